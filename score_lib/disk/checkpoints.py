"""Checkpoints: written whole or not at all, read without running what they contain.

The CRC-32 of every record, which PyTorch writes and does not look at, is verified on reading.  A
file holds {"optimizer", "model", "ema", "step"}, with state dicts for the first three, and what
else a run keeps (plain values).  Published files have `module.` before each model key and a NumPy
scalar as learning rate.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import operator
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import torch

from score_lib.base.distributed import unwrapped
from score_lib.disk.files import atomic_write, keep_earlier, printable, with_earlier

# What reading damaged or foreign bytes as a checkpoint may raise.
_UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not one of this network; one sentence for people."""

    def __init__(self, message: str):
        super().__init__(printable(message, limit=1000))


class DamagedCheckpointError(CheckpointError):
    """A file cannot be read as a checkpoint of any network."""


def save_checkpoint(path: str | os.PathLike, state: dict, keep: int = 0) -> None:
    """Write a training state; a file of that name is replaced only by a complete one.

    Args:
        path: the file, such as `checkpoints/checkpoint_3.pth`.
        state: live objects with a `state_dict` method, and plain values.
        keep: how many earlier files of the name stay, as `checkpoint_3.1.pth` (the latest of
            them), `checkpoint_3.2.pth`, ...
    """
    write_contents(path, contents_of(state), keep)


def contents_of(state: dict) -> dict:
    """What a checkpoint holds of a training state: its tensors are the live ones."""
    contents = {
        key: value.state_dict() if hasattr(value, "state_dict") else value
        for key, value in state.items()
    }
    contents["model"] = _without_wrapper(contents["model"])
    return contents


