"""Linear equations by conjugate gradients."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul, norms, over_sides, rows
from score_lib.inverse.operators import LinearOperator

# So many roundings of y or of A^T u tell nothing.
ROUNDINGS = 8


def solve(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int,
    *,
    tolerance: float | None = None,
    floor: Tensor | float = 0.0,
) -> Tensor:
    """Solve S u = b for each sample by conjugate gradients, starting at 0.

    [Hestenes and Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952]

    The number of iterations is fixed, so that the host never waits for the device; a sample that
    is solved stays as it is.  So does one whose next direction is mapped to no more than rounding,
    as it may be where S is singular: u would grow there without an end.

    Args:
        apply: u (B, *M) -> S u, where S may differ between samples and is symmetric and positive
            semidefinite for each.
        b: right sides, (B, *M).
        iterations: as many as S has distinct eigenvalues give the solution; fewer are enough where
            its condition number is small.
        tolerance: residual, relative to b in the 2-norm, at which a sample is solved; default: the
            rounding of the dtype of b.
        floor: the same as a number of its own, (B,), for b that is a small difference of numbers
            with more rounding.
    Returns:
        u, (B, *M).
    """
    tolerance = torch.finfo(b.dtype).eps if tolerance is None else tolerance
    u, residual, direction = torch.zeros_like(b), b, b
    size = _dot(b, b)
    solved_at = tolerance**2 * size + floor**2
    least = torch.zeros_like(size)
    for _ in range(iterations):
        image = apply(direction)
        curvature, length = _dot(direction, image), _dot(direction, direction)
        # S in this direction.  For S = A C A^T both ends of a null direction are rounding of A^T u.
        eigenvalue = _ratio(curvature, length, length > 0)
        least = torch.maximum(least, (ROUNDINGS * torch.finfo(b.dtype).eps) ** 2 * eigenvalue)
        active = (size > solved_at) & (eigenvalue > least)
        step = _ratio(size, curvature, active)
        u = u + batch_mul(step, direction)
        residual = residual - batch_mul(step, image)
        size, before = _dot(residual, residual), size
        direction = residual + batch_mul(_ratio(size, before, active), direction)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return rows(a * b).sum(dim=1)


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """a / b where a condition holds, else 0; never divides by 0."""
    return torch.where(where, a / torch.where(where, b, 1.0), 0.0)


# So many times as large as it may be the data that a measurement without noise means.
_LARGEST_GAIN = 1000


def explained(operator: LinearOperator, y: Tensor, noise_std: float) -> Tensor:
    """The part of a measurement that some data explain: A A^+ y, (B, *M), for y (B, *M).

    Samples without a contradiction stay bit for bit, and so do those of which it is not found in
    the iterations, as of a large and ill-conditioned A.

    Raises:
        ValueError: as in `check_meaning`.
    """
    return y - _contradiction(operator, y, noise_std)


@torch.no_grad()
def _contradiction(operator: LinearOperator, y: Tensor, noise_std: float) -> Tensor:
    """y - A A^+ y, (B, *M), or 0."""
    eps = ROUNDINGS * torch.finfo(y.dtype).eps
    x, left = _least_squares(operator, y, eps)
    meant = x
    if type(operator).pinv is not LinearOperator.pinv:
        # Small singular values need more iterations than there are.
        with contextlib.suppress(NotImplementedError):
            meant = operator.pinv(y)
    check_meaning(operator, y, meant, noise_std)
    # A part of y that A^T maps to no more than singular values that count as zero do.
    rest, largest = y - operator.apply(x), norms(operator.adjoint(y))
    size, total = norms(rest), norms(y)
    small = left * total <= largest * (operator.rcond * size + eps * total)
    return batch_mul(((size > eps * total) & small).to(y), rest)


def _least_squares(operator: LinearOperator, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, *D) for which |y - A x| is least, or nearly, and |A^T (y - A x)|, (B,).

    Of several numbers of iterations the best one counts: more than are needed amplify rounding.
    """

    def normal(x: Tensor) -> Tensor:
        return operator.adjoint(operator.apply(x))

    of_y = operator.adjoint(y)
    best, least = torch.zeros_like(of_y), norms(of_y)
    enough = eps * least
    for iterations in (1, 2, 3, 5, 10, 30, 100):
        x = solve(normal, of_y, iterations)
        left = norms(operator.adjoint(y - operator.apply(x)))
        better = left < least
        best = torch.where(over_sides(better, x), x, best)
        least = torch.where(better, left, least)
        if (least <= enough).all():
            break
    return best, least


@torch.no_grad()
def check_meaning(operator: LinearOperator, y: Tensor, x: Tensor, noise_std: float) -> None:
    """Refuse a measurement without noise that small singular values make into data far too large.

    Args:
        y, x: the measurement (B, *M), and A^+ y, (B, *D).
    Raises:
        ValueError: x is more than a thousand times as large as data of which A gives y.
    """
    if noise_std > 0:
        return
    gain = (norms(x) * norms(operator.adjoint(y)) / norms(y) ** 2).nan_to_num()
    if (gain > _LARGEST_GAIN).any():
        raise ValueError(
            f"without noise, this measurement by {operator!r} would mean data {gain.max():.2g} "
            "times as large as it: state the standard deviation of its noise, noise_std, above 0"
        )
