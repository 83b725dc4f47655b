"""Coefficients (B,) of a process from its methods that map data x, as published processes have.

A user's own process may broadcast for data of one rank only, which is looked for.
"""

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample

# Of data: channels, time and three sides.
_HIGHEST_RANK = 5
_NAMES = {"marginal_prob": "mean", "sde": "drift"}


def marginal_coeffs(sde, t: Tensor) -> tuple[Tensor, Tensor]:
    """m and s, (B,), at times t (B,), by `marginal_prob`.

    Raises:
        ValueError: its mean has the shape of x for no rank.
    """
    return _of_any_rank(sde, "marginal_prob", t, 1.0)


def drift_rate(sde, t: Tensor) -> Tensor:
    """a, (B,), at times t (B,), by the drift of `sde`.

    Raises:
        ValueError: the drift is not a x, or has the shape of x for no rank.
    """
    (rate, _), (twice, _) = (_of_any_rank(sde, "sde", t, x) for x in (1.0, 2.0))
    if not torch.allclose(twice, 2 * rate, rtol=1e-4, atol=1e-9):
        raise ValueError(
            f"the drift that sde(x, t) of {sde!r} gives is not linear in x, as drift_rate(t) and "
            "bounds of the likelihood need: use get_likelihood_fn, which takes any process"
        )
    return rate


def diffusion(sde, t: Tensor) -> Tensor:
    """g, (B,), at times t (B,), by `sde`."""
    return _of_any_rank(sde, "sde", t, 1.0)[1]


def _of_any_rank(sde, name: str, t: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """The results of a method for data of one entry: (B,) and (B,)."""
    failure = None
    for dimensions in range(_HIGHEST_RANK + 1):
        x = t.new_full((len(t), *(1,) * dimensions), value)
        try:
            mapped, coefficient = getattr(sde, name)(x, t)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            failure = error  # perhaps for this rank alone
            continue
        if mapped.numel() == len(t):
            return mapped.reshape(len(t)), per_sample(coefficient, t)
    raise ValueError(
        f"{name}(x, t) of {sde!r} should give a {_NAMES[name]} of the shape of x, (B, *D), for "
        "t (B,)"
    ) from failure
