"""Weights of |s score(x_t) + z|^2 at each time.

With sigma = s / m, |s score + z|^2 is |D - x_0|^2 / sigma^2 of the denoised x, D.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample
from score_lib.parametrization import Parametrization
from score_lib.sdes.process import SDE

# (x_t (B, *D), t (B,) or a noise index (B,), s (B,)) -> weights (B,).
Weighting = Callable[[Tensor, Tensor, Tensor], Tensor]

# Hang et al. 2023 find 5 to be best.
_LARGEST_SNR = 5.0


def weighting_of(
    kind: str,
    sde: SDE,
    likelihood: bool,
    parametrization: Parametrization | None,
    continuous: bool = True,
) -> Weighting:
    """The weights that `training.weighting` names.

    Args:
        kind: "" is 1, or g^2 / s^2 with `likelihood` [S21, equation 7]; "output" is 1 / (s out)^2,
            with which the network's output has the same weight at every time [Karras et al. 2022,
            table 1]; "min_snr" is min(1, 5 sigma^2), which is min(1 / sigma^2, 5) for |D - x_0|^2
            [Hang et al. 2023].
        continuous: whether levels are times, or indices of discrete ones.
    Raises:
        ValueError: an unknown kind, one together with `likelihood`, or "output" where the
            parametrisation is the process's own.
    """
    if kind and likelihood:
        raise ValueError(
            f"training.weighting = {kind!r} is a weight of its own: set "
            "training.likelihood_weighting = False, or training.weighting = ''"
        )
    if kind == "output" and parametrization is None:
        raise ValueError(
            "training.weighting = 'output' needs to know the output's share of the score: set "
            "model.parametrization, to 'edm' for example"
        )

    def coeffs(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return sde.scale_and_std(level, x.dim() - 1) if continuous else sde.discrete_coeffs(level)

    known = {
        "": _likelihood(sde) if likelihood else lambda x, t, std: torch.ones_like(std),
        "output": lambda x, t, std: _of_output(parametrization, *coeffs(x, t), std),
        "min_snr": lambda x, t, std: _min_snr(*coeffs(x, t)),
    }
    if kind not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"unknown training.weighting {kind!r}: known are {names}")
    return known[kind]


def _likelihood(sde: SDE) -> Weighting:
    return lambda x, t, std: (per_sample(sde.sde(torch.zeros_like(x), t)[1], t) / std) ** 2


def _of_output(parametrization: Parametrization, m: Tensor, s: Tensor, std: Tensor) -> Tensor:
    return (std * parametrization.coefficients(m, s).out) ** -2


def _min_snr(m: Tensor, s: Tensor) -> Tensor:
    return (_LARGEST_SNR * (s / m) ** 2).clamp(max=1)
