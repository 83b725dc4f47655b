"""Conditional samples from an unconditional model.  [S21, section 5 and appendix I]

A constraint (`sampling.Constraint`) wraps an update (x, t) -> (x, x_mean), adds a gradient to the
score, or says where sampling starts; `sampling` has the one loop.  Here are

- `DataConsistency`: what was measured is put into x after every update (inpainting, colorization);
- `PosteriorGuidance`: the score of the measurement given x_t, through the denoiser;
- `ClassGuidance`: the score of a label given x_t, by a classifier that knows noisy images;
- `StartFrom`: start from a given image at an intermediate time.

Measurements are linear, y = A x_0 + sigma_y n, with A from `operators`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.linalg import solve
from score_lib.base.registry import Registry
from score_lib.base.tensors import batch_mul
from score_lib.inverse.operators import GrayScale, LinearOperator, Mask
from score_lib.samplers.constraints import Constraint
from score_lib.samplers.correctors import Corrector
from score_lib.samplers.loop import Noise, Step
from score_lib.samplers.pc import get_pc_sampler
from score_lib.samplers.predictors import Predictor
from score_lib.scores import get_classifier_grad_fn
from score_lib.sdes.process import SDE

_RESTORATIONS = Registry("restoration method")

register_restoration, get_restoration = _RESTORATIONS.register, _RESTORATIONS.get


class Measured(Constraint):
    """What is known of x_0 is a linear measurement y = A x_0 + sigma_y n.

    Args:
        operator: A.
        measurement: y, (B, *M), of data in the network's range.
        noise_std: sigma_y.
    Raises:
        ValueError: no operator, a measurement that is not the operator's or not finite, or negative
            noise.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"the operator is an object such as operators.GaussianBlur((3, 32, 32)), not "
                f"{operator!r}"
            )
        if tuple(measurement.shape[1:]) != tuple(operator.measured_shape):
            raise ValueError(
                f"the measurement has shape {tuple(measurement.shape)}, but {operator!r} gives "
                f"(B, {', '.join(map(str, operator.measured_shape))})"
            )
        _check_floats("the measurement", measurement)
        if not (noise_std >= 0 and math.isfinite(noise_std)):
            raise ValueError(f"the noise of a measurement is 0 or more, not {noise_std}")
        self.operator, self.noise_std = operator, noise_std
        self.measurement = operator.observed(measurement)
        if not self.measurement.isfinite().all():
            raise ValueError("the measurement holds values that are not finite numbers")

    @classmethod
    def from_config(
        cls,
        config,
        operator: LinearOperator,
        measurement: Tensor,
        noise_std: float,
        bounds: tuple[float, float],
    ) -> Measured:
        """The constraint with the settings in `config.control`, for data in a range."""
        return cls(operator, measurement, noise_std)


def _check_floats(what: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"{what} should hold floating-point numbers in the network's range, not {x.dtype}: "
            "divide bytes by 255, and use the scaler"
        )


@register_restoration(name="projection")
class DataConsistency(Measured):
    """After every update the measured part of x is that of a sample of x_t given y.

    [S21, appendices I.2 to I.4.]  With A = U diag(d) V^T, coordinate i of V^T x_0 is known to be
    that of A^+ y up to noise of standard deviation sigma_y / d_i.  While x_t is noisier than that,
    m A^+ y takes its place, with as much noise as is missing.  Later the score of the measurement
    guides it, with x_t / m in place of x_0.

    Both are right in the limit of little noise only: at larger t, what is not measured depends too
    little on what is.  Corrector steps at small t make up for that; without them, samples are
    biased however many steps there are.
    """

    def __init__(self, operator: LinearOperator, measurement: Tensor, noise_std: float = 0.0):
        super().__init__(operator, measurement, noise_std)
        self.value = operator.pinv(self.measurement)

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        # As in the published samplers: without scale or noise.
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
                """1 / (m Var(y_i / d_i | x_t)) of what is not replaced."""
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
            # Taken away and put in, so that what is not measured stays to the last bit.
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


class _PublishedGray(DataConsistency):
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


