"""Coefficients (B,) of a process from its methods that map data x, as published processes have.

A user's own process may broadcast for data of one rank only, which is looked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample, rows

# Of data: channels, time and three sides.
_HIGHEST_RANK = 5
# Errors that it raises for data of another shape.
_OF_OTHER_SHAPES = (IndexError, RuntimeError, TypeError, ValueError)
_NAMES = {"marginal_prob": "mean", "sde": "drift"}


def marginal_coeffs(sde, t: Tensor) -> tuple[Tensor, Tensor]:
    """m and s, (B,), at times t (B,), by `marginal_prob`.

    Raises:
        ValueError: its mean has the shape of x for no rank.
    """
    return _of_any_rank(sde, "marginal_prob", t, 1.0)


def scale_and_std(sde, t: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """The same for data with so many dimensions.

    Raises:
        ValueError: the mean has another shape than data of one entry.
    """
    mean, std = sde.marginal_prob(t.new_ones(len(t), *(1,) * dimensions), t)
    if mean.numel() != len(t):
        raise _another_shape(sde, "marginal_prob")
    return mean.reshape(len(t)), per_sample(std, t)


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


def marginal(sde, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, *D) and standard deviation (B,) of x_t given x_0 = x, by `marginal_prob`.

    Raises:
        ValueError: its mean has another shape than x.
    """
    mean, std = sde.marginal_prob(x, t)
    _check_like(x, mean, "marginal_prob(x, t)", sde)
    return mean, per_sample(std, t)


def has_scaled_mean(sde, x: Tensor) -> bool:
    """Whether the mean of x_t given x_0 is m(t) x_0 for data like x (B, *D).

    A user's process may add to it, as those that revert to a mean do, or mix entries.
    """
    like = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    t = torch.linspace(0.3, 0.6, len(x), **like) * sde.T
    probe = torch.linspace(-1, 2, x.shape[1:].numel(), **like).expand(len(x), -1).reshape(x.shape)
    of_ones, of_probe = (rows(sde.marginal_prob(v, t)[0]) for v in (torch.ones_like(probe), probe))
    return torch.allclose(of_probe, of_ones[:, :1] * rows(probe), rtol=1e-3, atol=1e-4)


def check_scaled_mean(sde, x: Tensor) -> None:
    """Refuse a process without `has_scaled_mean`.

    Raises:
        ValueError: it is one.
    """
    if not has_scaled_mean(sde, x):
        raise ValueError(
            f"the mean of x_t that marginal_prob(x, t) of {sde!r} gives is not m(t) x, as this "
            "method needs: use get_pc_sampler or get_ode_sampler, which take any process"
        )


def check_shape(sde, x: Tensor) -> None:
    """Refuse a process that is written for data of another rank, or whose noise depends on their
    size; looks once at each shape.

    Scores and samplers ask for the coefficients at a time, without x.

    Args:
        x: data (B, *D).
    Raises:
        ValueError: a mean or drift has another shape than x, or the standard deviation of
            `marginal_prob` is another one for data of one entry.
    """
    seen, sides = vars(sde).setdefault("_shapes", set()), x.shape[1:]
    if sides in seen or torch.compiler.is_compiling():
        return
    t = torch.tensor([0.3, 0.6], dtype=x.dtype, device=x.device) * sde.T
    ones = t.new_ones(2, *sides)
    asked = {
        "marginal_prob(x, t)": lambda: sde.marginal_prob(ones, t)[0],
        "sde(x, t)": lambda: sde.sde(ones, t)[0],
        "the reverse process": lambda: sde.reverse(lambda x, t: x).sde(ones, t)[0],
    }
    for name, ask in asked.items():
        if (found := _tried(ask)) is not None:
            _check_like(ones, found, name, sde)

    def std(sides: Sequence[int]) -> Tensor:
        return per_sample(sde.marginal_prob(t.new_ones(2, *sides), t)[1], t)

    one = [1] * len(sides)
    if _tried(lambda: torch.allclose(std(sides), std(one), rtol=1e-2, equal_nan=True)) is False:
        raise ValueError(
            f"marginal_prob(x, t) of {sde!r} has the standard deviation {std(sides)[0]:.4g} for x "
            f"of {tuple(sides)} and {std(one)[0]:.4g} for one entry, but it should depend on time "
            "alone: give the size of data to the class, as an argument of its own"
        )
    seen.add(sides)


def _tried(ask: Callable) -> Any:
    """The result; None if it fails, as a user's class may for data of one entry, or on the
    way through a tracer."""
    try:
        return ask()
    except (AssertionError, AttributeError, LookupError, *_OF_OTHER_SHAPES):
        return None


def _check_like(x: Tensor, found: Tensor, name: str, sde) -> None:
    if found.shape != x.shape:
        raise ValueError(
            f"{name} of {sde!r} gives {tuple(found.shape)} for x of {tuple(x.shape)}: it is "
            "written for data with other sides; let it multiply by sde_lib.batch_mul, which takes "
            "any, or give data the sides that it needs"
        )


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
    raise _another_shape(sde, name) from failure


def _another_shape(sde, name: str) -> ValueError:
    return ValueError(
        f"{name}(x, t) of {sde!r} should give a {_NAMES[name]} of the shape of x, (B, *D), for "
        "t (B,), also of one entry; a process that adds a picture to it subclasses sde_lib.SDE, "
        "whose predictor-corrector and ODE samplers take it"
    )
