"""Sliced Wasserstein distance: the optimal transport of one-dimensional projections.

[Rabin et al. 2011; Bonneel et al. 2015]
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.tensors import SampleNoise, rows
from score_lib.metrics.distances import BLOCK
from score_lib.metrics.estimates import (
    Estimate,
    Values,
    check_same_shape,
    checked_pair,
    root_of,
    variance_of_mean,
)


def sliced_wasserstein(
    samples: Values,
    data: Values,
    *,
    order: float = 2,
    num_projections: int = 512,
    seed: int = 0,
    block: int = BLOCK,
) -> Estimate:
    """(E[W_p(u.x, u.y)^p])^(1/p) over uniform unit vectors u, with the order p.

    W_p between projections is exact, also for unequal N and M.  The distance between two sets of
    one distribution is above 0: compare it with that between two sets of data.

    The standard error has two parts.  That of the examples is the variance over them of the dual
    potentials [del Barrio & Loubes 2019], averaged over projections; it holds where the
    distributions differ.  That of the projections is their variance over `num_projections`.

    Args:
        samples, data: (N, *D) and (M, *D), two or more, on one device.
        order: p, 1 or more, and finite.
        num_projections: random vectors; two or more.  One-dimensional examples need none.
        seed: of the vectors, which depend on it alone.
        block: values in memory at once.
    Raises:
        ValueError: as in `checked_pair`, or settings out of range.
    """
    x, y = (rows(v) for v in checked_pair(samples, data, least=2))
    check_same_shape(x, y)
    if not 1 <= order < math.inf or num_projections < 2:
        raise ValueError(
            "the sliced Wasserstein distance needs a finite order >= 1 and num_projections >= "
            f"2, not {order=} and {num_projections=}"
        )
    count = num_projections if x.shape[1] > 1 else 1
    at_once = max(1, block // (4 * (len(x) + len(y))))
    transport = _Transport.between(len(x), len(y), x.device)
    powers, potentials = [], [0.0, 0.0]
    for first in range(0, count, at_once):
        directions = _directions(seed, range(first, min(first + at_once, count)), x)
        (a, places_a), (b, places_b) = (
            _projections(v, directions, block).sort(dim=1) for v in (x, y)
        )
        powers.append(transport.cost(a, b, order))
        duals = transport.potentials(a, b, order)
        for k, (dual, places) in enumerate(zip(duals, (places_a, places_b), strict=True)):
            potentials[k] += torch.zeros_like(dual).scatter_(1, places, dual).sum(dim=0)
    powers = torch.cat(powers)
    variance = variance_of_mean(*(sum_ / count for sum_ in potentials))
    if count > 1:
        variance = variance + powers.var() / count
    return root_of(powers.mean(), variance, order)


def _directions(seed: int, numbers: range, x: Tensor) -> Tensor:
    """Unit vectors of these numbers, (K, F) in float64."""
    noise = SampleNoise(seed, numbers)(torch.empty(len(numbers), x.shape[1])).double()
    return (noise / noise.norm(dim=1, keepdim=True)).to(x.device)


def _projections(x: Tensor, directions: Tensor, block: int) -> Tensor:
    """(N, F) on K unit vectors -> (K, N), in float64."""
    parts = x.split(max(1, block // x.shape[1]))
    return torch.cat([directions @ part.double().T for part in parts], dim=1)


class _Transport(NamedTuple):
    """The optimal plan between N and M sorted numbers, which depends on N and M alone.

    Attributes:
        source, target, mass: examples between which the plan moves mass, and how much.
        steps: for each set, examples of the other at the place where it goes from one example to
            the next, just before and just after.
    """

    source: Tensor
    target: Tensor
    mass: Tensor
    steps: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def between(cls, n: int, m: int, device: torch.device) -> "_Transport":
        # Quantile levels in units of 1 / (n m), in which all jumps are whole numbers.
        edges = [torch.arange(count, device=device) * (n * m // count) for count in (n, m)]
        levels = torch.cat([*edges, torch.tensor([n * m], device=device)]).unique()
        start = levels[:-1]
        steps = tuple(
            ((jumps - 1) // width, jumps // width)
            for jumps, width in ((edges[0][1:], n), (edges[1][1:], m))
        )
        return cls(start // m, start // n, levels.diff().double() / (n * m), steps)

    def cost(self, a: Tensor, b: Tensor, order: float) -> Tensor:
        """W_p^p of sorted a (K, N) and b (K, M) -> (K,)."""
        return _power(a[:, self.source] - b[:, self.target], order) @ self.mass

    def potentials(self, a: Tensor, b: Tensor, order: float) -> tuple[Tensor, Tensor]:
        """Dual potentials, (K, N) and (K, M), up to a constant.

        Their sum is the cost wherever mass moves, which fixes their differences.  Where both sets
        jump at once they are not unique, and the mean of both ends is taken.
        """
        return _potential(a, b, self.steps[0], order), _potential(b, a, self.steps[1], order)


def _potential(a: Tensor, b: Tensor, steps: tuple[Tensor, Tensor], order: float) -> Tensor:
    rises = [
        _power(a[:, 1:] - b[:, step], order) - _power(a[:, :-1] - b[:, step], order)
        for step in steps
    ]
    return torch.nn.functional.pad((rises[0] + rises[1]).cumsum(dim=1) / 2, (1, 0))


def _power(differences: Tensor, order: float) -> Tensor:
    return differences.abs() if order == 1 else differences.abs() ** order
