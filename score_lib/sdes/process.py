"""Forward processes that turn data into noise, and their time reversal.  [S21, section 3.4]

`SDE` asks for the four methods that every process has and gives all others defaults.  Samplers,
losses and likelihood call methods; some need those of a `LinearSDE`, which asks for three functions
of time instead:

    @register_sde("my_process")
    class MySDE(LinearSDE):
        def drift_rate(self, t): ...
        def diffusion(self, t): ...
        def marginal_coeffs(self, t): ...

or, instead of them, `sde` and `marginal_prob` as published processes have them.

Throughout, x is (B, *D) in the network's range and t is (B,) in [0, T], from data to noise.
"""

import abc
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from score_lib.base.inheritance import AsIn, derive, place
from score_lib.base.registry import Registry
from score_lib.base.tensors import (
    batch_mul,
    bytes_of,
    derive_seed,
    per_sample,
    rows,
    score_of_data,
    seeded,
    wide_dtype,
)
from score_lib.sdes import coefficients

SDES = Registry("SDE", options={"N": "model.num_scales"})


def register_sde(name: str, options: Mapping[str, str] | None = None) -> Callable:
    """Class decorator that makes a process available to configs as `training.sde = name`.

    Args:
        options: keywords of the class -> dotted names of the options that feed them; default: N
            from `model.num_scales`.
    """
    return SDES.register(name=name, options=options)


def checked_steps(N: float) -> int:
    """A number of discretisation steps as an int, also of 1e3.

    Raises:
        ValueError: it is below 1, or not whole.
    """
    if not N >= 1:
        raise ValueError(f"a process needs at least one discretisation step, not N = {N}")
    if N % 1:
        raise ValueError(f"a process has a whole number of discretisation steps, not N = {N}")
    return int(N)


