"""Sampling by the probability-flow ODE.  [S21, section 4.3, appendix D.1]"""

from collections.abc import Callable, Sequence

import torch

from score_lib.base.ode import integrate
from score_lib.samplers.loop import Constraint, sampler_of, without_callback, without_wraps
from score_lib.samplers.predictors import ReverseDiffusionPredictor
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
) -> Callable:
    """Sampling by integrating the probability-flow ODE.  [S21, section 4.3, appendix D.1]

    Args:
        denoise: end with one reverse-diffusion step without its noise.
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

    def follow(x, score_fn, noise, *, progress, callback):
        without_callback(callback)
        dtype = x.dtype
        drift = flow_drift(sde, score_fn, dtype)
        tolerances = {"rtol": rtol, "atol": atol, "method": method, "per_sample": per_sample}
        x, _ = integrate(drift, x.double(), start_time, eps, **tolerances)
        x = x.to(dtype)
        if denoise:
            last = ReverseDiffusionPredictor(sde, score_fn)
            _, x = last.update_fn(x, torch.full((x.shape[0],), eps, device=x.device))
        return x

    shared = continuous, device, constraints, differentiable
    return sampler_of(sde, shape, inverse_scaler, follow, start_time, *shared)


def flow_drift(sde: SDE, score_fn: Callable, dtype: torch.dtype) -> Callable:
    """`drift(t, x)` of the probability flow, for the solver: evaluated in the given dtype."""
    flow = sde.reverse(score_fn, probability_flow=True)
    return lambda t, x: flow.sde(x.to(dtype), t.to(dtype))[0]
