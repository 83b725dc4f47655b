"""Samplers of few evaluations, in the variables in which the network's noise is linear.

For x_t = m x_0 + s z, let lambda = log(m / s), half the logarithm of the signal-to-noise ratio.
From time t to time t' the probability flow has the exact solution

    x' = s'/s x + m' (1 - e^-h) D,  h = lambda' - lambda,

if the denoised D = E[x_0 | x_t] is constant on the way; solvers differ in how they approximate D.

They work for any process whose mean is m(t) x_0, and need a network of continuous time or one that
is good between its discrete noise levels.
"""

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.parametrization import Parametrization
from score_lib.samplers.grids import along, time_grid
from score_lib.samplers.loop import (
    Constraint,
    Noise,
    run_steps,
    sampler_of,
    without_wraps,
)
from score_lib.sdes.coefficients import check_levels, check_scaled_mean, marginal_coeffs
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE
from score_lib.sdes.snr import check_signal, log_snr, time_at


class Solver(abc.ABC):
    """Steps along a grid of times; one object makes one run.

    Args:
        score_fn: function of (x, t) giving the score.
        times: the grid, (N + 1,), as by `time_grid`.
        noise: source of standard normal noise, called like `torch.randn_like`.
    Attributes:
        grid: the kind of grid that suits the method.
    """

    grid = "log_snr"

    def __init__(self, sde: SDE, score_fn: Callable, times: Tensor, noise: Noise):
        self.sde, self.score_fn, self.times, self.noise = sde, score_fn, times, noise

    @abc.abstractmethod
    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """x at time s from x at time t, and its mean without the step's noise; both (B, *D)."""

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x], (B, *D)."""
        return self.sde.denoised(x, t, self.score_fn(x, t))

    # Coefficients are computed in float64: h is a difference, and phi_3 below one of differences.

    def width(self, t: Tensor, s: Tensor) -> Tensor:
        """h = lambda(s) - lambda(t), (B,), in float64."""
        return log_snr(self.sde, s.double()) - log_snr(self.sde, t.double())

    def flow(self, x: Tensor, denoised: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at time s, if `denoised` is constant on the way."""
        _, std = marginal_coeffs(self.sde, t.double())
        scale, std_s = marginal_coeffs(self.sde, s.double())
        gain = -scale * torch.expm1(-self.width(t, s))
        return _mul(std_s / std, x) + _mul(gain, denoised)


def _mul(a: Tensor, x: Tensor) -> Tensor:
    return batch_mul(a.to(x.dtype), x)


class DDIM(Solver):
    """D as at the start of the step: first order.  [Song et al. 2021, *DDIM*]"""

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x = self.flow(x, self.denoised(x, t), t, s)
        return x, x


class Heun(Solver):
    """The trapezoidal rule in s / m, with churn: second order.  [Karras et al. 2022, algorithm 2]

    A step evaluates the network twice.

    Args:
        churn: S_churn, noise added before each step; 0 is the ODE.
    """

    grid = "edm"

    def __init__(self, *run, churn: float = 0.0):
        super().__init__(*run)
        times = self.times.double()
        self.gamma = min(churn / (len(times) - 1), math.sqrt(2) - 1)
        sigma = torch.exp(-log_snr(self.sde, times))
        # sigma after churn, capped at sigma(T).
        raised = (sigma * (1 + self.gamma)).clamp(max=sigma[0])
        self.raised_times = time_at(self.sde, -torch.log(raised)) if self.gamma else times

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t_hat = self._after_churn(t)
        here, raised, there = (torch.exp(-log_snr(self.sde, u.double())) for u in (t, t_hat, s))
        scale, scale_hat, scale_s = (
            marginal_coeffs(self.sde, u.double())[0] for u in (t, t_hat, s)
        )
        y = _mul(1 / scale, x)
        if self.gamma:
            y = y + _mul((raised**2 - here**2).clamp(min=0).sqrt(), self.noise(x))
        slope = _mul(1 / raised, y - self.denoised(_mul(scale_hat, y), t_hat))
        ahead = y + _mul(there - raised, slope)
        slope_ahead = _mul(1 / there, ahead - self.denoised(_mul(scale_s, ahead), s))
        x = _mul(scale_s, y + _mul((there - raised) / 2, slope + slope_ahead))
        return x, x

    def _after_churn(self, t: Tensor) -> Tensor:
        """The time whose noise level is that of time t of the grid after churn, (B,)."""
        if not self.gamma:
            return t
        place = (self.times[:, None] - t[:1]).abs().argmin(0)
        return self.raised_times[place].to(t.dtype).expand(t.shape)


