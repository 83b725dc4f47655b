"""The one sampling loop.  [S21, algorithm 1]

A step is `step(x, t, s) -> (x, x_mean)`: from x at time t to x at an earlier time s.  Predictors
and solvers make such steps; correctors and constraints work at t.  The loop visits pairs of
neighbouring times.  x is (B, *D) in the network's range, t and s are (B,).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from score_lib.samplers.constraints import Constraint
from score_lib.scores import get_score_fn
from score_lib.sdes.process import SDE

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


def run_steps(
    x: Tensor,
    times: Tensor,
    steps: Iterable[Step],
    *,
    callback: Callback | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make each step between each pair of neighbouring times.

    Args:
        x: start, (B, *D).
        times: decreasing times, (N + 1,); the last one is where the last step ends.
        steps: functions (x, t, s) -> (x, x_mean): the corrector's, then the predictor's.
        callback: called as `callback(i, t, x, x_mean)` after the steps from time number i, t (B,).
        progress: show a progress bar.
    Returns:
        The final x and its mean, each (B, *D).
    """
    steps = list(steps)
    x_mean = x
    pairs = list(itertools.pairwise(times))
    for i, (t, s) in enumerate(_with_bar(pairs, progress)):
        t, s = t.expand(x.shape[0]), s.expand(x.shape[0])
        for step in steps:
            x, x_mean = step(x, t, s)
        if callback is not None:
            callback(i, t, x, x_mean)
    return x, x_mean


def _with_bar(pairs: Sequence, progress: bool) -> Iterable:
    if not progress:
        return pairs
    from tqdm import tqdm

    return tqdm(pairs, desc="sampling", unit="step", leave=False)


class CountedScore:
    """A score function that counts its evaluations."""

    def __init__(self, score_fn: Callable):
        self.score_fn, self.evaluations = score_fn, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.score_fn(x, t)


def score_fns(
    sde: SDE,
    model: Callable,
    continuous: bool,
    constraints: Sequence[Constraint],
    differentiable: bool,
) -> tuple[CountedScore, Callable]:
    """The network's score, counted, and the same after every constraint has guided it."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    if differentiable:
        score_fn = functools.partial(checkpoint, score_fn, use_reentrant=False)
    counted = guided = CountedScore(score_fn)
    for constraint in constraints:
        guided = constraint.guide(sde, guided)
    return counted, guided


def start(
    sde: SDE,
    shape: tuple[int, ...],
    device: torch.device,
    z: Tensor | None,
    first_time: Tensor,
    noise: Noise | None,
    constraints: Sequence[Constraint],
) -> Tensor:
    """x at the first time: z, or a draw from the prior, after every constraint's `start`."""
    x = draw_prior(sde, shape, device, noise) if z is None else z.to(device)
    t = first_time.expand(x.shape[0])
    for constraint in constraints:
        x = constraint.start(sde, x, t, noise or torch.randn_like)
    return x


def draw_prior(
    sde: SDE, shape: tuple[int, ...], device: torch.device, noise: Noise | None = None
) -> Tensor:
    """x_T ~ prior of the given shape, on a device."""
    if noise is None:
        return sde.prior_sampling(shape).to(device)
    return sde.prior_from_normal(noise(torch.empty(shape, device=device)))


def with_gradients(differentiable: bool) -> Callable:
    """Decorator: without gradients unless `differentiable`."""
    return (lambda fn: fn) if differentiable else torch.no_grad()
