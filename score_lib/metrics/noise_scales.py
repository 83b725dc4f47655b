"""Noise levels that fit a data set (Song & Ermon 2020, *Improved techniques for training
score-based generative models*, techniques 1 and 2)."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from score_lib.metrics.distances import squared_distances

# Rows compared with all others at once.
_ROWS = 1024

# What the published schedules have in common: 232 scales for CIFAR-10, 500 for CelebA, 788 for
# FFHQ at 96 px and 1086 for LSUN at 128 px.  The paper asks for about 0.5, which gives 6% fewer.
PUBLISHED_OVERLAP = 0.5667


def largest_pairwise_distance(images: Tensor | np.ndarray) -> float:
    """Largest Euclidean distance between two images: what `model.sigma_max` should be for VE.

    Args:
        images: (N, *D) in the range in which the network sees them ([0, 1] in VE experiments).
    Raises:
        ValueError: there are fewer than two images.
    """
    x = torch.as_tensor(images).flatten(1).float()
    if len(x) < 2:
        raise ValueError(f"a distance needs two images or more, not {len(x)}")
    x = x - x.mean(dim=0)
    largest, pair = -1.0, (0, 0)
    for first in range(0, len(x), _ROWS):
        # A pair is looked at once, from the image that comes first.
        squared = squared_distances(x[first : first + _ROWS], x[first:])
        value, place = squared.flatten().max(dim=0)
        if value > largest:
            row, column = divmod(int(place), squared.shape[1])
            largest, pair = float(value), (first + row, first + column)
    i, j = pair
    return (x[i] - x[j]).double().norm().item()


def fitting_num_scales(
    sigma_max: float, sigma_min: float, dimension: int, *, overlap: float = PUBLISHED_OVERLAP
) -> int:
    """Number of geometric noise scales whose neighbours overlap enough.

    With ratio gamma between neighbours and D dimensions, noise of one scale has a length that is
    likely for the next with probability
    Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma).

    Args:
        sigma_max, sigma_min: largest and smallest noise level, `sigma_max > sigma_min > 0`.
        dimension: D, numbers in one image.
        overlap: that probability, in (0, 0.99].
    Returns:
        the number of scales, both ends included.
    Raises:
        ValueError: an argument out of range.
    """
    if not (sigma_max > sigma_min > 0 and dimension >= 1 and 0 < overlap <= 0.99):
        raise ValueError(
            "needed are sigma_max > sigma_min > 0, a dimension of at least 1 and an overlap in "
            f"(0, 0.99], but they are {sigma_max}, {sigma_min}, {dimension} and {overlap}"
        )
    ratio = sigma_max / sigma_min
    if _overlap(ratio, dimension) > overlap:  # the two ends are enough
        return 2
    # The overlap falls as neighbours move apart: bisect.
    lower, upper = 1.0, ratio
    for _ in range(100):
        middle = (lower + upper) / 2
        if _overlap(middle, dimension) > overlap:
            lower = middle
        else:
            upper = middle
    return 1 + max(1, round(math.log(ratio) / math.log(lower)))


def _overlap(gamma: float, dimension: int) -> float:
    cdf, apart = NormalDist().cdf, math.sqrt(2 * dimension) * (gamma - 1)
    return cdf(apart + 3 * gamma) - cdf(apart - 3 * gamma)
