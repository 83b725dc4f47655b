"""The one sampling loop, and conditions on what it samples.  [S21, algorithm 1 and section 5]

A step is `step(x, t, s) -> (x, x_mean)`: from x at time t to x at an earlier time s.  Predictors
and solvers make such steps; correctors and constraints work at t.  The loop visits pairs of
neighbouring times.  x is (B, *D) in the network's range, t and s are (B,).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from score_lib.base.devices import device_of, resolve_device
from score_lib.base.tensors import check_real, normal_noise, wide_dtype, wide_floats
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import dtype_of, get_data_score_fn
from score_lib.sdes.process import SDE

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


class Constraint:
    """A condition on samples: three hooks, each a no-op unless a subclass overrides it.

    The process that they get makes the sampler's steps: `discretize` is the one from time t.  For a
    sampler that chooses its steps on the way, it is that of the process's own chain.
    """

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """x at the first time.

        Args:
            x: a draw from the prior, or the given start, (B, *D).
            t: the first time, (B,).
            noise: source of standard normal noise, called like `torch.randn_like`.
        Returns:
            x, (B, *D).
        """
        return x

    def guide(self, sde: SDE, score_fn: Callable) -> Callable:
        """A score function of (x, t), such as score_fn with a gradient added."""
        return score_fn

    def wrap(self, sde: SDE, step: Step, noise: Noise) -> Step:
        """A step (x, t, s) -> (x, x_mean) that changes the result of another step.

        The condition is imposed at time t, as in the published samplers.
        """
        return step


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
    Returns:
        The final x and its mean, each (B, *D).
    Raises:
        ValueError: a step gives no pair, or another shape than that of x.
    """
    steps = list(steps)
    x_mean = x
    pairs = list(itertools.pairwise(times))
    for i, (t, s) in enumerate(_with_bar(pairs, progress)):
        t, s = t.expand(x.shape[0]), s.expand(x.shape[0])
        for step in steps:
            x, x_mean = _checked(step(x, t, s), x)
        if callback is not None:
            callback(i, t, x, x_mean)
    return x, x_mean


def _checked(made: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The results of a step from x; there may be no mean, None, where it is not asked for."""
    alone = isinstance(made, Tensor)
    shapes = [tuple(y.shape) for y in ([made] if alone else made) if y is not None]
    if alone or any(shape != x.shape for shape in shapes):
        raise ValueError(
            f"a step from x of {tuple(x.shape)} should give x and its mean, both of this shape, "
            f"not {' and '.join(map(str, shapes))}: let update_fn or step return x, x_mean, and "
            "multiply by sampling.batch_mul, which takes data of any shape"
        )
    return made


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


def sampler_of(
    sde: SDE,
    shape: tuple[int, ...],
    inverse_scaler: Callable,
    follow: Callable,
    first_time: float | Tensor | Callable[[], Tensor],
    continuous: bool,
    device: torch.device | str | None,
    constraints: Sequence[Constraint],
    differentiable: bool,
    parametrization: Parametrization | str | None = None,
    *,
    read: Callable | None = None,
) -> Callable:
    """The function that every factory returns: from a start at the first time to samples.

    Args:
        follow: `follow(x, score_fn, noise, progress=..., callback=...)` gives x at the end; the
            score is guided by the constraints.
        first_time: time of the start, or a function that gives it when sampling starts.
        shape, inverse_scaler: (B, *D); from the network's range to [0, 1].
        continuous, parametrization: how the network is read, see `get_score_fn`.
        device: where to sample; None is the network's own.
        constraints: conditions on samples; the first is innermost.
        differentiable: keep the graph, with x at every step; the backward pass recomputes scores.
        read: `read(model, device)` gives the score in place of `get_score_fn`, and `follow` then
            gets it without guidance, too, as `network`.
    Returns:
        `sample(model, z=None, *, noise=None, progress=False, callback=None)`, which gives samples
        (B, *D) and the evaluations made; z is x at the first time, (B, *D), in place of a draw from
        the prior; see `run_steps` for the callback.
    """
    chosen = get_parametrization(parametrization)

    @(lambda fn: fn) if differentiable else torch.no_grad()
    def sample(
        model: Callable,
        z: Tensor | None = None,
        *,
        noise: Noise | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> tuple[Tensor, int]:
        where = device_of(model) if device is None else resolve_device(device)
        if read is None:
            score_fn = get_data_score_fn(sde, model, False, continuous, parametrization=chosen)
            own = {}
        else:
            score_fn = read(model, where)
            own = {"network": score_fn}
        if differentiable:
            score_fn = functools.partial(checkpoint, score_fn, use_reentrant=False)
        counted = score_fn = CountedScore(score_fn)
        for constraint in constraints:
            score_fn = constraint.guide(sde, score_fn)
        draw = normal_noise(noise)
        x = _start(z, sde, shape, where, noise, dtype_of(model))
        first = first_time() if callable(first_time) else first_time
        t = torch.as_tensor(first, dtype=x.dtype, device=where).expand(len(x))
        for constraint in constraints:
            x = constraint.start(sde, x, t, draw)
        x = follow(x, score_fn, draw, progress=progress, callback=callback, **own)
        return inverse_scaler(x), counted.evaluations

    return sample


def _start(
    z: Tensor | None,
    sde: SDE,
    shape: tuple[int, ...],
    device: torch.device,
    noise: Noise | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """z or, where it is None, x_T ~ prior of the given shape; on a device."""
    if z is not None:
        return wide_floats("z", z).to(device)
    if noise is None:
        x = sde.prior_sampling(shape)
        check_real("the prior's samples", x)
        return x.to(device, dtype or torch.float32)
    like = torch.empty(shape, dtype=dtype or wide_dtype(), device=device)
    return sde.prior_from_normal(normal_noise(noise)(like))


def changes_steps(constraint: Constraint) -> bool:
    """Whether a constraint changes the result of steps."""
    return type(constraint).wrap is not Constraint.wrap


def without_wraps(constraints: Sequence[Constraint]) -> None:
    """ValueError for a constraint that needs a predictor-corrector sampler."""
    for constraint in constraints:
        if changes_steps(constraint):
            raise ValueError(
                f"{type(constraint).__name__} changes the steps of a predictor-corrector sampler, "
                "and this sampler has none: use sampling.method = 'pc', or a constraint that "
                "guides the score"
            )
