"""Noise levels of a process as numbers that do not depend on its scale, and their times."""

import torch
from torch import Tensor

from score_lib.sdes.process import SDE

# Of data: channels, time and three sides.
_HIGHEST_RANK = 5


def marginal_coeffs(sde: SDE, times: Tensor) -> tuple[Tensor, Tensor]:
    """m and s at times (N,), each (N,).

    A user's own process may broadcast for data of one rank only, which is looked for.

    Raises:
        ValueError: its mean has the shape of x for no rank.
    """
    for dimensions in range(_HIGHEST_RANK + 1):
        ones = times.new_ones(len(times), *(1,) * dimensions)
        mean, std = sde.marginal_prob(ones, times)
        if mean.numel() == len(times):
            return mean.reshape(len(times)), std
    raise ValueError(
        f"marginal_prob(x, t) of {sde!r} should give a mean of the shape of x, (B, *D), for t (B,)"
    )


def log_snr(sde: SDE, times: Tensor) -> Tensor:
    """lambda = log(m / s) at times (N,): (N,), falling with time."""
    scale, std = marginal_coeffs(sde, times)
    return torch.log(scale / std)


def time_at(sde: SDE, wanted: Tensor) -> Tensor:
    """The times in [0, T] at which lambda has the wanted values, (N,), by bisection."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, sde.T)
    for _ in range(60):  # to the last bit of a double
        middle = (low + high) / 2
        too_early = log_snr(sde, middle) > wanted
        low, high = torch.where(too_early, middle, low), torch.where(too_early, high, middle)
    return (low + high) / 2
