"""Noise levels that networks are trained at, and how likely each is.  [S21, appendix C]"""

import abc
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul, wide_dtype
from score_lib.sdes.coefficients import marginal
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE, LinearSDE
from score_lib.sdes.times import NoiseTimes, TimeDensity


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

    @abc.abstractmethod
    def step(self, level: Tensor) -> Tensor:
        """The time steps (B,) that a network is told at levels (B,)."""


class ContinuousLevels(NoiseLevels):
    """Times uniform on [eps, T]."""

    def __init__(self, sde: SDE, eps: float = 1e-5):
        if not 0 <= eps < sde.T:
            raise ValueError(f"times of training start at eps from 0 to below T, not at {eps:g}")
        self.sde, self.eps = as_process(sde), eps

    def draw(self, count, device):
        return self.at(torch.rand(count, dtype=wide_dtype(), device=device))

    def at(self, quantile):
        return quantile * (self.sde.T - self.eps) + self.eps

    def marginal(self, batch, level):
        return marginal(self.sde, batch, level)

    def step(self, level):
        return self.sde.noise_label(level, True)

    def weight(self, t: Tensor) -> Tensor:
        """Factor (B,) of the loss at times (B,), for the density that they are drawn with."""
        return torch.ones_like(t)


class LikelihoodLevels(ContinuousLevels):
    """Times of [eps, T] drawn in proportion to the loss, with the mean loss of uniform times.

    For the likelihood weighting, whose variance it lowers.  [Song et al. 2021, *Maximum Likelihood
    Training*, section 5]  They draw in proportion to g^2 / s^2, which is uniform for the VE
    process; here the density follows the data as well, see `TimeDensity`.

    Args:
        sigma_data: standard deviation of the data, in the network's range.
    """

    def __init__(self, sde: SDE, eps: float = 1e-5, sigma_data: float = 0.5):
        super().__init__(sde, eps)
        if not isinstance(self.sde, LinearSDE) or eps == 0:
            raise ValueError(
                f"training.noise_levels = 'likelihood' needs a LinearSDE and times above 0, not "
                f"{sde!r} from {eps:g} on"
            )
        self.density = TimeDensity(self.sde, eps, sigma_data)

    def at(self, quantile):
        return self.density.at(quantile)[0].to(quantile)

    def weight(self, t):
        return (1 / (self.density.of(t) * (self.sde.T - self.eps))).to(t)


class LogNormalLevels(ContinuousLevels):
    """Times of [eps, T] at which log(s / m) is normal.  [Karras et al. 2022, table 1]

    Noise levels outside of those times are drawn at the nearest one.

    Args:
        mean, std: of log(s / m).
    """

    def __init__(self, sde: SDE, eps: float = 1e-5, mean: float = -1.2, std: float = 1.2):
        super().__init__(sde, eps)
        self.mean, self.std = mean, std
        self.times = NoiseTimes(self.sde, eps)

    def at(self, quantile):
        log_sigma = self.mean + self.std * torch.special.ndtri(quantile.double())
        return self.times.at(-log_sigma).to(quantile)


class DiscreteLevels(NoiseLevels):
    """Noise indices uniform on the N levels of a discrete chain."""

    def __init__(self, sde: SDE):
        self.sde = as_process(sde)

    def draw(self, count, device):
        return torch.randint(0, self.sde.N, (count,), device=device)

    def at(self, quantile):
        return (quantile * self.sde.N).long().clamp(max=self.sde.N - 1)

    def marginal(self, batch, level):
        scale, std = self.sde.discrete_coeffs(level)
        return batch_mul(scale, batch), std

    def step(self, level):
        return level


# By `training.noise_levels`: classes that are made of a process and the smallest time.
_LEVELS = {"": ContinuousLevels, "lognormal": LogNormalLevels, "likelihood": LikelihoodLevels}


def levels_named(
    kind: str | Callable[[SDE, float], ContinuousLevels], sde: SDE, eps: float
) -> ContinuousLevels:
    """The noise levels of a process from time eps on, by `noise_levels` of `get_sde_loss_fn`.

    Raises:
        ValueError: an unknown name, or levels that the process does not have.
    """
    make = kind if callable(kind) else _LEVELS.get(kind)
    if make is None:
        names = ", ".join(map(repr, _LEVELS))
        raise ValueError(f"unknown training.noise_levels {kind!r}: known are {names}")
    return make(sde, eps)


def levels_of(config) -> str | Callable[[SDE, float], ContinuousLevels]:
    """The configured noise levels, as `noise_levels` of `get_sde_loss_fn`.

    Args:
        config: complete, see `score_lib.options.complete`.
    """
    training = config.training
    settings = {
        "lognormal": {"mean": training.lognormal_mean, "std": training.lognormal_std},
        "likelihood": {"sigma_data": config.model.sigma_data},
    }
    kind = training.noise_levels
    return functools.partial(_LEVELS[kind], **settings[kind]) if kind in settings else kind
