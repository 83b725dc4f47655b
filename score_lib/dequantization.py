"""Noise that spreads grey levels over cells: uniform, or learned for a tighter bound of bits/dim.

[Ho et al. 2019, *Flow++*, section 3.1; Song et al. 2021, *Maximum Likelihood Training of
Score-Based Diffusion Models*, section 5]

For grey levels x and noise u in [0, 1)^D with density q(u | x),

    log P(x) >= E_q[log p(x + u) - log q(u | x)]

whatever q is; uniform noise has q = 1.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from models.dequantizer import Dequantizer
from score_lib.base.distributed import share_of_batch
from score_lib.base.tensors import LARGEST_SHARE, check_floats, rows
from score_lib.elbo import log_prior
from score_lib.likelihood import bits_per_dim
from score_lib.losses.objectives import Draws, get_sde_loss_fn
from score_lib.parametrization import Parametrization
from score_lib.sdes.process import SDE, check_linear


class Dequantization(abc.ABC):
    """Grey levels in, numbers in [0, 1) out.

    Called as `dequantize(x, noise=None)` with x (B, *D), numbers k / (levels - 1), it returns
    (k + u) / levels, (B, *D), and log q(u | x), (B,), in nats.  `noise` is called like
    `torch.rand_like`.

    Args:
        levels: number of grey levels.
    """

    def __init__(self, levels: int):
        self.levels = levels

    def __call__(self, x: Tensor, noise: Callable | None = None) -> tuple[Tensor, Tensor]:
        check_floats("images to dequantize", x)
        number = (x * (self.levels - 1)).round()
        uniform = (noise or torch.rand_like)(number).clamp(max=LARGEST_SHARE)
        u, log_q = self.spread(number / (self.levels - 1), uniform)
        return (number + u) / self.levels, log_q

    @abc.abstractmethod
    def spread(self, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, *D), made of uniform noise, and log q(u | x), (B,)."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor, u: Tensor) -> Tensor:
        """log q(u | x), (B,), for x and u of (B, *D)."""


class UniformDequantization(Dequantization):
    """u is the uniform noise itself."""

    def spread(self, x, uniform):
        return uniform, self.log_prob(x, uniform)

    def log_prob(self, x, u):
        """0."""
        return u.new_zeros(len(u))


class LearnedDequantization(Dequantization):
    """u is a flow of the uniform noise, given x.

    Args:
        levels: number of grey levels.
        flow: see `models.dequantizer.Dequantizer`.
    """

    def __init__(self, levels: int, flow: Dequantizer):
        super().__init__(levels)
        self.flow = flow

    def spread(self, x, uniform):
        u, log_det = self.flow(x, uniform)
        return u.clamp(0, LARGEST_SHARE), -log_det

    def log_prob(self, x, u):
        return -self.flow(x, self.flow.inverse(x, u))[1]


def get_dequantization_loss_fn(
    sde: SDE,
    dequantize: Dequantization,
    scaler: Callable,
    inverse_scaler: Callable,
    *,
    eps: float = 1e-5,
    continuous: bool = True,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """An estimate of the bound of bits/dim, whose gradient trains a dequantization.

    In place of log p(x + u) it has the bound of `get_elbo_fn` for x + u with the noise of time
    eps, in its denoising form, at one time a sample; the network itself is not changed.

    Args:
        dequantize: in training.
        scaler, inverse_scaler: from [0, 1] to the network's range, and back; affine.
        eps: time at which the data is taken to be.
        continuous, parametrization: how the network is read, see `get_score_fn`.
    Returns:
        `loss_fn(model, x)`, the estimate in bits/dim, (B,), for grey levels x (B, *D) in [0, 1].
    Raises:
        ValueError: the process's drift is not linear.
    """
    check_linear(sde)
    denoising = get_sde_loss_fn(
        sde,
        train=False,
        reduce_mean=False,
        continuous=continuous,
        likelihood_weighting=True,
        eps=eps,
        parametrization=parametrization,
        noise_levels="likelihood",
    )

    def loss_fn(model, x):
        images, log_q = dequantize(x, lambda like: _shared(torch.rand, like))
        data, size = scaler(images), x.shape[1:].numel()
        quantile = share_of_batch(lambda n: _strata(n, x.device), len(x))
        draws = Draws(denoising.levels.at(quantile), _shared(torch.randn, data))
        residual, weight = denoising.weighted_residual(model, data, draws)
        excess = (rows(residual).square().sum(1) - size) / 2
        integral = (sde.T - eps) * weight * excess
        end = torch.full_like(quantile, sde.T)
        prior = log_prior(sde, data, *sde.marginal_coeffs(end))
        ratio, _ = sde.transition(end, torch.full_like(end, eps))
        log_p = prior + size * ratio.double().log() - integral
        grey = inverse_scaler, dequantize.levels
        return bits_per_dim(log_p - log_q, size, *grey, shape=x.shape[1:])

    return loss_fn


def _strata(count: int, device: torch.device) -> Tensor:
    """Quantiles (count,), one in each of as many equal parts of [0, 1)."""
    return (torch.arange(count, device=device) + torch.rand(count, device=device)) / count


def _shared(draw: Callable, like: Tensor) -> Tensor:
    """This process's rows of a draw for the whole batch, such as `torch.randn`."""
    row = {"dtype": like.dtype, "device": like.device}
    return share_of_batch(lambda n: draw(n, *like.shape[1:], **row), len(like))
