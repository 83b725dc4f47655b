"""Checkpoints: written whole or not at all, verified once when they are loaded.

A file holds {"optimizer", "model", "ema", "step"}, with state dicts for the first three, and the
other plain values of a run.  As in published files, `module.` is before each model key; those also
have a NumPy scalar as learning rate.
"""

import contextlib
import copy
import errno
import itertools
import json
import logging
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from score_lib.base.devices import resolve_device
from score_lib.base.distributed import agreed, on_main, unwrapped
from score_lib.base.weights import as_published, without_wrapper
from score_lib.disk.files import atomic_write, set_aside, with_earlier
from score_lib.disk.fit import CheckpointError, check_fit, check_weights, count
from score_lib.disk.records import foreign_kind, load_verified
from score_lib.disk.safetensors_files import read_safetensors

# Errors that damaged or foreign bytes may raise when they are read as a checkpoint.
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


# Values in the metadata of our safetensors files: as they are, and as JSON.
_TEXTS, _AS_JSON = ("config", "average"), ("step", "class_to_idx", "standardization")
# Switches of an optimiser that are the program's own; of the last two there is one value here.
_OF_THE_PROGRAM = ("foreach", "fused", "capturable", "differentiable")
_OF_THE_PROGRAM += ("maximize", "decoupled_weight_decay")
# Values of a state that a file replaces.
_PLAIN = (int, float, str, bytes, list, tuple, dict, type(None), np.generic, torch.Tensor)


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
    """The contents of a checkpoint of a training state; its tensors are the live ones."""
    state = {**state, "model": unwrapped(state["model"])}
    contents = {
        key: value.state_dict() if hasattr(value, "state_dict") else value
        for key, value in state.items()
    }
    return {**contents, "model": as_published(contents["model"])}


def write_contents(path: str | os.PathLike, contents: dict, keep: int = 0) -> None:
    """Write the result of `contents_of`, see `save_checkpoint`."""
    with atomic_write(path, keep=keep) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:
            # PyTorch's writer covers the error of a full disk with one of its own.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def restore_checkpoint(
    path: str | os.PathLike, state: dict, device: torch.device | str, *, must_exist: bool = False
) -> dict:
    """Load a checkpoint, a run's own or a published one, into a training state; returns the state.

    Model keys, shapes and the averaged parameters must match exactly.  Nothing in `state` changes
    unless all of it does.  Without an "optimizer" in the state, a file of weights alone will do:
    they then serve as their own average.

    Args:
        path: the file.
        state: live "model" and "ema", perhaps "optimizer", "step" and more; changed in place.
            Objects with `load_state_dict` load, and plain values are replaced.
        device: where the file's tensors are loaded before they are copied; "auto" is a GPU where
            there is one.
        must_exist: raise if there is no such file; otherwise log that and return the state
            unchanged, as a training run starts.
    Raises:
        FileNotFoundError: there is no such file and `must_exist` is set.
        CheckpointError: the file is damaged, not a checkpoint, or of another network.
    """
    path = pathlib.Path(path)
    if not path.exists() and not must_exist:
        logging.info("there is no checkpoint at %s: starting from scratch", path)
        return state
    return restore_contents(path, read_checkpoint(path, device, mapped=True), state)


def restore_latest(
    path: str | os.PathLike,
    state: dict,
    device: torch.device | str,
    *,
    must_exist: bool = False,
    check: Callable[[pathlib.Path, dict], None] = lambda path, contents: None,
) -> pathlib.Path:
    """`restore_checkpoint` from the latest undamaged file: the path itself or a kept predecessor.

    Damaged files are skipped with a warning.  Of several processes, rank 0 chooses the file, and
    calls `check` with it and its contents before any state changes.

    Returns:
        the file, or the path if there is none.
    Raises:
        FileNotFoundError: there is no file and `must_exist` is set.
        CheckpointError: all files are damaged, or the latest is of another network.
        ValueError: processes have read different ones.
    """
    contents: dict | None = None

    def choose() -> pathlib.Path:
        nonlocal contents
        chosen, contents = read_latest(path, device, mapped=True) or (pathlib.Path(path), None)
        if contents is not None:
            check(chosen, contents)
        return chosen

    chosen = on_main(choose)
    if contents is None:
        restore_checkpoint(chosen, state, device, must_exist=must_exist)
    else:
        restore_contents(chosen, contents, state)
    agreed(state.get("step"), f"steps of the state at {chosen}")  # or they would be averaged
    return chosen


def set_damaged_aside(path: str | os.PathLike, restored: pathlib.Path) -> None:
    """Set a checkpoint and its predecessors aside, up to the one that was restored.

    They would take the place of good ones as predecessors of the next checkpoint.  No other process
    may be using these files.
    """
    for damaged in itertools.takewhile(lambda candidate: candidate != restored, with_earlier(path)):
        if damaged.is_file():
            set_aside(damaged, "damaged")


