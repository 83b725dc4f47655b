"""The published processes, and from a name to one.  [S21, section 3.4 and appendices B, C]"""

import abc
import math

import torch
from torch import Tensor

from score_lib.base.inheritance import place
from score_lib.base.tensors import batch_mul, per_sample, wide_dtype
from score_lib.sdes.process import SDE, SDES, LinearSDE, checked_steps, register_sde
from score_lib.sdes.tables import Table, made_values, own_tables

get_sde = SDES.get
_BETA_OPTIONS = {
    "beta_min": "model.beta_min",
    "beta_max": "model.beta_max",
    "N": "model.num_scales",
}


class _Chain(LinearSDE):
    """A process with a discrete chain, whose tables follow N.

    Attributes:
        N: number of discretisation steps; may be set, if no table was set.
    """

    @property
    def N(self) -> int:
        return self._N

    @N.setter
    def N(self, N: int) -> None:
        N = checked_steps(N)
        if vars(self).get("_N", N) != N and (own := own_tables(self)):
            raise ValueError(
                f"{self!r} has its own {', '.join(own)}, which cannot follow to N = {N}: make it "
                f"with N = {N}, delete them before, or use a predictor or solver that takes any "
                "step"
            )
        self._N = N
        for name in made_values(self):
            del vars(self)[name]


class _BetaSDE(_Chain):
    """Base of VP and sub-VP: drift -beta(t) x / 2, and a chain of variances beta_i."""

    @abc.abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """beta(t), (B,)."""

    @Table
    @abc.abstractmethod
    def discrete_betas(self) -> Tensor:
        """beta_i, (N,)."""

    @Table
    def alphas(self) -> Tensor:
        """alpha_i = 1 - beta_i, (N,); ValueError where one is negative."""
        _check_betas(self)
        return 1.0 - self.discrete_betas

    @Table
    def alphas_cumprod(self) -> Tensor:
        """bar alpha_i, (N,)."""
        return torch.cumprod(self.alphas, dim=0)

    @Table
    def sqrt_alphas_cumprod(self) -> Tensor:
        return torch.sqrt(self.alphas_cumprod)

    @Table
    def sqrt_1m_alphas_cumprod(self) -> Tensor:
        return torch.sqrt(1.0 - self.alphas_cumprod)

    def drift_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """1 - beta_i at the step that t belongs to."""
        return self.lookup("alphas", self.step_index(t))


def _check_betas(sde: SDE) -> None:
    """ValueError for a chain of so few steps that a beta_i is above 1, of which roots are taken."""
    largest = float(sde.discrete_betas.max())
    if largest > 1:
        raise ValueError(
            f"the chain of {sde!r} has too few steps: its beta_i go up to {largest:.3g}, and "
            f"should be below 1; choose N above {sde.N * largest:.4g}, or make other steps than "
            "the chain's, by a solver or by sampling.num_steps"
        )


def linear_betas(sde: SDE) -> Tensor:
    """beta_i = T / N beta(t_i) at equal distances from t = 0 to T, for beta(t) linear, (N,)."""
    # beta(0) and beta(T), so that T = 1 has the published table to the last bit.
    ends = sde.beta_0, (1 - sde.T) * sde.beta_0 + sde.T * sde.beta_1
    return torch.linspace(*(beta * sde.T / sde.N for beta in ends), sde.N, dtype=wide_dtype())


class _LinearBeta(_BetaSDE):
    """beta(t) linear in t.

    Args:
        beta_min, beta_max: beta(0) and beta(1).
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

    @Table
    def discrete_betas(self) -> Tensor:
        """beta_i, (N,)."""
        return linear_betas(self)

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def beta_integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t."""
        return 0.5 * t**2 * (self.beta_1 - self.beta_0) + t * self.beta_0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.beta_0}, {self.beta_1}, N={self.N})"


