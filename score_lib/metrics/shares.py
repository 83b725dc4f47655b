"""Shares of classes among samples and data, whose differences count in any distance of the two."""

import logging
import math

import numpy as np

# Half the sum of differences of shares that is worth a word, beside that of chance.
_MOST = 0.05


def warn_of_shares(drawn: np.ndarray, data: np.ndarray) -> None:
    """Say so where samples have classes in other shares than the data.

    Distances of a perfect conditional network are above 0 then: samples are of the classes of
    `sampling.classes` in turn, whatever the shares of the data.

    Args:
        drawn, data: classes of the samples and of the data, (N,) and (M,), whole numbers.
    """
    count = 1 + max(drawn.max(), data.max())
    ours, theirs = (np.bincount(values, minlength=count) / len(values) for values in (drawn, data))
    apart = np.abs(ours - theirs)
    # About the distance that M data of as many equal classes have by chance.
    chance = 0.4 * math.sqrt(np.count_nonzero(theirs) / len(data))
    if apart.sum() / 2 <= _MOST + chance:
        return
    label = int(apart.argmax())
    logging.warning(
        "the class %d has a share of %.2g of the data and %.2g of the samples, which all distances "
        "count as a difference: name classes as often as in the data, as in "
        "--config.sampling.classes=0,0,0,1 for one with three quarters of them",
        label, theirs[label], ours[label],
    )  # fmt: skip
