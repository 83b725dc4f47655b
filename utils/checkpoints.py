"""Checkpoints: written whole or not at all, read without running what they contain.

A file holds {"optimizer", "model", "ema", "step"}, with state dicts for the first three, and what
else a run keeps (plain values).  Published files have `module.` before each model key and a NumPy
scalar as learning rate.
"""

from __future__ import annotations

import logging
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import torch

from utils.files import atomic_write

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
    """A file is not a checkpoint, or not one of this network."""


def save_checkpoint(path: str | os.PathLike, state: dict) -> None:
    """Write a training state; a file of that name is replaced only by a complete one.

    Args:
        path: the file, such as `checkpoints/checkpoint_3.pth`.
        state: live objects with a `state_dict` method, and plain values.
    """
    contents = {
        key: value.state_dict() if hasattr(value, "state_dict") else value
        for key, value in state.items()
    }
    contents["model"] = _without_wrapper(contents["model"])
    with atomic_write(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # PyTorch's writer covers the error of a full disk with one of its own.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


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
    try:
        state["ema"].load_state_dict(loaded["ema"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {error}") from error
    _unwrapped(state["model"]).load_state_dict(_without_wrapper(loaded["model"]))
    if "optimizer" in state:
        state["optimizer"].load_state_dict(_with_plain_numbers(loaded["optimizer"]))
    for key in (state.keys() - {"model", "ema", "optimizer"}) & loaded.keys():
        state[key] = int(loaded[key]) if key == "step" else loaded[key]
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
        with torch.serialization.safe_globals(_numpy_scalars()):
            loaded = torch.load(path, map_location=device, weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete, or holds objects "
            f"other than tensors and plain values ({reason})"
        ) from error
    if not isinstance(loaded, dict) or not {"model", "ema", "step"} <= loaded.keys():
        found = sorted(map(str, loaded))[:8] if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint: it should hold 'model', 'ema' and 'step', not {found}"
        )
    return loaded


def _numpy_scalars() -> list:
    """What a NumPy scalar in a checkpoint is made of, under its names in old and new NumPy."""
    scalar = np._core.multiarray.scalar
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
    ]


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The network inside a wrapper for several devices."""
    return model.module if hasattr(model, "module") else model


def _without_wrapper(weights: dict) -> dict:
    """A model's state dict without the prefix that wrappers for several devices put first."""
    if isinstance(weights, dict) and weights and all(k.startswith("module.") for k in weights):
        return {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _check_model(path, loaded, model) -> None:
    expected = _unwrapped(model).state_dict()
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no weights: its 'model' is a {type(loaded).__name__}")
    problems = {
        "missing": [key for key in expected if key not in loaded],
        "not in the network": [key for key in loaded if key not in expected],
        "of another shape": [
            f"{key} {tuple(loaded[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in loaded and loaded[key].shape != value.shape
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


def _check_optimizer(path, loaded, optimizer) -> None:
    groups = loaded.get("optimizer", {}).get("param_groups", [])
    have = [len(group["params"]) for group in groups]
    want = [len(group["params"]) for group in optimizer.param_groups]
    if have != want:
        raise CheckpointError(
            f"{path} holds an optimiser of {sum(have)} parameters in {len(have)} groups; this "
            f"network's has {sum(want)} in {len(want)}"
        )


def _with_plain_numbers(optimizer: dict) -> dict:
    """An optimiser's state dict whose settings are Python numbers."""
    groups = [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in g.items()}
        for g in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}
