"""Options that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_CHAIN_PREDICTORS = ("ancestral_sampling", "reverse_diffusion")
_CHAIN_CORRECTORS = ("ald", "langevin", "langevin_per_sample")

Options = Mapping[str, object]


def conflicts(flat: Options) -> Iterator[str]:
    """Messages about options that are right alone, but not together.

    Args:
        flat: all options that an experiment needs, by their dotted names.
    """
    for find in (_classifier, _batches, _frequencies, _time_grid, _few_steps):
        yield from find(flat)


def _classifier(flat: Options) -> Iterator[str]:
    if flat["training.objective"] != "classifier":
        return
    if flat["data.num_classes"] < 2:
        yield (
            f"data.num_classes = {flat['data.num_classes']} should be the number of classes that "
            "a classifier tells apart, at least 2"
        )
    for key in ("training.snapshot_sampling", "eval.enable_bpd", "eval.enable_sampling"):
        if flat[key]:
            yield f"{key} = True needs a score network, and training.objective = 'classifier'"


def _batches(flat: Options) -> Iterator[str]:
    parts, batch_size = flat["training.grad_accumulation"], flat["training.batch_size"]
    if parts > batch_size:
        yield (
            f"training.grad_accumulation = {parts} should be at most training.batch_size = "
            f"{batch_size}: it is the number of parts of a batch"
        )


def _frequencies(flat: Options) -> Iterator[str]:
    at_once = flat["training.n_jitted_steps"]
    for name in ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"):
        if (frequency := flat[f"training.{name}"]) % at_once:
            yield (
                f"training.{name} = {frequency} should be a multiple of "
                f"training.n_jitted_steps = {at_once}"
            )


def _time_grid(flat: Options) -> Iterator[str]:
    method, grid = flat["sampling.method"].lower(), flat["sampling.time_grid"]
    if grid and method in ("ode", "adaptive"):
        yield (
            f"sampling.time_grid = {grid!r} should be '' with sampling.method = {method!r}, "
            "which chooses its steps as it goes"
        )


def _few_steps(flat: Options) -> Iterator[str]:
    """In a chain of N steps beta_max / N is a variance, below 1, and N must be larger."""
    steps, beta_max = flat["model.num_scales"], flat["model.beta_max"]
    has_betas = flat["training.sde"].lower() in ("vpsde", "subvpsde")
    if has_betas and _uses_chain(flat) and steps <= beta_max:
        yield (
            f"model.num_scales = {steps} steps are too few: the discrete process needs more than "
            f"model.beta_max = {beta_max} of them. Raise model.num_scales, or sample with the "
            "euler_maruyama predictor and no corrector"
        )


def _uses_chain(flat: Options) -> bool:
    """Whether the variances of the chain's N = `model.num_scales` steps are used."""
    if not flat["training.continuous"]:
        return True
    if flat["sampling.method"].lower() != "pc":
        return False
    # Correctors read them at any time, predictors only where they make the steps of the chain.
    published = flat["sampling.num_steps"] in (0, flat["model.num_scales"])
    chain = published and flat["sampling.time_grid"] in ("", "uniform")
    predictor, corrector = flat["sampling.predictor"].lower(), flat["sampling.corrector"].lower()
    return corrector in _CHAIN_CORRECTORS or (chain and predictor in _CHAIN_PREDICTORS)
