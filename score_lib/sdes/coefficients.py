"""Coefficients (B,) of a process from its methods that map data x, as published processes have.

A user's own process may broadcast for data of one rank only, which is looked for.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from score_lib.base.tensors import per_sample, rows

# Of data: channels, time and three sides.
_HIGHEST_RANK = 5
# Errors that it raises for data of another shape.
_OF_OTHER_SHAPES = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
_NAMES = {"marginal_prob": "mean", "sde": "drift"}


def checked_times(x: Tensor, t: Tensor | float) -> Tensor:
    """Times of data x (B, *D): (B,), or one for all samples, (1,) or (), also given as a number.

    One sample may stand for all times, too, as published.

    Raises:
        ValueError: the batch sizes of x and t differ.
    """
    if not isinstance(t, Tensor):
        t = torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if t.dim() > 1 or (t.dim() == 1 and 1 not in (len(t), len(x)) and len(t) != len(x)):
        raise ValueError(
            f"time must be (B,) with the batch size of x, or one for all: x is {tuple(x.shape)}, "
            f"t is {tuple(t.shape)}"
        )
    return t


def ones_at(t: Tensor, dimensions: int) -> Tensor:
    """Data of one entry, 1, for each time t (B,): (B, *D), with D of so many dimensions."""
    return t.new_ones(len(t), *(1,) * dimensions)


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
    mean, std = sde.marginal_prob(ones_at(t, dimensions), t)
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


@torch.no_grad()
def noise_at(sde, time: float, dimensions: int) -> float:
    """s at a time, for data with so many dimensions."""
    t = torch.tensor([float(time)], device=asked_as(sde, dimensions)["device"])
    return float(per_sample(sde.marginal_prob(ones_at(t, dimensions), t)[1], t))


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
            `marginal_prob` is another one for data of one entry, or drift and diffusion lead to
            other marginals.
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
    _check_marginals(sde, t)
    seen.add(sides)


# So far off may be logarithms of the mean's scale, and of the variance, for approximate methods.
_LARGEST_MISMATCH = 0.03
_CELLS = 128
# Of T: also where a bound of the deviation would act.
_SHARES = 1e-5, 1e-3, 0.03, 0.3, 0.6, 0.95
# So far apart may be the angles atan(s / m) of the levels of a long chain, and of their times.
_LEVEL_MISMATCH, _LONG_CHAIN = 0.02, 100


def without_refusal(sde) -> Any:
    """A copy of a process whose functions of time may contradict each other: for checks of it."""
    free = copy.copy(sde)
    vars(free)["_may_contradict"] = True
    return free


def _check_marginals(sde, like: Tensor) -> None:
    """Refuse a linear process whose functions of time contradict each other, as those of a subclass
    that overrides some of them: its drift and diffusion do not lead from m and s at one time to
    those at another.

    Raises:
        ValueError: it is one.
    """
    linear = all(hasattr(sde, name) for name in ("drift_rate", "diffusion", "marginal_coeffs"))
    if not linear or vars(sde).get("_may_contradict"):
        return
    off = _tried(lambda: _mismatch(sde, like.new_tensor([0.1, 0.5, 0.9], dtype=torch.float64)))
    if off is not None and off > _LARGEST_MISMATCH:
        raise ValueError(
            f"drift and diffusion of {sde!r} lead to other marginals than those that it gives: "
            f"their logarithms differ by {off:.2g}; a class that overrides drift_rate (or beta), "
            "diffusion or marginal_coeffs (or beta_integral, sigma, transition) overrides all that "
            "change with it, see checks.process"
        )
    forms = {
        "marginal_prob": sde.marginal_coeffs,
        "sde": lambda t: (sde.drift_rate(t), sde.diffusion(t)),
    }
    for name, of_time in forms.items():

        def agree(name: str = name, of_time: Callable = of_time) -> bool:
            t = like.new_tensor(_SHARES, dtype=torch.float64) * sde.T
            return all(map(_is_near, _of_any_rank(sde, name, t, 1.0), of_time(t)))

        if _tried(agree) is False:
            raise ValueError(
                f"{name}(x, t) of {sde!r} was set to another function than that which its "
                "coefficients of time follow: override it in a subclass, where they are derived"
            )


def _is_near(found: Tensor, expected: Tensor | float) -> bool:
    expected = per_sample(expected, found).to(found)
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-6, equal_nan=True)


@torch.no_grad()
def _mismatch(sde, shares: Tensor) -> float:
    """How far the logarithms of m and s^2 at times, shares of T, are off the solution of
    d m = a m dt and d s^2 = (2 a s^2 + g^2) dt from the time before, or off its own transition."""
    ends = shares * sde.T
    width = ends.diff()[:, None] / _CELLS
    t = ends[:-1, None] + width * (torch.arange(_CELLS).to(ends) + 0.5)
    a, g = (
        per_sample(f(t.flatten()), t.flatten()).double().reshape(t.shape)
        for f in (sde.drift_rate, sde.diffusion)
    )
    m, s = (per_sample(value, ends).double() for value in sde.marginal_coeffs(ends))
    # Exact for constant a and g in a cell, as near an equilibrium of strong drift and diffusion.
    steps = 2 * a * width
    grown = torch.where(steps == 0, 1.0, torch.expm1(steps) / steps) * width
    total = steps.sum(1)
    to_end = total[:, None] - steps.cumsum(1)
    variance = (g**2 * grown * to_end.exp()).sum(1) + total.exp() * s[:-1] ** 2
    of_mean = (torch.log(m[1:] / m[:-1]) - total / 2) / (steps.abs().sum(1) / 2).clamp(min=1)
    of_mean = torch.where(m[1:] == 0, 0.0, of_mean)  # below the smallest number
    r, G = (per_sample(v, ends[1:]).double() for v in sde.transition(ends[1:], ends[:-1]))
    stepped = torch.stack([variance, (r * s[:-1]) ** 2 + G**2])
    return float(torch.cat([of_mean, torch.log(s[1:] ** 2 / stepped).flatten()]).abs().max())


def check_levels(sde, continuous: bool) -> None:
    """Refuse discrete noise levels of another process than drift and marginals, for methods that
    follow these with a network of the levels.

    Raises:
        ValueError: s / m of a level is not that of its time, or nearly.
    """
    # Levels of a short chain are too far apart to compare.
    if continuous or sde.N < _LONG_CHAIN:
        return
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64) * sde.T

    def mismatch() -> Tensor:
        (m, s), (m_level, s_level) = marginal_coeffs(sde, t), sde.level_coeffs(t)
        # Angles, since m / s is hardly told where one of them is small.
        return (torch.atan2(s, m) - torch.atan2(s_level, m_level).to(s)).abs().max()

    off = _tried(mismatch)
    if off is not None and off > _LEVEL_MISMATCH + 10 / sde.N:
        raise ValueError(
            f"the noise levels of the chain of {sde!r} are not those of its marginals: "
            f"atan(s / m) differs by up to {off:.2g}; sample by the predictor reverse_diffusion or "
            "ancestral_sampling, or by sampling.method = 'chain', which keep to the chain, or "
            "override drift and marginals as well"
        )


def asked_as(sde, dimensions: int) -> dict[str, Any]:
    """dtype and device of times at which a process can be asked before there are data: float64 on
    the CPU, or as the network or the tables of a user's class need them.

    Args:
        dimensions: of the data, D.
    """
    first, *others = _ways(torch.full((1,), sde.T / 2, dtype=torch.float64))
    for t in (first, *others):
        x = ones_at(t, dimensions)
        methods = sde.marginal_prob, sde.sde, sde.discretize
        if _tried(lambda x=x, t=t, methods=methods: [ask(x, t) for ask in methods]):
            return {"dtype": t.dtype, "device": t.device}
    return {"dtype": first.dtype, "device": first.device}


def _ways(t: Tensor) -> Iterator[Tensor]:
    """t as it is, then in float32, then the same on a GPU, if there is one."""
    gpu = [torch.device("cuda")] * torch.cuda.is_available()
    for device in dict.fromkeys([t.device, *gpu]):
        for dtype in dict.fromkeys([t.dtype, torch.float32]):
            yield t.to(device=device, dtype=dtype)


def _tried(ask: Callable) -> Any:
    """The result; None if it fails, as a user's class may for data of one entry, or on the
    way through a tracer."""
    try:
        return ask()
    except (AttributeError, LookupError, *_OF_OTHER_SHAPES):
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
    for times, dimensions in itertools.product(_ways(t), range(_HIGHEST_RANK + 1)):
        x = value * ones_at(times, dimensions)
        try:
            mapped, coefficient = getattr(sde, name)(x, times)
        except _OF_OTHER_SHAPES as error:
            failure = error  # perhaps for this rank alone
            continue
        if mapped.numel() == len(t):
            found = mapped.reshape(len(t)), per_sample(coefficient, times)
            return found if times is t else tuple(value.to(t) for value in found)
    raise _another_shape(sde, name) from failure


def _another_shape(sde, name: str) -> ValueError:
    return ValueError(
        f"{name}(x, t) of {sde!r} should give a {_NAMES[name]} of the shape of x, (B, *D), for "
        "t (B,), also of one entry; a process that adds a picture to it subclasses sde_lib.SDE, "
        "whose predictor-corrector and ODE samplers take it"
    )
