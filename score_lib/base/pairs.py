"""Means over all pairs of independent examples, which share examples, and their errors.

[Hoeffding 1948, *A class of statistics with asymptotically normal distribution*]
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Fewer examples leave nothing to tell the rest of a pair by.
LEAST = 4


class PairEffects(NamedTuple):
    """k(x, x') = mean + effect of x + effect of x' + rest, over all pairs.

    Attributes:
        mean: ().
        effects: of examples, (N,), with sum 0.
        residual: unbiased variance of the rest, ().
    """

    mean: Tensor
    effects: Tensor
    residual: Tensor


def pair_effects(sums: Tensor, squares: Tensor) -> PairEffects:
    """The effects of N examples, `LEAST` or more, over the pairs of different ones.

    Args:
        sums: of the N - 1 values of each example, (N,).
        squares: sum of the squares of all N (N - 1) values, ().
    """
    n = len(sums)
    mean = sums.sum() / (n * (n - 1))
    effects = (sums - (n - 1) * mean) / (n - 2)
    rest = squares / 2 - n * (n - 1) / 2 * mean**2 - (n - 2) * effects.square().sum()
    return PairEffects(mean, effects, rest / (n * (n - 3) / 2))


def mean_over_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the ordered pairs of different examples, and its standard error: scalars.

    An example counts in its row and in its column.  The error is nan for fewer than `LEAST`.

    Args:
        values: of pairs, (N, N), of two or more examples; the diagonal is not read.
    """
    both, n = (values + values.T).fill_diagonal_(0.0) / 2, len(values)
    mean = both.sum() / (n * (n - 1))
    if n < LEAST:
        return mean, torch.full_like(mean, math.nan)
    found = pair_effects(both.sum(1), both.square().sum())
    # The noise of estimated effects would be counted twice.
    first = 4 * (found.effects.var() - found.residual / (n - 2)) / n
    second = 2 * found.residual / (n * (n - 1))
    return mean, (first.clamp(min=0) + second.clamp(min=0)).sqrt()
