"""From a config to the streams, sources and scalers of a data set."""

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import data_shape, derive_seed
from score_lib.data import (  # noqa: F401  (they register)
    digits,
    huggingface,
    imagenet,
    images,
    points,
    public,
    quickdraw,
    tfrecords,
    values,
    webdataset,
)
from score_lib.data.kinds import is_continuous, kind_of, stored_shape
from score_lib.data.sources import DATASETS, DataError, Source, log_once, named
from score_lib.data.standardization import Standardization
from score_lib.data.stream import ON_CPU, ImageStream
from score_lib.options import complete


def get_data_scaler(config) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to the network's range: [-1, 1] with `data.centered`."""
    if complete(config).data.centered:
        return lambda x: x * 2.0 - 1.0
    return lambda x: x


def get_data_inverse_scaler(config) -> Callable[[Tensor], Tensor]:
    """From the network's range to images in [0, 1]."""
    if complete(config).data.centered:
        return lambda x: (x + 1.0) / 2.0
    return lambda x: x


def get_scaling(config, device: torch.device | str = "cpu") -> tuple[Callable, Callable]:
    """From the data to the network's range, and back: the two scalers of grey levels in [0, 1], or
    a `Standardization` of continuous values, which has yet to be fitted or loaded."""
    if is_continuous(config):
        scaler = Standardization(data_shape(complete(config)), device)
        return scaler, scaler.inverse
    return get_data_scaler(config), get_data_inverse_scaler(config)


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A data set: its name and its two splits, "train" and "test" (held out)."""

    name: str
    sources: dict[str, Source]

    @property
    def num_examples(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {split: len(source) for split, source in self.sources.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, such as (C, H, W)."""
        return self.sources["train"].shape

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Name of a class -> its label; empty where classes have no names."""
        return dict(self.sources["train"].class_to_idx)

    @property
    def info(self) -> types.SimpleNamespace:
        """As in a builder of tensorflow-datasets: `info.splits["train"].num_examples`."""
        counts = self.num_examples.items()
        splits = {split: types.SimpleNamespace(num_examples=count) for split, count in counts}
        return types.SimpleNamespace(name=self.name, splits=splits)

    @property
    def levels(self) -> int:
        """Number of grey values, for dequantization and bits/dim."""
        return self.sources["train"].levels

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 without labels."""
        return max(source.num_classes for source in self.sources.values())

    def check_labels(self, classes: int) -> None:
        """Refuse labels that a network of so many classes cannot learn.

        Raises:
            DataError: there are more classes, or a split has no labels.
        """
        if not 1 < self.num_classes <= classes:
            raise DataError(
                f"a network of data.num_classes = {classes} cannot learn the labels of "
                f"{self.name}, which has {self.num_classes if self.num_classes > 1 else 0} classes"
            )
        first = np.zeros(1, dtype=np.int64)
        for split, source in self.sources.items():
            if source.num_classes < 2 and source.read(first)[1] is None:
                raise DataError(
                    f"a network that learns classes needs a label for each datum, but those of the "
                    f"part {split!r} of {self.name} have none"
                )


def check_levels(config, info: DatasetInfo) -> None:
    """Refuse `data.levels` = 0 for a run with data of other than 256 grey levels.

    Modes that write samples may not have the data at hand: they take 0 as 256.

    Raises:
        DataError: names the number to set.
    """
    if not config.data.levels and info.levels != 256:
        raise DataError(
            f"data.levels = 0 would write samples in 256 grey levels, and {info.name} has "
            f"{info.levels}: set data.levels = {info.levels}"
        )


def _check_kind_of_values(config, source: Source) -> None:
    """Refuse values that the opener of a data set calls other than they are: all that is done with
    them follows from it.

    Raises:
        DataError: names the attribute to set.
    """
    continuous = source.dtype.is_floating_point
    if continuous != is_continuous(config):
        kind = str(source.dtype).removeprefix("torch.")
        raise DataError(
            f"data.dataset = {config.data.dataset!r} gives {kind}, which is for "
            f"{'continuous values' if continuous else 'grey levels'}: set the attribute "
            f"`continuous = {continuous}` of the function that was registered, or the dtype of its "
            "sources"
        )


def get_streams(
    config,
    uniform_dequantization: bool = False,
    evaluation: bool = False,
    *,
    num_workers: int | None = None,
    **stream,
) -> tuple[ImageStream, ImageStream, DatasetInfo]:
    """Training stream, held-out stream and description of the configured data set.

    Args:
        config: reads `data.*`, `seed`, and `training.batch_size` or `eval.batch_size`.
        uniform_dequantization: add uniform noise within each grey level.
        evaluation: one ordered pass over each split in batches of `eval.batch_size`, no flips;
            otherwise both streams are endless and shuffled, in batches of `training.batch_size`,
            and the training stream flips images if `data.random_flip` is set, and augments them
            with the probability `data.augment`.  With the latter, all batches have "features".
            It permutes the points of sets.
        num_workers: default: `data.num_workers`.
        stream: further arguments of `ImageStream`, such as `device`, `rank` and `world`.
    Raises:
        ValueError: unknown data set or options out of range, or a `DataError`.
    """
    config = complete(config)
    kind = kind_of(config)
    with ON_CPU:
        train, test = DATASETS.build(config.data.dataset, config, stored_shape(config))
    for source in (train, test):
        _check_kind_of_values(config, source)
        _set_levels(source, config.data.levels)
    options = {
        "batch_size": config.eval.batch_size if evaluation else config.training.batch_size,
        "evaluation": evaluation,
        "dequantize": uniform_dequantization,
        "num_workers": config.data.num_workers if num_workers is None else num_workers,
        **stream,
    }
    told = config.data.augment > 0
    unchanged = {"augment": 0.0 if told else None}
    changed = {
        "random_flip": config.data.random_flip and kind == "images",
        "permute": kind == "points",
        "augment": config.data.augment if told else None,
    }
    # Different seeds: otherwise the n-th draws of both streams would be equal.
    seeds = config.seed, derive_seed(config.seed, "held out")
    training = unchanged if evaluation else changed
    train_stream = ImageStream(train, seed=seeds[0], **training, **options)
    test_stream = ImageStream(test, seed=seeds[1], **unchanged, **options)
    info = DatasetInfo(config.data.dataset, {"train": train, "test": test})
    if changed["random_flip"] and train.dtype.is_floating_point and not evaluation:
        log_once("data.random_flip = True mirrors half of the training data, along the last axis")
    if info.class_to_idx:
        place = f"{info.name} {config.data.path}".rstrip()
        log_once(f"{place}: classes and their labels: {named(info.class_to_idx)}")
    return train_stream, test_stream, info


def _set_levels(source: Source, levels: int) -> None:
    """Let a source have so many grey levels; 0: its own number.

    Raises:
        DataError: bytes cannot hold them.
    """
    source.levels = levels or source.levels
    if not 2 <= source.levels <= 256 and source.dtype == torch.uint8:
        raise DataError(
            f"data.levels={source.levels} must be from 2 to 256, since grey values are bytes, or 0 "
            f"for the data set's own number of levels"
        )