def read_latest(
    path: str | os.PathLike, device: torch.device | str = "cpu", *, mapped: bool = False
) -> tuple[pathlib.Path, dict] | None:
    """The latest undamaged file among a checkpoint and its kept predecessors, and its contents.

    Returns:
        None if there is no file.
    Raises:
        CheckpointError: all of them are damaged.
    """
    found = [candidate for candidate in with_earlier(path) if candidate.is_file()]
    for candidate in found:
        try:
            return candidate, read_checkpoint(candidate, device, mapped=mapped)
        except DamagedCheckpointError as error:
            logging.warning("skipped: %s", error)
    if found:
        raise CheckpointError(
            f"{path} and its kept predecessors are all damaged ({len(found)} files): move them "
            "away to start from scratch"
        )
    return None


def restore_contents(path: str | os.PathLike, loaded: dict, state: dict) -> dict:
    """Copy the contents of a checkpoint, see `read_checkpoint`, into a state; returns the state.

    Args:
        path: for messages.
    Raises:
        CheckpointError: they do not fit; the state is unchanged.
    """
    # Averages that are not in the file begin anew, see `Averages.fresh`.
    loaded = {"averages": {}, **_completed(path, loaded, state)}
    counters = {key: count(path, loaded, key) for key in ("step", "position") if key in loaded}
    check_fit(path, loaded, state)
    others = {key: v for key, v in state.items() if key not in ("model", "ema", "optimizer")}
    live = {key: value for key, value in others.items() if not isinstance(value, _PLAIN)}
    with ThreadPoolExecutor(1) as other, _one_thread(), _loaded(path, live, loaded):
        if "optimizer" in state:  # copied beside the rest
            owned = other.submit(_owned_optimizer, loaded["optimizer"], state["optimizer"])
        try:
            state["ema"].load_state_dict(loaded["ema"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not fit this network: {error}") from error
        unwrapped(state["model"]).load_state_dict(loaded["model"])
        if "optimizer" in state:
            state["optimizer"].load_state_dict(owned.result())
    plain = (others.keys() - live.keys()) & loaded.keys()
    state |= {key: counters.get(key, loaded[key]) for key in plain}
    return state


def _completed(path: str | os.PathLike, loaded: dict, state: dict) -> dict:
    """Contents with the network's own names for weights, and with all that weights alone lack.

    Raises:
        CheckpointError: something is missing to resume training, or the weights do not fit.
    """
    model = unwrapped(state["model"])
    if isinstance(loaded["model"], dict):
        loaded = {**loaded, "model": without_wrapper(loaded["model"], model.state_dict())}
    needed = ["ema", "step"] + ["optimizer"] * ("optimizer" in state)
    missing = " and no ".join(repr(key) for key in needed if key not in loaded)
    if missing and "optimizer" in state:
        raise CheckpointError(
            f"{path} holds no {missing}, so that training cannot resume from it: it can be "
            "evaluated and sampled from, as eval.checkpoint. Move it away to start from scratch"
        )
    check_weights(path, loaded["model"], model)
    if not missing:
        return loaded
    # Exports of ours hold the average, and say of which step.
    level = logging.INFO if {"config", "step"} <= loaded.keys() else logging.WARNING
    logging.log(
        level, "%s holds no %s: %sits step counts as %s", path, missing,
        "" if "ema" in loaded else "the weights serve as their own average, and ",
        loaded.get("step", 0),
    )  # fmt: skip
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    averages = {"shadow_params": [loaded["model"][name] for name in trained]}
    return {"ema": {**state["ema"].state_dict(), **averages}, "step": 0, **loaded}


@contextlib.contextmanager
def _loaded(path: str | os.PathLike, live: dict, loaded: dict) -> Iterator[None]:
    """Context in which live objects, such as schedulers, are loaded; an error in it undoes that."""
    loading = {key: value for key, value in live.items() if hasattr(value, "load_state_dict")}
    for key in (live.keys() & loaded.keys()) ^ loading.keys():
        logging.warning("%r stays as it is: %s has no state of it, or it loads none", key, path)
    live = {key: value for key, value in loading.items() if key in loaded}
    before = {key: copy.deepcopy(value.state_dict()) for key, value in live.items()}
    try:
        for key, value in live.items():
            restore_part(path, value, loaded[key], key)
        yield
    except BaseException:
        for key, value in live.items():
            value.load_state_dict(before[key])
        raise


def restore_part(path: str | os.PathLike, live: Any, stored: object, key: str) -> None:
    """Load a copy of a stored part of a state, which a file may hold in any form.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        live.load_state_dict(copy.deepcopy(stored))
    except (*_UNREADABLE, NotImplementedError) as error:
        raise CheckpointError(f"{path} holds a {key!r} that does not fit: {error}") from error


def read_checkpoint(
    path: str | os.PathLike, device: torch.device | str = "cpu", *, mapped: bool = False
) -> dict:
    """The contents of a checkpoint file, without running any code that it may hold.

    Args:
        mapped: see `load_verified`.
    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or not a checkpoint.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: train first, or set eval.checkpoint to a file"
        )
    return contents_of_file(path, read_plain(path, device, mapped=mapped))


def glance(path: str | os.PathLike) -> dict:
    """The plain values of a checkpoint, in a moment: its tensors are neither read nor verified.

    {} where there is no such file, or one that is damaged or no checkpoint.
    """
    try:
        contents = contents_of_file(path, load_verified(path, mapped=True, tensors=False))
    except (*_UNREADABLE, OSError):
        return {}
    parts = ("model", "ema", "optimizer", "averages")
    return {key: value for key, value in contents.items() if key not in parts}


def contents_of_file(path: str | os.PathLike, loaded: object) -> dict:
    """The contents of a file, see `read_plain`, as those of a checkpoint.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    if _are_weights(loaded):
        loaded = {"model": loaded}
    if not isinstance(loaded, dict) or "model" not in loaded:
        found = sorted(map(str, loaded))[:8] if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"{path} is not a checkpoint: it should hold 'model', 'ema' and 'step', or weights "
            f"alone, not {found}"
        )
    if not isinstance(loaded.get("config", ""), str):
        raise CheckpointError(f"{path} holds a config that is not text")
    classes = loaded.get("class_to_idx", {})
    if not isinstance(classes, dict) or not all(isinstance(v, int) for v in classes.values()):
        raise CheckpointError(f"{path} holds a class_to_idx that is no table of names and labels")
    return loaded


def read_plain(
    path: str | os.PathLike, device: torch.device | str = "cpu", *, mapped: bool = False
) -> Any:
    """The tensors and plain values in a file, see `read_checkpoint`.

    Of a safetensors file, they are those of a checkpoint of weights alone.

    Raises:
        CheckpointError: the file is damaged, or holds other objects.
    """
    where = resolve_device(device)
    if pathlib.Path(path).suffix == ".safetensors":
        return from_safetensors(path, *read_safetensors(path, where))
    try:
        return load_verified(path, where, mapped=mapped)
    except (*_UNREADABLE, OSError) as error:
        # EINVAL: the file sends the reader to a place before its start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        if kind := foreign_kind(path):
            raise DamagedCheckpointError(
                f"{path} cannot be read as a checkpoint: it is {kind}"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete, or holds objects "
            f"other than tensors and plain values ({reason})"
        ) from error


def safetensors_metadata(contents: dict) -> dict[str, str]:
    """The metadata of a checkpoint in a safetensors file, see `from_safetensors`."""
    found = {key: contents[key] for key in _TEXTS if key in contents}
    values = {key: contents[key] for key in _AS_JSON if key in contents}
    return found | {k: json.dumps(v, default=torch.Tensor.tolist) for k, v in values.items()}


def from_safetensors(path: str | os.PathLike, weights: dict, metadata: dict[str, str]) -> dict:
    """Weights and metadata of a safetensors file as a checkpoint's contents.

    Raises:
        CheckpointError: the metadata of ours are damaged.
    """
    contents = {"model": weights}
    contents |= {key: metadata[key] for key in _TEXTS if key in metadata}
    try:
        contents |= {key: json.loads(metadata[key]) for key in _AS_JSON if key in metadata}
        if "standardization" in contents:
            contents["standardization"] |= {
                name: torch.tensor(contents["standardization"][name], dtype=torch.float64)
                for name in ("mean", "std")
            }
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path} has metadata that cannot be read: {error}") from error
    return contents


def _are_weights(loaded: object) -> bool:
    """Whether the contents of a file are a network's state dict."""
    return isinstance(loaded, dict) and bool(loaded) and all(map(torch.is_tensor, loaded.values()))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Context for many small copies: threads would spend more time waiting than copying."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _owned_optimizer(stored: dict, live: torch.optim.Optimizer) -> dict:
    """An optimiser's state dict to take over: settings as Python numbers, tensors in memory.

    The program's own switches stay: the file may be of another machine or another program.
    """
    groups = [
        {key: _as_number(value) for key, value in group.items()}
        | {key: own[key] for key in _OF_THE_PROGRAM if key in own}
        for group, own in zip(stored["param_groups"], live.param_groups, strict=True)
    ]
    state = {
        number: {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in kept.items()
        }
        for number, kept in stored["state"].items()
    }
    return {**stored, "param_groups": groups, "state": state}


def _as_number(value: object) -> object:
    """A setting with numbers of Python's own in place of arrays and tensors of one number."""
    if isinstance(value, np.generic | torch.Tensor):
        return value.item()
    return tuple(map(_as_number, value)) if isinstance(value, tuple) else value
