"""Exact log-likelihoods by the probability-flow ODE.  [S21, section 4.3, appendix D.2]

log p_0(x_0) = log p_T(x_T) + integral of div f along the flow from x_0 to x_T.  The divergence is
estimated by Hutchinson's probes, eps^T (df/dx) eps, or summed exactly for small dimensions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.affine import read_affine
from score_lib.base.gradients import check_gradient, recording
from score_lib.base.ode import integrate, integrate_nodes
from score_lib.base.tensors import normal_noise, rows, wide_floats
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import get_data_score_fn, get_model_fn
from score_lib.sdes.coefficients import check_levels
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE
from score_lib.sdes.snr import noise_nodes

# Probes with mean 0 and covariance I, made of standard normal noise.
_PROBES = {"rademacher": lambda z: torch.where(z < 0, -1.0, 1.0).to(z), "gaussian": lambda z: z}


class LogLikelihood(NamedTuple):
    """log p(x) of a batch with its terms, in nats; every field but z and nfe is (B,)."""

    total: Tensor
    """log p_0(x) = prior + divergence."""
    prior: Tensor
    """Log density of the latent code under the prior."""
    divergence: Tensor
    """Integral of the drift's divergence along the flow."""
    standard_error: Tensor
    """Of `total`, from the spread over the probes; nan for one probe, 0 for the exact trace."""
    z: Tensor
    """Latent code x_T, (B, *D)."""
    nfe: int
    """Evaluations of the network."""


