"""Public data sets: through tensorflow-datasets, without importing TensorFlow, or from a path.

The files at a path, as their authors publish them, are read by `archives` and `lmdbs`.
"""

import contextlib
import contextvars
import functools
import http.client
import logging
import os
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.data import preprocess
from score_lib.data.archives import open_archive
from score_lib.data.lmdbs import open_lsun
from score_lib.data.sources import (
    DataError,
    MissingDataError,
    PerProcess,
    Remembered,
    Source,
    View,
    log_once,
    needed,
    register_dataset,
)
from score_lib.data.tfrecords import RecordFiles

log = logging.getLogger(__name__)

PROJECT = pathlib.Path(__file__).resolve().parents[2]
Shape = tuple[int, int, int]
_MAY_PREPARE = contextvars.ContextVar("may_prepare", default=True)
FOLDER = {"folder": "data.data_dir"}
FOLDER_OR_PATH = {**FOLDER, "path": "data.path"}


class Small(NamedTuple):
    """Square images with labels: the name in tensorflow-datasets, and what it holds."""

    name: str
    channels: int
    side: int
    classes: int


SMALL = {
    "CIFAR10": Small("cifar10", 3, 32, 10),  # 50,000 + 10,000
    "CIFAR100": Small("cifar100", 3, 32, 100),  # 50,000 + 10,000, by the fine classes
    "SVHN": Small("svhn_cropped", 3, 32, 10),  # 73,257 + 26,032
    "MNIST": Small("mnist", 1, 28, 10),  # 60,000 + 10,000
    "FASHION_MNIST": Small("fashion_mnist", 1, 28, 10),  # 60,000 + 10,000
}
# Names in tensorflow-datasets of what is read from there, beside the categories of LSUN.
FROM_TFDS = (*(known.name for known in SMALL.values()), "celeb_a")


@register_dataset(name="CELEBA", options=FOLDER)
def celeba(shape: Shape, folder: str) -> tuple[Source, Source]:
    """162,770 + 19,867 (the validation part) faces, cropped to 140 x 140 and shrunk."""
    return _resized("celeb_a", shape, folder, preprocess.celeba)


@register_dataset(name="LSUN", options={**FOLDER_OR_PATH, "category": "data.category"})
def lsun(shape: Shape, folder: str, path: str, category: str) -> tuple[Source, Source]:
    """The scenes of one category; the validation part of 300 images is held out."""
    if path:
        _need_square(f"lsun/{category}", shape)
        return open_lsun(path, category, shape)
    return _resized(f"lsun/{category}", shape, folder, preprocess.lsun)


def _small(title: str, shape: Shape, folder: str, path: str) -> tuple[Source, Source]:
    """A data set of `SMALL`; sides other than its own are resized, as published for CIFAR-10."""
    known = SMALL[title]
    channels, height, width = shape
    if channels != known.channels or height != width:
        raise DataError(
            f"{title} has square {'gray' if known.channels == 1 else 'RGB'} images, but the config "
            f"asks for {shape}: set data.num_channels={known.channels} and one number as "
            f"data.image_size, best {known.side}"
        )
    prepare = None
    if height != known.side:
        log_once(f"{title}: images of {known.side} px are resized to {height} px, antialiased")
        prepare = functools.partial(preprocess.resized, size=height)
    if path:
        train, test = open_archive(title, path)
        return (Prepared(train, prepare), Prepared(test, prepare)) if prepare else (train, test)
    train, test = (
        TfdsSource(known.name, split, folder, shape, prepare=prepare, num_classes=known.classes)
        for split in ("train", "test")
    )
    names = builder_of(known.name, folder).info.features["label"].names
    for source in (train, test):
        source.class_to_idx = {title: label for label, title in enumerate(names)}
    return Remembered(train), Remembered(test)


for _title in SMALL:
    _open_small = functools.partial(_small, _title)
    register_dataset(_small, name=_title, options=FOLDER_OR_PATH, build=_open_small)


class Prepared(View):
    """The images of another source after `prepare`, from and to (n, C, H, W) uint8."""

    def __init__(self, source: Source, prepare: Callable[[Tensor], Tensor]):
        super().__init__(source)
        self._prepare = prepare
        self.shape = tuple(prepare(source.images([0])).shape[1:])

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """See `Source`."""
        images, labels = self._source.read(numbers)
        return self._prepare(images), labels


def _resized(name: str, shape: Shape, folder: str, prepare: Callable) -> tuple[Source, Source]:
    _need_square(name, shape)
    sized = functools.partial(prepare, size=shape[1])
    keywords = {"folder": folder, "shape": shape, "prepare": sized}
    return TfdsSource(name, "train", **keywords), TfdsSource(name, "validation", **keywords)


def _need_square(name: str, shape: Shape) -> None:
    channels, height, width = shape
    if channels != 3 or height != width:
        raise DataError(
            f"{name} has square colour images, but the config asks for {shape}: set "
            f"data.num_channels=3 and one number as data.image_size"
        )


