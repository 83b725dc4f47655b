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

from score_lib.base.tensors import rows, some_of
from score_lib.metrics.distances import BLOCK, squared_distances, tile_size
from score_lib.metrics.estimates import Estimate, Values, check_same_shape, checked_pair
from score_lib.metrics.sliced import sliced_wasserstein

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
    Its standard error is that of both terms of the Hoeffding decomposition, and holds for equal
    distributions too.

    Args:
        samples, data: (N, *D) and (M, *D), four or more.
        block: kernel values in memory at once; by default `tile_size`.
    Raises:
        ValueError: examples of different shapes, or as in `checked_pair`.
    """
    return _two_sample(*_pair(samples, data), lambda squared: -squared.sqrt(), block)


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
    return KernelDistance(*_two_sample(x, y, lambda d: torch.exp(d / (-2 * h * h)), block), h)


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
    # Fewer than four leave nothing to tell the second term of the decomposition by.
    samples, data = checked_pair(samples, data, least=4)
    check_same_shape(samples, data)
    return rows(samples), rows(data)


def _two_sample(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], block: int | None
) -> Estimate:
    """E k(x, x') + E k(y, y') - 2 E k(x, y), with an unbiased estimate of its variance.

    Args:
        x, y: (N, F), (M, F).
        kernel: of squared distances.
    """
    block = block or tile_size(x.device)
    origin = y.mean(dim=0, dtype=torch.float64)  # makes the rounding errors of distances smaller
    xx, yy = (_within(v, kernel, origin, block) for v in (x, y))
    xy = _between(x, y, kernel, origin, block)
    n, m = len(x), len(y)
    # Noise of the estimated main effects would be counted twice.
    of_x = (xx.rows - xy.rows).var() - xx.residual / (n - 2) - xy.residual / m
    of_y = (yy.rows - xy.columns).var() - yy.residual / (m - 2) - xy.residual / n
    first = 4 * (of_x / n + of_y / m)
    second = 2 * xx.residual / (n * (n - 1)) + 2 * yy.residual / (m * (m - 1))
    second = second + 4 * xy.residual / (n * m)
    variance = first.clamp(min=0) + second.clamp(min=0)
    return Estimate((xx.mean + yy.mean - 2 * xy.mean).item(), variance.sqrt().item())


class _Effects(NamedTuple):
    """k(x, y) = mean + effect of x + effect of y + rest, over all pairs.

    Attributes:
        mean: ().
        rows, columns: effects, (N,) and (M,), with sum 0.
        residual: unbiased variance of the rest, ().
    """

    mean: Tensor
    rows: Tensor
    columns: Tensor
    residual: Tensor


def _within(x: Tensor, kernel: Callable, origin: Tensor, block: int) -> _Effects:
    """Effects over the pairs of different examples of one set."""
    above, columns, squares = _sums(x, x, kernel, origin, block, once=True)
    n, itself = len(x), kernel(torch.zeros_like(origin[0]))
    sums, squares = above + columns - itself, 2 * squares - n * itself**2
    mean = sums.sum() / (n * (n - 1))
    effects = (sums - (n - 1) * mean) / (n - 2)
    rest = squares / 2 - n * (n - 1) / 2 * mean**2 - (n - 2) * effects.square().sum()
    return _Effects(mean, effects, effects, rest / (n * (n - 3) / 2))


def _between(x: Tensor, y: Tensor, kernel: Callable, origin: Tensor, block: int) -> _Effects:
    """Effects over the pairs of two sets."""
    n, m = len(x), len(y)
    row_sums, column_sums, squares = _sums(x, y, kernel, origin, block)
    mean = row_sums.sum() / (n * m)
    of_x, of_y = row_sums / m - mean, column_sums / n - mean
    rest = squares - n * m * mean**2 - m * of_x.square().sum() - n * of_y.square().sum()
    return _Effects(mean, of_x, of_y, rest / ((n - 1) * (m - 1)))


def _sums(
    x: Tensor, y: Tensor, kernel: Callable, origin: Tensor, block: int, once: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of kernel values for each x (N,) and each y (M,), and the sum of their squares.

    Args:
        once: take each pair once, and an example with itself by half; for x = y.
    """
    # Tiles of the values in memory, and of the examples that they come from.
    side = max(1, min(math.isqrt(block), BLOCK // x.shape[1]))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    column_total, squares = total.new_zeros(len(y)), total.new_zeros(())
    for i in range(0, len(x), side):
        part = x[i : i + side].double() - origin
        for j in range(i if once else 0, len(y), side):
            values = kernel(squared_distances(part, y[j : j + side].double() - origin))
            share = 0.5 if once and i == j else 1.0
            total[i : i + side] += share * values.sum(dim=1)
            column_total[j : j + side] += share * values.sum(dim=0)
            squares += share * values.square_().sum()
    return total, column_total, squares
