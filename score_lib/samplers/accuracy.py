"""How accurate a number of steps is, from exact scores."""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.samplers.steps import (
    AncestralSamplingPredictor,
    EulerMaruyamaPredictor,
    Predictor,
    ReverseDiffusionPredictor,
)
from score_lib.sdes.process import SDE, LinearSDE

# Largest error of a run of few steps, in the network's range.
MOST_ERROR = 0.05

PUBLISHED = (EulerMaruyamaPredictor, ReverseDiffusionPredictor, AncestralSamplingPredictor)


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
    t, s = times[:-1].double(), times[1:].double()

    def variance_at(t: Tensor) -> Tensor:
        m, std = sde.scale_and_std(t, dimensions)
        return (m * data_std) ** 2 + std**2

    def score_fn(x: Tensor, t: Tensor) -> Tensor:
        return batch_mul(-1 / variance_at(t), x)

    built = predictor(sde, score_fn, probability_flow)
    built.noise = torch.ones_like
    ones = t.new_ones(len(t), *(1,) * dimensions)
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

    Only for the published predictors: those of users need not be linear.

    Args:
        visited: from a number of steps to the visited times.
    Raises:
        ValueError: the error is above `MOST_ERROR`; names a number of steps that is enough.
    """

    def error(number: int) -> float:
        return final_std(sde, predictor, visited(number), probability_flow, dimensions)

    if predictor not in PUBLISHED or (found := error(steps)) <= MOST_ERROR:
        return
    enough = next((n for k in range(1, 8) if error(n := steps << k) <= MOST_ERROR), None)
    hint = f"{enough} steps are enough" if enough else "no number of steps helps"
    raise ValueError(
        f"{steps} steps of {predictor.__name__} are too few for {sde!r}: samples would be off by "
        f"{found:.2g} in the network's range; {hint}, or choose a solver, such as "
        "sampling.method = 'dpmpp_2m', which needs about 25"
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
