"""The processes of the paper, and from a name to one.  [S21, section 3.4 and appendices B, C]"""

import math
from functools import cached_property

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.sdes.process import SDE, SDES, LinearSDE, register_sde

get_sde = SDES.get
_BETA_OPTIONS = {
    "beta_min": "model.beta_min",
    "beta_max": "model.beta_max",
    "N": "model.num_scales",
}


class _Chain(LinearSDE):
    """A process with a discrete chain, whose tables follow N.

    Attributes:
        N: number of discretisation steps; may be set.
    """

    @property
    def N(self) -> int:
        return self._N

    @N.setter
    def N(self, N: int) -> None:
        if N < 1:
            raise ValueError(f"a process needs at least one discretisation step, not N = {N}")
        self._N = N
        for name in ("_moved", *self._tables()):
            self.__dict__.pop(name, None)

    @classmethod
    def _tables(cls) -> list[str]:
        """Names of the tables, which are made when first looked up."""
        return [name for name in dir(cls) if isinstance(getattr(cls, name), cached_property)]


class _BetaSDE(_Chain):
    """Base of VP and sub-VP: drift -beta(t) x / 2 with beta(t) linear in t.

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

    @cached_property
    def discrete_betas(self) -> Tensor:
        """beta_i, (N,)."""
        return torch.linspace(self.beta_0 / self.N, self.beta_1 / self.N, self.N)

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_i = 1 - beta_i, (N,)."""
        return 1.0 - self.discrete_betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """bar alpha_i, (N,)."""
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        return torch.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_1m_alphas_cumprod(self) -> Tensor:
        return torch.sqrt(1.0 - self.alphas_cumprod)

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


@register_sde("vpsde", _BETA_OPTIONS)
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
        tables = "sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod"
        return tuple(self.lookup(table, label) for table in tables)

    def discrete_chain(self) -> tuple[Tensor, Tensor, Tensor]:
        """As of any process; 1 - bar alpha_i, small at first, is computed in float64."""
        cumprod = torch.cumprod(1.0 - self.discrete_betas.double(), dim=0)
        return torch.arange(self.N), torch.sqrt(cumprod), torch.sqrt(1.0 - cumprod)

    def ancestral_step(self, x: Tensor, t: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM's step: mean (x + beta_i score) / sqrt(1 - beta_i), variance beta_i."""
        beta = self.lookup("discrete_betas", self.step_index(t))
        mean = batch_mul(torch.rsqrt(1.0 - beta), x + batch_mul(beta, score))
        return mean, torch.sqrt(beta)

    def posterior(self, x: Tensor, t: Tensor, s: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The same between any two times, with beta = 1 - r^2 of the exact transition."""
        ratio, G = self.transition(t, s)
        return batch_mul(1 / ratio, x + batch_mul(G**2, score)), G


@register_sde("subvpsde", _BETA_OPTIONS)
class subVPSDE(_BetaSDE):
    """Sub-variance-preserving process, whose likelihoods are the best.  [S21, section 3.4]"""

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.beta_integral(t)))

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_integral(t)
        return torch.exp(-0.5 * integral), -torch.expm1(-integral)


@register_sde(
    "vesde",
    {"sigma_min": "model.sigma_min", "sigma_max": "model.sigma_max", "N": "model.num_scales"},
)
class VESDE(_Chain):
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

    @cached_property
    def discrete_sigmas(self) -> Tensor:
        """sigma_i, ascending, (N,)."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.exp(torch.linspace(*ends, self.N))

    @property
    def prior_std(self) -> float:
        """sigma_max: the data's own spread is negligible beside it."""
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

    def posterior(self, x: Tensor, t: Tensor, s: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The same between any two times."""
        _, G = self.transition(t, s)
        lower = torch.where(s > 0, self.sigma(s), 0.0)
        return x + batch_mul(G**2, score), lower * G / self.sigma(t)

    def _adjacent_sigmas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_{i-1} (0 below the first) at the step that t belongs to."""
        index = self.step_index(t)
        sigma = self.lookup("discrete_sigmas", index)
        lower = self.lookup("discrete_sigmas", (index - 1).clamp(min=0))
        return sigma, torch.where(index == 0, torch.zeros_like(lower), lower)

    def __repr__(self) -> str:
        return f"VESDE({self.sigma_min}, {self.sigma_max}, N={self.N})"


def registered_sdes() -> list[SDE]:
    """One process of each registered class, with its default parameters."""
    return [SDES.get(name)() for name in SDES]


def create_sde(config) -> SDE:
    """The configured process, `training.sde`, with the parameters in the config."""
    return SDES.build(config.training.sde, config)
