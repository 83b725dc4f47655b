"""Samplers with few evaluations of the network, in the variables in which its noise is linear.

For x_t = m x_0 + s z, let lambda = log(m / s), half the logarithm of the signal-to-noise ratio.
The probability flow is then solved exactly from one time to another but for the denoised
D = E[x_0 | x_t], of which every solver makes its own guess:

    x' = s'/s x + m' (1 - e^-h) D,  h = lambda' - lambda.

A solver is a class with one method, `step`; `sampling.run_updates` is the loop.  All are for any
process whose mean is m(t) x_0, need continuous time or a network that is good off its grid, and
take their coefficients from tables that are made once, on the host.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.utils import device_of
from sampling import (
    Constraint,
    Noise,
    register_sampler,
    run_updates,
    score_fns,
    start,
    with_gradients,
    without_wraps,
)
from sde_lib import SDE
from utils.tensors import batch_mul


def register_solver(name: str) -> Callable:
    """Class decorator: `sampling.method = name` then stands for a solver."""

    def add(solver: type[Solver]) -> type[Solver]:
        def from_config(config, sde, shape, inverse_scaler, **options):
            sampling = config.sampling
            steps, grid = sampling.get("num_steps", 0) or sde.N, sampling.get("time_grid", "")
            options |= solver.settings(config)
            return get_solver_sampler(
                sde, shape, solver, inverse_scaler, steps, grid=grid, **options
            )

        # One class, one entry: that a module may be loaded again is known by these names.
        from_config.__module__, from_config.__qualname__ = solver.__module__, solver.__qualname__
        register_sampler(from_config, name=name)
        return solver

    return add


def marginal_coeffs(sde: SDE, times: Tensor) -> tuple[Tensor, Tensor]:
    """m and s at times (N,), each (N,)."""
    return sde.marginal_prob(torch.ones_like(times), times)


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


# What grids are uniform in, as functions of lambda, and the inverse functions.
_GRIDS = {
    "log_snr": (lambda y: y, lambda y: y),
    "edm": (lambda y: torch.exp(-y / 7), lambda y: -7 * torch.log(y)),
    # The local error of a second-order step falls like exp(-2 |lambda|); spreading it evenly asks
    # for steps as dense as exp(-2/3 |lambda|).  On mixtures a little more, 3/4, does better.
    "arctan": (
        lambda y: torch.atan(torch.exp(-0.75 * y)),
        lambda y: -torch.log(torch.tan(y)) / 0.75,
    ),
}


def time_grid(
    sde: SDE, steps: int, eps: float, kind: str, start_time: float | None = None
) -> Tensor:
    """Times from the first to eps.

    Args:
        steps: number of steps between them.
        kind: "uniform" in time; "log_snr", uniform in lambda; "edm", uniform in (s / m)^(1/7)
            [Karras et al. 2022]; or "arctan", uniform in arctan((s / m)^(3/4)): dense where s and
            m are alike, which is where most of an image appears.
        start_time: the first time; None is T.
    Returns:
        (steps + 1,), float64, on the CPU.
    Raises:
        ValueError: an unknown kind, no step, or a start that is not after eps.
    """
    first = sde.T if start_time is None else start_time
    if steps < 1 or not eps < first <= sde.T:
        raise ValueError(
            f"{steps} steps from time {first:g} to {eps:g} cannot be made: there is at least one, "
            f"and it starts after {eps:g} and not after {sde.T:g}"
        )
    ends = torch.tensor([first, eps], dtype=torch.float64)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if kind == "uniform":
        return torch.lerp(ends[0], ends[1], share)
    if kind not in _GRIDS:
        known = ", ".join(map(repr, sorted([*_GRIDS, "uniform"])))
        raise ValueError(f"unknown time grid {kind!r}: known are {known}")
    to_even, from_even = _GRIDS[kind]
    low, high = to_even(log_snr(sde, ends))
    times = time_at(sde, from_even(torch.lerp(low, high, share)))
    times[0], times[-1] = ends  # not as bisection finds them
    return times


class Solver(abc.ABC):
    """Steps along a grid of times; one object makes one run.

    Args:
        sde: the forward process.
        score_fn: function of (x, t) giving the score.
        times: the grid, (N + 1,), as by `time_grid`.
        device: where x is.
        noise: where standard normal noise comes from; called like `torch.randn_like`.
    Attributes:
        grid: the kind of grid that suits the method.
    """

    grid = "log_snr"

    @staticmethod
    def settings(config) -> dict:
        """Keywords of the class, as `config.sampling` sets them."""
        return {}

    def __init__(
        self, sde: SDE, score_fn: Callable, times: Tensor, device: torch.device, noise: Noise
    ):
        self.sde, self.score_fn, self.noise = sde, score_fn, noise
        self.times = times.to(device, torch.float32)
        # Python numbers: they multiply tensors wherever those are.
        self.m, self.s = (coeff.tolist() for coeff in marginal_coeffs(sde, times))
        self.h = log_snr(sde, times).diff().tolist()
        self.made = 0

    def update(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The next step, for `run_updates`."""
        x = self.step(x, self.made)
        self.made += 1
        return x, x

    @abc.abstractmethod
    def step(self, x: Tensor, i: int) -> Tensor:
        """x at time i + 1 of the grid from x at time i; both (B, *D)."""

    def denoised(self, x: Tensor, i: int) -> Tensor:
        """E[x_0 | x_t = x] at time i of the grid, (B, *D)."""
        return self.denoised_at(x, self.times[i])

    def denoised_at(self, x: Tensor, time: Tensor) -> Tensor:
        """E[x_0 | x_t = x] at a time, 0-d."""
        t = time.expand(x.shape[0])
        return self.sde.denoised(x, t, self.score_fn(x, t))

    def flow(self, x: Tensor, denoised: Tensor, i: int) -> Tensor:
        """x at time i + 1 if `denoised` is right all along the step."""
        ratio = self.s[i + 1] / self.s[i]
        return ratio * x - self.m[i + 1] * math.expm1(-self.h[i]) * denoised


