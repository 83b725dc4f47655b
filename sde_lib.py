"""Forward processes that turn data into noise, and their time reversal.  [S21, section 3.4]

A process is one class.  `SDE` asks for the four methods that every process has; `LinearSDE`
derives them from three functions of time.  Samplers, losses and likelihood only call methods and
never ask which class they hold, so a new process works everywhere:

    @register_sde("cosine_vpsde")
    class CosineVPSDE(LinearSDE):
        def drift_rate(self, t): ...
        def diffusion(self, t): ...
        def marginal_coeffs(self, t): ...

Throughout, x is (B, *D) in the network's range and t is (B,) in [0, T], from data to noise.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils.registry import Registry
from utils.tensors import batch_mul

_SDES = Registry("SDE")


def register_sde(name: str) -> Callable:
    """Class decorator that makes a process available to configs as `training.sde = name`."""
    return _SDES.register(name=name)


def get_sde(name: str) -> type[SDE]:
    """The process class registered under a name; ValueError lists the known ones."""
    return _SDES.get(name)


def registered_sdes() -> list[SDE]:
    """One process of each registered class, with its default parameters."""
    return [_SDES.get(name)() for name in _SDES]


def create_sde(config) -> SDE:
    """The configured process: `training.sde` with the parameters in `config.model`."""
    return get_sde(config.training.sde.lower()).from_config(config)


class SDE(abc.ABC):
    """dx = f(x, t) dt + g(t) dw on [0, T], with data at t = 0 and noise at t = T.

    Abstract are only `sde`, `marginal_prob`, `prior_sampling` and `prior_logp`.  The other methods
    say how the process is discretised and how a network for it is read; they have defaults and are
    overridden only where a process differs.

    Args:
        N: number of discretisation steps.
    Attributes:
        T: end of time.
        sampling_eps: the reverse process stops here, because scores blow up at 0.
    """

    T = 1.0
    sampling_eps = 1e-3

    def __init__(self, N: int = 1000):
        if N < 1:
            raise ValueError(f"a process needs at least one discretisation step, not N = {N}")
        self.N = N

    @classmethod
    def from_config(cls, config) -> SDE:
        """The process with the parameters of a config."""
        return cls(N=config.model.num_scales)

    @abc.abstractmethod
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift f(x, t), (B, *D), and diffusion coefficient g(t), (B,)."""

    @abc.abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of p(x_t | x_0 = x).  [S21, appendix B]"""

    @abc.abstractmethod
    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        """Samples of the given shape from the prior, which stands for p_T; on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z: Tensor) -> Tensor:
        """Log density of the prior at z (B, *D): (B,), in nats."""

    def prior_from_normal(self, z: Tensor) -> Tensor:
        """A sample from the prior made of standard normal noise z (B, *D).

        A process that does not say how draws from its prior as usual and leaves z aside.
        """
        return self.prior_sampling(z.shape).to(z)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One step x_{i+1} = x_i + f + G z of a chain with N steps: f (B, *D) and G (B,).

        By default Euler-Maruyama with step T / N.
        """
        dt = self.T / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * math.sqrt(dt)

    def reverse(self, score_fn: Callable, probability_flow: bool = False) -> ReverseSDE:
        """The process run backwards in time, as an SDE or as the probability-flow ODE."""
        return ReverseSDE(self, score_fn, probability_flow)

    # How a network for this process is read.

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        """What the network is told about time t (B,)."""
        return 999 * t

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        """The standard deviation (B,) that the network's output is relative to."""
        return self.marginal_prob(torch.zeros_like(t), t)[1]

    def score_from_output(self, output: Tensor, std: Tensor) -> Tensor:
        """The score (B, *D), for an output that predicts the (negative) noise."""
        return batch_mul(-1.0 / std, output)

    def to_score(self, output: Tensor, t: Tensor, continuous: bool) -> Tensor:
        """The score (B, *D) that a network's output at time t stands for."""
        return self.score_from_output(output, self.noise_std(t, continuous))

    def discrete_coeffs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mean scale and standard deviation (B,) of x given x_0 at a noise index (B,), int64."""
        raise NotImplementedError(
            f"{type(self).__name__} has no discrete noise levels: set training.continuous = True"
        )

    # What samplers ask of a process beyond its equation.

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """Scale (B,) of the Langevin corrector's step at time t.  [S21, appendix G]"""
        return torch.ones_like(t)

    def scale_and_std(self, t: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
        """m(t) and s(t), (B,), for x_t = m x_0 + s z with x of (B, *D), D of so many dimensions.

        A process of one's own may know only x of the shape that it was written for.
        """
        mean, std = self.marginal_prob(t.new_ones(len(t), *(1,) * dimensions), t)
        return mean.reshape(len(t)), std

    def denoised(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """E[x_0 | x_t = x], (B, *D), by Tweedie's formula: (x + s^2 score) / m.

        For processes in which the mean of x_t is m(t) x_0, as it is wherever the drift is linear.
        """
        scale, std = self.scale_and_std(t, x.dim() - 1)
        return batch_mul(1 / scale, x + batch_mul(std**2, score))

    def score_of_denoised(self, x: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
        """The score (B, *D) for which `denoised` gives E[x_0 | x_t = x]."""
        scale, std = self.scale_and_std(t, x.dim() - 1)
        return batch_mul(std**-2, batch_mul(scale, denoised) - x)

    def ancestral_step(self, x: Tensor, t: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of x_{i-1} given x_i.  [S21, appendix F]"""
        raise NotImplementedError(
            f"{type(self).__name__} has no ancestral sampling: use the reverse_diffusion or "
            "euler_maruyama predictor"
        )

    def step_index(self, t: Tensor) -> Tensor:
        """Index floor(t (N - 1) / T) of the discretisation step at time t: (B,), int64."""
        return (t * (self.N - 1) / self.T).long()

    def lookup(self, table: str, index: Tensor) -> Tensor:
        """Entries of one of the process's tables, which moves to the index's device and stays."""
        values = getattr(self, table)
        if values.device != index.device:
            values = values.to(index.device)
            setattr(self, table, values)
        return values[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(N={self.N})"


class ReverseSDE:
    """Time reversal of a process, given its score.  [S21, equations 6 and 13]

    dx = (f - g^2 score) dt + g dw backwards in time, or, with `probability_flow`,
    dx = (f - g^2 score / 2) dt, which has the same marginals.
    """

    def __init__(self, forward: SDE, score_fn: Callable, probability_flow: bool = False):
        self.forward, self.score_fn = forward, score_fn
        self.probability_flow = probability_flow
        self.N, self.T = forward.N, forward.T

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift (B, *D) and diffusion coefficient (B,), for dt < 0."""
        return self._reverse(*self.forward.sde(x, t), x, t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, *D) and G (B,) of x_{i-1} = x_i - f + G z."""
        return self._reverse(*self.forward.discretize(x, t), x, t)

    def _reverse(self, drift, diffusion, x, t):
        share = 0.5 if self.probability_flow else 1.0
        drift = drift - batch_mul(share * diffusion**2, self.score_fn(x, t))
        return drift, torch.zeros_like(diffusion) if self.probability_flow else diffusion


class LinearSDE(SDE):
    """dx = a(t) x dt + g(t) dw: three functions of t, (B,) -> (B,), give everything else.

    Attributes:
        prior_std: standard deviation of the Gaussian prior.
    """

    prior_std = 1.0

    @abc.abstractmethod
    def drift_rate(self, t: Tensor) -> Tensor:
        """a(t)."""

    @abc.abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    @abc.abstractmethod
    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """m(t) and s(t) of x_t = m(t) x_0 + s(t) z."""

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift a(t) x, (B, *D), and diffusion coefficient g(t), (B,)."""
        _check_batch(x, t)
        return batch_mul(self.drift_rate(t), x), self.diffusion(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean m(t) x, (B, *D), and standard deviation s(t), (B,), of p(x_t | x_0 = x).

        Raises:
            ValueError: the batch sizes of x and t differ.
        """
        _check_batch(x, t)
        scale, std = self.marginal_coeffs(t)
        return batch_mul(scale, x), std

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        """s(t)."""
        return self.marginal_coeffs(t)[1]

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        """Samples from N(0, prior_std^2 I), on the CPU."""
        return self.prior_from_normal(torch.randn(*shape))

    def prior_from_normal(self, z: Tensor) -> Tensor:
        """prior_std z."""
        return z * self.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, prior_std^2 I): (B,), in nats."""
        z = z.flatten(1)
        variance = self.prior_std**2
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi * variance)
        return -constant - (z**2).sum(1) / (2 * variance)


def _check_batch(x: Tensor, t: Tensor) -> None:
    if t.dim() != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"time must be (B,) with the batch size of x: x is {tuple(x.shape)}, "
            f"t is {tuple(t.shape)}"
        )


class _BetaSDE(LinearSDE):
    """What VP and sub-VP share: drift -beta(t) x / 2 with beta(t) linear in t.

    Args:
        beta_min, beta_max: beta(0) and beta(T).
        N: number of discretisation steps.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000):
        super().__init__(N)
        if not 0 < beta_min <= beta_max:
            raise ValueError(
                f"beta must grow from a positive value: beta_min = {beta_min}, "
                f"beta_max = {beta_max}"
            )
        self.beta_0, self.beta_1 = beta_min, beta_max
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas = 1.0 - self.discrete_betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.sqrt_alphas_cumprod = torch.sqrt(self.alphas_cumprod)
        self.sqrt_1m_alphas_cumprod = torch.sqrt(1.0 - self.alphas_cumprod)

    @classmethod
    def from_config(cls, config) -> SDE:
        model = config.model
        return cls(beta_min=model.beta_min, beta_max=model.beta_max, N=model.num_scales)

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def beta_integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t."""
        return 0.5 * t**2 * (self.beta_1 - self.beta_0) + t * self.beta_0

    def drift_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """1 - beta_i at the step that t belongs to."""
        return self.lookup("alphas", self.step_index(t))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.beta_0}, {self.beta_1}, N={self.N})"


@register_sde("vpsde")
class VPSDE(_BetaSDE):
    """Variance-preserving process, the limit of DDPM.  [S21, equation 11]"""

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_integral(t)
        return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chain of DDPM: x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z."""
        beta = self.lookup("discrete_betas", self.step_index(t))
        return batch_mul(torch.sqrt(1.0 - beta) - 1.0, x), torch.sqrt(beta)

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        # The released discrete models were run with labels off the integers; rounding would
        # change their samples.
        return 999 * t if continuous else t * (self.N - 1)

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        if continuous:
            return super().noise_std(t, continuous)
        return self.discrete_coeffs(self.noise_label(t, continuous).long())[1]

    def discrete_coeffs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(bar alpha_i) and sqrt(1 - bar alpha_i) of DDPM."""
        return (
            self.lookup("sqrt_alphas_cumprod", label),
            self.lookup("sqrt_1m_alphas_cumprod", label),
        )

    def ancestral_step(self, x: Tensor, t: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM's step: mean (x + beta_i score) / sqrt(1 - beta_i), variance beta_i."""
        beta = self.lookup("discrete_betas", self.step_index(t))
        mean = batch_mul(torch.rsqrt(1.0 - beta), x + batch_mul(beta, score))
        return mean, torch.sqrt(beta)


@register_sde("subvpsde")
class subVPSDE(_BetaSDE):
    """Sub-variance-preserving process, whose likelihoods are the best.  [S21, section 3.4]"""

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.beta_integral(t)))

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_integral(t)
        return torch.exp(-0.5 * integral), -torch.expm1(-integral)


