"""Restoration: samples that agree with a linear measurement y = A x_0 + sigma_y n."""

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.gradients import recording
from score_lib.base.registry import Registry
from score_lib.base.tensors import batch_mul, check_floats, norms
from score_lib.inverse.equations import ROUNDINGS, check_meaning, explained, solve
from score_lib.inverse.operators import LinearOperator
from score_lib.samplers.loop import Constraint, Noise, Step
from score_lib.sdes.coefficients import check_scaled_mean, marginal, ones_at
from score_lib.sdes.process import SDE

# Within which standardised data lie, and an estimate of them should: far outside of most.
STANDARDIZED = (-10.0, 10.0)

# Builders take (operator, measurement, noise_std) and `bounds`, the range of the data, or None.
RESTORATIONS = Registry("restoration method")
register_restoration = RESTORATIONS.register
get_restoration, build_restoration = RESTORATIONS.get, RESTORATIONS.build


class Measured(Constraint):
    """Samples agree with a linear measurement y = A x_0 + sigma_y n of x_0.

    Args:
        operator: A.
        measurement: y, (B, *M), of data in the network's range.
        noise_std: sigma_y.
    Raises:
        ValueError: the operator is not one, the measurement does not fit it or is not finite, or
            the noise is negative.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"the operator is an object such as GaussianBlur((3, 32, 32)), not {operator!r}"
            )
        if tuple(measurement.shape[1:]) != tuple(operator.measured_shape):
            raise ValueError(
                f"the measurement has shape {tuple(measurement.shape)}, but {operator!r} gives "
                f"(B, {', '.join(map(str, operator.measured_shape))})"
            )
        check_floats("the measurement", measurement)
        if not (noise_std >= 0 and math.isfinite(noise_std)):
            raise ValueError(f"the noise of a measurement is 0 or more, not {noise_std}")
        self.operator, self.noise_std = operator, noise_std
        self.measurement = operator.observed(measurement)
        if not self.measurement.isfinite().all():
            raise ValueError("the measurement holds values that are not finite numbers")

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        self.to(x.device)
        return x

    def to(self, device: torch.device) -> None:
        """Keep the measurement on a device: that of the samples, from their start on."""
        self.measurement = self.measurement.to(device)


class DataConsistency(Measured):
    """After every step the measured part of x is that of a sample of x_t given y.

    [S21, appendices I.2 to I.4.]  With A = U diag(d) V^T, coordinate i of V^T x_0 is known to be
    that of A^+ y up to noise of standard deviation sigma_y / d_i.  While x_t is noisier than that,
    m A^+ y takes its place, with as much noise as is missing.  Later the score of the measurement
    guides it, with x_t / m in place of x_0.  A start below T, such as that of a second part of a
    run, is left as it is.

    Both are right only in the limit of little noise: at larger t the unmeasured part depends too
    little on the measured one.  Corrector steps at small t make up for that; without them, samples
    are biased for any number of steps.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        super().__init__(operator, measurement, noise_std)
        self.value = operator.pinv(self.measurement)
        check_meaning(operator, self.measurement, self.value, noise_std)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.value = self.value.to(device)

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        x = super().start(sde, x, t, noise)
        if _starts_below_T(sde, t):
            return x
        # Without scale or noise, as in the published samplers.
        known = self._known(self._missing(sde, t, marginal(sde, x, t)[1]))
        spectral = self.operator.spectral
        return x - spectral(x, known) + spectral(self.value, known)

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        if self.noise_std == 0:
            return score_fn
        check_scaled_mean(sde, self.value)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            scale, std = sde.scale_and_std(t, x.dim() - 1)
            missing = self._missing(sde, t, std)

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
            value, std = marginal(sde, self.value.expand_as(x), t)
            missing = self._missing(sde, t, std)
            known = self._known(missing)
            mean = spectral(value, known)
            noisy = mean + self.spread(noise(x), lambda d: missing(d).clamp(min=0).sqrt())
            # Subtracted and added, so that the unmeasured part stays bit for bit.
            return x - spectral(x, known) + noisy, x_mean - spectral(x_mean, known) + mean

        return constrained

    def _missing(self, sde: SDE, t: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
        """Variance of V^T x_t beyond that of m A^+ y: function of d (1, R), giving (B, R)."""
        if self.noise_std == 0:  # whatever m is
            return lambda d: (std[:, None] ** 2).expand(-1, d.shape[1])
        scale = sde.scale_and_std(t, len(self.operator.shape))[0]
        return lambda d: std[:, None] ** 2 - (scale[:, None] * self.noise_std / d) ** 2

    @staticmethod
    def _known(missing: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """1 where A^+ y takes the place of x, else 0: function of d (1, R), giving (B, R)."""
        return lambda d: (missing(d) >= 0).to(d)

    def spread(self, z: Tensor, std: Callable[[Tensor], Tensor]) -> Tensor:
        """Noise whose coordinates have the given standard deviation, made of z ~ N(0, I)."""
        return self.operator.spectral(z, std)


class PublishedGray(DataConsistency):
    """The mean over channels is known, with noise in the order of the published colorizer."""

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        self.to(x.device)
        # Without noise in the first channel.
        if not _starts_below_T(sde, t):
            x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1) + self.value
        # With the channels last in memory, which is the order in which noise like x is drawn.
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    def spread(self, z: Tensor, std: Callable[[Tensor], Tensor]) -> Tensor:
        # Along the unit vector (1, ..., 1) / sqrt(C), by the noise of the first channel.
        along = (z[:, :1] / math.sqrt(z.shape[1])).expand_as(z)
        return super().spread(along, std)


def _starts_below_T(sde: SDE, t: Tensor) -> bool:
    """Whether sampling starts from an x_t below T, of data or of a part of a run before."""
    rounding = max(1e-6, torch.finfo(t.dtype).eps)
    return bool((t < sde.T * (1 - rounding)).any())


# The network itself is told the measurement, as its condition.
register_restoration(Measured, name="none", build=lambda *measured, bounds: Measured(*measured))

register_restoration(
    DataConsistency,
    name="projection",
    build=lambda *measured, bounds: DataConsistency(*measured),
)


class PosteriorGuidance(Measured):
    """Adds the gradient of log p(y | x_t) to the score, through the denoiser.

    With x_0 given x_t taken as Gaussian around the denoised xhat_0 = E[x_0 | x_t], of covariance C,

        grad log p(y | x_t) = J^T A^T u,  (sigma_y^2 I + A C A^T) u = y - A xhat_0,

    where J = d xhat_0 / d x_t.  Subclasses define u.  Each evaluation of the score costs a
    backward pass of the network beside the forward pass.

    Args:
        bounds: the range that data lie in, such as (-1, 1).  E[x_0 | x_t, y], which is
            xhat_0 + s^2 / m grad log p(y | x_t), then lies in it too, and is clipped: where m is
            small, s^2 / m amplifies the network's errors until sampling diverges.
    """

    def __init__(
        self,
        operator: LinearOperator,
        measurement: Tensor,
        noise_std: float = 0.0,
        *,
        bounds: tuple[float, float] | None = None,
    ):
        super().__init__(operator, measurement, noise_std)
        self.bounds = bounds

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        shape = len(self.measurement), *self.operator.shape
        check_scaled_mean(sde, self.measurement.new_empty(shape))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            score, denoised, pull_back = _denoise(sde, score_fn, x, t)
            residual = self.measurement - self.operator.apply(denoised)
            u = self.weigh(residual, pull_back, sde, t)
            score = score + pull_back(self.operator.adjoint(u))
            if self.bounds is None:
                return score
            return sde.score_of_denoised(x, t, sde.denoised(x, t, score).clamp(*self.bounds))

        return guided

    @abc.abstractmethod
    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        """u, (B, *M).

        Args:
            residual: y - A xhat_0, (B, *M).
            pull_back: v (B, *D) -> J^T v.
            t: time, (B,).
        """

    def rounding(self) -> Tensor:
        """Of y, (B,): a residual of that size tells nothing, least of all where A is singular."""
        y = self.measurement
        return ROUNDINGS * torch.finfo(y.dtype).eps * norms(y)


def _denoise(sde: SDE, score_fn: Callable, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Callable]:
    """The score, xhat_0, and v -> J^T v with J = d xhat_0 / d x_t; each (B, *D)."""
    keep = torch.is_grad_enabled()
    with recording(x, t) as (x, t):
        at = x if x.requires_grad else x.detach().requires_grad_(True)
        score = score_fn(at, t)
        denoised = sde.denoised(at, t, score)

    def pull_back(v: Tensor) -> Tensor:
        with recording(v) as (v,):
            return torch.autograd.grad(denoised, at, v, retain_graph=True, create_graph=keep)[0]

    return (score, denoised, pull_back) if keep else (score.detach(), denoised.detach(), pull_back)


@register_restoration(name="dps", options={"strength": "control.strength"})
class DiffusionPosteriorSampling(PosteriorGuidance):
    """A predictor's step moves x by -strength grad |y - A xhat_0|.  [Chung et al. 2023]

    However long the step is; along the probability flow by about half as much.  `ode` and
    `adaptive`, which choose their steps on the way, are guided as in N steps.

    The published heuristic: it treats x_0 as if it were xhat_0, and its step does not depend on
    sigma_y.  Results follow the measurement, but are not samples of the posterior.

    Args:
        strength: step size, zeta' in the paper.
    """

    def __init__(self, *measured, strength: float = 1.0, **options):
        super().__init__(*measured, **options)
        self.strength = strength

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        # A predictor's step moves x by G^2 score.
        _, G = sde.discretize(ones_at(t, len(self.operator.shape)), t)
        length = (G**2 * norms(residual)).clamp(min=1e-12)
        return batch_mul(self.strength / length, residual)


class _Solved(PosteriorGuidance):
    """u by conjugate gradients, of the part of y that A explains: A^T u is 0 of the rest.

    Where rows of A depend on each other, noise may contradict them; the iterations would follow it
    far beyond the data.

    Args:
        iterations: of conjugate gradients.
    """

    def __init__(
        self,
        operator: LinearOperator,
        measurement: Tensor,
        noise_std: float = 0.0,
        *,
        iterations: int = 5,
        **options,
    ):
        super().__init__(operator, measurement, noise_std, **options)
        if not iterations >= 1:
            raise ValueError(
                f"without an iteration the measurement counts for nothing: set iterations to 1 or "
                f"more, not {iterations}"
            )
        self.iterations = iterations
        self.measurement = explained(operator, self.measurement, noise_std)


class PseudoInverseGuidance(_Solved):
    """C = r^2 I, as for data of independent entries.  [Song et al. 2023, PiGDM]

    r^2 = s^2 d^2 / (s^2 + m^2 d^2) where the data have standard deviation d; exact if they are
    Gaussian with covariance d^2 I.

    Args:
        data_std: d, in the network's range.
        iterations: of conjugate gradients, where A A^T is not a multiple of I.
    """

    def __init__(self, *measured, data_std: float = 0.5, **options):
        super().__init__(*measured, **options)
        if not 0 < data_std < math.inf:
            raise ValueError(
                f"the deviation of data is a number above 0, not data_std = {data_std}"
            )
        self.data_std = data_std

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = (std * self.data_std) ** 2 / (std**2 + (scale * self.data_std) ** 2)

        def covariance(u: Tensor) -> Tensor:
            return self.noise_std**2 * u + batch_mul(variance, self.operator.gram(u))

        return solve(covariance, residual, self.iterations, floor=self.rounding())


@register_restoration(name="tweedie", options={"iterations": "control.iterations"})
class TweedieGuidance(_Solved):
    """C = (s^2 / m) J, the covariance of x_0 given x_t itself.  [Boys et al. 2023, TMPD]

    Exact for Gaussian data of any covariance.  A step of conjugate gradients costs one backward
    pass.

    Args:
        iterations: of conjugate gradients; as many as y has entries solve the system exactly.
    """

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = std**2 / scale

        def covariance(u: Tensor) -> Tensor:
            # C is symmetric: J^T stands for J.
            back = self.operator.apply(pull_back(self.operator.adjoint(u)))
            return self.noise_std**2 * u + batch_mul(variance, back)

        return solve(covariance, residual, self.iterations, floor=self.rounding())


def _configured_pigdm(
    *measured, bounds: tuple[float, float] | None, data_std: float, iterations: int
) -> PseudoInverseGuidance:
    """With a deviation in units of images in [0, 1], as configs have it; of standardised data, and
    without bounds, in the network's range."""
    low, high = bounds or STANDARDIZED
    pixels = (low, high) != STANDARDIZED
    unit = high - low if pixels else 1.0
    data_std = data_std or (0.3 if pixels else 1.0)
    return PseudoInverseGuidance(
        *measured, bounds=bounds, data_std=data_std * unit, iterations=iterations
    )


register_restoration(
    PseudoInverseGuidance,
    name="pigdm",
    build=_configured_pigdm,
    options={"data_std": "control.data_std", "iterations": "control.iterations"},
)
