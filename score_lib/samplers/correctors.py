"""Correctors: Markov chain steps that leave p_t as it is.  [S21, appendix G]"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.base.tensors import batch_mul
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE

_CORRECTORS = Registry("corrector")
register_corrector, get_corrector = _CORRECTORS.register, _CORRECTORS.get


class Corrector(abc.ABC):
    """Steps at one time.

    Args:
        sde: the forward process.
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
@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """Langevin dynamics with snr s(t), as in NCSN and NCSNv2.  [Song and Ermon, 2019 and 2020]

    This is also `langevin_per_sample`: |z| / |score| is s(t) wherever noise dominates.  The norms
    of a sample itself would not do: a step size that depends on x changes the distribution that
    the chain converges to.
    """

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
