"""Noise levels that suit a data set.  [Song & Ermon 2020, techniques 1 and 2]"""

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from score_lib.metrics.distances import squared_distances

# Overlap in all published schedules: 232 scales for CIFAR-10, 500 for CelebA, 788 for FFHQ at 96 px
# and 1086 for LSUN at 128 px.  The paper recommends about 0.5, which gives 6% fewer scales.
PUBLISHED_OVERLAP = 0.5667


def largest_pairwise_distance(images: Tensor | np.ndarray, *, rows: int = 1024) -> float:
    """Largest Euclidean distance between two images, the recommended `model.sigma_max` for VE.

    Args:
        images: two or more, (N, *D) in the network's range ([0, 1] in VE experiments).
        rows: images that are compared with the others at once, which limits memory.
    """
    x = torch.as_tensor(images).flatten(1).float()
    if len(x) < 2:
        raise ValueError(f"a distance needs two or more images, not {len(x)}")
    x = x - x.mean(dim=0)
    largest, pair = -1.0, (0, 0)
    for first in range(0, len(x), rows):
        # Later images suffice: each pair is compared once.
        squared = squared_distances(x[first : first + rows], x[first:])
        value, place = squared.flatten().max(dim=0)
        if value > largest:
            row, column = divmod(int(place), squared.shape[1])
            largest, pair = float(value), (first + row, first + column)
    i, j = pair
    return (x[i] - x[j]).double().norm().item()


def fitting_num_scales(
    sigma_max: float, sigma_min: float, dimension: int, *, overlap: float = PUBLISHED_OVERLAP
) -> int:
    """Number of geometric noise scales with a given overlap between neighbours.

    Args:
        sigma_max, sigma_min: largest and smallest noise level, `sigma_max > sigma_min > 0`.
        dimension: D, the number of values in an image.
        overlap: of neighbours, see `neighbour_overlap`; in (0, 0.99].
    Returns:
        the number of scales, including both ends.
    """
    if not (math.inf > sigma_max > sigma_min > 0 and dimension >= 1 and 0 < overlap <= 0.99):
        raise ValueError(
            "the number of scales needs sigma_max > sigma_min > 0, dimension >= 1 and 0 < overlap "
            f"<= 0.99, not {sigma_max=}, {sigma_min=}, {dimension=} and {overlap=}"
        )
    ratio = sigma_max / sigma_min
    if neighbour_overlap(ratio, dimension) > overlap:  # the two ends suffice
        return 2
    # The overlap decreases with the ratio: bisect.
    lower, upper = 1.0, ratio
    for _ in range(100):
        middle = (lower + upper) / 2
        if neighbour_overlap(middle, dimension) > overlap:
            lower = middle
        else:
            upper = middle
    return 1 + max(1, round(math.log(ratio) / math.log(lower)))


def neighbour_overlap(gamma: float, dimension: int) -> float:
    """Probability that the norm of noise at one scale is typical of the next scale.

    Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma), with the ratio
    gamma of the scales and D dimensions.
    """
    cdf, apart = NormalDist().cdf, math.sqrt(2 * dimension) * (gamma - 1)
    return cdf(apart + 3 * gamma) - cdf(apart - 3 * gamma)
