"""Sources: examples by number, as they are stored, before any randomness."""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.disk.files import printable

_DATASETS = Registry("dataset")


def register_dataset(opener: Callable | None = None, *, name: str | None = None) -> Callable:
    """Decorator for a function `opener(config) -> (train, test)`, two `Source`s.

    The name (the function's own by default) is what `config.data.dataset` then says.
    """
    return _DATASETS.register(opener, name=name)


def open_dataset(config) -> tuple[Source, Source]:
    """The training and the held-out examples of `config.data.dataset`.

    Raises:
        ValueError: unknown name.
        DataError: the data are missing, damaged or do not fit the config.
    """
    return _DATASETS.get(config.data.dataset)(config)


class DataError(ValueError):
    """Data that are missing, damaged, or not what the config says; one sentence for people.

    Names and values from damaged files can be anything, and are shown on one line.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, limit=1000))


class Source(abc.ABC):
    """A fixed, numbered set of examples.

    Reading must be a function of the numbers alone: workers may read in any order, and a run that
    is resumed reads again what it needs.

    Attributes:
        shape: (C, H, W) of every image.
        levels: number of grey values; images hold 0 ... levels - 1.
        num_classes: labels are 0 ... num_classes - 1; 1 where there are no labels.
        start_method: how worker processes have to be started ("spawn", ...); None: any way.
    """

    shape: tuple[int, int, int]
    levels: int = 256
    num_classes: int = 1
    start_method: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Some examples, in the order asked for.

        Args:
            numbers: (n,) int64, each in [0, len(self)).
        Returns:
            images (n, C, H, W) uint8, and labels (n,) int64 or None where there are none.
        Raises:
            DataError: an example cannot be read; the message names it.
        """

    def images(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """The images alone, (n, C, H, W) uint8."""
        return self.read(np.asarray(numbers, dtype=np.int64))[0]


class MemorySource(Source):
    """Images (N, C, H, W) uint8 and labels (N,) that are in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, levels: int = 256):
        self._images, self._labels = images, labels
        self.shape, self.levels = tuple(images.shape[1:]), levels
        self.num_classes = 1 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self._images)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        rows = torch.from_numpy(numbers)
        return self._images[rows], None if self._labels is None else self._labels[rows]


class View(Source):
    """Another source, read in a different way."""

    def __init__(self, source: Source):
        self._source = source
        self.shape, self.levels, self.num_classes = source.shape, source.levels, source.num_classes
        self.start_method = source.start_method

    def __len__(self) -> int:
        return len(self._source)


class Subset(View):
    """Some of the examples of another source, renumbered from 0."""

    def __init__(self, source: Source, numbers: np.ndarray):
        super().__init__(source)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        return self._source.read(self._numbers[numbers])


class Remembered(View):
    """Keeps in memory what another source has read: for small images that are slow to decode.

    Each process that reads has a memory of its own.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self._memory = PerProcess(functools.partial(_Memory, len(source), source.shape))

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        memory = self._memory()
        missing = numbers[~memory.known[numbers]]
        if missing.size:
            images, labels = self._source.read(missing)
            memory.images[missing] = images
            memory.labels[missing] = 0 if labels is None else labels
            memory.known[missing] = True
        return memory.images[numbers], memory.labels[numbers]


class _Memory:
    def __init__(self, size: int, shape: tuple[int, int, int]):
        self.images = torch.zeros(size, *shape, dtype=torch.uint8)
        self.labels = torch.zeros(size, dtype=torch.int64)
        self.known = np.zeros(size, dtype=bool)


class PerProcess:
    """Something that is opened once in each process that uses it.

    File positions and readers with threads of their own do not survive a fork, and do not travel
    to a spawned worker; what opens them does.
    """

    def __init__(self, open_it: Callable[[], Any]):
        self._open, self._value, self._process = open_it, None, None

    def __call__(self) -> Any:
        if self._process != os.getpid():
            self._value, self._process = self._open(), os.getpid()
        return self._value

    def __getstate__(self) -> dict:
        return {"_open": self._open, "_value": None, "_process": None}
