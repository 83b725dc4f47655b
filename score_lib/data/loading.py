"""From a config to streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import derive_seed
from score_lib.data.sources import DataError, Source, open_dataset
from score_lib.data.stream import ImageStream


def get_data_scaler(config) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to the network's range: [-1, 1] with `data.centered`."""
    if config.data.centered:
        return lambda x: x * 2.0 - 1.0
    return lambda x: x


def get_data_inverse_scaler(config) -> Callable[[Tensor], Tensor]:
    """From the network's range to images in [0, 1]."""
    if config.data.centered:
        return lambda x: (x + 1.0) / 2.0
    return lambda x: x


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A data set: its name and its two parts, "train" and "test" (held out)."""

    name: str
    sources: dict[str, Source]

    @property
    def num_examples(self) -> dict[str, int]:
        """Examples in each part."""
        return {split: len(source) for split, source in self.sources.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.sources["train"].shape

    @property
    def levels(self) -> int:
        """Number of grey values, which dequantisation and bits/dim count."""
        return self.sources["train"].levels

    @property
    def num_classes(self) -> int:
        """Number of labels; 1 where there are none."""
        return max(source.num_classes for source in self.sources.values())


def get_dataset(
    config,
    uniform_dequantization: bool = False,
    evaluation: bool = False,
    *,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[ImageStream, ImageStream, DatasetInfo]:
    """Training stream, held-out stream and description of the configured data set.

    Args:
        config: reads `data.*`, `seed`, and `training.batch_size` or `eval.batch_size`.
        uniform_dequantization: add uniform noise within each grey level.
        evaluation: one ordered pass over each part in batches of `eval.batch_size`, no flips;
            otherwise both streams are endless and shuffled, in batches of `training.batch_size`,
            and the training stream flips if `data.random_flip`.
        device, rank, world: see `ImageStream`.
    Raises:
        ValueError: unknown data set or settings out of range.
        DataError: the data are missing, damaged or do not fit the config.
    """
    train, test = open_dataset(config)
    for source in (train, test):
        source.levels = _levels(config, source)
    options = {
        "batch_size": config.eval.batch_size if evaluation else config.training.batch_size,
        "evaluation": evaluation,
        "dequantize": uniform_dequantization,
        "num_workers": config.data.get("num_workers", 4),
        "device": device,
        "rank": rank,
        "world": world,
    }
    flip = config.data.random_flip and not evaluation
    # Seeds of their own: else the n-th draw for both streams would be the same one.
    train_stream = ImageStream(train, seed=config.seed, random_flip=flip, **options)
    test_stream = ImageStream(test, seed=derive_seed(config.seed, "held out"), **options)
    info = DatasetInfo(config.data.dataset, {"train": train, "test": test})
    return train_stream, test_stream, info


def _levels(config, source: Source) -> int:
    levels = config.data.get("levels", 0) or source.levels
    if not 2 <= levels <= 256:
        raise DataError(
            f"data.levels={levels}: grey values are bytes, so there are 2 to 256 levels (0 takes "
            f"the data set's own number)"
        )
    return levels
