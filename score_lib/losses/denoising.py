"""Denoising score matching.  [S21, section 3.3 and appendix C]

The losses of score SDEs, SMLD and DDPM are one formula, |s score(x_t) + z|^2 with
x_t = m x_0 + s z; they differ in how the noise level is drawn and in how it is weighted.
"""

import abc

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.losses.noise_levels import ContinuousLevels, DiscreteLevels, NoiseLevels
from score_lib.losses.noisy import NoisyLoss
from score_lib.scores import get_model_fn, get_score_fn
from score_lib.sdes.process import SDE


class DenoisingLoss(NoisyLoss):
    """|s score(x_t) + z|^2, the mean over dimensions or half the sum.

    Args:
        reduce_mean: average over dimensions; otherwise half the sum.
    """

    def __init__(self, levels: NoiseLevels, train: bool, reduce_mean: bool):
        super().__init__(levels, train)
        self.sde, self.reduce_mean = levels.sde, reduce_mean

    def per_sample(self, model, batch, draws, labels=None):
        """Loss of each sample, (B,), for given noise levels and noise; labels are ignored."""
        residual, weight = self.weighted_residual(model, batch, draws)
        square = residual.square().flatten(1)
        losses = square.mean(1) if self.reduce_mean else 0.5 * square.sum(1)
        return losses * weight

    @abc.abstractmethod
    def weighted_residual(self, model, batch, draws) -> tuple[Tensor, Tensor]:
        """s score + z, (B, *D), and its weight, (B,)."""


class _ContinuousLoss(DenoisingLoss):
    """Weight 1 or g^2 / s^2.  [S21, equation 7]"""

    def __init__(self, sde, train, reduce_mean, continuous, likelihood_weighting, eps):
        super().__init__(ContinuousLevels(sde, eps), train, reduce_mean)
        self.continuous, self.likelihood_weighting = continuous, likelihood_weighting

    def weighted_residual(self, model, batch, draws):
        t, z = draws
        mean, std = self.levels.marginal(batch, t)
        x_t = mean + batch_mul(std, z)
        score = get_score_fn(self.sde, model, self.train, self.continuous)(x_t, t)
        weight = torch.ones_like(std)
        if self.likelihood_weighting:
            weight = (self.sde.sde(torch.zeros_like(batch), t)[1] / std) ** 2
        return batch_mul(std, score) + z, weight


class _DiscreteLoss(DenoisingLoss):
    """Weight 1 at each of the N noise levels."""

    def __init__(self, sde, train, reduce_mean):
        super().__init__(DiscreteLevels(sde), train, reduce_mean)

    def weighted_residual(self, model, batch, draws):
        label, z = draws
        mean, std = self.levels.marginal(batch, label)
        output = get_model_fn(model, self.train)(mean + batch_mul(std, z), label)
        return batch_mul(std, self.sde.score_from_output(output, std)) + z, torch.ones_like(std)


def get_sde_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> DenoisingLoss:
    """Loss over continuous time, t uniform on [eps, T].  [S21, equation 7]

    Args:
        sde: the forward process.
        train: whether dropout is on.
        reduce_mean: average over dimensions; otherwise half the sum.
        continuous: whether the network is told continuous times.
        likelihood_weighting: weight g(t)^2 of Song et al. 2021 (*Maximum Likelihood Training*),
            instead of s(t)^2.
        eps: smallest time.
    Returns:
        `loss_fn(model, batch)`.
    """
    return _ContinuousLoss(sde, train, reduce_mean, continuous, likelihood_weighting, eps)


def get_smld_loss_fn(vesde: SDE, train: bool, reduce_mean: bool = False) -> DenoisingLoss:
    """Loss over the noise levels of SMLD (NCSN).  [S21, equation 1]"""
    return _DiscreteLoss(vesde, train, reduce_mean)


def get_ddpm_loss_fn(vpsde: SDE, train: bool, reduce_mean: bool = True) -> DenoisingLoss:
    """Loss over the steps of DDPM.  [S21, equation 3]"""
    return _DiscreteLoss(vpsde, train, reduce_mean)
