"""DIGITS: the 1,797 handwritten digits that come with scikit-learn (8 x 8, 17 grey levels)."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np
import torch

from datasets.sources import DataError, MemorySource, Source, Subset, register_dataset
from utils import image_shape

SHAPE, LEVELS = (1, 8, 8), 17


@register_dataset(name="DIGITS")
def digits(config) -> tuple[Source, Source]:
    """1,501 training and 296 held-out digits with their labels.

    Held out is every sixth digit of each class, in the order of the file: the same ones for every
    seed, and each class is as frequent in both parts.
    """
    if image_shape(config) != SHAPE:
        raise DataError(
            f"DIGITS are gray images of 8 x 8 and are not resized, but the config asks for "
            f"{image_shape(config)}: set data.image_size=8 and data.num_channels=1"
        )
    table = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.int64))
    images, labels = table[:, :-1].reshape(-1, *SHAPE).to(torch.uint8), table[:, -1].contiguous()
    source = MemorySource(images, labels, levels=LEVELS)
    held_out = np.zeros(len(source), dtype=bool)
    for label in range(source.num_classes):
        held_out[np.flatnonzero(labels.numpy() == label)[5::6]] = True
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))


def _file() -> pathlib.Path:
    """The table of digits inside scikit-learn, whose own loader takes a second to import."""
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise DataError(
            "DIGITS are part of scikit-learn, which is missing: pip install scikit-learn"
        )
    return pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