class _Preserving(_BetaSDE):
    """Variance-preserving processes, whose chains are those of DDPM."""

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def check_chain(self) -> None:
        _check_betas(self)

    def chain_beta(self, t: Tensor) -> Tensor:
        """beta_i of the chain's step that ends at time t, (B,)."""
        return self.lookup("discrete_betas", self.step_index(t))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chain of DDPM: x_{i+1} = sqrt(1 - beta_i) x_i + sqrt(beta_i) z."""
        beta = self.chain_beta(t)
        return batch_mul(torch.sqrt(1.0 - beta) - 1.0, x), torch.sqrt(beta)

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        # The released discrete models were run with labels off the integers; rounding would
        # change their samples.
        return 999 * t if continuous else t * (self.N - 1) / self.T

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        if continuous:
            return super().noise_std(t, continuous)
        return self.level_coeffs(t)[1]

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
        self.check_chain()
        beta = self.chain_beta(t)
        mean = batch_mul(torch.rsqrt(1.0 - beta), x + batch_mul(beta, score))
        return mean, torch.sqrt(beta)

    def posterior(self, x: Tensor, t: Tensor, s: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The same between any two times, with beta = 1 - r^2 of the exact transition."""
        ratio, G = self.transition(t, s)
        return batch_mul(1 / ratio, x + batch_mul(G**2, score)), G


@register_sde("vpsde", _BETA_OPTIONS)
class VPSDE(_Preserving, _LinearBeta):
    """Variance-preserving process, the limit of DDPM.  [S21, equation 11]"""

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.beta_integral(t)
        return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))


@register_sde("cosine_vpsde", {"N": "model.num_scales", "continuous": "training.continuous"})
class CosineVPSDE(_Preserving):
    """Variance-preserving process with m(t) = cos(u(t)) / cos(u(0)), u = (t + 0.008) / 1.008 pi/2.

    [Nichol & Dhariwal 2021, equation 17.]  Time ends before t = 1, where g diverges:

    - for networks of all times at T = 0.995, where the signal is as weak as at the end of the
      linear schedule, m = 0.008, and steps of 1 / 1000 are stable;
    - for networks of discrete levels, as published, at the last level.  Level i of their chain is
      the process at (i + 1) / N, but for the last: beta_i is at most 0.999.

    Args:
        N: number of discretisation steps, at least 2.
        continuous: whether networks know all times.
    """

    OFFSET, LARGEST_BETA, END = 0.008, 0.999, 0.995

    def __init__(self, N: int = 1000, continuous: bool = True):
        super().__init__(N)
        if N < 2:
            raise ValueError(f"the cosine schedule needs at least two steps, not N = {N}")
        self.continuous = continuous
        self.rate = math.pi / 2 / (1 + self.OFFSET)  # du / dt
        self.start = self.rate * self.OFFSET  # u(0)

    @property
    def T(self) -> float:
        """End of time."""
        return self.END if self.continuous else self.last_level

    @property
    def sampling_eps(self) -> float:
        """The reverse process stops at 1e-3, or at the first level."""
        return 1e-3 if self.continuous else 1 / self.N

    @Table
    def discrete_betas(self) -> Tensor:
        """beta_i, (N,), float64."""
        ends = torch.arange(self.N + 1, dtype=torch.float64) / self.N
        signal = torch.cos(self.rate * ends + self.start) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=self.LARGEST_BETA)

    @Table
    def last_level(self) -> float:
        """The time at which m^2 is the last bar alpha_i."""
        scale = self.sqrt_alphas_cumprod[-1].item() * math.cos(self.start)
        return 1 - math.asin(scale) / self.rate

    def lookup(self, table: str, index: Tensor) -> Tensor:
        """Entries of one of the tables, rounded to float32."""
        return super().lookup(table, index).float()

    # Sines of differences, rather than differences of cosines, which float32 rounds to 0.

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = pi / 1.008 tan(u(t))."""
        return 2 * self.rate / torch.tan(self.rate * (1 - t))

    def marginal_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._ratio_and_noise(t, torch.zeros_like(t))

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """r = cos u(t) / cos u(s) and G = sqrt(1 - r^2), (B,)."""
        return self._ratio_and_noise(t, s)

    def _ratio_and_noise(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """For both: `transition` of a subclass may be by its own marginals."""
        earlier = torch.sin(self.rate * (1 - s))  # cos u(s)
        difference, total = self.rate * (t - s), self.rate * (t + s) + 2 * self.start
        G = torch.sqrt(torch.sin(difference) * torch.sin(total)) / earlier
        return torch.sin(self.rate * (1 - t)) / earlier, G

    # The chain: as published, or with the exact steps of a grid that ends at T.

    def chain_beta(self, t: Tensor) -> Tensor:
        """beta_i of the chain's step that ends at time t, (B,)."""
        if not self.continuous:
            return super().chain_beta(t)
        return self.transition(t, (t - self.T / self.N).clamp(min=0))[1] ** 2

    def level(self, t: Tensor) -> Tensor:
        """The place of time t among the levels of the chain, from 0 to N - 1, (B,)."""
        share = (t - 1 / self.N) / (self.last_level - 1 / self.N)
        # To hundredths, so that levels have whole numbers, although t is rounded.
        return torch.round(share * (self.N - 1), decimals=2).clamp(0, self.N - 1)

    def step_index(self, t: Tensor) -> Tensor:
        """The level at or before time t: (B,), int64."""
        return self.level(t).long()

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        """999 t, or the place of t among the levels."""
        return 999 * t if continuous else self.level(t)

    def level_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """m and s at the place that the network is told, which may be between two levels."""
        return self.marginal_coeffs(((self.level(t) + 1) / self.N).clamp(max=self.last_level))

    def level_time(self, label: Tensor) -> Tensor:
        """The time (B,) whose place among the levels is a noise index (B,)."""
        return 1 / self.N + (self.last_level - 1 / self.N) * label / (self.N - 1)

    def __repr__(self) -> str:
        levels = "" if self.continuous else ", continuous=False"
        return f"{type(self).__name__}(N={self.N}{levels})"


