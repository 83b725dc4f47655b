"""Distributions whose scores are known at all times, as networks that have learned them."""

from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.sdes.coefficients import without_refusal
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE


def told_by_time(sde: SDE) -> SDE:
    """A process whose networks are score functions of (x, t), for any process."""
    exact = without_refusal(as_process(sde))
    vars(exact)["noise_label"] = lambda t, continuous: t
    vars(exact)["to_score"] = lambda output, t, continuous: output
    return exact


def gaussian(sde: SDE, mean: float = 0.0, std: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """The score function of data ~ N(mean, std^2 I)."""
    sde = as_process(sde)

    def score(x: Tensor, t: Tensor) -> Tensor:
        m, s = sde.scale_and_std(t, x.dim() - 1)
        centred = x - batch_mul(m * mean, torch.ones_like(x))
        return batch_mul(-1 / ((m * std) ** 2 + s**2), centred)

    return score


def binary(sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
    """The score function of data whose entries are -1 or 1, as pixels at the ends of a range."""
    sde = as_process(sde)

    def score(x: Tensor, t: Tensor) -> Tensor:
        m, s = sde.scale_and_std(t, x.dim() - 1)
        return sde.score_of_denoised(x, t, torch.tanh(batch_mul(m / s**2, x)))

    return score
