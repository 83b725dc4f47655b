"""Data consistency: the measured part of x is replaced after every step.

[S21, appendices I.2 to I.4]
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.inverse.measured import Measured, register_restoration
from score_lib.inverse.operators import LinearOperator
from score_lib.samplers.loop import Noise, Step
from score_lib.sdes.process import SDE


class DataConsistency(Measured):
    """After every step the measured part of x is that of a sample of x_t given y.

    [S21, appendices I.2 to I.4.]  With A = U diag(d) V^T, coordinate i of V^T x_0 is known to be
    that of A^+ y up to noise of standard deviation sigma_y / d_i.  While x_t is noisier than that,
    m A^+ y takes its place, with as much noise as is missing.  Later the score of the measurement
    guides it, with x_t / m in place of x_0.

    Both are right only in the limit of little noise: at larger t the unmeasured part depends too
    little on the measured one.  Corrector steps at small t make up for that; without them, samples
    are biased for any number of steps.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        super().__init__(operator, measurement, noise_std)
        self.value = operator.pinv(self.measurement)

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        # Without scale or noise, as in the published samplers.
        known = self._known(*sde.scale_and_std(t, x.dim() - 1))
        spectral = self.operator.spectral
        return x - spectral(x, known) + spectral(self.value, known)

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        if self.noise_std == 0:
            return score_fn

        def guided(x: Tensor, t: Tensor) -> Tensor:
            scale, std = sde.scale_and_std(t, x.dim() - 1)
            missing = self._missing(scale, std)

            def weight(d: Tensor) -> Tensor:
                """1 / (m Var(y_i / d_i | x_t)) of the coordinates that are not replaced."""
                variance = (self.noise_std / d) ** 2 + (std / scale)[:, None] ** 2
                return (missing(d) < 0) / (scale[:, None] * variance)

            residual = self.value - batch_mul(1 / scale, x)
            return score_fn(x, t) + self.operator.spectral(residual, weight)

        return guided

    def wrap(self, sde: SDE, step: Step, noise: Noise) -> Step:
        spectral = self.operator.spectral

        def constrained(x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            x, x_mean = step(x, t, s)
            scale, std = sde.scale_and_std(t, x.dim() - 1)
            missing, known = self._missing(scale, std), self._known(scale, std)
            mean = spectral(batch_mul(scale, self.value), known)
            noisy = mean + self.spread(noise(x), lambda d: missing(d).clamp(min=0).sqrt())
            # Subtracted and added, so that the unmeasured part stays bit for bit.
            return x - spectral(x, known) + noisy, x_mean - spectral(x_mean, known) + mean

        return constrained

    def _missing(self, scale: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
        """Variance of V^T x_t beyond that of m A^+ y: function of d (1, R), giving (B, R)."""
        return lambda d: std[:, None] ** 2 - (scale[:, None] * self.noise_std / d) ** 2

    def _known(self, scale: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
        """1 where A^+ y takes the place of x, else 0: function of d (1, R), giving (B, R)."""
        missing = self._missing(scale, std)
        return lambda d: (missing(d) >= 0).to(d)

    def spread(self, z: Tensor, std: Callable[[Tensor], Tensor]) -> Tensor:
        """Noise whose coordinates have the given standard deviation, made of z ~ N(0, I)."""
        return self.operator.spectral(z, std)


class PublishedGray(DataConsistency):
    """The mean over channels is known, with noise in the order of the published colorizer."""

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        # Without noise in the first channel, and with the channels last in memory, which is the
        # order in which noise like x is drawn.
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)
        return (x + self.value).movedim(1, -1).contiguous().movedim(-1, 1)

    def spread(self, z: Tensor, std: Callable[[Tensor], Tensor]) -> Tensor:
        # Along the unit vector (1, ..., 1) / sqrt(C), by the noise of the first channel.
        along = (z[:, :1] / math.sqrt(z.shape[1])).expand_as(z)
        return super().spread(along, std)


def _without_bounds(*measured, bounds: tuple[float, float]) -> DataConsistency:
    return DataConsistency(*measured)


register_restoration(DataConsistency, name="projection", build=_without_bounds)