@register_sde("subvpsde", _BETA_OPTIONS)
class subVPSDE(_LinearBeta):
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

    @Table
    def discrete_sigmas(self) -> Tensor:
        """sigma_i, ascending, (N,)."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.exp(torch.linspace(*ends, self.N, dtype=wide_dtype()))

    @property
    def prior_std(self) -> float:
        """sigma_max, or s(T) of a subclass whose sigma is another one: the data's own spread is
        negligible beside it."""
        of_subclass = "sigma", "marginal_coeffs", "marginal_prob"
        if place(type(self), *of_subclass) >= place(type(self), "prior_std"):
            return self.sigma_max
        end = torch.tensor([float(self.T)], dtype=torch.float64)
        return float(per_sample(self.marginal_coeffs(end)[1], end))

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t) = sigma_min (sigma_max / sigma_min)^(t / T)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** (t / self.T)

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min) / self.T)

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
        return torch.round((self.T - t) / self.T * (self.N - 1)).long()

    def level_time(self, label: Tensor) -> Tensor:
        """The time (B,) of an index into the noise levels in descending order, (B,)."""
        return self.T * (1 - label / max(self.N - 1, 1))

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
        ratio, G = self.transition(t, s)
        (_, std), (_, std_s) = self.marginal_coeffs(t), self.marginal_coeffs(s)
        lower = torch.where(s > 0, std_s, 0.0)
        return batch_mul(1 / ratio, x + batch_mul(G**2, score)), lower * G / std

    def _adjacent_sigmas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_{i-1} (0 below the first) at the step that t belongs to."""
        index = self.step_index(t)
        sigma = self.lookup("discrete_sigmas", index)
        lower = self.lookup("discrete_sigmas", (index - 1).clamp(min=0))
        return sigma, torch.where(index == 0, torch.zeros_like(lower), lower)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sigma_min}, {self.sigma_max}, N={self.N})"


def registered_sdes() -> list[SDE]:
    """One process of each registered class, with its default parameters."""
    return [SDES.get(name)() for name in SDES]


def create_sde(config) -> SDE:
    """The configured process, `training.sde`, with the parameters in the config."""
    return SDES.build(config.training.sde, config)
