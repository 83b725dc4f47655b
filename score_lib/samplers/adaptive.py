"""Samplers that choose their own steps: the probability flow by RK45, and the reverse SDE."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.ode import check_tolerances, integrate
from score_lib.base.tensors import batch_mul, over_sides, rows
from score_lib.parametrization import Parametrization
from score_lib.samplers.loop import Callback, Constraint, sampler_of, without_wraps
from score_lib.sdes.coefficients import check_levels, has_scaled_mean
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE


def get_ode_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    *,
    continuous: bool = True,
    per_sample: bool = False,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    differentiable: bool = False,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """Sampling by integrating the probability-flow ODE.  [S21, section 4.3, appendix D.1]

    Args:
        denoise: end with the denoised x, E[x_0 | x_t], for one evaluation more.
        rtol, atol: tolerances of the solver.
        method: "RK45", on the device, or another of SciPy's solvers, on the host.
        eps: time at which integration stops.
        per_sample: control each sample's error separately.
        constraints: conditions on samples; here only by a guided score.
        start_time: time at which integration starts; None is T.
        differentiable: keep the graph for a gradient of the samples; requires "RK45".
        others: see `sampler_of`.
    Returns:
        see `sampler_of`; z is the latent code x_T.  `progress` is a no-op: the number of solver
        steps is not known beforehand.
    Raises:
        ValueError: a constraint changes steps, which an ODE does not have.
    """
    without_wraps(constraints)
    sde = as_process(sde)
    start_time = sde.T if start_time is None else start_time
    sde.check_times(*sorted((eps, start_time)), shape)  # an encoder goes forwards
    check_levels(sde, continuous)

    def follow(x, score_fn, noise, *, progress, callback):
        _without_callback(callback)
        dtype = x.dtype
        drift = flow_drift(sde, score_fn, dtype)
        tolerances = {"rtol": rtol, "atol": atol, "method": method, "per_sample": per_sample}
        x, _ = integrate(drift, x.double(), start_time, eps, **tolerances)
        x = x.to(dtype)
        if denoise:
            t = torch.full((x.shape[0],), eps, dtype=dtype, device=x.device)
            x = _denoised(sde, score_fn, x, t)
        return x

    shared = continuous, device, constraints, differentiable, parametrization
    return sampler_of(sde, shape, inverse_scaler, follow, start_time, *shared)


def _denoised(sde: SDE, score_fn: Callable, x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t]; as published, the mean of a step of the chain where Tweedie's formula is not
    that of the process."""
    if has_scaled_mean(sde, x):
        return sde.denoised(x, t, score_fn(x, t))
    return x - sde.reverse(score_fn).discretize(x, t)[0]


def flow_drift(sde: SDE, score_fn: Callable, dtype: torch.dtype) -> Callable:
    """`drift(t, x)` of the probability flow, for the solver: evaluated in the given dtype."""
    flow = sde.reverse(score_fn, probability_flow=True)
    return lambda t, x: flow.sde(x.to(dtype), t.to(dtype))[0]


# The published algorithm sets no limit.  In one dimension an error is sometimes near 0 by chance;
# a step that then grows a thousandfold may pass by chance again: samples spread by 20% and more.
_GROW_MOST = 1.3


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
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """The reverse SDE with steps as long as they can be.  [Jolicoeur-Martineau et al. 2021]

    Each sample has its own step size.  A step computes Euler-Maruyama's x' and repeats it with the
    drift and diffusion at x'; their mean x'' is accepted where it differs from x' by less than
    max(atol, rtol |x'|) in the root mean square.

    Args:
        rtol, atol: tolerances; the absolute one is in the network's range, where 0.0078 is one
            grey level of centred images.
        first_step: in units of T.
        denoise: end with the denoised x, for one evaluation more.
        others: see `get_ode_sampler`, and `sampler_of`, which documents the returned `sample`.
    Raises:
        ValueError: a constraint changes steps, or as in `check_tolerances`.
        FloatingPointError: while sampling, if the score is not finite.
    """
    without_wraps(constraints)
    check_tolerances(rtol, atol)
    sde = as_process(sde)
    start_time = sde.T if start_time is None else start_time
    sde.check_times(eps, start_time, shape)
    check_levels(sde, continuous)

    def follow(x, score_fn, noise, *, progress, callback):
        _without_callback(callback)
        x, t = _integrate(x, sde.reverse(score_fn).sde, noise, start_time, eps, **steps)
        return _denoised(sde, score_fn, x, t) if denoise else x

    steps = {"rtol": rtol, "atol": atol, "first_step": first_step * sde.T}
    shared = continuous, device, constraints, differentiable, parametrization
    return sampler_of(sde, shape, inverse_scaler, follow, start_time, *shared)


