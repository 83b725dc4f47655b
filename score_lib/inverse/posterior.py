"""Posterior guidance: the score of the measurement given x_t, through the denoiser."""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.linalg import solve
from score_lib.base.tensors import batch_mul
from score_lib.inverse.measured import Measured, register_restoration
from score_lib.inverse.operators import LinearOperator
from score_lib.sdes.process import SDE


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


@register_restoration(name="dps", options={"strength": "control.strength"})
class DiffusionPosteriorSampling(PosteriorGuidance):
    """A predictor's step moves x by -strength grad |y - A xhat_0|.  [Chung et al. 2023]

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
        _, G = sde.discretize(torch.zeros_like(t), t)
        norm = torch.linalg.vector_norm(residual.flatten(1), dim=1)
        return batch_mul(self.strength / (G**2 * norm).clamp(min=1e-12), residual)


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

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = (std * self.data_std) ** 2 / (std**2 + (scale * self.data_std) ** 2)

        def covariance(u: Tensor) -> Tensor:
            return self.noise_std**2 * u + batch_mul(variance, self.operator.gram(u))

        return solve(covariance, residual, self.iterations)


@register_restoration(name="tweedie", options={"iterations": "control.iterations"})
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

    def weigh(self, residual: Tensor, pull_back: Callable, sde: SDE, t: Tensor) -> Tensor:
        scale, std = sde.scale_and_std(t, len(self.operator.shape))
        variance = std**2 / scale

        def covariance(u: Tensor) -> Tensor:
            # C is symmetric: J^T stands for J.
            back = self.operator.apply(pull_back(self.operator.adjoint(u)))
            return self.noise_std**2 * u + batch_mul(variance, back)

        return solve(covariance, residual, self.iterations)


def _pigdm_of_images(
    *measured, bounds: tuple[float, float], data_std: float, iterations: int
) -> PseudoInverseGuidance:
    """With a standard deviation in units of images in [0, 1], as configs have it."""
    low, high = bounds
    return PseudoInverseGuidance(
        *measured, bounds=bounds, data_std=data_std * (high - low), iterations=iterations
    )


register_restoration(
    PseudoInverseGuidance,
    name="pigdm",
    build=_pigdm_of_images,
    options={"data_std": "control.data_std", "iterations": "control.iterations"},
)
