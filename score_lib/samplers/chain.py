"""Sampling of discrete chains step by step, as DDPM, DDIM and ADM are sampled by their own code.

[Ho et al. 2020; Song et al. 2021, *Denoising Diffusion Implicit Models*; Nichol and Dhariwal 2021]

A network of discrete noise levels is told whole labels, at all levels or at some of them.  From the
predicted x_0 and x_i, with the posterior q(x_{i-1} | x_i, x_0) of the levels that are kept,

    ancestral:  x_{i-1} = weight x_0 + weight_x x_i + sigma z,
    DDIM:       x_{i-1} = m_{i-1} x_0 + sqrt(s_{i-1}^2 - sigma^2) eps + sigma z.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.affine import Clamp
from score_lib.base.devices import device_of
from score_lib.base.tensors import batch_mul, over_sides
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.samplers.loop import Constraint, Noise, changes_steps, run_steps, sampler_of
from score_lib.samplers.respacing import kept_levels
from score_lib.scores import LevelDenoiser
from score_lib.sdes.chain import Chain, Levels
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE

VARIANCES = ("small", "large", "learned", "ddim")


class StepSettings(NamedTuple):
    """How a step is made.

    Attributes:
        variance: "small" is that of q(x_{i-1} | x_i, x_0), and "large" that of q(x_i | x_{i-1});
            "learned" ones are between the two, by the second half of the network's output channels,
            as `models.adm_configured.WithVariances` gives them.  "ddim": DDIM's step, whose
            variance is eta^2 times the small one.
        eta: of "ddim", from 0, no noise, to 1.
        clip_noise: "ddim" takes the noise in x from the clamped x_0, as ADM; else it is the
            network's own, as in Diffusers.
        shift_mean: guidance moves the mean of an ancestral step by its variance times the part of
            the score that it adds, as ADM's classifier guidance; else it changes the predicted x_0.
    """

    variance: str = "small"
    eta: float = 0.0
    clip_noise: bool = True
    shift_mean: bool = False

    def check(self) -> None:
        """Refuse settings that there are not.

        Raises:
            ValueError: an unknown variance, or eta out of range.
        """
        if self.variance not in VARIANCES:
            known = ", ".join(VARIANCES)
            raise ValueError(f"unknown variance {self.variance!r}: known are {known}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta goes from 0, no noise, to 1, not {self.eta}")


class ChainScore:
    """The score of a network at the levels of a chain: a function of (x, t).

    Args:
        levels: the process at those levels.
        chain: on the device of x.
        denoiser: reads the network.
        clamp: keeps the predicted x_0 in the range of the data; None: it is left as it is.
    Attributes:
        free, denoised: the predicted x_0 of the latest call, as it is and clamped, (B, *D).
        v: its learned variances, or None.
        score: its score, of the clamped x_0, (B, *D).
    """

    def __init__(
        self,
        levels: Levels,
        chain: Chain,
        denoiser: LevelDenoiser,
        clamp: Clamp | None,
    ):
        self.levels, self.chain = levels, chain
        self.denoiser, self.clamp = denoiser, clamp

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        i = self.levels.step_index(t)
        m, s = self.chain.m[i], self.chain.s[i]
        self.free, self.v = self.denoiser(x, self.chain.labels[i], (m, s))
        self.denoised = self.clamp(self.free) if self.clamp else self.free
        self.score = batch_mul(s**-2, batch_mul(m, self.denoised) - x).to(x.dtype)
        return self.score


class ChainStep:
    """A step (x, t, s) -> (x, x_mean) from one level of a chain to the next, in float64.

    Args:
        network: its score, as it is.
        score_fn: the same, guided by constraints; it calls `network` last where it was asked.
        noise: source of standard normal noise, called like `torch.randn_like`.
        settings: how the step is made.
    """

    def __init__(
        self, network: ChainScore, score_fn: Callable, noise: Noise, settings: StepSettings
    ):
        self.network, self.score_fn, self.noise = network, score_fn, noise
        self.settings = settings

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        i = self.network.levels.step_index(t)
        # The part of the score that guidance adds; 0 without it.
        change = self.score_fn(x, t).double() - self.network.score
        make = self._ddim if self.settings.variance == "ddim" else self._ancestral
        x_mean, std = make(x.double(), i, change)
        x_mean = x_mean.to(x.dtype)
        if std is None:
            return x_mean, x_mean
        return x_mean + (std * self.noise(x)).to(x.dtype), x_mean

    def _guided(self, i: Tensor, change: Tensor) -> Tensor:
        """The predicted x_0 by Tweedie's formula for the changed score."""
        m, s = self.network.chain.m[i], self.network.chain.s[i]
        return self.network.denoised + batch_mul(s**2 / m, change)

    def _ancestral(self, x: Tensor, i: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D), and the standard deviation, which broadcasts to it."""
        chain, kind = self.network.chain, self.settings.variance
        if kind == "learned":
            shift = noise = chain.between(i, self.network.v)
        else:
            # Both are published for step 0 of "large": in ADM's guidance, in DDPM's last noise.
            low, high = chain.log_posterior[i], chain.log_step[i]
            shift, noise = (chain.large(i), high) if kind == "large" else (low, low)
            shift, noise = (over_sides(v, x) for v in (shift, noise))
        denoised = self.network.denoised if self.settings.shift_mean else self._guided(i, change)
        mean = batch_mul(chain.weight[i], denoised) + batch_mul(chain.weight_x[i], x)
        if self.settings.shift_mean:
            mean = mean + torch.exp(shift) * change
        return mean, torch.exp(noise / 2)

    def _ddim(self, x: Tensor, i: Tensor, change: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, *D), and the standard deviation; None if there is no noise."""
        chain, eta = self.network.chain, self.settings.eta
        m, s = chain.m[i], chain.s[i]
        denoised = self._guided(i, change)
        # The noise that x holds beside the guided x_0, or what the network said of it.
        told = (
            denoised
            if self.settings.clip_noise
            else self.network.free + (denoised - self.network.denoised)
        )
        eps = batch_mul(1 / s, x - batch_mul(m, told))
        variance = eta**2 * chain.posterior[i]
        rest = torch.sqrt(chain.s_before[i] ** 2 - variance)
        mean = batch_mul(chain.m_before[i], denoised) + batch_mul(rest, eps)
        return mean, batch_mul(torch.sqrt(variance), torch.ones_like(x)) if eta else None


