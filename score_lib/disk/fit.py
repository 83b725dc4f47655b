"""Whether the contents of a checkpoint fit a training state: names, shapes and types."""

import math
from operator import index

import numpy as np
import torch
from torch import nn

from score_lib.base.distributed import unwrapped
from score_lib.disk.files import printable

# The state that Adam keeps of a parameter.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not one of this network; the message is one sentence."""

    def __init__(self, message: str):
        super().__init__(printable(message, limit=1000))


def check_fit(path, loaded: dict, state: dict) -> None:
    """Refuse contents that a state cannot take over, beside the weights, see `check_weights`.

    Args:
        path: for messages.
        loaded: contents of the file.
        state: live "ema", perhaps "optimizer" and "averages".
    Raises:
        CheckpointError: names the first mismatch.
    """
    if "optimizer" in state:
        _check_optimizer(path, loaded.get("optimizer", {"param_groups": []}), state["optimizer"])
    check_average(path, loaded["ema"], state["ema"])
    stored = loaded.get("averages", {})
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds 'averages' that are no table of names and averages")
    live = getattr(state.get("averages"), "named", {})
    for name in live.keys() & stored.keys():
        check_average(path, stored[name], live[name])


def count(path, loaded: dict, key: str) -> int:
    """A number of steps or images in a file.

    Raises:
        CheckpointError: it is not an integer from 0 up.
    """
    number = _whole(loaded[key])
    if not 0 <= number < 2**63:
        shown = printable(repr(loaded[key]), 60)
        raise CheckpointError(f"{path} holds {key!r} = {shown}, which should be a number from 0 up")
    return number


def _whole(value: object) -> int:
    """A whole number of Python, of NumPy or in a tensor, also as 5.0; -1 for all else."""
    try:
        plain = value.item() if isinstance(value, np.generic | torch.Tensor) else value
        return int(plain) if isinstance(plain, float) and plain == int(plain) else index(plain)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return -1


def check_weights(
    path,
    loaded: object,
    model: nn.Module,
    hint: str = "Is the config the one that the checkpoint was trained with?",
) -> None:
    """Refuse weights that are not exactly those of a network, not finite, or of other noise levels.

    Args:
        hint: the last sentence of the message.
    Raises:
        CheckpointError: names the first mismatch.
    """
    expected = unwrapped(model).state_dict()
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no weights: its 'model' is a {type(loaded).__name__}")
    problems = {
        "missing": [key for key in expected if key not in loaded],
        "not in the network": [str(key) for key in loaded if key not in expected],
        "of another shape": [
            f"{key} {_described(loaded[key])} instead of {_described(value)}"
            for key, value in expected.items()
            if key in loaded and not _fits(loaded[key], value)
        ],
    }
    found = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{path} does not fit this network: of its weights, {'; '.join(found)}. {hint}"
        )
    for name, _ in unwrapped(model).named_parameters():  # a mask in a table may hold inf
        _check_finite(path, repr(name), loaded[name])
    if getattr(unwrapped(model), "uses_sigmas", False) and "sigmas" in expected:
        _check_sigmas(path, loaded["sigmas"], expected["sigmas"], hint)


