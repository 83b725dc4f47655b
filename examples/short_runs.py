"""Training and sampling of minutes, for data of any shape."""

import argparse
import pathlib

from ml_collections import ConfigDict

from score_lib.base.memory import keep_freed_memory
from score_lib.disk.logs import log_to_console


def workdir_of(description: str, default: str) -> pathlib.Path:
    """The folder that `--workdir` names; messages go to the console from here on.

    Args:
        description: text of `--help`.
        default: the folder without that option.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workdir", default=default, help="folder of the run")
    workdir = pathlib.Path(parser.parse_args().workdir)
    log_to_console()
    keep_freed_memory()
    return workdir


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