@register_sde("vesde")
class VESDE(LinearSDE):
    """Variance-exploding process, the limit of SMLD.  [S21, equation 9]

    Args:
        sigma_min, sigma_max: noise levels at time 0 and T.
        N: number of discretisation steps.
    """

    sampling_eps = 1e-5

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000):
        super().__init__(N)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma must grow from a positive value: sigma_min = {sigma_min}, "
                f"sigma_max = {sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.discrete_sigmas = torch.exp(
            torch.linspace(math.log(sigma_min), math.log(sigma_max), N)
        )

    @classmethod
    def from_config(cls, config) -> SDE:
        model = config.model
        return cls(sigma_min=model.sigma_min, sigma_max=model.sigma_max, N=model.num_scales)

    @property
    def prior_std(self) -> float:
        """sigma_max: beside it the data's own spread does not count."""
        return self.sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t) = sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # The paper subtracts sigma(0)^2 from the variance; the released models do not.
        return torch.ones_like(t), self.sigma(t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chain of SMLD: x_i = x_{i-1} + sqrt(sigma_i^2 - sigma_{i-1}^2) z."""
        sigma, lower = self._adjacent_sigmas(t)
        return torch.zeros_like(x), torch.sqrt(sigma**2 - lower**2)

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        """sigma(t), or the index into the noise levels in descending order."""
        if continuous:
            return self.sigma(t)
        return torch.round((self.T - t) * (self.N - 1)).long()

    def score_from_output(self, output: Tensor, std: Tensor) -> Tensor:
        """The output itself: these networks divide by sigma inside."""
        return output

    def discrete_coeffs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """1 and sigma at an index into the noise levels in descending order."""
        sigma = self.lookup("discrete_sigmas", self.N - 1 - label)
        return torch.ones_like(sigma), sigma

    def ancestral_step(self, x: Tensor, t: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """SMLD's posterior: variance sigma_{i-1}^2 (1 - sigma_{i-1}^2 / sigma_i^2)."""
        sigma, lower = self._adjacent_sigmas(t)
        step = sigma**2 - lower**2
        return x + batch_mul(step, score), lower * torch.sqrt(step) / sigma

    def _adjacent_sigmas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_{i-1} (0 below the first) at the step that t belongs to."""
        index = self.step_index(t)
        lower = self.lookup("discrete_sigmas", (index - 1).clamp(min=0))
        return (
            self.lookup("discrete_sigmas", index),
            torch.where(index == 0, torch.zeros_like(lower), lower),
        )

    def __repr__(self) -> str:
        return f"VESDE({self.sigma_min}, {self.sigma_max}, N={self.N})"