class _Multistep(Solver):
    """Extrapolates D along a step from its values at the times before."""

    order: int

    def __init__(self, *run):
        super().__init__(*run)
        self.values: list[Tensor] = []
        self.widths: list[Tensor] = []

    def remember(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The latest values of D and widths h of steps, this step's first, as many as needed."""
        self.values = [self.denoised(x, t), *self.values][: self.order]
        self.widths = [self.width(t, s), *self.widths][: self.order]
        return self.values, self.widths


class _Linear(_Multistep):
    """D as a line through the last two values."""

    order = 2

    def middle(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """D half-way through the step."""
        (latest, *before), (h, *h_before) = self.remember(x, t, s)
        if before:
            latest = latest + _mul(h / (2 * h_before[0]), latest - before[0])
        return latest


class DPMSolver2M(_Linear):
    """D as a line through the last two values: second order.  [Lu et al. 2022, DPM-Solver++]"""

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x = self.flow(x, self.middle(x, t, s), t, s)
        return x, x


class DPMSolver3M(_Multistep):
    """D as a parabola through the last three values: third order.  [Lu et al. 2022]"""

    order = 3

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        values, h = self.remember(x, t, s)
        x = self.flow(x, values[0], t, s)
        if len(values) == 1:
            return x, x
        m, _ = marginal_coeffs(self.sde, s.double())
        slope = _mul(1 / h[1], values[0] - values[1])
        # Integrals over the step of e^(lambda - lambda') times 1, u and u^2 / 2, u from its start.
        phi_1 = -torch.expm1(-h[0])
        phi_2 = h[0] - phi_1
        phi_3 = h[0] ** 2 / 2 - phi_2
        if len(values) == 2:
            x = x + _mul(m * phi_2, slope)
            return x, x
        slope_before = _mul(1 / h[2], values[1] - values[2])
        bend = _mul(1 / (h[1] + h[2]), slope - slope_before)  # half the second derivative
        x = x + _mul(m * phi_2, slope) + _mul(m * (phi_2 * h[1] + 2 * phi_3), bend)
        return x, x


class DPMSolverSDE(_Linear):
    """The reverse SDE with D as a line through the last two values.  [Lu et al. 2022]

    Noise is exact: where D is constant, samples have the right distribution for any step.
    """

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        middle, h = self.middle(x, t, s), self.width(t, s)
        _, std = marginal_coeffs(self.sde, t.double())
        scale, std_s = marginal_coeffs(self.sde, s.double())
        lost = -torch.expm1(-2 * h)
        x_mean = _mul(std_s / std * torch.exp(-h), x) + _mul(scale * lost, middle)
        return x_mean + _mul(std_s * lost.sqrt(), self.noise(x)), x_mean


def get_solver_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    solver: type[Solver],
    inverse_scaler: Callable,
    steps: int = 0,
    *,
    grid: str = "",
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    differentiable: bool = False,
    parametrization: Parametrization | str | None = None,
    **settings,
) -> Callable:
    """Sampling by a solver of few steps.

    Args:
        solver: a subclass of `Solver`.
        steps: number of steps; 0 is sde.N.
        grid: kind of time grid, see `time_grid`; "" is the solver's own.
        denoise: end with the denoised x, E[x_0 | x_t], for one evaluation more.
        constraints: conditions on samples; here only by a guided score.
        settings: keywords of the solver.
        others: see `get_ode_sampler`, and `sampler_of`, which documents the returned `sample`.
    Raises:
        ValueError: a grid that cannot be made, or a constraint that changes steps.
    """
    without_wraps(constraints)
    sde = as_process(sde)
    sde.check_times(eps, start_time, shape)
    check_levels(sde, continuous)
    check_signal(sde, sde.T if start_time is None else start_time)
    times = time_grid(sde, steps or sde.N, eps, grid or solver.grid, start_time)
    # Denoising is a step to the data.
    shown = along(sde, torch.cat([times, times.new_zeros(1)]))

    def follow(x, score_fn, noise, **watch):
        check_scaled_mean(sde, x)
        visited = times.to(x)
        run = solver(sde, score_fn, visited, noise, **settings)
        x, _ = run_steps(x, visited, [run.step], **watch)
        return run.denoised(x, visited[-1].expand(x.shape[0])) if denoise else x

    shared = continuous, device, constraints, differentiable, parametrization
    return sampler_of(shown, shape, inverse_scaler, follow, times[0], *shared)
