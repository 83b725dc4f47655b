"""Kernel distances between two sets, with their errors by the Hoeffding decomposition.

E k(x, x') + E k(y, y') - 2 E k(x, y) over pairs of different examples, which is unbiased.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.pairs import LEAST, pair_effects
from score_lib.metrics.distances import (
    BLOCK,
    Features,
    feature_pair,
    polynomial_kernel,
    squared_mmd,
    tile_size,
)
from score_lib.metrics.estimates import Estimate

# From rows (n, F) and (m, F) to values (n, m), symmetric in both.
Kernel = Callable[[Tensor, Tensor], Tensor]


def two_sample(x: Tensor, y: Tensor, kernel: Kernel, block: int) -> Estimate:
    """The distance of x (N, F) and y (M, F), of `LEAST` or more rows each.

    Where both distributions are equal, the first term of the variance is 0, and its estimate counts
    if it happens to be above: the error is then up to half too large.

    Args:
        block: kernel values in memory at once.
    """
    xx, yy = (_within(v, kernel, block) for v in (x, y))
    xy = _between(x, y, kernel, block)
    n, m = len(x), len(y)
    # Noise of the estimated main effects would be counted twice.
    of_x = (xx.rows - xy.rows).var() - xx.residual / (n - 2) - xy.residual / m
    of_y = (yy.rows - xy.columns).var() - yy.residual / (m - 2) - xy.residual / n
    first = 4 * (of_x / n + of_y / m)
    second = 2 * xx.residual / (n * (n - 1)) + 2 * yy.residual / (m * (m - 1))
    second = second + 4 * xy.residual / (n * m)
    value, variance = xx.mean + yy.mean - 2 * xy.mean, first.clamp(min=0) + second.clamp(min=0)
    return Estimate(value.item(), variance.sqrt().item())


def kid_estimate(features_a: Features, features_b: Features) -> Estimate:
    """The kernel distance whose mean over blocks `kid` is, over all pairs of rows at once.

    The order of the rows is irrelevant, and the error smaller: each row meets every other, not only
    those of its block.  It is nan for sets of fewer than `LEAST` rows.

    Args:
        features_a, features_b: (N, F) and (M, F).
    Raises:
        ValueError: as in `squared_mmd`.
    """
    a, b = feature_pair(features_a, features_b)
    if min(len(a), len(b)) < LEAST:
        return Estimate(squared_mmd(a, b), math.nan)
    return two_sample(a, b, polynomial_kernel, tile_size(a.device))


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


def _within(x: Tensor, kernel: Kernel, block: int) -> _Effects:
    """Effects over the pairs of different examples of one set."""
    above, columns, squares, itself = _sums(x, x, kernel, block, once=True)
    sums, squares = above + columns - itself, 2 * squares - itself.square().sum()
    mean, effects, residual = pair_effects(sums, squares)
    return _Effects(mean, effects, effects, residual)


def _between(x: Tensor, y: Tensor, kernel: Kernel, block: int) -> _Effects:
    """Effects over the pairs of two sets."""
    n, m = len(x), len(y)
    row_sums, column_sums, squares, _ = _sums(x, y, kernel, block)
    mean = row_sums.sum() / (n * m)
    of_x, of_y = row_sums / m - mean, column_sums / n - mean
    rest = squares - n * m * mean**2 - m * of_x.square().sum() - n * of_y.square().sum()
    return _Effects(mean, of_x, of_y, rest / ((n - 1) * (m - 1)))


def _sums(
    x: Tensor, y: Tensor, kernel: Kernel, block: int, once: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of kernel values for each x (N,) and each y (M,), the sum of their squares, and those
    of each example with itself (N,).

    Args:
        once: take each pair once, and an example with itself by half; for x = y.
    """
    # Tiles of the values in memory, and of the examples that they come from.
    side = max(1, min(math.isqrt(block), BLOCK // x.shape[1]))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    column_total, squares = total.new_zeros(len(y)), total.new_zeros(())
    itself = torch.zeros_like(total)
    for i in range(0, len(x), side):
        part = x[i : i + side].double()
        for j in range(i if once else 0, len(y), side):
            values = kernel(part, y[j : j + side].double())
            share = 0.5 if once and i == j else 1.0
            if once and i == j:
                itself[i : i + side] = values.diagonal()
            total[i : i + side] += share * values.sum(dim=1)
            column_total[j : j + side] += share * values.sum(dim=0)
            squares += share * values.square_().sum()
    return total, column_total, squares, itself
