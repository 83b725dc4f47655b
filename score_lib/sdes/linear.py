"""Processes with a linear drift: three functions of time define one.

@register_sde("cosine_vpsde")
class CosineVPSDE(LinearSDE):
    def drift_rate(self, t): ...
    def diffusion(self, t): ...
    def marginal_coeffs(self, t): ...
"""

import abc
import math

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.sdes.process import SDE


class LinearSDE(SDE):
    """dx = a(t) x dt + g(t) dw: three functions of t, (B,) -> (B,), give everything else.

    Attributes:
        prior_std: standard deviation of the Gaussian prior.
    """

    prior_std = 1.0

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
        _check_batch(x, t)
        return batch_mul(self.drift_rate(t), x), self.diffusion(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean m(t) x, (B, *D), and standard deviation s(t), (B,), of p(x_t | x_0 = x).

        Raises:
            ValueError: the batch sizes of x and t differ.
        """
        _check_batch(x, t)
        scale, std = self.marginal_coeffs(t)
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
        return self.prior_from_normal(torch.randn(*shape))

    def prior_from_normal(self, z: Tensor) -> Tensor:
        """prior_std z."""
        return z * self.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """log N(z; 0, prior_std^2 I): (B,), in nats."""
        z = z.flatten(1)
        variance = self.prior_std**2
        constant = 0.5 * z.shape[1] * math.log(2 * math.pi * variance)
        return -constant - (z**2).sum(1) / (2 * variance)


def _check_batch(x: Tensor, t: Tensor) -> None:
    if t.dim() != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"time must be (B,) with the batch size of x: x is {tuple(x.shape)}, "
            f"t is {tuple(t.shape)}"
        )
