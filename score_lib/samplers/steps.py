"""The published steps: predictors go back in time, correctors stay.  [S21, appendices D to G]

The predictors make the steps of the process's own chain, N of them on the published grid.  Between
any two other times they make the step that leads from the one to the other.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.inheritance import place
from score_lib.base.registry import Registry
from score_lib.base.tensors import batch_mul, norms, per_sample, score_of_data
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE

_PREDICTORS = Registry("predictor")
register_predictor, get_predictor = _PREDICTORS.register, _PREDICTORS.get
# Methods that make the steps of the process's own chain, by their published names.
_OF_CHAIN = ("update_fn", "vesde_update_fn", "vpsde_update_fn")


class Predictor:
    """Steps of the reverse process.  A subclass defines `update_fn`, `step` or both.

    The one that is defined nearest, in the order of inheritance, counts.

    Args:
        score_fn: function of (x, t) giving the score.
        probability_flow: follow the ODE with the same marginals instead of the SDE.
    Attributes:
        rsde: the reverse process.
        noise: source of standard normal noise, called like `torch.randn_like`.
    """

    noise: Callable[[Tensor], Tensor] = staticmethod(torch.randn_like)

    def __init__(self, sde: SDE, score_fn: Callable, probability_flow: bool = False):
        self.sde, self.score_fn = as_process(sde), score_fn
        self.probability_flow = probability_flow
        self.rsde = self.sde.reverse(score_fn, probability_flow)

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The step at time t (B,) of the process's own chain of N.

        Returns:
            x one step earlier, and its mean (x without the step's noise); both (B, *D).
        """
        return self.step(x, t, (t - self.sde.T / self.sde.N).clamp(min=0))

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The step from time t to an earlier time s, (B,); 0 is the data.

        Returns:
            x at s, and its mean; both (B, *D).
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines update_fn only, which makes the steps of the "
            "process's own chain: define step(x, t, s) for other grids of times"
        )

    def noised(self, x: Tensor, x_mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """x_mean with noise like x, of standard deviation (B,), and x_mean itself."""
        return x_mean + batch_mul(std, self.noise(x)), x_mean

    def chain_step(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`update_fn` or, where `step` is defined nearer, the step of that from time t (B,)."""
        by_step = place(type(self), "step") < place(type(self), *_OF_CHAIN)
        return Predictor.update_fn(self, x, t) if by_step else self.update_fn(x, t)

    @classmethod
    def takes_any_step(cls) -> bool:
        """Whether the class defines `step`, and no step of the chain alone nearer."""
        by_step = place(cls, "step") <= place(cls, *_OF_CHAIN)
        return by_step and cls.step is not Predictor.step


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """x <- x - f_rev(x, t) dt + g(t) sqrt(dt) z; in the process's own chain dt = T / N."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _euler_step(self, x, t, torch.full_like(t, self.rsde.T / self.rsde.N))

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return _euler_step(self, x, t, t - s)


def _euler_step(predictor: Predictor, x: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    drift, diffusion = predictor.rsde.sde(x, t)
    return predictor.noised(x, x - batch_mul(dt, drift), diffusion * torch.sqrt(dt))


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """x <- x - f_rev + G z, with the forward process's own discretisation.  [S21, appendix E]"""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, G = self.rsde.discretize(x, t)
        return self.noised(x, x - f, G)

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self.rsde, "increment"):  # a user's own, with the published methods
            return _euler_step(self, x, t, t - s)
        f, G = self.rsde.increment(x, t, s)
        return self.noised(x, x - f, G)


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
        # By their published names, which subclasses may override.
        explodes = hasattr(self.sde, "discrete_sigmas")
        return self.vesde_update_fn(x, t) if explodes else self.vpsde_update_fn(x, t)

    def vesde_update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The step of the process's own chain, whichever process it is."""
        return self.noised(x, *self.sde.ancestral_step(x, t, score_of_data(self.score_fn, x, t)))

    vpsde_update_fn = vesde_update_fn

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return self.noised(x, *self.sde.posterior(x, t, s, score_of_data(self.score_fn, x, t)))


@register_predictor(name="none")
class NonePredictor(Predictor):
    """Leaves x as it is: sampling by the corrector alone."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def step(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


_CORRECTORS = Registry("corrector")
register_corrector, get_corrector = _CORRECTORS.register, _CORRECTORS.get


class Corrector(abc.ABC):
    """Steps at one time.

    Args:
        score_fn: function of (x, t) giving the score.
        snr: signal-to-noise ratio, which sets the step size.
        n_steps: steps at each time.
    Attributes:
        noise: source of standard normal noise, called like `torch.randn_like`.
    """

    noise: Callable[[Tensor], Tensor] = staticmethod(torch.randn_like)

    def __init__(self, sde: SDE, score_fn: Callable, snr: float, n_steps: int):
        self.sde, self.score_fn = as_process(sde), score_fn
        self.snr, self.n_steps = snr, n_steps

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x after n_steps steps at time t (B,), and its mean; both (B, *D)."""


class _Langevin(Corrector):
    """x <- x + eps score + sqrt(2 eps) z; a subclass sets eps."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.sde.langevin_alpha(t)
        x_mean = x
        for _ in range(self.n_steps):
            score, z = score_of_data(self.score_fn, x, t), self.noise(x)
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
        return (self.snr * norms(z).mean() / norms(score).mean()).expand(t.shape)


@register_corrector(name="langevin_per_sample")
@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """Langevin dynamics with snr s(t), as in NCSN and NCSNv2.  [Song and Ermon, 2019 and 2020]

    This is also `langevin_per_sample`: |z| / |score| is s(t) wherever noise dominates.  The norms
    of a sample itself would not do: a step size that depends on x changes the distribution that
    the chain converges to.
    """

    def relative_step(self, score: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.snr * per_sample(self.sde.marginal_prob(score, t)[1], t)


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """Leaves x as it is."""

    def __init__(
        self, sde: SDE | None, score_fn: Callable | None = None, snr: float = 0.0, n_steps: int = 0
    ):
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
