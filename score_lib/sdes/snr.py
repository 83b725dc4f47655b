"""Noise levels of a process as numbers that do not depend on its scale, and their times."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.gradients import recording
from score_lib.sdes.coefficients import marginal_coeffs
from score_lib.sdes.process import SDE


def log_snr(sde: SDE, times: Tensor) -> Tensor:
    """lambda = log(m / s) at times (N,): (N,), falling with time."""
    scale, std = marginal_coeffs(sde, times)
    return torch.log(scale / std)


def check_signal(sde: SDE, start: float) -> None:
    """Refuse to start where lambda is not a number, or rounding in float32.

    Raises:
        ValueError: m is 0 there, up to rounding.
    """
    for dtype in (torch.float32, torch.float64):
        scale, _ = marginal_coeffs(sde, torch.tensor([start], dtype=dtype))
        if not scale > 0:
            raise ValueError(
                f"nothing of the data is left in x at time {start:g} of {sde!r}, where m = "
                f"{float(scale):.2g}: end it before, such as at T = {0.995 * start:.4g}"
            )


def time_at(sde: SDE, wanted: Tensor) -> Tensor:
    """The times in [0, T] at which lambda has the wanted values, (N,), by bisection."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, sde.T)
    for _ in range(60):  # to the last bit of a double
        middle = (low + high) / 2
        too_early = log_snr(sde, middle) > wanted
        low, high = torch.where(too_early, middle, low), torch.where(too_early, high, middle)
    return (low + high) / 2


class Nodes(NamedTuple):
    """Equal steps in a variable u of the noise level, from the data to the noise.

    u = asinh(-lambda / 3): the logarithm of s / m, drawn out where signal and noise are alike.
    Divided by r = sqrt(m^2 + s^2), x_t is of the same size at all times.  Tensors are (N + 1,), in
    float64 on the CPU.
    """

    times: Tensor
    """t at each node."""
    speed: Tensor
    """dt / du."""
    size: Tensor
    """r."""
    growth: Tensor
    """d log r / du."""
    width: float
    """Distance between two nodes in u."""


_STRETCH = 3.0


def noise_nodes(sde: SDE, steps: int, eps: float) -> Nodes:
    """So many equal steps from time eps to T.

    Raises:
        ValueError: the process' noise does not grow all the way, or gives no derivative, or nothing
            of the data is left at T.
    """
    check_signal(sde, sde.T)
    ends = torch.tensor([eps, sde.T], dtype=torch.float64)
    first, last = torch.asinh(-log_snr(sde, ends) / _STRETCH)
    u = torch.lerp(first, last, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    times = time_at(sde, -_STRETCH * torch.sinh(u))
    times[0], times[-1] = ends  # exact, where bisection is not
    with recording():
        t = times.clone().requires_grad_()
        scale, std = marginal_coeffs(sde, t)
        if not (scale.requires_grad or std.requires_grad):
            raise ValueError(
                f"marginal_prob(x, t) of {sde!r} should be differentiable in t, as steps in the "
                "noise level need: use the adaptive solver, without a number of steps"
            )
        size = torch.sqrt(scale**2 + std**2)
        slopes = [
            torch.autograd.grad(f.sum(), t, retain_graph=True, materialize_grads=True)[0]
            for f in (torch.asinh(torch.log(std / scale) / _STRETCH), torch.log(size))
        ]
    speed = 1 / slopes[0]
    if not bool((speed > 0).logical_and(speed < math.inf).all()):
        raise ValueError(
            f"the noise of {sde!r} should grow from time {eps:g} to {sde.T:g}, as steps in its "
            "level need: use the adaptive solver, without a number of steps"
        )
    return Nodes(times, speed, size.detach(), slopes[1] * speed, float(last - first) / steps)