class TfdsSource(Source):
    """One split of a prepared tensorflow-datasets data set.

    Args:
        folder: the data directory; "" for the default of tensorflow-datasets.
        shape: (C, H, W) after `prepare`, from (1, C, h, w) to (1, C, H, W) uint8.
        num_classes: labels are read if there is more than one class.
    """

    # The reader of ArrayRecord files crashes in a process forked from one that has used it.
    start_method = "spawn"

    def __init__(
        self,
        name: str,
        split: str,
        folder: str,
        shape: Shape,
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        num_classes: int = 1,
    ):
        self._open = PerProcess(functools.partial(_open, name, split, folder))
        self._prepare, self._name = prepare, f"{name} ({split})"
        self.shape, self.num_classes = shape, num_classes
        self._length = len(self._open())

    def __len__(self) -> int:
        return self._length

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        data = self._open()
        try:
            examples = [data[number] for number in numbers.tolist()]
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"{self._name}: examples cannot be read: {error}") from error
        images = [torch.tensor(example["image"]).permute(2, 0, 1)[None] for example in examples]
        if self._prepare is not None:
            images = [self._prepare(image) for image in images]
        images = torch.cat(images)
        if self.num_classes == 1:
            return images, None
        return images, torch.tensor([int(example["label"]) for example in examples])


def _open(name: str, split: str, folder: str) -> Sequence[dict]:
    """Random access to the examples of a split; prepares the data set first if necessary."""
    builder = builder_of(name, folder)
    if builder.is_prepared() and split not in builder.info.splits:
        known = sorted(builder.info.splits)
        raise DataError(f"{name} in {builder.data_dir} has the splits {known}, not {split!r}")
    try:
        return builder.as_data_source(split)
    except NotImplementedError:  # prepared in another format, or not at all
        if builder.is_prepared():
            return _PreparedRecords(builder, split)
    _prepare(builder, name, folder)
    return builder_of(name, folder).as_data_source(split)


def builder_of(name: str, folder: str, **options):
    """The builder of tensorflow-datasets for a name such as "cifar10".

    Args:
        folder: the data directory; "" for the default of tensorflow-datasets.
        options: of `tensorflow_datasets.builder`.
    Raises:
        DataError: the package is missing, or has no such data set.
    """
    tfds = needed(
        "tensorflow_datasets",
        f"{name} needs tensorflow-datasets, which is missing: pip install tensorflow-datasets",
    )
    try:
        return tfds.builder(name, data_dir=os.path.expanduser(folder) or None, **options)
    except (ValueError, AssertionError) as error:  # the latter for an unknown version
        # Its own message lists all of its hundreds of names.
        raise DataError(
            f"tensorflow-datasets has no {name!r}: known here are {', '.join(FROM_TFDS)} and "
            "lsun/CATEGORY, such as lsun/church_outdoor"
        ) from error


class _PreparedRecords(RecordFiles):
    """Random access to a data set prepared as TFRecord files, the default format."""

    def __init__(self, builder, split: str):
        told = builder.info.splits[split]
        super().__init__(told.filepaths)
        self._features = builder.info.features
        for path, count, wanted in zip(self.paths, self.counts, told.shard_lengths, strict=True):
            if count != wanted:
                raise DataError(
                    f"{path} has {count} records, and dataset_info.json beside it says {wanted}: "
                    "copy the file again, or prepare the data set again"
                )

    def __getitem__(self, number: int) -> dict:
        return self._features.deserialize_example_np(super().__getitem__(number))


@contextlib.contextmanager
def only_prepared() -> Iterator[None]:
    """Context in which a data set that is not on this machine is an error and not prepared."""
    token = _MAY_PREPARE.set(False)
    try:
        yield
    finally:
        _MAY_PREPARE.reset(token)


def may_prepare() -> bool:
    """Whether data may be downloaded and prepared here, see `only_prepared`."""
    return _MAY_PREPARE.get()


def _prepare(builder, name: str, folder: str) -> None:
    """Download and prepare a data set in a separate process, because this imports TensorFlow."""
    if not may_prepare():
        raise MissingDataError(f"{name} is not in {builder.data_dir}")
    place = [os.path.abspath(os.path.expanduser(folder))] if folder else []
    command = ["-m", "score_lib.data.prepare", name, *place, "--tfds"]
    advice = f"run `python {' '.join(command)}` in the project's folder on a machine with a network"
    if not _reachable(builder.info.homepage):
        raise DataError(
            f"{name} is not in {builder.data_dir}, and its home page cannot be reached: {advice}, "
            f"or set data.data_dir to the folder that contains {name.split('/')[0]}/"
        )
    log.warning("preparing %s in %s: once, this can take hours", name, builder.data_dir)
    if subprocess.run([sys.executable, *command], cwd=PROJECT).returncode:
        raise DataError(f"{name} could not be prepared in {builder.data_dir}: {advice}")


def _reachable(page: str) -> bool:
    try:
        with urllib.request.urlopen(page, timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False