@register_solver(name="ddim")
class DDIM(Solver):
    """D as at the start of the step: first order.  [Song et al. 2021, *DDIM*]"""

    def step(self, x: Tensor, i: int) -> Tensor:
        return self.flow(x, self.denoised(x, i), i)


@register_solver(name="heun")
class Heun(Solver):
    """The trapezoidal rule in s / m, with churn: second order.  [Karras et al. 2022, algorithm 2]

    A step evaluates the network twice.

    Args:
        churn: noise that is added before steps, S_churn, in all of them; 0 is the ODE.
    """

    grid = "edm"

    @staticmethod
    def settings(config) -> dict:
        return {"churn": config.sampling.get("churn", 0.0)}

    def __init__(self, *run, churn: float = 0.0):
        super().__init__(*run)
        *_, times, device, _ = run
        self.gamma = min(churn / (len(times) - 1), math.sqrt(2) - 1)
        sigma = torch.exp(-log_snr(self.sde, times))
        # Of what there is after noise was added, but never more than at T.
        sigma_hat = (sigma * (1 + self.gamma)).clamp(max=sigma[0])
        t_hat = time_at(self.sde, -torch.log(sigma_hat)) if self.gamma else times
        self.added = (sigma_hat**2 - sigma**2).sqrt().tolist()
        self.m_hat = marginal_coeffs(self.sde, t_hat)[0].tolist()
        self.sigma, self.sigma_hat = sigma.tolist(), sigma_hat.tolist()
        self.t_hat = t_hat.to(device, torch.float32)

    def step(self, x: Tensor, i: int) -> Tensor:
        y, here, there = x / self.m[i], self.sigma_hat[i], self.sigma[i + 1]
        if self.gamma:
            y = y + self.added[i] * self.noise(x)
        slope = (y - self.denoised_at(self.m_hat[i] * y, self.t_hat[i])) / here
        width = there - here
        ahead = y + width * slope
        slope_ahead = (ahead - self.denoised(self.m[i + 1] * ahead, i + 1)) / there
        return self.m[i + 1] * (y + width / 2 * (slope + slope_ahead))


class _Multistep(Solver):
    """Guesses D along a step from what it was at the times before."""

    order: int

    def __init__(self, *run):
        super().__init__(*run)
        self.history: list[Tensor] = []

    def remember(self, denoised: Tensor) -> list[Tensor]:
        """The latest values of D, the newest first; as many as the order asks for."""
        self.history = [denoised, *self.history][: self.order]
        return self.history