class PosteriorGuidance(Measured):
    """Adds the gradient of log p(y | x_t) to the score, through the denoiser.

    With x_0 given x_t taken as Gaussian around the denoised xhat_0 = E[x_0 | x_t], of covariance C,

        grad log p(y | x_t) = J^T A^T u,  (sigma_y^2 I + A C A^T) u = y - A xhat_0,

    where J = d xhat_0 / d x_t.  Subclasses say what u is.  Each evaluation of the score costs a
    backward pass of the network beside the forward pass.

    Args:
        bounds: the range that data lie in, such as (-1, 1).  E[x_0 | x_t, y], which is
            xhat_0 + s^2 / m grad log p(y | x_t), then lies in it too, and is clipped: where m is
            small, s^2 / m magnifies what a network gets wrong until samples are lost.
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

    @classmethod
    def from_config(cls, config, operator, measurement, noise_std, bounds):
        settings = cls.settings(config, bounds)
        return cls(operator, measurement, noise_std, bounds=bounds, **settings)

    @staticmethod
    def settings(config, bounds: tuple[float, float]) -> dict:
        """Keywords of the class, as `config.control` sets them, for data in a range."""
        return {}

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
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
            sde: the forward process.
            t: time, (B,).
        """


def _denoise(sde: SDE, score_fn: Callable, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Callable]:
    """The score, xhat_0, and v -> J^T v with J = d xhat_0 / d x_t; each (B, *D)."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_(True)
        score = score_fn(at, t)
        denoised = sde.denoised(at, t, score)

    def pull_back(v: Tensor) -> Tensor:
        return torch.autograd.grad(denoised, at, v, retain_graph=True, create_graph=keep)[0]

    return (score, denoised, pull_back) if keep else (score.detach(), denoised.detach(), pull_back)


@register_restoration(name="dps")
class DiffusionPosteriorSampling(PosteriorGuidance):
    """A predictor's step moves x by -strength grad |y - A xhat_0|.  [Chung et al. 2023]

    The published heuristic: it treats x_0 as if it were xhat_0, and its step does not depend on
    sigma_y.  Results follow the measurement, but are no samples of the posterior.

    Args:
        strength: step size, zeta' in the paper.
    """

    def __init__(self, *measured, strength: float = 1.0, **options):
        super().__init__(*measured, **options)
        self.strength = strength

    @staticmethod
    def settings(config, bounds):
        return {"strength": config.control.get("strength", 1.0)}

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        # A predictor's step moves x by G^2 score.
        _, G = sde.discretize(torch.zeros_like(t), t)
        norm = torch.linalg.vector_norm(residual.flatten(1), dim=1)
        return batch_mul(self.strength / (G**2 * norm).clamp(min=1e-12), residual)


@register_restoration(name="pigdm")
class PseudoInverseGuidance(PosteriorGuidance):
    """C = r^2 I, as for data of independent entries.  [Song et al. 2023, PiGDM]

    r^2 = s^2 d^2 / (s^2 + m^2 d^2) where the data have standard deviation d; exact if they are
    Gaussian with covariance d^2 I.

    Args:
        data_std: d, in the network's range.
        iterations: of conjugate gradients, where A A^T is not a multiple of I.
    """

    def __init__(self, *measured, data_std: float = 0.5, iterations: int = 5, **options):
        super().__init__(*measured, **options)
        self.data_std, self.iterations = data_std, iterations

    @staticmethod
    def settings(config, bounds):
        low, high = bounds
        return {
            "data_std": config.control.get("data_std", 0.3) * (high - low),
            "iterations": config.control.get("iterations", 5),
        }

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = (std * self.data_std) ** 2 / (std**2 + (scale * self.data_std) ** 2)

        def covariance(u: Tensor) -> Tensor:
            return self.noise_std**2 * u + batch_mul(variance, self.operator.gram(u))

        return solve(covariance, residual, self.iterations)


@register_restoration(name="tweedie")
class TweedieGuidance(PosteriorGuidance):
    """C = (s^2 / m) J, the covariance of x_0 given x_t itself.  [Boys et al. 2023, TMPD]

    Exact for Gaussian data of any covariance.  A step of conjugate gradients costs one backward
    pass.

    Args:
        iterations: of conjugate gradients; as many as y has entries solve the system exactly.
    """

    def __init__(self, *measured, iterations: int = 5, **options):
        super().__init__(*measured, **options)
        self.iterations = iterations

    @staticmethod
    def settings(config, bounds):
        return {"iterations": config.control.get("iterations", 5)}

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = std**2 / scale

        def covariance(u: Tensor) -> Tensor:
            # C is symmetric: J^T stands for J.
            back = self.operator.apply(pull_back(self.operator.adjoint(u)))
            return self.noise_std**2 * u + batch_mul(variance, back)

        return solve(covariance, residual, self.iterations)


class ClassGuidance(Constraint):
    """Adds scale grad log p(label | x_t) to the score.  [S21, section 5 and appendix I.1]

    Args:
        classifier: network, or function, of x_t (B, *D) and s(t) (B,) that gives logits (B, K).
        labels: (B,) whole numbers in [0, K).
        scale: of the gradient; above 1, samples are more typical of their class.
        until: the last time at which the classifier is used; None is T.  In more noise it may know
            no more than chance.
    Raises:
        ValueError: labels are not whole numbers, (B,); when sampling starts: they are not in
            [0, K), or not as many as samples.
    """

    def __init__(
        self,
        classifier: Callable,
        labels: Tensor,
        scale: float = 1.0,
        *,
        until: float | None = None,
    ):
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels are whole numbers, one a sample: (B,), not {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        self.classifier, self.labels = classifier, labels.to(torch.int64)
        self.scale, self.until = scale, until

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        self.labels = self.labels.to(x.device)
        if len(x) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels were given for {len(x)} samples")
        # Once, and before the loop: on a GPU a wrong label would end the whole process.
        classes = self.classifier(x[:1], torch.ones_like(t[:1])).shape[1]
        wrong = self.labels[(self.labels < 0) | (self.labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} is not one of the classifier's {classes} classes, 0 to "
                f"{classes - 1}"
            )
        return x

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        grad_fn = get_classifier_grad_fn(self.classifier)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            _, noise_std = sde.marginal_prob(torch.zeros_like(t), t)
            scale = self.scale * (t <= (sde.T if self.until is None else self.until))
            return score_fn(x, t) + batch_mul(scale, grad_fn(x, noise_std, self.labels))

        return guided


class StartFrom(Constraint):
    """Sampling starts from x_t of given data instead of the prior.  [Meng et al. 2022, SDEdit]

    Args:
        data: x_0, (B, *D), in the network's range.
    """

    def __init__(self, data: Tensor):
        _check_floats("the data to start from", data)
        self.data = data

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        if self.data.shape != x.shape:
            raise ValueError(
                f"sampling starts from data of shape {tuple(self.data.shape)}, but samples have "
                f"shape {tuple(x.shape)}"
            )
        mean, std = sde.marginal_prob(self.data.to(x), t)
        return mean + batch_mul(std, noise(x))


def pc_factory(constrain: Callable[..., tuple[Constraint, Tensor]]) -> Callable:
    """Make a factory of samplers from what turns their input into a constraint.

    Args:
        constrain: takes what the samplers take after the model, and gives the constraint and a
            tensor with the shape of the samples, on their device.
    Returns:
        `factory(sde, predictor, corrector, inverse_scaler, snr, n_steps=1, probability_flow=False,
        continuous=False, denoise=True, eps=1e-5, **options) -> sampler`, where
        `sampler(model, ..., *, noise=None, progress=False)` gives images (B, *D) in [0, 1]; the
        arguments are those of `sampling.get_pc_sampler`.
    """

    def factory(
        sde: SDE,
        predictor: type[Predictor] | None,
        corrector: type[Corrector] | None,
        inverse_scaler: Callable,
        snr: float,
        n_steps: int = 1,
        probability_flow: bool = False,
        continuous: bool = False,
        denoise: bool = True,
        eps: float = 1e-5,
        **options,
    ) -> Callable:
        def sampler(model, *given, noise=None, progress=False, **named) -> Tensor:
            constraint, like = constrain(*given, **named)
            sample = get_pc_sampler(
                sde,
                like.shape,
                predictor,
                corrector,
                inverse_scaler,
                snr,
                n_steps,
                probability_flow,
                continuous,
                denoise,
                eps,
                like.device,
                constraints=[constraint],
                **options,
            )
            return sample(model, noise=noise, progress=progress)[0]

        return sampler

    factory.__name__, factory.__doc__ = constrain.__name__, constrain.__doc__
    return factory


@pc_factory
def get_pc_inpainter(data: Tensor, mask: Tensor) -> tuple[Constraint, Tensor]:
    """Fill in what a mask leaves open: `inpainter(model, data, mask)`.  [S21, appendix I.2]

    data (B, *D) is in the network's range, and mask is 1 where it is known; what data hold where
    the mask is 0 is not looked at.  Further arguments: see `pc_factory`.
    """
    _check_floats("the data", data)
    operator = Mask(data.shape[1:], mask.to(data.device))
    return DataConsistency(operator, operator.apply(data)), data


@pc_factory
def get_pc_colorizer(gray_scale_img: Tensor) -> tuple[Constraint, Tensor]:
    """Colour gray images: `colorizer(model, gray_scale_img)`.  [S21, appendix I.3]

    The gray images (B, C, *D) have equal channels, in the network's range.  Further arguments: see
    `pc_factory`.
    """
    _check_floats("a gray image", gray_scale_img)
    if gray_scale_img.dim() < 2 or not torch.allclose(
        gray_scale_img, gray_scale_img[:, :1], rtol=0, atol=1e-3
    ):
        raise ValueError(
            "gray images are (B, C, *D) with equal channels, as many as the network's: from images "
            "of one channel, x.expand(-1, C, -1, -1); these have shape "
            f"{tuple(gray_scale_img.shape)}"
        )
    operator = GrayScale(gray_scale_img.shape[1:])
    return _PublishedGray(operator, operator.apply(gray_scale_img)), gray_scale_img


@pc_factory
def get_pc_restorer(
    operator: LinearOperator,
    measurement: Tensor,
    noise_std: float = 0.0,
    *,
    method: str = "tweedie",
    **settings,
) -> tuple[Constraint, Tensor]:
    """Solve a linear inverse problem: `restorer(model, operator, measurement, noise_std=0.0, *,
    method="tweedie", **settings)`.

    measurement (B, *M) is of data in the network's range, with noise of standard deviation
    noise_std; method is the name of a restoration method, and settings are its own.  Further
    arguments: see `pc_factory`.
    """
    constraint = get_restoration(method)(operator, measurement, noise_std, **settings)
    return constraint, measurement.new_empty(len(measurement), *operator.shape)


@pc_factory
def get_pc_editor(data: Tensor) -> tuple[Constraint, Tensor]:
    """Edit images: `editor(model, data)`, from x_t of data at `start_time`.  [SDEdit]

    data (B, *D) is in the network's range.  The option start_time of the factory says how much of
    it is forgotten: nothing at 0, all at T.  Further arguments: see `pc_factory`.
    """
    return StartFrom(data), data


def get_pc_conditional_sampler(
    sde: SDE,
    classifier: Callable,
    shape: tuple[int, ...],
    predictor: type[Predictor] | None,
    corrector: type[Corrector] | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    device: torch.device | str | None = None,
    *,
    guidance_scale: float = 1.0,
    **options,
) -> Callable:
    """Samples of given classes, guided by a classifier.  [S21, section 5 and appendix I.1]

    For the ODE, give `sampling.get_ode_sampler` a `ClassGuidance`.

    Args:
        classifier, guidance_scale: see `ClassGuidance`.
        sde, ..., device, options: see `sampling.get_pc_sampler`.
    Returns:
        `sampler(model, labels, *, noise=None, progress=False) -> images (B, *D)`, for labels (B,).
    """

    def sampler(model, labels, *, noise=None, progress=False):
        sample = get_pc_sampler(
            sde,
            shape,
            predictor,
            corrector,
            inverse_scaler,
            snr,
            n_steps,
            probability_flow,
            continuous,
            denoise,
            eps,
            device,
            constraints=[ClassGuidance(classifier, labels, guidance_scale)],
            **options,
        )
        return sample(model, noise=noise, progress=progress)[0]

    return sampler
