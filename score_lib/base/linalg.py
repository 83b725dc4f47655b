"""Linear systems given as matrix-vector products."""

from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul


def solve(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int,
    *,
    tolerance: float | None = None,
) -> Tensor:
    """Solve S u = b for each sample by conjugate gradients, starting at 0.

    [Hestenes and Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952]

    The number of iterations is fixed, so that the host never waits for the device; a sample that
    is solved stays as it is.

    Args:
        apply: u (B, *M) -> S u, where S may differ between samples and is symmetric and positive
            definite for each.
        b: right sides, (B, *M).
        iterations: as many as S has distinct eigenvalues give the solution; fewer are enough where
            its condition number is small.
        tolerance: residual, relative to b in the 2-norm, at which a sample is solved; default: the
            rounding of the dtype of b.
    Returns:
        u, (B, *M).
    """
    tolerance = torch.finfo(b.dtype).eps if tolerance is None else tolerance
    u, residual, direction = torch.zeros_like(b), b, b
    size = _dot(b, b)
    solved_at = tolerance**2 * size
    for _ in range(iterations):
        image = apply(direction)
        curvature = _dot(direction, image)
        active = (size > solved_at) & (curvature > 0)
        step = _ratio(size, curvature, active)
        u = u + batch_mul(step, direction)
        residual = residual - batch_mul(step, image)
        size, before = _dot(residual, residual), size
        direction = residual + batch_mul(_ratio(size, before, active), direction)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(dim=1)


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """a / b where a condition holds, else 0; never divides by 0."""
    return torch.where(where, a / torch.where(where, b, 1.0), 0.0)