@register_solver(name="dpmpp_2m")
class DPMSolver2M(_Multistep):
    """D as a line through the last two values: second order.  [Lu et al. 2022, DPM-Solver++]"""

    order = 2

    def step(self, x: Tensor, i: int) -> Tensor:
        latest, *before = self.remember(self.denoised(x, i))
        if before:
            latest = latest + self.h[i] / (2 * self.h[i - 1]) * (latest - before[0])
        return self.flow(x, latest, i)


@register_solver(name="dpmpp_3m")
class DPMSolver3M(_Multistep):
    """D as a parabola through the last three values: third order.  [Lu et al. 2022]"""

    order = 3

    def step(self, x: Tensor, i: int) -> Tensor:
        values, h, m = self.remember(self.denoised(x, i)), self.h, self.m[i + 1]
        x = self.flow(x, values[0], i)
        if len(values) == 1:
            return x
        slope = (values[0] - values[1]) / h[i - 1]
        # Integrals over the step of e^(lambda - lambda') times 1, u and u^2 / 2, u from its start.
        phi_1 = -math.expm1(-h[i])
        phi_2 = h[i] - phi_1
        phi_3 = h[i] ** 2 / 2 - phi_2
        if len(values) == 2:
            return x + m * phi_2 * slope
        slope_before = (values[1] - values[2]) / h[i - 2]
        bend = (slope - slope_before) / (h[i - 1] + h[i - 2])  # half the second derivative
        return x + m * (phi_2 * (slope + h[i - 1] * bend) + 2 * phi_3 * bend)


@register_solver(name="dpmpp_sde")
class DPMSolverSDE(_Multistep):
    """The reverse SDE with D as a line through the last two values.  [Lu et al. 2022]

    Noise is exact: where D is constant, so are samples in distribution, whatever the step.
    """

    order = 2

    def step(self, x: Tensor, i: int) -> Tensor:
        latest, *before = self.remember(self.denoised(x, i))
        if before:
            latest = latest + self.h[i] / (2 * self.h[i - 1]) * (latest - before[0])
        keep = self.s[i + 1] / self.s[i] * math.exp(-self.h[i])
        lost = -math.expm1(-2 * self.h[i])
        x = keep * x + self.m[i + 1] * lost * latest
        return x + self.s[i + 1] * math.sqrt(lost) * self.noise(x)


def get_solver_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    solver: type[Solver],
    inverse_scaler: Callable,
    steps: int,
    *,
    grid: str = "",
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    differentiable: bool = False,
    **settings,
) -> Callable:
    """Sampling by a solver of few steps.

    Args:
        sde: the forward process; its N says nothing about the steps.
        solver: a class of this module, or of one's own.
        steps: number of steps.
        grid: kind of time grid, see `time_grid`; "" is the solver's own.
        denoise: end with the denoised x, E[x_0 | x_t], for one evaluation more.
        constraints: what samples are to satisfy; here only by a guided score.
        settings: keywords of the solver.
        shape, inverse_scaler, continuous, eps, device, start_time, differentiable: as for
            `sampling.get_ode_sampler`.
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples (B, *D), evaluations)`.
    Raises:
        ValueError: a grid that cannot be made, or a constraint that acts on updates.
    """
    without_wraps(constraints)
    times = time_grid(sde, steps, eps, grid or solver.grid, start_time)

    @with_gradients(differentiable)
    def sample(model, z=None, *, noise=None, progress=False):
        where = device_of(model) if device is None else torch.device(device)
        counted, score_fn = score_fns(sde, model, continuous, constraints, differentiable)
        run = solver(sde, score_fn, times, where, noise or torch.randn_like, **settings)
        x = start(sde, shape, where, z, run.times[0], noise, constraints)
        x, _ = run_updates(x, run.times[:-1], [run.update], progress)
        if denoise:
            x = run.denoised(x, steps)
        return inverse_scaler(x), counted.evaluations

    return sample


