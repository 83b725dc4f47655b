"""Measures of samples that are sets of points, in which the order of points has no meaning.

Samples are (N, P, C) and data (M, P', C), tensors or arrays on one device.  All measures follow
from the Chamfer distances between all sets; those of matrices take any other distance as well.
[Achlioptas et al. 2018; Yang et al. 2019, section 5]
"""

import math

import torch
from torch import Tensor

from score_lib.base.tensors import check_floats
from score_lib.metrics.distances import squared_distances, tile_size
from score_lib.metrics.estimates import Estimate, Values, checked_pair


def point_set_metrics(
    samples: Values, data: Values, *, block: int | None = None
) -> dict[str, float]:
    """All measures of sets of points.

    Args:
        samples, data: (N, P, C) and (M, P', C), two or more; the matrices of distances hold
            (N + M)^2 numbers.
        block: as in `chamfer_distances`.
    Returns:
        "nearest_neighbour_accuracy" and "matching_distance", each with its "_standard_error", and
        "coverage".
    Raises:
        ValueError: as in `checked_pair`, or points of different dimensions.
    """
    between = chamfer_distances(samples, data, block=block)
    within = [chamfer_distances(sets, sets, block=block) for sets in (samples, data)]
    accuracy = nearest_neighbour_accuracy(within[0], between, within[1])
    return {
        **accuracy.named("nearest_neighbour_accuracy"),
        "coverage": coverage(between),
        **matching_distance(between).named("matching_distance"),
    }


def chamfer_distances(samples: Values, data: Values, *, block: int | None = None) -> Tensor:
    """Mean squared distance to the nearest point of the other set, summed over both directions.

    Args:
        samples, data: (N, P, C) and (M, P', C).
        block: distances between points in memory at once, by default `tile_size`, but at least
            those of two sets.
    Returns:
        (N, M) in float64, in squared units of the coordinates.
    """
    x, y = checked_pair(samples, data, least=2, ranks=(3,), shape="(N, P, C)")
    if x.shape[2] != y.shape[2]:
        raise ValueError(f"points of {x.shape[2]} and of {y.shape[2]} coordinates have no distance")
    origin = y.flatten(0, 1).mean(dim=0, dtype=torch.float64)
    block = block or tile_size(x.device)
    side = max(1, math.isqrt(block // (x.shape[1] * y.shape[1])))
    return torch.cat(
        [
            torch.cat([_chamfer(a - origin, b - origin) for b in y.split(side)], dim=1)
            for a in x.split(side)
        ]
    )


def _chamfer(x: Tensor, y: Tensor) -> Tensor:
    """(n, P, C), (m, P', C) -> (n, m)."""
    between = squared_distances(x.flatten(0, 1), y.flatten(0, 1))
    between = between.unflatten(0, x.shape[:2]).unflatten(2, y.shape[:2])
    return between.amin(dim=3).mean(dim=1) + between.amin(dim=1).mean(dim=2)


def nearest_neighbour_accuracy(
    within_samples: Tensor, between: Tensor, within_data: Tensor
) -> Estimate:
    """Accuracy of telling samples from data by the nearest other example; 0.5 is perfect.

    The mean of the accuracies on samples and on data, so that it is 0.5 for equal distributions
    also where N and M differ [for N = M: Lopez-Paz & Oquab 2017].  Below 0.5, samples are nearer to
    data than data are to each other.  The standard error counts that two examples which are each
    other's nearest are right or wrong together.

    Args:
        within_samples, between, within_data: distances (N, N), (N, M), (M, M); those of an example
            from itself are not read.
    Raises:
        ValueError: other shapes, or distances that are not finite numbers.
    """
    _check_distances(between)
    n, m = between.shape
    for within, count in ((within_samples, n), (within_data, m)):
        check_floats("distances", within)
        if within.shape != (count, count):
            raise ValueError(
                f"distances within {count} examples should have the shape {(count, count)}, not "
                f"{tuple(within.shape)}"
            )
    apart = torch.cat(
        [torch.cat([within_samples, between], 1), torch.cat([between.T, within_data], 1)]
    )
    _check_distances(apart.fill_diagonal_(0.0))
    nearest = apart.fill_diagonal_(torch.inf).argmin(dim=1)
    itself = torch.arange(n + m, device=between.device)
    right = ((nearest < n) == (itself < n)).double()
    shares = torch.stack([right[:n].mean(), right[n:].mean()])
    residual = torch.cat([(right[:n] - shares[0]) / (2 * n), (right[n:] - shares[1]) / (2 * m)])
    mutual = nearest[nearest] == itself
    together = residual * torch.where(mutual, residual[nearest], 0.0)
    variance = (residual.square() + together).sum().clamp(min=0)
    return Estimate(shares.mean().item(), variance.sqrt().item())


def coverage(between: Tensor) -> float:
    """Share of the data that are the nearest to some sample, of distances (N, M); 1 is perfect.

    It grows with N and has no simple standard error: compare it with that of as many other data.

    Raises:
        ValueError: another shape, or distances that are not finite numbers.
    """
    _check_distances(between)
    return between.argmin(dim=1).unique().numel() / between.shape[1]


def matching_distance(between: Tensor) -> Estimate:
    """Minimum matching distance: the mean over data of the distance to the nearest sample.

    Its standard error is that of the mean over data, given these samples.

    Args:
        between: distances of samples and data, (N, M).
    Raises:
        ValueError: another shape, or distances that are not finite numbers.
    """
    _check_distances(between)
    nearest = between.amin(dim=0)
    return Estimate(nearest.mean().item(), (nearest.std() / math.sqrt(len(nearest))).item())


def _check_distances(distances: Tensor) -> None:
    """Refuse all but matrices of distances; the least of numbers and nan would be nan."""
    check_floats("distances", distances)
    if distances.dim() != 2 or 0 in distances.shape:
        raise ValueError(f"distances should be a matrix (N, M), not {tuple(distances.shape)}")
    if not bool(distances.isfinite().all()):
        raise ValueError("distances should be finite numbers, but some are nan or inf")
