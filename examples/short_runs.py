"""Training and sampling of minutes, for data of any shape."""

from ml_collections import ConfigDict


def set_short_run(config: ConfigDict, *, steps: int, sampling_steps: int) -> None:
    """Train as in EDM, with which few steps are enough, and save one checkpoint at the end.

    Args:
        steps: of training.
        sampling_steps: of the configured sampler.
    """
    config.model.update(parametrization="edm", embedding_type="fourier", fourier_log=False)
    config.training.update(noise_levels="lognormal", weighting="output")
    config.training.update(n_iters=steps, snapshot_freq=steps, snapshot_sampling=False)
    config.sampling.num_steps = sampling_steps
