"""The noise levels that a network is trained at."""

import abc

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.sdes.process import SDE


class NoiseLevels(abc.ABC):
    """The noise levels that a network is trained at, and how likely each is."""

    @abc.abstractmethod
    def draw(self, count: int, device: torch.device) -> Tensor:
        """Noise levels, (count,), from PyTorch's global generator."""

    @abc.abstractmethod
    def at(self, quantile: Tensor) -> Tensor:
        """The noise levels at these quantiles, numbers in [0, 1], (B,)."""

    @abc.abstractmethod
    def marginal(self, batch: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of x at a level, given the batch."""


class ContinuousLevels(NoiseLevels):
    """Times uniform on [eps, T]."""

    def __init__(self, sde: SDE, eps: float = 1e-5):
        self.sde, self.eps = sde, eps

    def draw(self, count, device):
        return self.at(torch.rand(count, device=device))

    def at(self, quantile):
        return quantile * (self.sde.T - self.eps) + self.eps

    def marginal(self, batch, level):
        return self.sde.marginal_prob(batch, level)


class DiscreteLevels(NoiseLevels):
    """Noise indices uniform on the N levels of a discrete chain."""

    def __init__(self, sde: SDE):
        self.sde = sde

    def draw(self, count, device):
        return torch.randint(0, self.sde.N, (count,), device=device)

    def at(self, quantile):
        return (quantile * self.sde.N).long().clamp(max=self.sde.N - 1)

    def marginal(self, batch, level):
        scale, std = self.sde.discrete_coeffs(level)
        return batch_mul(scale, batch), std
