"""ARRAYS: the user's own arrays, of any shape: series, spectra, fields, molecules, volumes."""

import os
import pathlib

import numpy as np
import torch
from torch import Tensor

from score_lib.data.folders import divided
from score_lib.data.sources import (
    DataError,
    MissingDataError,
    Source,
    check_finite,
    checked_labels,
    register_dataset,
)
from score_lib.data.stored import SUFFIXES, Rows, open_rows

EXAMPLE = "example"
# NumPy's types that are read without loss, by what they become.
_CONTINUOUS = {"f2": torch.float32, "f4": torch.float32, "f8": torch.float64}


class ArraySource(Source):
    """The rows of an array: continuous values, or grey levels.

    Args:
        rows: of the array, (N, *shape), of floats, or of bytes where `levels` is not 0.
        labels: (N,) int64, or None.
        levels: number of grey levels; 0: continuous values.
    """

    def __init__(self, rows: Rows, labels: Tensor | None, levels: int):
        self._rows, self._labels = rows, labels
        self.shape, self.levels = tuple(rows.shape[1:]), levels or 256
        self.dtype = torch.uint8 if levels else _CONTINUOUS[rows.dtype.str[1:]]
        self.num_classes = 1 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        rows = self._rows.read(numbers)
        if self.dtype == torch.uint8:
            rows = self._as_bytes(rows, numbers)
        native = rows.astype(rows.dtype.newbyteorder("="), copy=False)
        examples = torch.from_numpy(native).to(self.dtype)
        if examples.is_floating_point():
            check_finite(examples, numbers, f"{self._rows.path}: row")
        return examples, None if self._labels is None else self._labels[numbers]

    def _as_bytes(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        outside = (rows < 0) | (rows >= self.levels)
        if outside.any():
            row = int(numbers[np.argwhere(outside)[0][0]])
            raise DataError(
                f"row {row} (from 0) of {self._rows.path} holds {rows[outside][0]}, but "
                f"data.levels={self.levels} allows 0 to {self.levels - 1}"
            )
        return rows.astype(np.uint8, copy=False)


@register_dataset(
    name="ARRAYS",
    options={
        "path": "data.path",
        "split": "data.split",
        "key": "data.key",
        "levels": "data.levels",
    },
)
def arrays(
    shape: tuple[int, ...], path: str, split: str, key: str, levels: int
) -> tuple[Source, Source]:
    """The rows of an array at a path, (N, *shape): .npy and .h5 are read row by row.

    In a folder, `train` and `test` with one of these endings are the two parts.  Of one file every
    tenth row is held out, or the last tenth with `data.split = "last"`, as suits windows of one
    long series; fewer than ten rows are all in both parts.
    """
    if not path:
        raise MissingDataError(
            "data.path is empty: data.dataset='ARRAYS' reads an .npy, .npz or .h5 there, or a "
            "folder with train.npy and test.npy"
        )
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        if split:
            raise DataError(f"data.split={split!r} divides one file, but {path} is a folder")
        parts = [_part(place, name) for name in ("train", "test")]
        return tuple(open_array_source(part, shape, key, levels) for part in parts)
    return divided(open_array_source(place, shape, key, levels), path, EXAMPLE, split)


def _is_continuous(config) -> bool:
    return config.data.levels == 0


arrays.continuous = _is_continuous


def _part(folder: pathlib.Path, name: str) -> pathlib.Path:
    found = [file for suffix in SUFFIXES if (file := folder / f"{name}{suffix}").is_file()]
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{folder} should hold one file {name} with an ending of {', '.join(SUFFIXES)}; there "
            f"is {there}. Examples in a file each are read by data.dataset='POINTS' or 'IMAGES'"
        )
    return found[0]


def open_array_source(
    path: pathlib.Path, shape: tuple[int, ...], key: str = "", levels: int = 0
) -> ArraySource:
    """The rows of an array in a file, each of the configured shape.

    Args:
        key, levels: the options of `data`.
    Raises:
        DataError: there is no such array, or its shape or type does not suit.
    """
    rows, labels = open_rows(path, key)
    _check_type(path, rows.dtype, levels)
    if rows.shape[1:] != tuple(shape):
        raise DataError(
            f"{path} holds {rows.shape[0]} rows of shape {rows.shape[1:]}, but the config's data "
            f"have {tuple(shape)}: {_fitting(rows.shape[1:], tuple(shape))}"
        )
    if 0 in rows.shape:
        raise DataError(f"{path} holds no numbers: its shape is {rows.shape}")
    return ArraySource(rows, checked_labels(path, labels, len(rows), "row"), levels)


def _fitting(stored: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """How to let rows of a shape fit a config whose data have another one."""
    option = f"set data.shape={','.join(map(str, stored)) or '()'}"
    if not stored:
        return f"{option}, after saving each number as a row of one"
    if len(stored) + 1 == len(shape):
        with_channel = ",".join(map(str, (1, *stored)))
        return (
            f"if their channel axis is missing, save array[:, None] and set "
            f"data.shape={with_channel}; else {option}"
        )
    if len(stored) == len(shape) > 1 and shape[0] <= shape[-1] and stored[0] > stored[-1]:
        channels_first = ",".join(map(str, (stored[-1], *stored[:-1])))
        return (
            f"if their last axis counts channels, save np.moveaxis(array, -1, 1) and set "
            f"data.shape={channels_first}; else {option}"
        )
    return option


def _check_type(path: pathlib.Path, dtype: np.dtype, levels: int) -> None:
    if dtype.kind == "c":
        raise DataError(
            f"{path} holds complex numbers ({dtype}): save real and imaginary parts as two "
            "channels, as np.stack([x.real, x.imag], axis=1) does"
        )
    if levels:
        if dtype.kind not in "bui":
            raise DataError(
                f"{path} holds {dtype}, but data.levels={levels} means whole numbers, grey levels: "
                "set data.levels=0 for continuous values"
            )
        if not 2 <= levels <= 256:
            raise DataError(
                f"data.levels={levels} must be from 2 to 256, or 0 for continuous values"
            )
    elif dtype.kind in "bui":
        raise DataError(
            f"{path} holds {dtype}: whole numbers have no density; set data.levels to the number "
            "of grey levels, such as 256, or save measurements as floats"
        )
    elif dtype.str[1:] not in _CONTINUOUS:
        raise DataError(f"{path} holds {dtype}: save floats of 16, 32 or 64 bits")
