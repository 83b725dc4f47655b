"""Processes written for the published code, which have its methods and none of our hooks.

They are read by the published conventions for VE, VP and sub-VP.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from score_lib.base.tensors import per_sample
from score_lib.sdes import coefficients
from score_lib.sdes.process import SDE, LinearSDE, ReverseSDE
from score_lib.sdes.published import VESDE, VPSDE, linear_betas


def as_process(sde: object) -> SDE:
    """A process with all hooks: the given one or, if it has only the published methods, a view.

    The view is of a subclass of its class, and has its attributes, also those that change later.

    Raises:
        ValueError: it has not even the published methods.
    """
    if hasattr(sde, "to_score"):
        return sde
    if missing := sorted(name for name in SDE.__abstractmethods__ if not hasattr(sde, name)):
        raise ValueError(
            f"{sde!r} is no process: it has no {', '.join(missing)}. Use one of sde_lib, or define "
            "the methods that `sde_lib.SDE` asks for"
        )
    process = object.__new__(_completed(type(sde), _kind(sde)))
    object.__setattr__(process, "__dict__", vars(sde))  # a class may refuse to set attributes
    return process


def _kind(sde: object) -> type:
    """The conventions for a process, by the names of its classes, else by its attributes."""
    for base in type(sde).__mro__:
        for part, kind in {"subvpsde": _SubVP, "vpsde": _VP, "vesde": _VE}.items():
            if part in base.__name__.lower():
                return kind
    if hasattr(sde, "sigma_max") or hasattr(sde, "discrete_sigmas"):
        return _VE
    return _VP if hasattr(sde, "sqrt_1m_alphas_cumprod") else _Foreign


@functools.cache
def _completed(cls: type, kind: type) -> type[SDE]:
    return type(cls)(cls.__name__, (kind, cls, SDE), {"__module__": cls.__module__})


class _Foreign:
    """Before a foreign class in the order of inheritance; `SDE`, with other hooks, comes after."""

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As the foreign class has it, which may broadcast for images only."""
        if x.dim() > 1:
            return super().marginal_prob(x, t)
        mean, std = super().marginal_prob(x.reshape(-1, 1, 1, 1), t)
        return mean.reshape(len(x)), std

    def reverse(self, score_fn: Callable, probability_flow: bool = False) -> ReverseSDE:
        """The foreign class's own reverse process."""
        theirs = super().reverse(score_fn, probability_flow)
        return _ForeignReverse(self, score_fn, probability_flow, theirs)

    def with_steps(self, N: int) -> SDE:
        """Refused: its tables are those of its own N."""
        raise ValueError(
            f"{type(self).__name__} has tables for N = {self.N} steps: make it with N = {N}, or "
            "use a predictor that takes any step"
        )


class _ForeignReverse(ReverseSDE):
    """A foreign reverse process, and steps of any length as `ReverseSDE` makes them."""

    def __init__(self, forward: SDE, score_fn: Callable, probability_flow: bool, theirs):
        super().__init__(forward, score_fn, probability_flow)
        self.theirs = theirs

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _with_tensor(self.theirs.sde(x, t), t)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _with_tensor(self.theirs.discretize(x, t), t)


def _with_tensor(coefficients: tuple, t: Tensor) -> tuple[Tensor, Tensor]:
    """Drift and diffusion; the published code has the number 0 for that of an ODE."""
    drift, diffusion = coefficients
    return drift, per_sample(diffusion, t).to(t)


class _Linear(_Foreign):
    """The mean of x_t is m(t) x_0, which gives exact steps of any length."""

    transition, increment = LinearSDE.transition, LinearSDE.increment
    marginal_coeffs = coefficients.marginal_coeffs


class _VE(_Linear):
    """Conventions of VE."""

    sampling_eps = VESDE.sampling_eps
    score_from_output, discrete_coeffs = VESDE.score_from_output, VESDE.discrete_coeffs
    ancestral_step, posterior = VESDE.ancestral_step, VESDE.posterior
    _adjacent_sigmas, noise_label = VESDE._adjacent_sigmas, VESDE.noise_label
    level_time = VESDE.level_time

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t), (B,)."""
        return self.marginal_coeffs(t)[1]


class _SubVP(_Linear):
    """Conventions of sub-VP: `SDE` has its labels and scores."""

    posterior = SDE.posterior

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """1 - beta_i, also where the published class has no table of it."""
        if hasattr(self, "alphas"):
            return VPSDE.langevin_alpha(self, t)
        return (1 - linear_betas(self)).to(t.device)[self.step_index(t)]


class _VP(_SubVP):
    """Conventions of VP."""

    noise_label, discrete_coeffs = VPSDE.noise_label, VPSDE.discrete_coeffs
    ancestral_step, posterior = VPSDE.ancestral_step, VPSDE.posterior
    chain_beta = VPSDE.chain_beta

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        """s(t), or that of the chain at the label's integer part."""
        if continuous:
            return self.marginal_coeffs(t)[1]
        return self.lookup("sqrt_1m_alphas_cumprod", self.noise_label(t, continuous).long())