def get_chain_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    *,
    respacing: str | int = "",
    clip: bool = True,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 0.0,
    device: torch.device | str | None = None,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    most_steps: int = 0,
    differentiable: bool = False,
    parametrization: Parametrization | str | None = None,
    **settings,
) -> Callable:
    """Sampling of a discrete chain, all of it or some levels, as DDPM, DDIM and ADM do.

    Args:
        sde: a process with discrete noise levels.
        respacing: which of them are visited, see `kept_levels`; variances are those of steps
            between the visited ones.
        clip: clamp the predicted x_0 to the range that `inverse_scaler` maps to [0, 1].
        continuous: must be False.
        denoise: return the mean of the last step; else its noise is added, of a variance that is
            the next step's for "small", and for "ddim" 0.
        eps: of no effect, as the last step leads from the lowest level to the data.
        start_time: start from the last visited level at or below it; None: from the last one.
        most_steps: make only the last so many steps; 0: all.
        settings: `variance`, `eta`, `clip_noise` and `shift_mean`, see `StepSettings`.
        others: see `sampler_of`, which also documents the returned `sample`.
    Raises:
        ValueError: an unknown setting, levels that cannot be kept, a network of all times, or a
            constraint on steps whose last one is from a level far from the data.
        NotImplementedError: the process has no discrete noise levels.
    """
    chosen = StepSettings(**settings)
    chosen.check()
    if continuous:
        raise ValueError(
            "sampling.method = 'chain' needs a network of discrete noise levels, "
            "training.continuous = False: sample a network of all times by 'pc' with "
            "ancestral_sampling, or by a solver such as 'ddim', in sampling.num_steps"
        )
    clamp = Clamp(inverse_scaler) if clip else None
    levels, read = _reader(sde, respacing, chosen, clamp, parametrization)
    _check_prior(levels, respacing)
    _check_wraps(levels, respacing, constraints)
    times = _visited(levels, start_time, most_steps)

    def follow(x, score_fn, noise, *, network, **watch):
        step = ChainStep(network, score_fn, noise, chosen)
        for constraint in constraints:
            step = constraint.wrap(levels, step, noise)
        x, x_mean = run_steps(x, times.to(x), [step], **watch)
        return x_mean if denoise else x

    shared = False, device, constraints, differentiable
    return sampler_of(levels, shape, inverse_scaler, follow, times[0], *shared, read=read)


