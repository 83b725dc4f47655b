"""How accurate a number of steps is, from exact scores."""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul, per_sample
from score_lib.samplers.steps import (
    AncestralSamplingPredictor,
    EulerMaruyamaPredictor,
    Predictor,
    ReverseDiffusionPredictor,
)
from score_lib.sdes.coefficients import asked_as, ones_at
from score_lib.sdes.process import SDE, LinearSDE

# Largest error of a run of few steps, in the network's range.
MOST_ERROR = 0.05

# Share by which it may be larger than the error of the last step alone.
_MORE_THAN_LAST = 0.25

# Logarithm by which variances of the steps of a long chain may be off.
_CHAIN_MISMATCH, _LONG_CHAIN = 0.05, 100

PUBLISHED = (EulerMaruyamaPredictor, ReverseDiffusionPredictor, AncestralSamplingPredictor)


@torch.no_grad()
def final_std(
    sde: SDE,
    predictor: type[Predictor],
    times: Tensor,
    probability_flow: bool = False,
    dimensions: int = 1,
    *,
    data_std: float = 0.0,
    denoise: bool = True,
    chain: bool = False,
) -> float:
    """Standard deviation of a predictor's samples of data ~ N(0, data_std^2 I).

    Steps are linear in x and in the noise there, so that this is exact, without sampling.  With
    data at the point 0 it is the error of the samples.  Images behave alike near the data: their
    pixels are as far apart as their range is wide.

    Args:
        times: those visited, and the end of the last step, (N + 1,).
        dimensions: of D; a user's process may broadcast for one shape only.
        denoise: without the noise of the last step.
        chain: make the steps of the process's own chain, whatever the distances between times.
    """
    like = asked_as(sde, dimensions)
    t, s = times[:-1].to(**like), times[1:].to(**like)

    def variance_at(t: Tensor) -> Tensor:
        m, std = sde.scale_and_std(t, dimensions)
        return (m * data_std) ** 2 + std**2

    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        return batch_mul(-1 / variance_at(t), x)

    built = predictor(sde, score_fn, probability_flow)
    built.noise = torch.ones_like
    ones = ones_at(t, dimensions)
    x, x_mean = built.chain_step(ones, t) if chain else built.step(ones, t, s)
    gains, noises = x_mean.flatten().tolist(), (x - x_mean).flatten().tolist()
    if denoise:
        noises[-1] = 0.0
    variance = float(variance_at(t[:1]))
    for gain, noise in zip(gains, noises, strict=True):
        variance = gain**2 * variance + noise**2
    return math.sqrt(variance)


def check_steps(
    sde: SDE,
    predictor: type[Predictor] | None,
    visited: Callable[[int], Tensor],
    steps: int,
    probability_flow: bool,
    dimensions: int,
) -> None:
    """Refuse a number of steps in which a predictor does not get near the data.

    Only for the published predictors: those of users need not be linear.  A large error of the last
    step alone is none of their number, but of a last time or a sigma_min far from the data: it is
    told.

    Args:
        visited: from a number of steps to the visited times.
    Raises:
        ValueError: the error is above `MOST_ERROR`; names a number of steps that is enough.
    """

    def error(times: Tensor) -> float:
        return final_std(sde, predictor, times, probability_flow, dimensions)

    if predictor not in PUBLISHED or (found := error(visited(steps))) <= MOST_ERROR:
        return
    last = visited(steps)[-2:]
    allowed = max(MOST_ERROR, (1 + _MORE_THAN_LAST) * (of_last := error(last)))
    if found <= allowed:
        _warn_once(
            f"samples will be off by {found:.2g} in the network's range, however many steps are "
            f"made: the last one, from the time {last[0]:g} of {sde!r}, is by {of_last:.2g}"
        )
        return
    enough = next((n for k in range(1, 8) if error(visited(n := steps << k)) <= allowed), None)
    hint = f"{enough} steps are enough" if enough else "no number of steps helps"
    raise ValueError(
        f"{steps} steps of {predictor.__name__} are too few for {sde!r}: samples would be off by "
        f"{found:.2g} in the network's range; {hint}, or choose a solver, such as "
        "sampling.method = 'dpmpp_2m', which needs about 25"
    )


@torch.no_grad()
def check_chain(sde: SDE, predictor: type[Predictor] | None, dimensions: int = 1) -> None:
    """Refuse a chain of N steps that is that of another process than its drift and diffusion, which
    a network of all times knows.  Steps of a short one are too long to compare.

    Raises:
        ValueError: steps do not have the variance g^2 T / N, or nearly, at times between the ends.
    """
    # Others may need the shape of the data.
    if predictor not in PUBLISHED or not isinstance(sde, LinearSDE) or sde.N < _LONG_CHAIN:
        return
    t = torch.linspace(0.1, 0.9, 33, **asked_as(sde, dimensions)) * sde.T
    ones = ones_at(t, dimensions)
    built = predictor(sde, lambda x, t: torch.zeros_like(x))
    built.noise = torch.ones_like
    x, x_mean = built.chain_step(ones, t)
    length = sde.T / sde.N
    variance, before = (per_sample(sde.sde(ones, u)[1], u) ** 2 * length for u in (t, t - length))
    ratio = (x - x_mean).flatten() ** 2 / variance
    # Chains look up the time of a step in other ways, and some take it away from a posterior.
    allowed = _CHAIN_MISMATCH + 20 / sde.N + 3 * (variance / before).log().abs()
    if (ratio.log().abs() > allowed).any():
        raise ValueError(
            f"{predictor.__name__} makes the steps of a chain of N = {sde.N} whose variances are "
            f"{ratio.min():.2g} to {ratio.max():.2g} of those that the diffusion of {sde!r} gives: "
            "override discrete_betas (of VE: discrete_sigmas), or discretize and ancestral_step, "
            "as well, or make other steps than the chain's, by a solver or by sampling.num_steps"
        )


def warn_of_chain(
    sde: SDE,
    predictor: type[Predictor] | None,
    times: Tensor,
    probability_flow: bool,
    dimensions: int,
) -> None:
    """Tell where a process is built with so few steps that its published chain misses the data.

    It is taken as it is, for published figures.

    Args:
        times: that the chain visits, and 0.
    """
    # Others may need the shape of the data.
    if predictor not in PUBLISHED or not isinstance(sde, LinearSDE):
        return
    error = final_std(sde, predictor, times, probability_flow, dimensions, chain=True)
    if error > MOST_ERROR:
        _warn_once(
            f"samples will be off by {error:.2g} in the network's range: the last step of the "
            f"published chain of {sde!r}, from the time {times[-2]:g}, is as long as all others; "
            f"build the process with more steps, such as N = 1000, and make fewer of them by "
            f"sampling.num_steps (steps={len(times) - 1})"
        )


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)