def get_div_fn(fn: Callable) -> Callable:
    """`div_fn(x, t, eps)`: Hutchinson's estimate of the divergence of fn(x, t), (B,)."""

    def div_fn(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return value_and_divergence(fn, x, t, eps[None])[1][:, 0]

    return div_fn


def value_and_divergence(
    fn: Callable, x: Tensor, t: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """fn(x, t) and one estimate of its divergence a probe, from one forward pass.

    Args:
        fn: function of (x, t) giving (B, *D).
        x, t: (B, *D) and (B,).
        probes: eps with mean 0 and covariance I, (P, B, *D).
    Returns:
        fn(x, t), (B, *D), and eps^T (d fn / dx) eps, (B, P).
    Raises:
        ValueError: fn changes with x, but gives no gradient.
    """
    with recording(x, t, probes) as (x, t, probes):
        x = x.detach().requires_grad_(True)
        value = fn(x, t)
        if not value.requires_grad:
            check_gradient("the function", fn, x, t, value)
            return value, x.new_zeros(len(x), len(probes))
        products = [
            torch.autograd.grad(
                value, x, eps, retain_graph=i + 1 < len(probes), materialize_grads=True
            )[0]
            for i, eps in enumerate(probes)
        ]
    estimates = [rows(p * eps).sum(1) for p, eps in zip(products, probes, strict=True)]
    return value.detach(), torch.stack(estimates, dim=1)


def differentiable(model: Callable) -> Callable:
    """A network for evaluation that is refused at its first call if it gives no gradient.

    The drift has one all the same, of which the divergence would be that of its linear part.

    Args:
        model: a network, or any function of (x, labels).
    Returns:
        Function of (x, labels), which raises ValueError as `check_gradient` does.
    """
    model_fn, checked = get_model_fn(model), False

    def checked_fn(x: Tensor, labels: Tensor) -> Tensor:
        nonlocal checked
        output = model_fn(x, labels)
        if not checked:
            check_gradient("the network", model_fn, x, labels, output)
        checked = True
        return output

    return checked_fn


def get_log_likelihood_fn(
    sde: SDE,
    *,
    hutchinson_type: str = "Rademacher",
    num_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    continuous: bool = True,
    per_sample: bool = False,
    steps: int = 0,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """Log-likelihood of data under the probability flow, in nats.

    Args:
        hutchinson_type: "Rademacher", "Gaussian", or "exact" for the whole trace, which costs one
            backward pass a dimension.
        num_probes: independent probes; two or more give a standard error.
        rtol, atol, method: of the solver, see `base.ode.integrate`.
        eps: time at which the data is taken to be.
        continuous: whether the network was trained on all times.
        per_sample: control each sample's steps by its own error, so that its result is
            independent of the rest of the batch.
        steps: 0 is the adaptive solver.  Otherwise so many steps, equal in a variable of the noise
            level, by a method with one evaluation a step (`base.ode.integrate_nodes`); tolerances,
            method and per_sample then mean nothing.  A smooth flow needs fewer evaluations so.
        parametrization: what the network's output is, see `get_score_fn`.
    Returns:
        `log_likelihood_fn(model, data, *, noise=None) -> LogLikelihood`, for data (B, *D) in the
        network's range; noise is called like `torch.randn_like` to make the probes.
    Raises:
        ValueError: an unknown type of probe, fewer than one, or a network that gives no gradient.
    """
    sde = as_process(sde)
    kind = _kind_of_probe(hutchinson_type, num_probes)
    check_levels(sde, continuous)
    chosen = get_parametrization(parametrization)

    def log_likelihood_fn(model, data, *, noise=None):
        data = wide_floats("the data", data)
        sde.check_times(eps, shape=data.shape)
        probes = _basis(data) if kind == "exact" else _draw_probes(kind, num_probes, data, noise)
        network = differentiable(model)
        score_fn = get_data_score_fn(sde, network, False, continuous, parametrization=chosen)
        flow = sde.reverse(score_fn, probability_flow=True)

        def slope(x, t):
            drift, divergence = value_and_divergence(lambda x, t: flow.sde(x, t)[0], x, t, probes)
            return drift, divergence.sum(1, keepdim=True) if kind == "exact" else divergence

        columns = 1 if kind == "exact" else num_probes
        if steps:
            z, divergence, nfe = _in_steps(sde, slope, data, columns, eps, steps)
        else:
            solver = {"rtol": rtol, "atol": atol, "method": method, "per_sample": per_sample}
            z, divergence, nfe = _adaptively(sde, slope, data, columns, eps, solver)
        return _summarise(_log_prior(sde, z), divergence, kind == "exact", z, nfe)

    return log_likelihood_fn


# Both solve for x_T and the integrals of divergences, one a column, in double precision.


def _adaptively(sde, slope, data, columns, eps, solver) -> tuple[Tensor, Tensor, int]:
    """In time, to a tolerance."""
    size = data.shape[1:].numel()

    def joint(t, state):
        x = state[:, :size].reshape(data.shape).to(data.dtype)
        drift, divergence = slope(x, t.to(data.dtype))
        return torch.cat([rows(drift), divergence], dim=1)

    start = torch.cat([rows(data), data.new_zeros(len(data), columns)], dim=1).double()
    state, nfe = integrate(joint, start, eps, sde.T, **solver)
    return state[:, :size].reshape(data.shape).to(data.dtype), state[:, size:], nfe


def _in_steps(sde, slope, data, columns, eps, steps) -> tuple[Tensor, Tensor, int]:
    """In the noise level u, for x / r, whose divergence is that of x without d log r / du each."""
    size = data.shape[1:].numel()
    nodes = noise_nodes(sde, steps, eps)
    time, speed, r, growth = (values.tolist() for values in nodes[:4])

    def joint(k, state):
        x = (state[:, :size] * r[k]).reshape(data.shape).to(data.dtype)
        drift, divergence = slope(x, data.new_full((len(data),), time[k]))
        moved = rows(drift).double() * (speed[k] / r[k]) - growth[k] * state[:, :size]
        return torch.cat([moved, divergence.double() * speed[k] - size * growth[k]], dim=1)

    start = torch.cat([rows(data) / r[0], data.new_zeros(len(data), columns)], dim=1).double()
    state, nfe = integrate_nodes(joint, start, nodes.width, steps)
    z = (state[:, :size] * r[-1]).reshape(data.shape).to(data.dtype)
    divergence = state[:, size:] + size * math.log(r[-1] / r[0])
    return z, divergence, nfe


def get_likelihood_fn(
    sde: SDE,
    inverse_scaler: Callable,
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    *,
    levels: int = 256,
    **options,
) -> Callable:
    """Bits per dimension of data under the probability flow.

    Args:
        inverse_scaler, levels: see `offsets`.
        options: more keywords of `get_log_likelihood_fn`, which documents the others as well.
    Returns:
        `likelihood_fn(model, data, *, noise=None) -> (bits/dim (B,), z (B, *D), evaluations)`.
    """
    solver = {"rtol": rtol, "atol": atol, "method": method, "eps": eps}
    log_likelihood_fn = get_log_likelihood_fn(
        sde, hutchinson_type=hutchinson_type, **solver, **options
    )

    def likelihood_fn(model, data, *, noise=None):
        result = log_likelihood_fn(model, data, noise=noise)
        shape = data.shape[1:]
        bpd = bits_per_dim(result.total, shape.numel(), inverse_scaler, levels, shape=shape)
        return bpd, result.z, result.nfe

    return likelihood_fn


def bits_per_dim(
    log_p: Tensor,
    dimensions: int,
    inverse_scaler: Callable,
    levels: int = 256,
    *,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Bits/dim of data with a number of grey levels, from its log density in nats.

    A density over the network's range becomes one over [0, levels): dequantised data fills that
    range with unit cells, so that the density bounds the probability of a grey level from below.
    See `offsets` for the terms besides -log2 p / D.

    Args:
        log_p: log density of the data in the network's range, (B,), in nats.
        dimensions: number D of dimensions of the data.
        inverse_scaler, levels, shape: see `offsets`.
    Returns:
        Bits/dim, (B,).
    Raises:
        ValueError: the inverse scaler is not affine.
    """
    terms = offsets(inverse_scaler, levels, shape=shape, device=log_p.device)
    return -log_p / (dimensions * math.log(2)) + sum(terms)


def offsets(
    inverse_scaler: Callable,
    levels: int = 256,
    *,
    shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Offsets added to -log2 p / D: log2(levels) for dequantisation, and for scaling the mean of
    log2 |a| over dimensions, where the inverse scaler is x -> a x + b.

    Args:
        inverse_scaler: from the network's range to [0, 1]; affine, where each dimension may have an
            a and b of its own.
        levels: grey levels of the data.
        shape: of one datum, D; needed where the inverse scaler takes no other shape.
        device: of the data.
    Raises:
        ValueError: the inverse scaler is not affine.
    """
    return math.log2(levels), read_affine(inverse_scaler, shape, device).mean_log2()


def _kind_of_probe(hutchinson_type: str, num_probes: int) -> str:
    """The kind of probe in lower case; ValueError lists the known ones."""
    kind = str(hutchinson_type).lower()
    if kind not in (*_PROBES, "exact"):
        raise ValueError(
            f"unknown hutchinson_type {hutchinson_type!r}: known are 'Rademacher', 'Gaussian' "
            "and 'exact'"
        )
    if num_probes < 1:
        raise ValueError(f"at least one probe is needed, not {num_probes}")
    return kind


def _draw_probes(kind: str, count: int, data: Tensor, noise: Callable | None) -> Tensor:
    """(P, B, *D) probes; without a source of noise, from PyTorch's global generator."""
    if noise is None and kind == "rademacher":
        return 2.0 * torch.stack([torch.randint_like(data, 2) for _ in range(count)]) - 1.0
    draws = torch.stack([normal_noise(noise)(data) for _ in range(count)])
    return _PROBES[kind](draws)


def _basis(data: Tensor) -> Tensor:
    """The D unit vectors of the data's space, (D, B, *D)."""
    size = data.shape[1:].numel()
    unit = torch.eye(size, dtype=data.dtype, device=data.device)
    return unit.reshape(size, 1, *data.shape[1:]).expand(-1, *data.shape)


def _log_prior(sde: SDE, z: Tensor) -> Tensor:
    """The prior's log density at z, (B,).  ValueError: it gives no number for each sample."""
    prior = torch.as_tensor(sde.prior_logp(z))
    if prior.shape != z.shape[:1]:
        raise ValueError(
            f"prior_logp(z) of {sde!r} gives {tuple(prior.shape)} for z of {tuple(z.shape)}: it "
            "should sum over all sides but the first, and give one number for each sample, (B,)"
        )
    return prior


def _summarise(prior, divergences, exact, z, nfe) -> LogLikelihood:
    divergence = divergences.mean(1)
    probes = divergences.shape[1]
    if exact:
        error = torch.zeros_like(divergence)
    elif probes == 1 or not len(divergences):  # one probe says nothing about its own error
        error = torch.full_like(divergence, torch.nan)
    else:
        error = divergences.std(1) / math.sqrt(probes)
    prior = prior.double()
    return LogLikelihood(prior + divergence, prior, divergence, error, z, nfe)
