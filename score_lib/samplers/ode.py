"""Sampling by the probability-flow ODE.  [S21, section 4.3, appendix D.1]"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.devices import device_of
from score_lib.base.ode import integrate
from score_lib.samplers.constraints import Constraint, without_wraps
from score_lib.samplers.loop import Noise, score_fns, start, with_gradients
from score_lib.samplers.predictors import ReverseDiffusionPredictor
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
        sde: the forward process.
        shape: shape of a batch of samples, (B, *D).
        inverse_scaler: from the network's range to [0, 1].
        denoise: end with one reverse-diffusion step without its noise.
        rtol, atol: tolerances of the solver.
        method: "RK45", on the device, or another of SciPy's solvers, on the host.
        eps: time at which integration stops.
        device: where to sample; None is the network's own.
        continuous: whether the network was trained on all times.
        per_sample: control each sample's error separately.
        constraints: conditions on samples; here only by a guided score.
        start_time: time at which integration starts; None is T.
        differentiable: keep the graph for a gradient of the samples; requires "RK45".
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples (B, *D), evaluations)`;
        z is the latent code x_T (B, *D), in place of a draw from the prior.  `progress` is a no-op:
        the number of solver steps is not known beforehand.
    Raises:
        ValueError: a constraint changes steps, which an ODE does not have.
    """
    without_wraps(constraints)
    start_time = sde.T if start_time is None else start_time

    @with_gradients(differentiable)
    def sample(
        model: Callable,
        z: Tensor | None = None,
        *,
        noise: Noise | None = None,
        progress: bool = False,
    ):
        where = device_of(model) if device is None else torch.device(device)
        counted, score_fn = score_fns(sde, model, continuous, constraints, differentiable)
        first = torch.tensor(start_time, dtype=torch.float32, device=where)
        x = start(sde, shape, where, z, first, noise, constraints)
        dtype = x.dtype
        x, _ = integrate(
            flow_drift(sde, score_fn, dtype),
            x.double(),
            start_time,
            eps,
            rtol=rtol,
            atol=atol,
            method=method,
            per_sample=per_sample,
        )
        x = x.to(dtype)
        if denoise:
            last = ReverseDiffusionPredictor(sde, score_fn)
            _, x = last.update_fn(x, torch.full((x.shape[0],), eps, device=where))
        return inverse_scaler(x), counted.evaluations

    return sample


def flow_drift(sde: SDE, score_fn: Callable, dtype: torch.dtype) -> Callable:
    """`drift(t, x)` of the probability flow, for the solver: evaluated in the given dtype."""
    flow = sde.reverse(score_fn, probability_flow=True)
    return lambda t, x: flow.sde(x.to(dtype), t.to(dtype))[0]
