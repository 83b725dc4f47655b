"""Folders of Diffusers: a network, and perhaps a scheduler and an index of both.

    model_index.json                          list of the parts
    unet/config.json                          options of the network
    unet/diffusion_pytorch_model.safetensors  its weights, or .bin
    scheduler/scheduler_config.json

Those of 2022 hold the same files in one folder, and may say "model" for "unet".  Only files of
these names are opened, whatever the index says, and nothing in them is run.
"""

import json
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.disk.checkpoints import read_plain
from score_lib.disk.files import printable, write_text
from score_lib.disk.safetensors_files import read_safetensors, write_safetensors
from score_lib.exchange.errors import ExchangeError, shown, wrong_class, wrong_value
from score_lib.exchange.schedulers import PIPELINES

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_LARGEST_JSON = 1 << 20
_NETWORKS = ("unet", "model")  # names of the network in an index, and of its folder
_CONFIGS = [f"{name}/{_CONFIG}" for name in _NETWORKS]
_SCHEDULERS = [f"scheduler/{_SCHEDULER}", _SCHEDULER]


class Folder(NamedTuple):
    """The files of a model, and the contents of those that describe it.

    Attributes:
        config, scheduler, weights: paths; scheduler is None where there is none.
        pipeline: the class in the index; "" without one.
        network: contents of `config`.
        process: contents of `scheduler`, or None.
        versions: the library's version that each file names, by the file's name.
    """

    config: pathlib.Path
    scheduler: pathlib.Path | None
    weights: pathlib.Path
    pipeline: str
    network: dict
    process: dict | None
    versions: dict[str, str]


def open_folder(folder: str | os.PathLike) -> Folder:
    """Find the files of a folder and read those that describe the model.

    Raises:
        FileNotFoundError: there is no such folder.
        ExchangeError: something is missing, or is of another kind.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    index = _read_json(folder / _INDEX) if _is_file(folder / _INDEX) else {}
    _check_index(folder / _INDEX, index)
    config = _first(folder, [*_CONFIGS, _CONFIG])
    if config is None:
        raise ExchangeError(f"{folder} holds no unet/{_CONFIG} and no {_CONFIG}: no network there")
    names = [f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.bin"]
    weights = _first(config.parent, names)
    if weights is None:
        raise ExchangeError(
            f"{config.parent} holds no weights, {' or '.join(names)}; weights in parts or of "
            "another variant cannot be read"
        )
    scheduler = _first(folder, _SCHEDULERS)
    network = _read_json(config)
    process = None if scheduler is None else _read_json(scheduler)
    found = {folder / _INDEX: index, config: network, scheduler: process}
    versions = {
        path.name: printable(str(contents["_diffusers_version"]), 40)
        for path, contents in found.items()
        if contents and "_diffusers_version" in contents
    }
    pipeline = index.get("_class_name", "")
    return Folder(config, scheduler, weights, pipeline, network, process, versions)


def _check_index(path: pathlib.Path, index: Mapping[str, object]) -> None:
    """Refuse pipelines of other parts, and parts with code of their own."""
    pipeline = index.get("_class_name", "")
    if index and pipeline not in PIPELINES.values():
        raise wrong_class(path, pipeline, PIPELINES.values())
    for name, part in index.items():
        if name.startswith("_") or part in (None, [None, None]):
            continue
        if name not in (*_NETWORKS, "scheduler"):
            raise ExchangeError(f"{path} has a part {shown(name)}, which these pipelines have not")
        if not (isinstance(part, list) and len(part) == 2 and part[0] == "diffusers"):
            raise wrong_value(path, name, part, "a class of diffusers itself")


def _first(folder: pathlib.Path, names: list[str]) -> pathlib.Path | None:
    return next((folder / name for name in names if _is_file(folder / name)), None)


def _is_file(path: pathlib.Path) -> bool:
    """Whether there is a regular file; links may lead to it, as in the cache of the Hub.

    Raises:
        ExchangeError: links go round in a circle.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ExchangeError(f"{path} cannot be opened: {error.strerror}") from error


def _read_json(path: pathlib.Path) -> dict:
    """The table in a small file.

    Raises:
        ExchangeError: it is no table, or is larger than any such file.
    """
    with path.open("rb") as file:
        contents = file.read(_LARGEST_JSON + 1)
    if len(contents) > _LARGEST_JSON:
        raise ExchangeError(f"{path} is larger than {_LARGEST_JSON} bytes, so no such file")
    try:
        # With NaN and Infinity, which schedulers of other classes hold; no option here takes them.
        table = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise ExchangeError(f"{path} holds a {type(table).__name__} and should hold a table")
    return table


# --- Weights -----------------------------------------------------------------------------------


def read_weights(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors in a file of weights, on the CPU.

    Raises:
        CheckpointError: the file is damaged, holds other things than tensors, or code.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    loaded = read_plain(path, mapped=True)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in loaded.items()
    ):
        raise ExchangeError(f"{path} is no table of names and tensors")
    return loaded


# --- Writing -----------------------------------------------------------------------------------


def write_folder(
    folder: str | os.PathLike,
    network: dict,
    weights: dict[str, Tensor],
    process: dict | None,
) -> None:
    """Write a pipeline, or without a process the network alone, in today's layout.

    Raises:
        ExchangeError: the network alone would be written beside a pipeline.
        OSError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    if process is None and (left := _first(folder, [_INDEX, *_CONFIGS, *_SCHEDULERS])):
        raise ExchangeError(
            f"{folder} holds a pipeline, whose {left.relative_to(folder)} would be read with the "
            "network alone, or in its place: choose another folder, or remove it"
        )
    at = folder if process is None else folder / "unet"
    _write_json(at / _CONFIG, network)
    write_safetensors(at / f"{_WEIGHTS}.safetensors", weights)
    if process is None:
        return
    _write_json(folder / "scheduler" / _SCHEDULER, process)
    kind = process["_class_name"]
    index = {
        "_class_name": PIPELINES[kind],
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", network["_class_name"]],
    }
    _write_json(folder / _INDEX, index)  # last, so that it stands for all


def _write_json(path: pathlib.Path, table: dict) -> None:
    write_text(path, json.dumps(table, indent=2, sort_keys=True) + "\n")