def get_adaptive_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.01,
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    differentiable: bool = False,
) -> Callable:
    """The reverse SDE with steps as long as they can be.  [Jolicoeur-Martineau et al. 2021]

    Each sample has steps of its own.  A step is Euler and Maruyama's, x', and again with the drift
    and diffusion at its end; their mean x'' is kept where it differs from x' by less than
    max(atol, rtol |x'|) in the root mean square.

    Args:
        rtol, atol: tolerances; the absolute one is in the network's range, of which 0.0078 is a
            grey level of centred images.
        first_step: in units of T.
        denoise: end with the denoised x, for one evaluation more.
        sde, ..., differentiable: as for `get_solver_sampler`.
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples (B, *D), evaluations)`.
    Raises:
        ValueError: a constraint acts on updates.
    """
    without_wraps(constraints)
    start_time = sde.T if start_time is None else start_time

    @with_gradients(differentiable)
    def sample(model, z=None, *, noise=None, progress=False):
        where = device_of(model) if device is None else torch.device(device)
        counted, score_fn = score_fns(sde, model, continuous, constraints, differentiable)
        draw, reverse = noise or torch.randn_like, sde.reverse(score_fn).sde
        first = torch.tensor(start_time, dtype=torch.float32, device=where)
        x = start(sde, shape, where, z, first, noise, constraints)
        t = first.repeat(x.shape[0])
        h = torch.full_like(t, first_step * sde.T)
        path, before = _BrownianPath(x, h), x
        while bool((t > eps).any()):
            h = torch.minimum(h, t - eps)
            euler, improved = _stochastic_heun(reverse, x, t, h, path.increment(h, draw(x)))
            allowed = rtol * torch.maximum(euler.abs(), before.abs())
            relative = (euler - improved) / allowed.clamp(min=atol)
            error = relative.detach().flatten(1).square().mean(1).sqrt()
            accepted = (error <= 1) & (t > eps)
            path.settle(accepted)
            x = torch.where(_like(accepted, x), improved, x)
            before = torch.where(_like(accepted, x), euler, before)
            t = torch.where(accepted, torch.where(h == t - eps, eps, t - h), t)
            h = h * (0.9 * error.clamp(min=1e-6) ** -0.9)
        if denoise:
            x = sde.denoised(x, t, score_fn(x, t))
        return inverse_scaler(x), counted.evaluations

    return sample


class _BrownianPath:
    """Increments of a Brownian motion, which a step that is rejected does not forget.

    With new noise after each rejection, noise that goes in the direction of larger tolerances would
    be accepted more often, and samples would spread.  What is remembered is the increment over one
    stretch of time ahead, of a length of its own for each sample; within it the path is a Brownian
    bridge.
    """

    def __init__(self, x: Tensor, h: Tensor):
        self.length, self.ahead = torch.zeros_like(h), torch.zeros_like(x)

    def increment(self, h: Tensor, z: Tensor) -> Tensor:
        """The increment over the next h (B,), (B, *D), for which z ~ N(0, I) may be needed."""
        self.inside = h < self.length
        share = torch.where(self.inside, h / self.length.clamp(min=1e-12), 1.0)
        variance = torch.where(self.inside, (1 - share) * h, h - self.length)
        self.h, self.step = h, batch_mul(share, self.ahead) + batch_mul(variance.sqrt(), z)
        return self.step

    def settle(self, accepted: Tensor) -> None:
        """Go ahead where the step was accepted, (B,); remember its increment elsewhere."""
        inside = _like(self.inside, self.step)
        gone = torch.where(inside, self.ahead - self.step, torch.zeros_like(self.step))
        kept = torch.where(inside, self.ahead, self.step)
        self.ahead = torch.where(_like(accepted, self.step), gone, kept)
        left = (self.length - self.h).clamp(min=0)
        self.length = torch.where(accepted, left, torch.maximum(self.length, self.h))


def _stochastic_heun(reverse: Callable, x: Tensor, t: Tensor, h: Tensor, increment: Tensor):
    """Euler and Maruyama's step, and the mean of it and of one with what there is at its end.

    The increment is that of the Brownian motion over the step, (B, *D).
    """

    def moved(drift: Tensor, diffusion: Tensor) -> Tensor:
        return x - batch_mul(h, drift) + batch_mul(diffusion, increment)

    euler = moved(*reverse(x, t))
    return euler, (euler + moved(*reverse(euler, t - h))) / 2


def _like(condition: Tensor, x: Tensor) -> Tensor:
    """A condition on samples, (B,), for each of their entries."""
    return condition.reshape(-1, *(1,) * (x.dim() - 1))


@register_sampler(name="adaptive")
def _adaptive_from_config(config, sde, shape, inverse_scaler, **options):
    tolerances = {
        "rtol": config.sampling.get("adaptive_rtol", 0.05),
        "atol": config.sampling.get("adaptive_atol", 0.0078),
    }
    return get_adaptive_sampler(sde, shape, inverse_scaler, **tolerances, **options)