def _integrate(x, reverse, noise, start_time, eps, *, rtol, atol, first_step):
    """x and t, (B,), at eps, from x at the start."""
    t = torch.full((x.shape[0],), start_time, dtype=x.dtype, device=x.device)
    h = torch.full_like(t, first_step)
    path, before = BrownianPath(x, h), x
    while _goes_on(t, h, eps):
        h = torch.minimum(h, t - eps)
        euler, improved = stochastic_heun(reverse, x, t, h, path.increment(h, noise(x)))
        allowed = rtol * torch.maximum(euler.abs(), before.abs())
        relative = (euler - improved) / allowed.clamp(min=atol)
        error = rows(relative.detach()).square().mean(1).sqrt()
        accepted = (error <= 1) & (t > eps)
        path.settle(accepted)
        x = torch.where(over_sides(accepted, x), improved, x)
        before = torch.where(over_sides(accepted, x), euler, before)
        t = torch.where(accepted, torch.where(h == t - eps, eps, t - h), t)
        h = h * (0.9 * error.clamp(min=1e-6) ** -0.9).clamp(max=_GROW_MOST)
    return x, t


def _goes_on(t: Tensor, h: Tensor, eps: float) -> bool:
    """Whether a sample is still on its way to eps; the host reads the device once.

    Raises:
        FloatingPointError: one of them cannot move by its step h.
    """
    left = t > eps
    stuck = left & ~(t - h < t)  # also by a step that is no number
    goes_on, some_stuck = torch.stack([left.any(), stuck.any()]).tolist()
    if some_stuck:
        raise FloatingPointError(
            f"the reverse SDE cannot be integrated beyond t = {t[stuck].max():.3g}: the step has "
            "become smaller than rounding; is the score finite there?"
        )
    return goes_on


class BrownianPath:
    """Increments of a Brownian motion that survive rejected steps.

    Redrawing after a rejection biases samples towards easily accepted increments.  So each sample
    keeps the increment over the interval it tried last; shorter steps within it are drawn from the
    Brownian bridge.
    """

    def __init__(self, x: Tensor, h: Tensor):
        self.length, self.ahead = torch.zeros_like(h), torch.zeros_like(x)

    def increment(self, h: Tensor, z: Tensor) -> Tensor:
        """The increment over the next h (B,): (B, *D), drawn with z ~ N(0, I) where it is new."""
        self.inside = h < self.length
        share = torch.where(self.inside, h / self.length.clamp(min=1e-12), 1.0)
        variance = torch.where(self.inside, (1 - share) * h, h - self.length)
        self.h, self.step = h, batch_mul(share, self.ahead) + batch_mul(variance.sqrt(), z)
        return self.step

    def settle(self, accepted: Tensor) -> None:
        """Advance where the step was accepted, (B,); keep its increment elsewhere."""
        inside = over_sides(self.inside, self.step)
        gone = torch.where(inside, self.ahead - self.step, 0.0)
        kept = torch.where(inside, self.ahead, self.step)
        self.ahead = torch.where(over_sides(accepted, self.step), gone, kept)
        left = (self.length - self.h).clamp(min=0)
        self.length = torch.where(accepted, left, torch.maximum(self.length, self.h))


def stochastic_heun(reverse: Callable, x: Tensor, t: Tensor, h: Tensor, increment: Tensor):
    """The Euler-Maruyama step, and its mean with a step that uses the coefficients at its end.

    Args:
        increment: of the Brownian motion over the step, (B, *D).
    """

    def moved(drift: Tensor, diffusion: Tensor) -> Tensor:
        return x - batch_mul(h, drift) + batch_mul(diffusion, increment)

    euler = moved(*reverse(x, t))
    return euler, (euler + moved(*reverse(euler, t - h))) / 2


def _without_callback(callback: Callback | None) -> None:
    """ValueError for a callback, in a sampler that chooses its steps on the way."""
    if callback is not None:
        raise ValueError(
            "this sampler chooses its steps as it goes and takes no callback: use "
            "sampling.method = 'pc' or one of the solvers"
        )