def is_finite(value: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither nan nor inf."""
    if not value.numel():
        return True
    # Types of 8 bits can do little themselves.
    value = value.float() if value.element_size() == 1 else value
    # The extremes are nan where a value is: one pass, as fast as memory is read.
    return bool(torch.stack(value.aminmax()).isfinite().all())


def _check_finite(path, name: str, value: torch.Tensor) -> None:
    if value.is_floating_point() and not is_finite(value):
        raise CheckpointError(
            f"{path} holds nan or inf in {name}: its training diverged, or the file is damaged"
        )


def _check_sigmas(path, stored: torch.Tensor, own: torch.Tensor, hint: str) -> None:
    """Refuse noise levels (N,), falling, that are not a network's own up to rounding."""
    # Published tables were computed in float32, and weights may be halved.
    tolerance = max(1e-3, torch.finfo(stored.dtype).eps)
    there, here = (table.double().cpu() for table in (stored, own))
    if torch.allclose(there, here, rtol=tolerance, atol=0):
        return
    ends = {"model.sigma_max": 0, "model.sigma_min": -1}
    differing = [
        f"{name} = {there[end]:.6g} there and {here[end]:.6g} in the config"
        for name, end in ends.items()
        if not math.isclose(there[end], here[end], rel_tol=tolerance)
    ]
    shape = "its table 'sigmas' has other levels between model.sigma_max and model.sigma_min"
    raise CheckpointError(
        f"{path} was trained with other noise levels: {'; '.join(differing) or shape}. {hint}"
    )


def check_average(path, loaded: object, ema) -> None:
    """Refuse other values than a moving average's state; `load_state_dict` compares their number.

    Raises:
        CheckpointError: names the first mismatch.
    """
    if not isinstance(loaded, dict) or not isinstance(loaded.get("shadow_params"), list | tuple):
        raise CheckpointError(f"{path} holds no averages: its 'ema' has no list 'shadow_params'")
    _check_averaged(path, loaded["shadow_params"], ema)
    decay, updates = loaded.get("decay"), loaded.get("num_updates")
    if not _is_number(decay) or not 0 <= decay <= 1:
        raise CheckpointError(f"{path} holds a moving average with the decay {decay!r}")
    if updates is not None and _whole(updates) < 0:
        raise CheckpointError(f"{path} holds a moving average of {updates!r} updates")


def check_snapshot(path, averages: object, names: list[str], ema) -> None:
    """Refuse other values than these averages of the network, each a list of tensors.

    Raises:
        CheckpointError: names the first mismatch.
    """
    known = averages if isinstance(averages, dict) else {}
    for name in names:
        tensors, own = known.get(name), len(ema.shadow_params)
        if not isinstance(tensors, list):
            raise CheckpointError(f"{path} is not a snapshot: it holds no average {name!r}")
        if len(tensors) != own:
            raise CheckpointError(
                f"{path} is of another network: it averages {len(tensors)} parameters instead of "
                f"{own}"
            )
        _check_averaged(path, tensors, ema)


def _check_averaged(path, tensors: list, ema) -> None:
    for number, (value, own) in enumerate(zip(tensors, ema.shadow_params, strict=False)):
        if not _fits(value, own):
            raise CheckpointError(
                f"{path} does not fit this network: averaged parameter {number} is "
                f"{_described(value)} instead of {_described(own)}"
            )
        _check_finite(path, f"averaged parameter {number}", value)


def _check_optimizer(path, stored: object, optimizer: torch.optim.Optimizer) -> None:
    groups = stored.get("param_groups") if isinstance(stored, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError(f"{path} holds an optimiser without groups of parameters")
    have = [len(group["params"]) for group in groups]
    want = [len(group["params"]) for group in optimizer.param_groups]
    if have != want:
        raise CheckpointError(
            f"{path} holds an optimiser of {sum(have)} parameters in {len(have)} groups; this "
            f"network's has {sum(want)} in {len(want)}"
        )
    for group in groups:
        for name, default in optimizer.defaults.items():
            if name in group and not _is_like(group[name], default):
                raise CheckpointError(
                    f"{path} holds an optimiser with {name} = {printable(repr(group[name]), 60)}"
                )
    _check_kind(path, groups, stored.get("state"), optimizer)
    numbers = [number for group in groups for number in group["params"]]
    if set(map(type, numbers)) - {int} or len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{path} holds an optimiser that does not number its parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_moments(path, stored.get("state"), dict(zip(numbers, parameters, strict=True)))


def _check_kind(path, groups: list[dict], state: object, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what is of another kind of optimiser: it would fail at its next step."""
    defaults = optimizer.defaults.items()
    needed = {name for name, value in defaults if isinstance(value, float | tuple)}
    kept = state.values() if isinstance(state, dict) else ()
    moments = _MOMENTS if isinstance(optimizer, torch.optim.Adam) else set()
    other_state = any(isinstance(k, dict) and k and moments - k.keys() for k in kept)
    if other_state or any(needed - group.keys() for group in groups):
        raise CheckpointError(
            f"{path} holds the state of another optimiser than {type(optimizer).__name__}, so that "
            "training cannot resume from it: start from its weights, by model.weights"
        )


def _check_moments(path, state: object, parameters: dict[int, torch.Tensor]) -> None:
    """An optimiser's state of each parameter: tensors of its shape, and single numbers."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds an optimiser without its state")
    names = {repr(sorted(map(str, kept))) for kept in state.values() if isinstance(kept, dict)}
    if len(names) > 1:
        raise CheckpointError(f"{path} holds an optimiser whose state has gaps")
    for number, kept in state.items():
        own = parameters.get(number)
        if own is None or not isinstance(kept, dict):
            raise CheckpointError(f"{path} holds an optimiser's state of no parameter: {number!r}")
        for name, value in kept.items():
            is_single = _is_dense(value) and value.numel() == 1
            if not (_is_number(value) or is_single or _fits(value, own)):
                raise CheckpointError(
                    f"{path} holds {name!r} of parameter {number!r} as {_described(value)}, where "
                    f"the parameter is {_described(own)}"
                )


def _fits(value: object, expected: torch.Tensor) -> bool:
    """Whether a value from a file is a tensor like the expected one, of any precision."""
    return (
        _is_dense(value)
        and value.shape == expected.shape
        and value.is_floating_point() == expected.is_floating_point()
        and value.is_complex() == expected.is_complex()
    )


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
    )


def _is_number(value: object) -> bool:
    """Whether this is a finite number, of Python or of NumPy."""
    return isinstance(value, int | float | np.generic) and math.isfinite(value)


def _is_like(value: object, default: object) -> bool:
    """Whether a setting is a number, numbers or a switch, as its default is."""
    if isinstance(default, tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(default)
            and all(map(_is_like, value, default))
        )
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    # A rate that a compiled or captured step reads is a tensor.
    is_single = _is_dense(value) and value.numel() == 1 and value.is_floating_point()
    return _is_number(value) or (is_single and is_finite(value))


def _described(value: object) -> str:
    """A value for messages: its shape, and its type where that says more."""
    if not isinstance(value, torch.Tensor):
        return f"({type(value).__name__})"
    special = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    kind = "" if special == "strided" else f" {special}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{kind}"
