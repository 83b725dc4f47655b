"""What the values of a config have to be."""

from __future__ import annotations

import collections
import functools
import numbers
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.defaults import experiments, flatten, load

# What values have to be, and of which options.  Names, such as that of the network, are looked up
# where they are used.
_LIMITS = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "data.num_channels",
            "model.nf",
            "model.num_scales",
            "model.blocks_per_group",
            "model.channel_multiplier",
            "training.batch_size",
            "training.n_iters",
            "training.log_freq",
            "training.eval_freq",
            "training.snapshot_freq",
            "training.snapshot_freq_for_preemption",
            "training.n_jitted_steps",
            "training.grad_accumulation",
            "sampling.num_samples",
            "eval.batch_size",
            "eval.num_samples",
            "eval.bpd_num_repeats",
            "eval.loss_num_repeats",
            "eval.num_probes",
            "eval.accuracy_num_repeats",
            "control.num_images",
            "control.num_results",
            "control.factor",
            "control.iterations",
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            "data.image_width",
            "data.num_workers",
            "data.num_classes",
            "model.num_res_blocks",
            "optim.weight_decay",
            "optim.warmup",
            "sampling.n_steps_each",
            "sampling.num_steps",
            "sampling.snr",
            "sampling.churn",
            "eval.begin_ckpt",
            "eval.wait_minutes",
            "control.noise_std",
            "control.num_measurements",
            "control.strength",
            "control.guidance_scale",
        ),
    ),
    (
        "above 0",
        lambda value: value > 0,
        (
            "model.sigma_min",
            "model.beta_min",
            "optim.lr",
            "sampling.adaptive_rtol",
            "sampling.adaptive_atol",
            "control.blur_std",
            "control.data_std",
            "control.start_time",
            "control.guidance_until",
            "control.tolerance",
        ),
    ),
    (
        "at least 2",
        lambda value: value >= 2,
        ("eval.accuracy_num_levels", "control.num_interpolations"),
    ),
    (
        "'score' or 'classifier'",
        lambda value: value in ("score", "classifier"),
        ("training.objective",),
    ),
    (
        "'float32', 'tf32' or 'bfloat16'",
        lambda value: value in ("float32", "tf32", "bfloat16"),
        ("training.precision", "sampling.precision"),
    ),
    (
        "'default', 'reduce-overhead', 'max-autotune' or ''",
        lambda value: value in ("", "default", "reduce-overhead", "max-autotune"),
        ("training.compile", "sampling.compile"),
    ),
    ("from 0 to 9", lambda value: 0 <= value <= 9, ("training.keep_meta_checkpoints",)),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("model.dropout", "model.ema_rate")),
    ("from 0 to below 1", lambda value: 0 <= value < 1, ("optim.beta1",)),
    ("numbers from 1 up", lambda value: value and min(value) >= 1, ("model.ch_mult",)),
    (
        "a side of at least 1, or two of them",
        lambda value: value >= 1 if isinstance(value, int) else len(value) == 2 and min(value) >= 1,
        ("data.image_size",),
    ),
    ("'train' or 'test'", lambda value: value in ("train", "test"), ("eval.bpd_dataset",)),
    ("'train', 'test' or ''", lambda value: value in ("train", "test", ""), ("eval.dataset",)),
)

# Why a sampler takes no grid of times.
_WITHOUT_GRID = {
    "pc": "whose steps are those of the process's own chain",
    "ode": "which chooses its steps as it goes",
    "adaptive": "which chooses its steps as it goes",
}

_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "several numbers, such as (1, 2)",
}


def check_values(config: ConfigDict) -> None:
    """Find options that are missing, of a wrong type, out of range, or that exclude each other.

    Args:
        config: with the general options filled in, as by `complete`.
    Raises:
        ValueError: names them, and what would be right.
    """
    flat = flatten(config)
    # In this order: a text is in no range, and what goes together depends on what is in range.
    for problems in (_missing, _wrong_kinds, _out_of_range, _conflicts):
        if found := list(problems(flat)):
            raise ValueError("; ".join(found))


def _kind(value: object) -> type | None:
    """The Python type that stands for a value's kind; None for values that are not plain."""
    if isinstance(value, list | tuple):
        return tuple if all(isinstance(entry, numbers.Real) for entry in value) else None
    types = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}
    return next((kind for kind, type_ in types.items() if isinstance(value, type_)), None)


