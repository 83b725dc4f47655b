"""The 1,797 handwritten digits that come with scikit-learn (8 x 8), gray and in colour."""

import importlib.util
import pathlib

import numpy as np
import torch
from torch import Tensor

from score_lib.data.sources import (
    DataError,
    MemorySource,
    Source,
    Subset,
    register_dataset,
    require_shape,
)

SIDE, LEVELS = 8, 17
GOLDEN_RATIO, SATURATION = (5**0.5 - 1) / 2, 0.85


@register_dataset(name="DIGITS")
def digits(shape: tuple[int, int, int]) -> tuple[Source, Source]:
    """1,501 training and 296 held-out gray digits of 17 levels, with their labels."""
    require_shape("DIGITS", shape, (1, SIDE, SIDE))
    ink, labels = _table()
    return _split(MemorySource(ink, labels, levels=LEVELS))


@register_dataset(name="COLOR_DIGITS")
def color_digits(shape: tuple[int, int, int]) -> tuple[Source, Source]:
    """The same digits, each in one bright colour on black: RGB of 256 levels.

    A digit's colour is a function of its number in the file and is independent of its label.
    Nor does the mean over channels determine it: permuting the channels leaves the mean unchanged.
    """
    require_shape("COLOR_DIGITS", shape, (3, SIDE, SIDE))
    ink, labels = _table()
    color = bright_colors(torch.arange(len(ink), dtype=torch.float64) * GOLDEN_RATIO)
    pixels = ink / (LEVELS - 1) * color[:, :, None, None]
    return _split(MemorySource((255 * pixels).round().byte(), labels))


def bright_colors(hue: Tensor) -> Tensor:
    """Red, green and blue in [0, 1], (n, 3), of the brightest colours with these hues (n,).

    Hues are counted in turns: 0 is red, 1/3 green, 2/3 blue, and 1 red again.
    """
    turned = (6 * hue[:, None] + torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype)) % 6
    return 1 - SATURATION * torch.minimum(turned, 4 - turned).clamp(0, 1)


def _table() -> tuple[Tensor, Tensor]:
    """Ink (1797, 1, 8, 8), uint8 in 0 ... 16, and labels (1797,), in the order of the file."""
    package = importlib.util.find_spec("sklearn")  # its own loader takes a second to import
    if package is None:
        raise DataError(
            "the digits are part of scikit-learn, which is missing: pip install scikit-learn"
        )
    file = pathlib.Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    ink = table[:, :-1].reshape(-1, 1, SIDE, SIDE).to(torch.uint8)
    return ink, table[:, -1].contiguous()


def _split(source: MemorySource) -> tuple[Source, Source]:
    """Hold out every sixth digit of each class, in the order of the file.

    The split does not depend on the seed, and class frequencies are equal in both parts.
    """
    labels = source.read(np.arange(len(source)))[1].numpy()
    source.class_to_idx = {str(label): label for label in range(source.num_classes)}
    held_out = np.zeros(len(source), dtype=bool)
    for label in range(source.num_classes):
        held_out[np.flatnonzero(labels == label)[5::6]] = True
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))
