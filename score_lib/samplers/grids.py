"""Grids of times that samplers visit, from T (noise) down to eps or 0 (data)."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.base.tensors import Constants, wide_dtype
from score_lib.sdes.process import SDE
from score_lib.sdes.snr import log_snr, time_at

_GRIDS = Registry("time grid")


def register_grid(name: str) -> Callable:
    """Decorator that makes a grid available as `sampling.time_grid = name`.

    A grid is a function of the process, the first time, the last one (eps) and a number of steps;
    it gives the visited times, falling, (steps + 1,).
    """
    return _GRIDS.register(name=name)


@register_grid("uniform")
def _uniform(sde: SDE, first: float, eps: float, steps: int) -> Tensor:
    ends = torch.tensor([first, eps], dtype=torch.float64)
    return torch.lerp(*ends, torch.linspace(0, 1, steps + 1, dtype=torch.float64))


def _register_even(name: str, to_even: Callable, from_even: Callable) -> None:
    """A grid that is uniform in a function of lambda, which has an inverse function."""

    def grid(sde: SDE, first: float, eps: float, steps: int) -> Tensor:
        ends = torch.tensor([first, eps], dtype=torch.float64)
        low, high = to_even(log_snr(sde, ends))
        share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return time_at(sde, from_even(torch.lerp(low, high, share)))

    register_grid(name)(grid)


_register_even("log_snr", lambda y: y, lambda y: y)
_register_even("edm", lambda y: torch.exp(-y / 7), lambda y: -7 * torch.log(y))
# The local error of a second-order step falls like exp(-2 |lambda|); spreading it evenly needs
# steps as dense as exp(-2/3 |lambda|).  On mixtures a little more, 3/4, does better.
_register_even(
    "arctan",
    lambda y: torch.atan(torch.exp(-0.75 * y)),
    lambda y: -torch.log(torch.tan(y)) / 0.75,
)


def time_grid(
    sde: SDE, steps: int, eps: float, kind: str, start_time: float | None = None
) -> Tensor:
    """Times from the first to eps.

    Args:
        steps: number of steps between them.
        kind: "uniform" in time; "log_snr", uniform in lambda; "edm", uniform in (s / m)^(1/7)
            [Karras et al. 2022]; "arctan", uniform in arctan((s / m)^(3/4)): dense where s and m
            are alike, where most of an image appears; or registered by `register_grid`.
        start_time: the first time; None is T.
    Returns:
        (steps + 1,), float64, on the CPU.
    Raises:
        ValueError: an unknown kind, no step, a start that is not after eps, or an own grid that
            does not fall.
    """
    first = sde.T if start_time is None else start_time
    if steps < 1 or not eps < first <= sde.T:
        raise ValueError(
            f"{steps} steps from time {first:g} to {eps:g} are impossible: at least one step is "
            f"needed, starting after {eps:g} and at most at {sde.T:g}"
        )
    times = torch.as_tensor(_GRIDS.get(kind)(sde, first, eps, steps))
    times = times.to("cpu", torch.float64, copy=True)
    if times.shape == (steps + 1,):
        times[0], times[-1] = first, eps  # exact, where bisection is not
    if times.shape != (steps + 1,) or not (times.diff() <= 0).all():
        raise ValueError(
            f"the time grid {kind!r} should give times that fall from {first:g} to {eps:g}, "
            f"({steps + 1},) for {steps} steps, not {times.flatten()[:5].tolist()} ... of shape "
            f"{tuple(times.shape)}"
        )
    return times


def visited_times(
    sde: SDE,
    eps: float,
    start_time: float | None = None,
    stop_time: float | None = None,
    *,
    steps: int = 0,
    grid: str = "",
) -> Tensor:
    """The times of a predictor-corrector run, or of a part of one.

    A whole run visits as many times as it has steps, from T to eps; its last step ends at 0.  A run
    that stops at a time and another that starts there make up the whole run.

    Args:
        eps: the last visited time.
        start_time, stop_time: visit only times from start_time down to, and without, stop_time;
            None is T and 0.
        steps: of the whole run; 0 is sde.N.
        grid: kind of grid, see `time_grid`; "" is uniform.
    Returns:
        The visited times and the time at which the last step ends, float32, on the CPU.
    Raises:
        ValueError: no visited time is left.
    """
    steps = steps or sde.N
    if grid in ("", "uniform"):  # as published, in float32
        times = torch.linspace(sde.T, eps, steps, dtype=wide_dtype())
    else:
        times = time_grid(sde, max(steps - 1, 1), eps, grid)[:steps].float()
    times = torch.cat([times, times.new_zeros(1)])
    first = 0 if start_time is None else _first_at_or_below(times, start_time)
    stop = steps if stop_time is None else _first_at_or_below(times, stop_time)
    if first >= stop:
        raise ValueError(
            f"none of the {steps} times from {sde.T:g} down to {eps:g} lies between the start at "
            f"{sde.T if start_time is None else start_time:g} and the stop at "
            f"{0 if stop_time is None else stop_time:g}"
        )
    return times[first : stop + 1]


def along(sde: SDE, times: Tensor) -> SDE:
    """The process whose `discretize` makes the steps of a grid: constraints on samples ask for it.

    Any time means the nearest one that a step starts at, such as a time of Heun's after churn.

    Args:
        times: falling: where steps start, and where the last one ends, (N + 1,).
    """
    middles = (times[:-2] + times[1:-1]).double() / 2
    negated, visited = Constants(-middles), Constants(times)  # a search is in rising numbers

    def discretize(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (rising,), (grid,) = negated.on(t.device), visited.like(t)
        i = torch.searchsorted(rising, -t.double())
        return sde.increment(x, grid[i], grid[i + 1])

    process = copy.copy(sde)
    vars(process)["discretize"] = discretize  # also of a frozen dataclass
    return process


def _first_at_or_below(times: Tensor, time: float) -> int:
    """Index of the first of falling times that is not above a time, up to rounding."""
    if not math.isfinite(time):
        raise ValueError(f"a time to start or stop at is a number, not {time}")
    # A thousandth of a step is rounding.
    tolerance = 1e-3 * (times[:-1] - times[1:])
    later = times[:-1] > time + tolerance
    return int(later.sum())
