"""Sources: examples by number, as they are stored, before any randomness."""

import abc
import functools
import importlib
import logging
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.disk.files import printable

DATASETS = Registry("dataset")
# Tables with a row per class must fit in memory.
MAX_CLASSES = 1 << 24

# Decorator for a function `opener(shape, **keywords) -> (train, test)`: two `Source`s of images of
# the configured shape (C, H, W).  Its arguments are those of `Registry.register`; `name` is the
# value of `config.data.dataset`.  An opener of data of any shape has the attribute `continuous`,
# see `kinds.is_continuous`.
register_dataset = DATASETS.register


class DataError(ValueError):
    """Data that are missing, damaged, or do not fit the config; the message is one line.

    Names and values from damaged files can be anything, so unprintable characters are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, limit=1000))


@functools.cache
def log_once(message: str) -> None:
    """Log how data are read; a run opens them several times."""
    logging.info("%s", message)


def log_unread(path: pathlib.Path, chosen: str, names: Sequence[str]) -> None:
    """Log which array of a file serves as the data, where others are left out."""
    if left := [printable(name) for name in names if name not in (chosen, "labels")]:
        shown = ", ".join(left[:20]) + (", ..." if len(left) > 20 else "")
        log_once(f"{path}: the data are the array {printable(chosen)!r}; not read: {shown}")


def named(class_to_idx: Mapping[str, int]) -> str:
    """Classes and their labels for a message: cat = 0, dog = 1."""
    shown = [f"{printable(name)} = {label}" for name, label in [*class_to_idx.items()][:100]]
    return ", ".join(shown) + (", ..." if len(class_to_idx) > 100 else "")


def needed(module: str, message: str) -> types.ModuleType:
    """A module of a package that is not always there.

    Raises:
        DataError: the message, if it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(message) from error


class MissingDataError(DataError):
    """The data are not there yet: a published set not on this machine, or no path."""


class Source(abc.ABC):
    """A fixed, numbered set of examples.

    Reading must be a function of the numbers alone: workers read in any order, and a resumed run
    reads examples again.

    Attributes:
        shape: of every example, such as (C, H, W) of images.
        dtype: `torch.uint8` for grey levels; a floating-point type for continuous values, which are
            in the user's own units.
        levels: number of grey values; images hold 0 ... levels - 1.
        num_classes: labels are 0 ... num_classes - 1; 1 where there are no labels.
        class_to_idx: name of a class -> its label; empty where classes have no names.
        start_method: how worker processes must be started ("spawn", ...); None: any way.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    levels: int = 256
    num_classes: int = 1
    class_to_idx: Mapping[str, int] = types.MappingProxyType({})
    start_method: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Examples (n, *shape) of `dtype`, and labels (n,) int64 or None, in the given order.

        Raises:
            DataError: an example cannot be read; the message names it.
        """

    def images(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """The examples alone, (n, *shape)."""
        return self.read(np.asarray(numbers, dtype=np.int64))[0]


def check_finite(examples: Tensor, numbers: np.ndarray, name: str = "example") -> None:
    """Refuse values that are not finite.

    Args:
        examples: (n, *D).
        numbers: of the examples, (n,).
        name: of an example, for the error.
    Raises:
        DataError: names the first example and entry.
    """
    if examples.isfinite().all():
        return
    row, *entry = (~examples.isfinite()).nonzero()[0].tolist()
    raise DataError(
        f"{name} {int(numbers[row])} (from 0) holds {examples[(row, *entry)].item()} at entry "
        f"{tuple(entry)}: continuous data should be finite numbers; remove such examples or fill "
        "them in"
    )


def checked_labels(
    path: pathlib.Path, labels: np.ndarray | None, count: int, noun: str
) -> Tensor | None:
    """Labels as they are stored in a file, (N,) int64; None if there are none.

    Args:
        count: N.
        noun: of the things that have them, for the error.
    Raises:
        DataError: they are not one class each.
    """
    if labels is None:
        return None
    one_integer_each = labels.shape == (count,) and labels.dtype.kind in "iu"
    if not one_integer_each or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        advice = "np.unique(labels, return_inverse=True)[1] numbers names and other values"
        if labels.shape != (count,) and labels.size == count:
            advice = "save labels.ravel()"
        raise DataError(
            f"{path}: labels must be one integer from 0 to {MAX_CLASSES - 1} for each {noun}, not "
            f"{labels.dtype} of shape {labels.shape}: {advice}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def require_shape(name: str, shape: tuple[int, int, int], stored: tuple[int, int, int]) -> None:
    """Check the configured shape for a data set whose square images are not resized."""
    channels, side, _ = stored
    if shape != stored:
        raise DataError(
            f"{name} has {'gray' if channels == 1 else 'RGB'} images of {side} x {side}, which are "
            f"not resized, but the config asks for {shape}: set data.image_size={side} and "
            f"data.num_channels={channels}"
        )


class MemorySource(Source):
    """Examples (N, *shape), uint8 or floating-point, and labels (N,) in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, levels: int = 256):
        self._images, self._labels = images, labels
        self.shape, self.dtype, self.levels = tuple(images.shape[1:]), images.dtype, levels
        self.num_classes = 1 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self._images)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        rows = torch.from_numpy(numbers)
        return self._images[rows], None if self._labels is None else self._labels[rows]


class View(Source):
    """A source that reads from another source."""

    def __init__(self, source: Source):
        self._source = source
        self.shape, self.dtype, self.levels = source.shape, source.dtype, source.levels
        # A copy: the default is of a type that cannot be sent to a worker that is not forked.
        self.num_classes, self.class_to_idx = source.num_classes, dict(source.class_to_idx)
        self.start_method = source.start_method

    def __len__(self) -> int:
        return len(self._source)


class Subset(View):
    """The examples of another source with these numbers, renumbered from 0."""

    def __init__(self, source: Source, numbers: np.ndarray):
        super().__init__(source)
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        return self._source.read(self.numbers[numbers])


class Remembered(View):
    """Caches the examples of another source, in each process: for images that decode slowly."""

    def __init__(self, source: Source):
        super().__init__(source)
        size, shape = len(source), source.shape
        self._cache = PerProcess(functools.partial(_empty_cache, size, shape, source.dtype))

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        known, images, labels = self._cache()
        missing = numbers[~known[numbers]]
        if missing.size:
            new_images, new_labels = self._source.read(missing)
            images[missing] = new_images
            labels[missing] = 0 if new_labels is None else new_labels
            known[missing] = True
        return images[numbers], labels[numbers]


def _empty_cache(
    size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[np.ndarray, Tensor, Tensor]:
    examples = torch.zeros(size, *shape, dtype=dtype)
    return np.zeros(size, dtype=bool), examples, torch.zeros(size, dtype=torch.int64)


class PerProcess:
    """A resource that is opened once in each process that uses it.

    Open files and readers with threads do not survive a fork and cannot be pickled for a spawned
    worker; the function that opens them can.
    """

    def __init__(self, open_it: Callable[[], Any]):
        self._open, self._value, self._process = open_it, None, None

    def __call__(self) -> Any:
        if self._process != os.getpid():
            self._value, self._process = self._open(), os.getpid()
        return self._value

    def __getstate__(self) -> dict:
        return {"_open": self._open, "_value": None, "_process": None}
