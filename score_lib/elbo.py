"""A lower bound of the log-likelihood of the reverse SDE.

[Huang et al. 2021, *A Variational Perspective on Diffusion-Based Generative Models*; Song et al.
2021, *Maximum Likelihood Training of Score-Based Diffusion Models*, theorem 3]

Of a forward process dx = a x dt + g dw that starts at x at time eps,

    log p(x) >= E[log prior(x_T)] + D log r(T) - int_eps^T g^2 E[|s|^2 / 2 + div s] dt

with the model's score s at x_t = r(t) x + G(t) z.  It is the exact log density at eps where s is
the true score and the prior is p_T.  The integral is estimated at times drawn in proportion to
g^2 / std^2, which the integrand follows for data such as images.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.tensors import (
    batch_mul,
    normal_noise,
    per_sample,
    rows,
    stratified_mean,
    wide_floats,
)
from score_lib.likelihood import differentiable, value_and_divergence
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import get_data_score_fn
from score_lib.sdes.coefficients import check_levels
from score_lib.sdes.process import SDE, LinearSDE, check_linear, check_prior
from score_lib.sdes.times import TimeDensity


class Elbo(NamedTuple):
    """A lower bound of log p(x) of a batch, in nats; each field is (B,), float64."""

    total: Tensor
    """The estimate of the bound."""
    standard_error: Tensor
    """Of `total`, from the differences between times, see `stratified_mean`."""


def get_elbo_fn(
    sde: SDE,
    *,
    num_times: int = 100,
    eps: float = 1e-5,
    continuous: bool = True,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """A lower bound of the log-likelihood of data under the reverse SDE, in nats.

    Args:
        num_times: times at which the integral is estimated, for each sample; one evaluation and
            one backward pass each.
        eps: time at which the data is taken to be.
        continuous: whether the network was trained on all times.
        parametrization: what the network's output is, see `get_score_fn`.
    Returns:
        `elbo_fn(model, data, *, noise=None) -> Elbo`, for data (B, *D) in the network's range;
        noise is called like `torch.randn_like`.  It raises ValueError for a network that changes
        with x, but gives no gradient.
    Raises:
        ValueError: the drift is not linear, fewer than two times, or eps is not above 0.
    """
    check_linear(sde)
    check_levels(sde, continuous)
    if num_times < 2 or not 0 < eps < sde.T:
        raise ValueError(
            f"the bound needs at least two times and eps between 0 and {sde.T:g}, not "
            f"{num_times} and {eps:g}"
        )
    density, chosen = TimeDensity(sde, eps), get_parametrization(parametrization)

    def elbo_fn(model, data, *, noise=None):
        data = wide_floats("the data", data)
        draw = normal_noise(noise)
        network = differentiable(model)
        score_fn = get_data_score_fn(sde, network, False, continuous, parametrization=chosen)
        size, start = data.shape[1:].numel(), data.new_full((len(data),), eps)
        # One stratum of quantiles for each time, shifted alike for all times of a sample.
        shift = torch.special.ndtr(draw(data.new_empty(len(data))))
        terms = []
        for k in range(num_times):
            t, p = density.at((k + shift.double()) / num_times)
            t = t.to(data.dtype)
            r, G = sde.transition(t, start)
            x = batch_mul(r, data) + batch_mul(G, draw(data))
            probe = torch.where(draw(data) < 0, -1.0, 1.0).to(data)
            score, divergence = value_and_divergence(score_fn, x, t, probe[None])
            value = rows(score).double().square().sum(1) / 2 + divergence[:, 0].double()
            terms.append(per_sample(sde.diffusion(t), t).double() ** 2 * value / p)
        integral, error = stratified_mean(torch.stack(terms))
        to_end = sde.transition(torch.full_like(start, sde.T), start)
        end = log_prior(sde, data, *to_end) + size * to_end[0].double().log()
        return Elbo(end - integral, error)

    return elbo_fn


def log_prior(sde: LinearSDE, data: Tensor, r: Tensor, G: Tensor) -> Tensor:
    """E[log prior(x_T)] of x_T = r x + G z under N(0, prior_std^2 I): (B,), float64, in nats."""
    check_prior(sde, data)
    r, G = r.double(), G.double()
    x, variance = rows(data).double(), sde.prior_std**2
    square = r**2 * x.square().sum(1) + x.shape[1] * G**2
    return -0.5 * (x.shape[1] * math.log(2 * math.pi * variance) + square / variance)
