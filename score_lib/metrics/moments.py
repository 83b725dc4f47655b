"""Features, means and covariances of files, checked before anything is computed with them."""

import numpy as np
import torch

# Shares of the largest variance, and of their sum, that rounding in float32 explains.
ASYMMETRY, NEGATIVE = 1e-5, 1e-5


def check_rows(name: str, values: np.ndarray, count: int) -> None:
    """Refuse features that are no rows (N, F) of finite numbers, one for each of N images.

    Raises:
        ValueError: says which.
    """
    if values.ndim != 2 or not values.shape[1] or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{name} must be rows of floating-point numbers, one per image, not {values.dtype} of "
            f"shape {values.shape}"
        )
    if len(values) != count or count < 2:
        raise ValueError(
            f"{name} has {len(values)} rows for {count} images: one row per image and two or more "
            "images are needed"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")


def check_moments(mean: str, mu: np.ndarray, covariance: str, sigma: np.ndarray) -> None:
    """Refuse a mean and a covariance that are none.

    Args:
        mean, covariance: their names, for messages.
        mu: (F,).
        sigma: (F, F).
    Raises:
        ValueError: other shapes; values that are not finite floating-point numbers; a matrix that
            is not symmetric and positive semi-definite up to rounding.
    """
    names = f"{mean} and {covariance}"
    if mu.ndim != 1 or not mu.size or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(
            f"{names} must have shapes (F,) and (F, F), not {mu.shape} and {sigma.shape}"
        )
    if not all(np.issubdtype(x.dtype, np.floating) and np.isfinite(x).all() for x in (mu, sigma)):
        raise ValueError(f"{names} must be finite floating-point numbers")
    largest = max(sigma.max(), -sigma.min())
    # By rows, for a difference of the whole would need the memory of another matrix.
    difference = max(np.abs(row - column).max() for row, column in zip(sigma, sigma.T, strict=True))
    if difference > ASYMMETRY * largest:
        raise ValueError(f"{covariance} is no covariance: it is not symmetric, by {difference:.3g}")
    if not _is_positive(sigma):
        raise ValueError(f"{covariance} is no covariance: some variance would be negative")


def _is_positive(sigma: np.ndarray) -> bool:
    """Whether a symmetric matrix has no negative eigenvalue, up to rounding."""
    total = float(np.trace(sigma, dtype=np.float64))
    if total <= 0:
        return not sigma.any()
    # A matrix has a Cholesky factor exactly if its eigenvalues are positive.
    scaled = torch.from_numpy(sigma).to(torch.float32, copy=True).div_(total)
    scaled.diagonal().add_(NEGATIVE)
    return not torch.linalg.cholesky_ex(scaled).info.item()