@functools.cache
def _known_kinds() -> dict[str, set[type | None]]:
    """Options by their dotted names, with the kinds of value that experiments give them."""
    kinds = collections.defaultdict(set)
    for name in experiments():
        for key, value in flatten(load(name)).items():
            kinds[key].add(_kind(value))
    return kinds


@functools.cache
def _in_every_experiment() -> frozenset[str]:
    always = frozenset.intersection(*(frozenset(flatten(load(name))) for name in experiments()))
    # A network of the user's own has options of its own.
    return frozenset(
        key
        for key in always
        if not key.startswith("model.") or key in ("model.name", "model.ema_rate")
    )


def _missing(flat: dict[str, object]) -> Iterator[str]:
    for key in sorted(_in_every_experiment() - flat.keys()):
        yield f"the config has no {key}, which every experiment needs"


def _wrong_kinds(flat: dict[str, object]) -> Iterator[str]:
    also = {"data.image_size": {tuple}}
    for key, value in flat.items():
        if key not in _known_kinds() or key == "device":  # which may be a torch.device
            continue
        right = _known_kinds()[key] | also.get(key, set())
        if _kind(value) not in (right | {int} if float in right else right):
            said = " or ".join(_KINDS[kind] for kind in _KINDS if kind in right)
            yield f"{key} = {value!r} should be {said}"


def _out_of_range(flat: dict[str, object]) -> Iterator[str]:
    for said, is_right, keys in _LIMITS:
        for key in keys:
            if key in flat and not is_right(flat[key]):
                yield f"{key} = {flat[key]!r} should be {said}"


def _conflicts(flat: dict[str, object]) -> Iterator[str]:
    if flat["training.objective"] == "classifier":
        if flat["data.num_classes"] < 2:
            yield (
                f"data.num_classes = {flat['data.num_classes']} should be the number of classes "
                "that a classifier tells apart"
            )
        for key in ("training.snapshot_sampling", "eval.enable_bpd", "eval.enable_sampling"):
            if flat[key]:
                yield f"{key} = True needs a score network, and training.objective = 'classifier'"
    parts, batch_size = flat["training.grad_accumulation"], flat["training.batch_size"]
    if parts > batch_size:
        yield (
            f"training.grad_accumulation = {parts} parts cannot be made of a batch of "
            f"training.batch_size = {batch_size}"
        )
    at_once = flat["training.n_jitted_steps"]
    for name in ("log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"):
        if (frequency := flat[f"training.{name}"]) % at_once:
            yield (
                f"training.{name} = {frequency} should be a multiple of "
                f"training.n_jitted_steps = {at_once}"
            )
    method, grid = flat["sampling.method"].lower(), flat["sampling.time_grid"]
    if grid and method in _WITHOUT_GRID:
        yield (
            f"sampling.time_grid = {grid!r} has no meaning for sampling.method = {method!r}, "
            f"{_WITHOUT_GRID[method]}"
        )
    # In a chain of N steps beta_max / N is a variance, and what is left of 1 divides.
    has_betas = flat["training.sde"].lower() in ("vpsde", "subvpsde")
    steps = flat["model.num_scales"]
    if flat["sampling.method"].lower() in ("pc", "ode"):  # others have grids of their own
        steps = flat["sampling.num_steps"] or steps
    if has_betas and _uses_chain(flat) and steps <= flat["model.beta_max"]:
        yield (
            f"{steps} steps are too few: there should be more than model.beta_max = "
            f"{flat['model.beta_max']} of them. Raise model.num_scales or sampling.num_steps, or "
            "sample with the euler_maruyama predictor and no corrector"
        )


def _uses_chain(flat: dict[str, object]) -> bool:
    """Whether training or sampling is in the steps of a discrete chain, and not those of an SDE."""
    predictor, corrector = flat["sampling.predictor"].lower(), flat["sampling.corrector"].lower()
    updates = predictor in ("ancestral_sampling", "reverse_diffusion") or corrector in (
        "ald",
        "langevin",
        "langevin_per_sample",
    )
    return not flat["training.continuous"] or (flat["sampling.method"].lower() == "pc" and updates)
