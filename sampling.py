"""Sampling by running a process backwards in time.  [S21, section 4 and appendices D, F, G]

Every factory returns `sample(model, z=None) -> (images, function evaluations)`.  Inside, a step is
`update(x, t) -> (x, x_mean)`: predictors and correctors are such functions, constraints wrap them
or add to the score, and one loop, `run_updates`, applies them.  x is (B, *D) in the network's
range, t is (B,).

Noise is drawn in a fixed order: the prior, then at each time the corrector's noise (once a
corrector step), then the predictor's; a constraint that wraps an update draws after it.  Noise
comes from PyTorch's global generator, or from `noise`, a function like `torch.randn_like`; with
`utils.SampleNoise(seed, indices)`, sample k is a function of the seed and k alone for every method
that treats samples apart.
"""

from __future__ import annotations

import abc
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.utils import device_of, get_score_fn
from sde_lib import SDE
from utils.ode import integrate
from utils.registry import Registry
from utils.tensors import batch_mul

_PREDICTORS = Registry("predictor")
_CORRECTORS = Registry("corrector")
_SAMPLERS = Registry("sampling.method")

register_predictor, get_predictor = _PREDICTORS.register, _PREDICTORS.get
register_corrector, get_corrector = _CORRECTORS.register, _CORRECTORS.get
# Of functions (config, sde, shape, inverse_scaler, **options) that give a sampler.
register_sampler = _SAMPLERS.register

# Where further samplers are defined; imported when one is first asked for.
_MODULES = ("solvers",)

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]


class Predictor(abc.ABC):
    """One step of the reverse process from time t towards 0.

    Args:
        sde: the forward process.
        score_fn: function of (x, t) giving the score.
        probability_flow: follow the ODE with the same marginals instead of the SDE.
    Attributes:
        rsde: the reverse process.
        noise: where standard normal noise comes from; called like `torch.randn_like`.
    """

    noise: Noise = staticmethod(torch.randn_like)

    def __init__(self, sde: SDE, score_fn: Callable, probability_flow: bool = False):
        self.sde, self.score_fn, self.probability_flow = sde, score_fn, probability_flow
        self.rsde = sde.reverse(score_fn, probability_flow)

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x one step earlier and its mean, which is x without the step's noise; both (B, *D)."""


class Corrector(abc.ABC):
    """Markov chain steps that leave p_t as it is.

    Args:
        sde: the forward process.
        score_fn: function of (x, t) giving the score.
        snr: signal-to-noise ratio, which sets the step size.
        n_steps: steps at each time.
    Attributes:
        noise: where standard normal noise comes from; called like `torch.randn_like`.
    """

    noise: Noise = staticmethod(torch.randn_like)

    def __init__(self, sde: SDE, score_fn: Callable, snr: float, n_steps: int):
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x after n_steps steps at time t, and its mean; both (B, *D)."""


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """x <- x - f_rev(x, t) dt + g(t) sqrt(dt) z with dt = T / N."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        dt = self.rsde.T / self.rsde.N
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x - drift * dt
        return x_mean + batch_mul(diffusion * math.sqrt(dt), self.noise(x)), x_mean


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """x <- x - f_rev + G z, with the forward chain's own discretisation.  [S21, appendix E]"""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, G = self.rsde.discretize(x, t)
        x_mean = x - f
        return x_mean + batch_mul(G, self.noise(x)), x_mean


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(Predictor):
    """The posterior of the discrete chain, as in SMLD and DDPM.  [S21, appendix F]"""

    def __init__(self, sde: SDE, score_fn: Callable, probability_flow: bool = False):
        super().__init__(sde, score_fn, probability_flow)
        if probability_flow:
            raise ValueError(
                "ancestral sampling has no probability-flow form: use the reverse_diffusion "
                "predictor, or sampling.probability_flow = False"
            )

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_mean, std = self.sde.ancestral_step(x, t, self.score_fn(x, t))
        return x_mean + batch_mul(std, self.noise(x)), x_mean