def get_chain_step_fn(
    sde: SDE,
    model: Callable,
    inverse_scaler: Callable | None = None,
    *,
    respacing: str | int = "",
    guide: Callable | None = None,
    noise: Noise = torch.randn_like,
    parametrization: Parametrization | str | None = None,
    **settings,
) -> Callable:
    """A single step of `get_chain_sampler`, for loops of one's own.

    Args:
        inverse_scaler: if given, the predicted x_0 is clamped to the range that it maps to [0, 1].
        guide: from the score function of (x, t) to a guided one; t are times of `Levels`.
        noise: source of standard normal noise, called like `torch.randn_like`.
        settings: see `StepSettings`.
        others: see `get_chain_sampler`.
    Returns:
        `step(x, i) -> (x, x_mean)`, for x (B, *D) at visited levels i (B,), int64, counted from 0,
        the least noise; x at the next lower level, and without the step's noise.
    """
    chosen = StepSettings(**settings)
    chosen.check()
    clamp = Clamp(inverse_scaler) if inverse_scaler else None
    levels, read = _reader(sde, respacing, chosen, clamp, parametrization)
    network = read(model, device_of(model))
    made = ChainStep(network, guide(network) if guide else network, noise, chosen)

    def step(x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        t = levels.lookup("times", i)
        return made(x, t, t)

    return step


def _reader(
    sde: SDE,
    respacing: str | int,
    settings: StepSettings,
    clamp: Clamp | None,
    parametrization: Parametrization | str | None,
) -> tuple[Levels, Callable]:
    """The visited levels, and `read(model, device)`, which gives a `ChainScore`."""
    sde, learned = as_process(sde), settings.variance == "learned"
    chosen = get_parametrization(parametrization)
    kept = kept_levels(sde.N, respacing)
    if len(kept) < 2 <= sde.N:
        raise ValueError(
            f"sampling.respacing = {respacing!r} keeps one level of {sde.N}, and a chain has "
            f"two or more steps"
        )
    levels = Levels(sde, Chain(sde, kept=kept))

    def read(model, where):
        denoiser = LevelDenoiser(sde, model, learned, chosen)
        return ChainScore(levels, Chain(sde, where, kept), denoiser, clamp)

    return levels, read


def _visited(levels: Levels, start_time: float | None, most_steps: int) -> Tensor:
    """Times of the visited levels, falling, and 0 for the data, (n + 1,)."""
    start = levels.T if start_time is None else start_time
    # A thousandth of a step is rounding.
    tolerance = 1e-3 * float(levels.times.diff().min())
    times = levels.times[levels.times <= start + tolerance]
    if not len(times) or not math.isfinite(start):
        raise ValueError(
            f"none of the visited levels is at or below the start at {start:g}: the first is at "
            f"{levels.sampling_eps:g}"
        )
    return torch.cat([times[: most_steps or None].flip(0), times.new_zeros(1)])


def _check_prior(levels: Levels, respacing: str | int) -> None:
    """Refuse to start below the last level where x has another spread there.

    A variance-preserving process has the same one at all levels, for data of unit variance.
    """
    _, m, s = levels.process.discrete_chain()
    spread, last = (
        float(torch.hypot(m_i[-1], s_i[-1])) for m_i, s_i in ((levels.m, levels.s), (m, s))
    )
    if abs(spread / last - 1) > 0.01:
        raise ValueError(
            f"sampling.respacing = {respacing!r} leaves out the last level of {levels.process!r}, "
            f"at which sampling starts: keep it by a number alone, such as '{levels.N}'"
        )


def _check_wraps(levels: Levels, respacing: str | int, constraints: Sequence[Constraint]) -> None:
    """Refuse constraints that leave known parts of x as they are at the lowest level, m x_0, where
    m is not nearly 1."""
    scale = float(levels.m[0])
    if scale < 0.99 and any(map(changes_steps, constraints)):
        raise ValueError(
            f"sampling.respacing = {respacing!r} ends at a level where {scale:.3g} of the data is "
            f"left in x, and so much would be of the known part of samples: visit lower levels of "
            f"{levels.process!r}, as by '{levels.N}', build it with more steps, or choose a "
            "constraint that guides the score"
        )