class SDE(abc.ABC):
    """dx = f(x, t) dt + g(t) dw on [0, T], with data at t = 0 and noise at t = T.

    Abstract are only `sde`, `marginal_prob`, `prior_sampling` and `prior_logp`.  The other methods
    set how the process is discretised and how a network's output becomes a score; a process
    overrides them only where it differs.

    Args:
        N: number of discretisation steps.
    Attributes:
        T: end of time.
        sampling_eps: the reverse process stops here, because scores blow up at 0.
    """

    T = 1.0
    sampling_eps = 1e-3

    def __init__(self, N: int = 1000):
        self.N = checked_steps(N)

    @abc.abstractmethod
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift f(x, t), (B, *D), and diffusion coefficient g(t), (B,)."""

    @abc.abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of p(x_t | x_0 = x).  [S21, appendix B]"""

    @abc.abstractmethod
    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        """Samples of the given shape from the prior, which approximates p_T; on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z: Tensor) -> Tensor:
        """Log density of the prior at z (B, *D): (B,), in nats."""

    def prior_from_normal(self, z: Tensor) -> Tensor:
        """A sample from the prior made of standard normal noise z (B, *D).

        By default a draw from the prior whose seed is a function of z, all of it.
        """
        with seeded(derive_seed("prior", bytes_of(z).tobytes().hex())):
            return self.prior_sampling(z.shape).to(z)

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One step x_{i+1} = x_i + f + G z of a chain with N steps: f (B, *D) and G (B,).

        By default Euler-Maruyama with step T / N.
        """
        dt = self.T / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, per_sample(diffusion, t) * math.sqrt(dt)

    def check_chain(self) -> None:  # noqa: B027  (a hook)
        """Refuse to go back along the chain of N steps, where there is no way.

        Raises:
            ValueError: N is too small.
        """

    def increment(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """One step x_t = x_s + f + G z between any times s < t, (B,): f (B, *D) and G (B,).

        f and G are functions of x and t, the end at which a reverse step starts.  By default
        Euler-Maruyama with step t - s.
        """
        drift, diffusion = self.sde(x, t)
        return batch_mul(t - s, drift), per_sample(diffusion, t) * torch.sqrt(t - s)

    def reverse(self, score_fn: Callable, probability_flow: bool = False) -> "ReverseSDE":
        """The process run backwards in time, as an SDE or as the probability-flow ODE."""
        return ReverseSDE(self, score_fn, probability_flow)

    def with_steps(self, N: int) -> "SDE":
        """The process with another number of discretisation steps."""
        process = copy.copy(self)
        try:
            process.N = N
        except dataclasses.FrozenInstanceError:  # its tables, made with it, are made anew
            return dataclasses.replace(self, N=N)
        return process

    # The conventions of networks for this process.

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        """The label (B,) that the network gets for time t (B,)."""
        return 999 * t

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        """The standard deviation (B,) that the network's output is relative to."""
        return self.marginal_prob(torch.zeros_like(t), t)[1]

    def score_from_output(self, output: Tensor, std: Tensor) -> Tensor:
        """The score (B, *D), for an output that predicts the (negative) noise."""
        return batch_mul(-1.0 / std, output)

    def to_score(self, output: Tensor, t: Tensor, continuous: bool) -> Tensor:
        """The score (B, *D) from a network's output at time t."""
        if type(self).noise_std is SDE.noise_std:  # of data of its shape, as published
            std = per_sample(self.marginal_prob(torch.zeros_like(output), t)[1], t)
        else:
            std = self.noise_std(t, continuous)
        return self.score_from_output(output, std)

    def discrete_coeffs(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mean scale and standard deviation (B,) of x given x_0 at a noise index (B,), int64."""
        raise NotImplementedError(
            f"{type(self).__name__} has no discrete noise levels: set training.continuous = True"
        )

    def level_coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """m and s, (B,), of the discrete noise level that a network is told at time t (B,)."""
        return self.discrete_coeffs(self.noise_label(t, False).long())

    def level_time(self, label: Tensor) -> Tensor:
        """The time (B,) at which a network is told a noise index (B,): of `noise_label`."""
        return self.T * label / max(self.N - 1, 1)

    def discrete_chain(self) -> tuple[Tensor, Tensor, Tensor]:
        """The N discrete noise levels, from the least noise on: labels, int64, and the mean scale
        and standard deviation of x given x_0, float64, each (N,)."""
        t = torch.linspace(0, self.T, self.N, dtype=torch.float64)
        labels = self.noise_label(t, False).round().long()
        scale, std = self.discrete_coeffs(labels)
        return labels, scale.double(), std.double()

    # Hooks of samplers.

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """Scale (B,) of the Langevin corrector's step at time t.  [S21, appendix G]"""
        return torch.ones_like(t)

    def scale_and_std(self, t: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
        """m(t) and s(t), (B,), for x_t = m x_0 + s z with x of (B, *D), D of so many dimensions.

        Calls `marginal_prob` with x of as many dimensions as the data, since a user's own may
        broadcast for one shape only.
        """
        return coefficients.scale_and_std(self, t, dimensions)

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
        return self.posterior(x, t, (t - self.T / self.N).clamp(min=0), score)

    def posterior(self, x: Tensor, t: Tensor, s: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of x_s given x_t = x, for s < t, (B,)."""
        raise NotImplementedError(
            f"{type(self).__name__} has no ancestral sampling: use the reverse_diffusion or "
            "euler_maruyama predictor"
        )

    def check_times(
        self, eps: float, start: float | None = None, shape: tuple[int, ...] = ()
    ) -> None:
        """Refuse times that the reverse process cannot visit.

        Args:
            eps: where it stops.
            start: where it starts; None is T.
            shape: of x, (B, *D); () if unknown, then the noise at eps is not looked at.
        Raises:
            ValueError: they are not in [0, T] and falling, or there is no noise at eps, or it
                depends on the shape.
        """
        start = self.T if start is None else start
        if not 0 <= eps <= start <= self.T * (1 + 1e-6):
            raise ValueError(
                f"the reverse process runs from T = {self.T:g}, or below, down to a time >= 0: "
                f"not from {start:g} to {eps:g}"
            )
        if not shape:
            return
        coefficients.check_shape(self, torch.empty(0, *shape[1:]))
        if not coefficients.noise_at(self, eps, len(shape) - 1) > 0:
            raise ValueError(
                f"there is no noise at eps = {eps:g}, so that the score is infinite: stop at "
                f"{self.sampling_eps:g}"
            )

    def step_index(self, t: Tensor) -> Tensor:
        """Index floor(t (N - 1) / T) of the discretisation step at time t: (B,), int64."""
        return (t * (self.N - 1) / self.T).long()

    def lookup(self, table: str, index: Tensor) -> Tensor:
        """Entries of one of the process's tables, of which a copy stays on the index's device."""
        return self.table_on(table, index.device)[index]

    def table_on(self, table: str, device: torch.device) -> Tensor:
        """One of the process's tables, of which a copy stays on the device."""
        values = getattr(self, table)
        if values.device == device:
            return values
        moved = self.__dict__.setdefault("_moved", {})
        source, copied = moved.get((table, device), (None, None))
        if source is not values:  # the first time, or set anew
            copied = values.to(device)
            moved[table, device] = values, copied
        return copied

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
        self.forward.check_chain()
        return self._reverse(*self.forward.discretize(x, t), x, t)

    def increment(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, *D) and G (B,) of x_s = x_t - f + G z, for s < t."""
        return self._reverse(*self.forward.increment(x, t, s), x, t)

    def _reverse(self, drift, diffusion, x, t):
        share, diffusion = 0.5 if self.probability_flow else 1.0, per_sample(diffusion, t)
        drift = drift - batch_mul(share * diffusion**2, score_of_data(self.score_fn, x, t))
        return drift, torch.zeros_like(diffusion) if self.probability_flow else diffusion


class LinearSDE(SDE):
    """dx = a(t) x dt + g(t) dw: three functions of t, (B,) -> (B,), give everything else.

    A subclass may override these, or `sde` and `marginal_prob`, which say the same of x: the form
    that is defined nearest, in the order of inheritance, gives the other one.  So it is with
    `prior_sampling` and `prior_from_normal`.

    Attributes:
        prior_std: standard deviation of the Gaussian prior.
    """

    prior_std = 1.0

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        for name, (formula, *sources) in _FORMULAS.items():
            derive(cls, name, formula, *sources)

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
        t = coefficients.checked_times(x, t)
        return batch_mul(self.drift_rate(t), x), self.diffusion(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean m(t) x, (B, *D), and standard deviation s(t), (B,), of p(x_t | x_0 = x).

        Raises:
            ValueError: the batch sizes of x and t differ.
        """
        scale, std = self.marginal_coeffs(coefficients.checked_times(x, t))
        if isinstance(scale, Tensor):
            scale = scale.to(x.device)  # x may be on the host, if s(t) alone is asked for
        return batch_mul(scale, x), std

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """r and G of x_t = r x_s + G z for s < t, (B,); at s = 0, x_s is the data itself.

        A VE process has noise sigma_min at time 0, which the last step of its chain removes, too.
        """
        (scale, std), (scale_s, std_s) = self.marginal_coeffs(t), self.marginal_coeffs(s)
        ratio = scale / torch.where(s > 0, scale_s, 1.0)
        earlier = ratio * torch.where(s > 0, std_s, 0.0)
        return ratio, torch.sqrt((std**2 - earlier**2).clamp(min=0))

    def increment(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, *D) and G (B,) of the exact transition x_t = x_s + f + G z, with f = (r - 1) x."""
        ratio, G = self.transition(t, s)
        return batch_mul(ratio - 1.0, x), G

    def noise_std(self, t: Tensor, continuous: bool) -> Tensor:
        """s(t)."""
        return self.marginal_coeffs(t)[1]

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        """Samples from N(0, prior_std^2 I), on the CPU."""
        # A subclass may make noise into a fresh draw of its own, which may call this method.
        return AsIn(self, LinearSDE).prior_from_normal(torch.randn(*shape, dtype=wide_dtype()))

    def prior_from_normal(self, z: Tensor) -> Tensor:
        """prior_std z."""
        return z * self.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, prior_std^2 I): (B,), in nats."""
        z = rows(z)
        variance = self.prior_std**2
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi * variance)
        return -constant - (z**2).sum(1) / (2 * variance)


# Methods by formulas of others that say the same.
_FORMULAS = {
    "sde": (LinearSDE.sde, "drift_rate", "diffusion"),
    "drift_rate": (coefficients.drift_rate, "sde"),
    "diffusion": (coefficients.diffusion, "sde"),
    "marginal_prob": (LinearSDE.marginal_prob, "marginal_coeffs"),
    "marginal_coeffs": (coefficients.marginal_coeffs, "marginal_prob"),
    "transition": (LinearSDE.transition, "marginal_coeffs", "marginal_prob"),
    "prior_sampling": (LinearSDE.prior_sampling, "prior_from_normal"),
    "prior_from_normal": (SDE.prior_from_normal, "prior_sampling"),
}


def check_linear(sde: object) -> None:
    """Refuse a process that bounds of the likelihood are not known for.

    Raises:
        ValueError: its drift is not linear.
    """
    if not isinstance(sde, LinearSDE):
        raise ValueError(
            f"the bound needs a process with a linear drift, a LinearSDE, and {sde!r} is none"
        )
    if place(type(sde), "sde") < place(type(sde), "drift_rate"):
        sde.drift_rate(torch.tensor([sde.T / 2]))


def check_prior(sde: LinearSDE, x: Tensor) -> None:
    """Refuse a prior other than N(0, prior_std^2 I), which bounds of the likelihood take.

    Args:
        x: data (B, *D), of the shape that `prior_logp` is asked for.
    Raises:
        ValueError: `prior_logp` is another density.
    """
    if type(sde).prior_logp is LinearSDE.prior_logp:
        return
    sides, std = x.shape[1:], float(sde.prior_std)
    z = std * torch.linspace(-2, 2, 3 * sides.numel(), dtype=x.dtype, device=x.device).reshape(
        3, *sides
    )
    found, expected = sde.prior_logp(z).to(z), LinearSDE.prior_logp(sde, z)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"bounds of the likelihood take the prior N(0, prior_std^2 I), and prior_logp of "
            f"{sde!r} is another density than that of prior_std = {std:g}: set prior_std, or use "
            "get_likelihood_fn, which takes any prior"
        )