@register_predictor(name="none")
class NonePredictor(Predictor):
    """Leaves x as it is: sampling by the corrector alone."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _Langevin(Corrector):
    """x <- x + eps score + sqrt(2 eps) z; a subclass says how large eps is."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.sde.langevin_alpha(t)
        x_mean = x
        for _ in range(self.n_steps):
            score, z = self.score_fn(x, t), self.noise(x)
            step = 2 * alpha * self.relative_step(score, z, t) ** 2
            x_mean = x + batch_mul(step, score)
            x = x_mean + batch_mul(torch.sqrt(2 * step), z)
        return x, x_mean

    @abc.abstractmethod
    def relative_step(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """sqrt(eps / (2 alpha)), (B,)."""


@register_corrector(name="langevin")
class LangevinCorrector(_Langevin):
    """Langevin dynamics with snr |z| / |score|, norms averaged over the batch.

    [S21, appendix G, algorithms 4 and 5.]  The average makes a sample depend on its batch.
    """

    def relative_step(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return (self.snr * _norms(z).mean() / _norms(score).mean()).expand(t.shape)


@register_corrector(name="langevin_per_sample")
class PerSampleLangevinCorrector(_Langevin):
    """Langevin dynamics with snr |z| / |score| of each sample, whatever else is in the batch."""

    def relative_step(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.snr * _norms(z) / _norms(score)


@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """Langevin dynamics with snr s(t), as in NCSN and NCSNv2.  [Song and Ermon, 2019 and 2020]"""

    def relative_step(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.snr * self.sde.marginal_prob(score, t)[1]


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """Leaves x as it is."""

    def __init__(
        self, sde: SDE, score_fn: Callable | None = None, snr: float = 0.0, n_steps: int = 0
    ):
        super().__init__(sde, score_fn, snr, n_steps)

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


class Constraint:
    """What samples are to satisfy.  [S21, section 5]

    Three hooks, each of which leaves things as they are unless a subclass says otherwise.
    """

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """Where sampling starts.

        Args:
            sde: the forward process.
            x: a draw from the prior, or the given start, (B, *D).
            t: the first time, (B,).
            noise: where standard normal noise comes from; called like `torch.randn_like`.
        Returns:
            x at that time, (B, *D).
        """
        return x

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        """A score function of (x, t), for instance score_fn with a gradient added."""
        return score_fn

    def wrap(self, sde: SDE, update: Update, noise: Noise) -> Update:
        """An update (x, t) -> (x, x_mean) that does something to x after another update."""
        return update


class CountedScore:
    """A score function that counts its evaluations."""

    def __init__(self, score_fn: Callable):
        self.score_fn, self.evaluations = score_fn, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.score_fn(x, t)


def run_updates(
    x: Tensor, timesteps: Tensor, updates: Iterable[Update], progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply each update at each time.

    Args:
        x: start, (B, *D).
        timesteps: times in the order in which they are visited, (N,).
        updates: functions (x, t) -> (x, x_mean), corrector first, then predictor.
        progress: show a progress bar.
    Returns:
        The final x and its mean, each (B, *D).
    """
    updates = list(updates)
    x_mean = x
    for t in _with_bar(timesteps, progress):
        t = t.expand(x.shape[0])
        for update in updates:
            x, x_mean = update(x, t)
    return x, x_mean


def _with_bar(timesteps: Tensor, progress: bool) -> Iterable[Tensor]:
    if not progress:
        return timesteps
    from tqdm import tqdm

    return tqdm(timesteps, desc="sampling", unit="step", leave=False)


def visited_times(
    sde: SDE, eps: float, start_time: float | None = None, stop_time: float | None = None
) -> Tensor:
    """The times from start_time down to, and without, stop_time of the N times of a whole run.

    A run that stops at a time and another that starts there are together the whole one.

    Args:
        eps: the last of the N times; the first is sde.T.
        start_time: None is T.
        stop_time: None is after the last one.
    Returns:
        Times in the order in which they are visited, on the CPU.
    Raises:
        ValueError: no time is left.
    """
    times = torch.linspace(sde.T, eps, sde.N)
    step = (sde.T - eps) / max(sde.N - 1, 1)

    def index(time: float) -> int:
        # A thousandth of a step is rounding.
        return max(0, math.ceil((sde.T - time) / step - 1e-3))

    first = 0 if start_time is None else index(start_time)
    stop = sde.N if stop_time is None else index(stop_time)
    if len(times[first:stop]) == 0:
        raise ValueError(
            f"none of the {sde.N} times from {sde.T:g} down to {eps:g} lies between the start at "
            f"{sde.T if start_time is None else start_time:g} and the stop at "
            f"{0 if stop_time is None else stop_time:g}"
        )
    return times[first:stop]


def draw_prior(sde: SDE, shape: tuple[int, ...], device: torch.device, noise: Noise | None):
    """x_T ~ prior of the given shape, on a device."""
    if noise is None:
        return sde.prior_sampling(shape).to(device)
    return sde.prior_from_normal(noise(torch.empty(shape, device=device)))


def predictor_update(
    sde: SDE,
    score_fn: Callable,
    predictor: type[Predictor] | None,
    probability_flow: bool = False,
    noise: Noise | None = None,
) -> Update:
    """The update of a predictor class; None stands for no predictor."""
    built = (predictor or NonePredictor)(sde, score_fn, probability_flow)
    return _with_noise(built, noise).update_fn


def corrector_update(
    sde: SDE,
    score_fn: Callable,
    corrector: type[Corrector] | None,
    snr: float,
    n_steps: int,
    noise: Noise | None = None,
) -> Update:
    """The update of a corrector class; None stands for no corrector."""
    built = (corrector or NoneCorrector)(sde, score_fn, snr, n_steps)
    return _with_noise(built, noise).update_fn


def _with_noise(built, noise):
    if noise is not None:
        built.noise = noise
    return built


def shared_predictor_update_fn(x, t, sde, model, predictor, probability_flow, continuous):
    """One predictor step of a network at (x, t): (x, x_mean)."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return predictor_update(sde, score_fn, predictor, probability_flow)(x, t)


def shared_corrector_update_fn(x, t, sde, model, corrector, continuous, snr, n_steps):
    """One round of corrector steps of a network at (x, t): (x, x_mean)."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return corrector_update(sde, score_fn, corrector, snr, n_steps)(x, t)


def get_sampling_fn(
    config,
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    eps: float,
    **options,
) -> Callable:
    """The configured sampler.

    Args:
        config: `sampling.method` is "pc", "ode" or a solver of `solvers`.
        sde: the forward process.
        shape: shape of a batch of samples, (B, *D).
        inverse_scaler: from the network's range to [0, 1].
        eps: time at which sampling stops.
        options: further keywords that all samplers have, such as `constraints`.
    Returns:
        `sample(model, z=None)`.
    Raises:
        ValueError: an unknown method, predictor or corrector.
    """
    options |= {
        "denoise": config.sampling.noise_removal,
        "eps": eps,
        "continuous": config.training.continuous,
    }
    for module in _MODULES:
        importlib.import_module(module)
    build = _SAMPLERS.get(config.sampling.method.lower())
    return build(config, sde, shape, inverse_scaler, **options)


@register_sampler(name="pc")
def _pc_from_config(config, sde, shape, inverse_scaler, **options):
    settings = config.sampling
    return get_pc_sampler(
        sde,
        shape,
        get_predictor(settings.predictor.lower()),
        get_corrector(settings.corrector.lower()),
        inverse_scaler,
        settings.snr,
        n_steps=settings.n_steps_each,
        probability_flow=settings.probability_flow,
        **options,
    )


@register_sampler(name="ode")
def _ode_from_config(config, sde, shape, inverse_scaler, **options):
    return get_ode_sampler(sde, shape, inverse_scaler, **options)


def get_pc_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    predictor: type[Predictor] | None,
    corrector: type[Corrector] | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    *,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    stop_time: float | None = None,
    differentiable: bool = False,
) -> Callable:
    """Predictor-corrector sampling.  [S21, algorithm 1]

    Args:
        sde: the forward process; its N is the number of steps of a whole run.
        shape: shape of a batch of samples, (B, *D).
        predictor, corrector: classes, or None.
        inverse_scaler: from the network's range to [0, 1].
        snr: signal-to-noise ratio of the corrector.
        n_steps: corrector steps at each time.
        probability_flow: let the predictor follow the probability flow.
        continuous: whether the network was trained on all times.
        denoise: return the last update's mean, without its noise.
        eps: time at which sampling stops.
        device: where to sample; None is the network's own.
        constraints: what samples are to satisfy; the first is innermost.
        start_time, stop_time: part of the run to make, see `visited_times`.
        differentiable: keep what a gradient of the samples needs: x at every step; scores are
            computed again in the backward pass.
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples (B, *D), evaluations)`;
        z is x at the first time, (B, *D), in place of a draw from the prior.
    Raises:
        ValueError: no time lies between start_time and stop_time.
    """
    times = visited_times(sde, eps, start_time, stop_time)

    @with_gradients(differentiable)
    def sample(model, z=None, *, noise=None, progress=False):
        where = device_of(model) if device is None else torch.device(device)
        counted, score_fn = score_fns(sde, model, continuous, constraints, differentiable)
        updates = [
            corrector_update(sde, score_fn, corrector, snr, n_steps, noise),
            predictor_update(sde, score_fn, predictor, probability_flow, noise),
        ]
        for constraint in constraints:
            wrap = functools.partial(constraint.wrap, sde, noise=noise or torch.randn_like)
            updates = [wrap(update) for update in updates]
        timesteps = times.to(where)
        x = start(sde, shape, where, z, timesteps[0], noise, constraints)
        x, x_mean = run_updates(x, timesteps, updates, progress)
        return inverse_scaler(x_mean if denoise else x), counted.evaluations

    return sample


def get_ode_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    *,
    continuous: bool = True,
    per_sample: bool = False,
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    differentiable: bool = False,
) -> Callable:
    """Sampling by integrating the probability-flow ODE.  [S21, section 4.3, appendix D.1]

    Args:
        sde: the forward process.
        shape: shape of a batch of samples, (B, *D).
        inverse_scaler: from the network's range to [0, 1].
        denoise: end with one reverse-diffusion step without its noise.
        rtol, atol: tolerances of the solver.
        method: "RK45", on the device, or another of SciPy's solvers, on the host.
        eps: time at which integration stops.
        device: where to sample; None is the network's own.
        continuous: whether the network was trained on all times.
        per_sample: control the error of each sample by itself.
        constraints: what samples are to satisfy; here only by a guided score.
        start_time: time at which integration starts; None is T.
        differentiable: keep what a gradient of the samples needs; needs "RK45".
    Returns:
        `sample(model, z=None, *, noise=None, progress=False) -> (samples (B, *D), evaluations)`;
        z is the latent code x_T (B, *D), in place of a draw from the prior.  There is no progress
        to show: how many steps the solver takes is not known beforehand.
    Raises:
        ValueError: a constraint acts on updates, which an ODE does not have.
    """
    without_wraps(constraints)
    start_time = sde.T if start_time is None else start_time

    @with_gradients(differentiable)
    def sample(model, z=None, *, noise=None, progress=False):
        where = device_of(model) if device is None else torch.device(device)
        counted, score_fn = score_fns(sde, model, continuous, constraints, differentiable)
        first = torch.tensor(start_time, dtype=torch.float32, device=where)
        x = start(sde, shape, where, z, first, noise, constraints)
        dtype = x.dtype
        x, _ = integrate(
            flow_drift(sde, score_fn, dtype),
            x.double(),
            start_time,
            eps,
            rtol=rtol,
            atol=atol,
            method=method,
            per_sample=per_sample,
        )
        x = x.to(dtype)
        if denoise:
            last = predictor_update(sde, score_fn, ReverseDiffusionPredictor, noise=noise)
            _, x = last(x, torch.full((x.shape[0],), eps, device=where))
        return inverse_scaler(x), counted.evaluations

    return sample


def without_wraps(constraints: Sequence[Constraint]) -> None:
    """Refuse constraints that need a predictor-corrector sampler.

    Raises:
        ValueError: names the first.
    """
    for constraint in constraints:
        if type(constraint).wrap is not Constraint.wrap:
            raise ValueError(
                f"{type(constraint).__name__} acts on the updates of a predictor-corrector "
                "sampler, and this sampler has none: use sampling.method = 'pc', or a constraint "
                "that guides the score"
            )


def with_gradients(differentiable: bool) -> Callable:
    """Decorator: no gradients inside, unless they are wanted there and outside."""
    return (lambda fn: fn) if differentiable else torch.no_grad()


def score_fns(sde, model, continuous, constraints, differentiable):
    """The network's score, which counts, and what constraints make of it."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    if differentiable:
        score_fn = functools.partial(checkpoint, score_fn, use_reentrant=False)
    counted = guided = CountedScore(score_fn)
    for constraint in constraints:
        guided = constraint.guide(sde, guided)
    return counted, guided


def start(sde, shape, device, z, first_time, noise, constraints) -> Tensor:
    """x at the first time: drawn or given, and as constraints want it."""
    x = draw_prior(sde, shape, device, noise) if z is None else z.to(device)
    t = first_time.expand(x.shape[0])
    for constraint in constraints:
        x = constraint.start(sde, x, t, noise or torch.randn_like)
    return x


def flow_drift(sde: SDE, score_fn: Callable, dtype: torch.dtype) -> Callable:
    """`drift(t, x)` of the probability flow, for the solver: evaluated in the given dtype."""
    flow = sde.reverse(score_fn, probability_flow=True)
    return lambda t, x: flow.sde(x.to(dtype), t.to(dtype))[0]