def write_contents(path: str | os.PathLike, contents: dict, keep: int = 0) -> None:
    """Write what `contents_of` gave, see `save_checkpoint`."""
    keep_earlier(path, keep)
    with atomic_write(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # PyTorch's writer covers the error of a full disk with one of its own.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def latest_whole(path: str | os.PathLike) -> pathlib.Path | None:
    """The latest undamaged file among a checkpoint and its kept predecessors; None if none exists.

    Those that are damaged are passed over with a warning.

    Raises:
        CheckpointError: all of them are damaged.
    """
    found = [candidate for candidate in with_earlier(path) if candidate.is_file()]
    for candidate in found:
        try:
            read_checkpoint(candidate, "meta")
        except DamagedCheckpointError as error:
            logging.warning("passed over: %s", error)
        else:
            return candidate
    if found:
        raise CheckpointError(
            f"{path} and what was kept of its predecessors are all damaged ({len(found)} files): "
            "move them away to start from scratch"
        )
    return None


def restore_checkpoint(
    path: str | os.PathLike, state: dict, device: torch.device | str, *, must_exist: bool = False
) -> dict:
    """Load a checkpoint, a run's own or a published one, into a training state.

    Model keys, shapes and the averaged parameters must match exactly.  Nothing in `state` changes
    unless all of it does.

    Args:
        path: the file.
        state: live "model" and "ema", perhaps "optimizer" and "step"; changed in place.
        device: where the file's tensors are loaded before they are copied.
        must_exist: raise if there is no such file; otherwise that is logged, and the state
            returned as it is, which is how a training run starts.
    Returns:
        The state.
    Raises:
        FileNotFoundError: there is no such file and `must_exist` is set.
        CheckpointError: the file is damaged, not a checkpoint, or of another network.
    """
    path = pathlib.Path(path)
    if not path.exists() and not must_exist:
        logging.info("there is no checkpoint at %s: starting from scratch", path)
        return state
    loaded = read_checkpoint(path, device)
    _check_model(path, _without_wrapper(loaded["model"]), state["model"])
    if "optimizer" in state:
        _check_optimizer(path, loaded, state["optimizer"])
    counters = {key: _count(path, loaded, key) for key in ("step", "position") if key in loaded}
    _check_average(path, loaded["ema"], state["ema"])
    try:
        state["ema"].load_state_dict(loaded["ema"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {error}") from error
    unwrapped(state["model"]).load_state_dict(_without_wrapper(loaded["model"]))
    if "optimizer" in state:
        state["optimizer"].load_state_dict(_with_plain_numbers(loaded["optimizer"]))
    for key in (state.keys() - {"model", "ema", "optimizer"}) & loaded.keys():
        state[key] = counters.get(key, loaded[key])
    return state


def read_checkpoint(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict:
    """The contents of a checkpoint file, without running any code that it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or not a checkpoint.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: train first, or set eval.checkpoint to a file"
        )
    try:
        verify_records(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            loaded = torch.load(path, map_location=device, weights_only=True)
    except (*_UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the start
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete, or holds objects "
            f"other than tensors and plain values ({reason})"
        ) from error
    if not isinstance(loaded, dict) or not {"model", "ema", "step"} <= loaded.keys():
        found = sorted(map(str, loaded))[:8] if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint: it should hold 'model', 'ema' and 'step', not {found}"
        )
    if not isinstance(loaded.get("config", ""), str):
        raise CheckpointError(f"{path} holds a config that is no text")
    return loaded


def verify_records(path: str | os.PathLike) -> None:
    """Compare every record with its CRC-32; files of PyTorch before 1.6 have neither.

    Raises:
        zipfile.BadZipFile, ValueError: names the record.
        OSError: the file cannot be read, or (EINVAL) sends the reader to a place before its start.
    """
    _refuse_buffers(path)
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":
                raise ValueError("its list of records is missing: it is cut off")
        return
    with zipfile.ZipFile(path) as file:
        if sum(record.file_size for record in file.infolist()) > os.path.getsize(path):
            raise ValueError("its records claim more bytes than there are")
        for record in file.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the record {record.filename} is compressed")
        if (bad := file.testzip()) is not None:
            raise ValueError(f"the record {bad} does not have its checksum")


def _refuse_buffers(path: str | os.PathLike) -> None:
    """Refuse the one call that `weights_only=True` allows and that takes any amount of memory."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents,
    ):
        if contents.find(b"\nbytearray\n") >= 0:
            raise ValueError("it holds a bytearray")


def _numpy_scalars() -> list:
    """What a NumPy scalar in a checkpoint is made of, under its names in old and new NumPy."""
    return [
        (_numpy_scalar, "numpy.core.multiarray.scalar"),
        (_numpy_scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
    ]


def _numpy_scalar(dtype: np.dtype, data: bytes = b"") -> np.generic:
    """A NumPy number, and nothing else: other types can take any amount of memory."""
    if dtype.kind not in "biufc" or len(data) != dtype.itemsize:
        raise ValueError(f"a NumPy scalar of {dtype} and {len(data)} bytes is no number")
    return np.frombuffer(data, dtype)[0]


def _without_wrapper(weights: dict) -> dict:
    """A model's state dict without the prefix that wrappers for several devices put first."""
    if not isinstance(weights, dict) or not weights:
        return weights
    if all(isinstance(key, str) and key.startswith("module.") for key in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _check_model(path, loaded, model) -> None:
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
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if said:
        raise CheckpointError(
            f"{path} does not fit this network: of its weights, {'; '.join(said)}. Is the config "
            "the one that the checkpoint was trained with?"
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


def _described(value: object) -> str:
    """A value for messages: its shape, and its type where that says more."""
    if not isinstance(value, torch.Tensor):
        return f"({type(value).__name__})"
    special = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    kind = "" if special == "strided" else f" {special}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{kind}"


def _is_like(value: object, default: object) -> bool:
    """Whether a setting is a number, numbers or a switch, as its default is."""
    if isinstance(default, tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(default)
            and all(map(_is_number, value))
        )
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    return _is_number(value)


def _count(path, loaded: dict, key: str) -> int:
    """A number of steps or images: from 0 up."""
    try:
        count = operator.index(loaded[key])
    except (TypeError, ValueError, RuntimeError):
        count = -1
    if not 0 <= count < 2**63:
        shown = printable(repr(loaded[key]), 60)
        raise CheckpointError(f"{path} holds {key!r} = {shown}, which should be a number from 0 up")
    return count


def _check_average(path, loaded, ema) -> None:
    """The numbers and types of a moving average; it looks at the shapes itself."""
    if not isinstance(loaded, dict) or not isinstance(loaded.get("shadow_params"), list | tuple):
        raise CheckpointError(f"{path} holds no averages: its 'ema' has no list 'shadow_params'")
    for number, (value, own) in enumerate(
        zip(loaded["shadow_params"], ema.shadow_params, strict=False)
    ):
        if not _fits(value, own):
            raise CheckpointError(
                f"{path} does not fit this network: averaged parameter {number} is "
                f"{_described(value)} instead of {_described(own)}"
            )
    decay, updates = loaded.get("decay"), loaded.get("num_updates")
    if not _is_number(decay) or not 0 <= decay <= 1:
        raise CheckpointError(f"{path} holds a moving average with the decay {decay!r}")
    if updates is not None and (type(updates) is not int or updates < 0):
        raise CheckpointError(f"{path} holds a moving average of {updates!r} updates")


def _check_optimizer(path, loaded, optimizer) -> None:
    stored = loaded.get("optimizer", {"param_groups": []})
    groups = stored.get("param_groups") if isinstance(stored, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError(f"{path} holds an optimiser that has no groups of parameters")
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
    numbers = [number for group in groups for number in group["params"]]
    if set(map(type, numbers)) - {int} or len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{path} holds an optimiser that does not number its parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_moments(path, stored.get("state"), dict(zip(numbers, parameters, strict=True)))


def _check_moments(path, state, parameters: dict[int, torch.Tensor]) -> None:
    """What an optimiser keeps of each parameter: tensors of its shape, and single numbers."""
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


def _with_plain_numbers(optimizer: dict) -> dict:
    """An optimiser's state dict whose settings are Python numbers."""
    groups = [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in g.items()}
        for g in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}
