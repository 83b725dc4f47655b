"""Coefficients (B,) of a process from its methods that map data x, as published processes have.

A user's own process may broadcast for data of one rank only, which is looked for.
"""

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample

# Of data: channels, time and three sides.
_HIGHEST_RANK = 5
# What it raises for data of another shape.
_OF_OTHER_SHAPES = (IndexError, RuntimeError, TypeError, ValueError)
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


def check_shape(sde, x: Tensor) -> None:
    """Refuse a process whose noise depends on the size of data; looks once at each shape.

    Scores and samplers ask for the coefficients at a time, without x.

    Args:
        x: data (B, *D).
    Raises:
        ValueError: the standard deviation of `marginal_prob` is another one for data of one entry.
    """
    seen, sides = vars(sde).setdefault("_shapes", set()), x.shape[1:]
    if sides in seen or torch.compiler.is_compiling():
        return
    t = torch.tensor([0.3, 0.6], dtype=x.dtype, device=x.device) * sde.T
    try:
        of_data, of_one = (
            per_sample(sde.marginal_prob(t.new_ones(2, *shape), t)[1], t)
            for shape in (sides, [1] * len(sides))
        )
        same = torch.allclose(of_data, of_one, rtol=1e-2, equal_nan=True)
    except _OF_OTHER_SHAPES:  # or, where it is traced, of a value that is asked for
        return
    if not same:
        raise ValueError(
            f"marginal_prob(x, t) of {sde!r} has the standard deviation {of_data[0]:.4g} for x of "
            f"{tuple(sides)} and {of_one[0]:.4g} for one entry, but it should depend on time "
            "alone: give the size of data to the class, as an argument of its own"
        )
    seen.add(sides)


def _of_any_rank(sde, name: str, t: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """The results of a method for data of one entry: (B,) and (B,)."""
    failure = None
    for dimensions in range(_HIGHEST_RANK + 1):
        x = t.new_full((len(t), *(1,) * dimensions), value)
        try:
            mapped, coefficient = getattr(sde, name)(x, t)
        except _OF_OTHER_SHAPES as error:
            failure = error  # perhaps for this rank alone
            continue
        if mapped.numel() == len(t):
            return mapped.reshape(len(t)), per_sample(coefficient, t)
    raise ValueError(
        f"{name}(x, t) of {sde!r} should give a {_NAMES[name]} of the shape of x, (B, *D), for "
        "t (B,)"
    ) from failure
