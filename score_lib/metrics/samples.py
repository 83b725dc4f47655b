"""Distances between samples and data of any shape, from their values alone.

Samples are (N, *D) and data (M, *D), tensors or arrays on one device; sums are in float64, over
tiles of all pairs.  Distances are Euclidean, so the values of an example should have comparable
scales.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.pairs import LEAST
from score_lib.base.tensors import rows, some_of
from score_lib.metrics.distances import squared_distances, tile_size
from score_lib.metrics.estimates import Estimate, Values, check_same_shape, checked_pair
from score_lib.metrics.sliced import sliced_wasserstein
from score_lib.metrics.two_sample import two_sample

# Examples of which the median distance is taken; 500,000 pairs.
_MOST_FOR_MEDIAN = 1000


class KernelDistance(NamedTuple):
    """A squared MMD, its standard error, and the bandwidth of the kernel."""

    value: float
    standard_error: float
    bandwidth: float


def sample_metrics(samples: Values, data: Values, *, seed: int = 0) -> dict[str, float]:
    """All distances for vectors, or for data of another shape that is as good as a vector.

    Args:
        samples, data: (N, *D) and (M, *D), four or more.
        seed: of the projections of the sliced Wasserstein distance.
    Returns:
        "sliced_w1", "sliced_w2", "energy_distance" and "mmd" (squared), each with its
        "_standard_error", and "mmd_bandwidth".
    Raises:
        ValueError: as in `energy_distance`.
    """
    mmd = squared_gaussian_mmd(samples, data)
    return {
        **sliced_wasserstein(samples, data, order=1, seed=seed).named("sliced_w1"),
        **sliced_wasserstein(samples, data, order=2, seed=seed).named("sliced_w2"),
        **energy_distance(samples, data).named("energy_distance"),
        **Estimate(*mmd[:2]).named("mmd"),
        "mmd_bandwidth": mmd.bandwidth,
    }


def energy_distance(samples: Values, data: Values, *, block: int | None = None) -> Estimate:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (Székely & Rizzo 2013).

    A U-statistic: 0 on average for equal distributions, so slightly negative values are normal.
    Its standard error is that of both terms of the Hoeffding decomposition; for equal distributions
    it is up to half too large.

    Args:
        samples, data: (N, *D) and (M, *D), four or more.
        block: kernel values in memory at once; by default `tile_size`.
    Raises:
        ValueError: examples of different shapes, or as in `checked_pair`.
    """
    return _distance(*_pair(samples, data), lambda squared: -squared.sqrt(), block)


def squared_gaussian_mmd(
    samples: Values, data: Values, *, bandwidth: float | None = None, block: int | None = None
) -> KernelDistance:
    """Unbiased squared MMD with the kernel exp(-|x - y|^2 / (2 h^2)) (Gretton et al. 2012).

    Its standard error is as in `energy_distance`.

    Args:
        bandwidth: h; by default `median_distance` of the data, and not of samples, so that all
            models are measured with the same kernel.
    Raises:
        ValueError: as in `energy_distance`, or a bandwidth that is not positive.
    """
    x, y = _pair(samples, data)
    h = median_distance(y) if bandwidth is None else float(bandwidth)
    if not (h > 0 and math.isfinite(h)):
        raise ValueError(
            f"the kernel's bandwidth should be positive, not {h}: give a bandwidth, also where "
            "all data are equal"
        )
    return KernelDistance(*_distance(x, y, lambda d: torch.exp(d / (-2 * h * h)), block), h)


def median_distance(data: Tensor) -> float:
    """Median Euclidean distance between two examples, (M, *D), of `some_of` 1,000 of them.

    Where most of them are equal, as vectors of a few values are, of those that are not.
    """
    numbers = some_of(len(data), _MOST_FOR_MEDIAN, "median distance").to(data.device)
    apart = torch.pdist(rows(data)[numbers].double())
    median = apart.median()
    if median == 0 and bool(apart.any()):
        median = apart[apart > 0].median()
    return median.item()


def _pair(samples: Values, data: Values) -> tuple[Tensor, Tensor]:
    samples, data = checked_pair(samples, data, least=LEAST)
    check_same_shape(samples, data)
    return rows(samples), rows(data)


def _distance(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], block: int | None
) -> Estimate:
    """The distance by a kernel of squared distances, of rows (N, F) and (M, F)."""
    origin = y.mean(dim=0, dtype=torch.float64)  # makes the rounding errors of distances smaller

    def of_rows(a: Tensor, b: Tensor) -> Tensor:
        return kernel(squared_distances(a - origin, b - origin))

    return two_sample(x, y, of_rows, block or tile_size(x.device))
