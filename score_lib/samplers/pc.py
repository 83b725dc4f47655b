"""Predictor-corrector sampling.  [S21, algorithm 1]"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.parametrization import Parametrization
from score_lib.samplers.accuracy import check_chain, check_steps, warn_of_chain
from score_lib.samplers.grids import along, visited_times
from score_lib.samplers.loop import Constraint, Noise, Step, run_steps, sampler_of
from score_lib.samplers.steps import (
    Corrector,
    EulerMaruyamaPredictor,
    NoneCorrector,
    NonePredictor,
    Predictor,
)
from score_lib.scores import get_data_score_fn
from score_lib.sdes.chain import checked_levels
from score_lib.sdes.coefficients import check_levels
from score_lib.sdes.foreign import as_process
from score_lib.sdes.process import SDE, LinearSDE


def get_pc_sampler(
    sde: SDE,
    shape: tuple[int, ...],
    predictor: type[Predictor] | None,
    corrector: type[Corrector] | None,
    inverse_scaler: Callable,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str | None = None,
    *,
    steps: int = 0,
    grid: str = "",
    constraints: Sequence[Constraint] = (),
    start_time: float | None = None,
    stop_time: float | None = None,
    differentiable: bool = False,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """Predictor-corrector sampling.  [S21, algorithm 1]

    Args:
        predictor, corrector: classes, or functions that take the arguments of `Predictor` and
            `Corrector`, or None.  Classes need no base of ours: `update_fn` will do.
        snr: signal-to-noise ratio of the corrector.
        n_steps: corrector steps at each time.
        probability_flow: let the predictor follow the flow.
        denoise: return the last step's mean, where the run ends at the data.
        eps: last visited time; the last step leads from there to the data.
        steps: predictor steps of a whole run.  0 or sde.N is the published chain of the process;
            with others each step is exactly as long as the distance between its two times.
        grid: kind of time grid, see `time_grid`; "" is the published one, uniform.
        start_time, stop_time: part of the run to make, see `visited_times`.
        others: see `sampler_of`, which also documents the returned `sample`.
    Raises:
        ValueError: no time is left, a setting is out of range, or other steps are not known.
    """
    sde = as_process(sde)
    sde.check_times(eps, start_time, shape)
    _check_settings(snr, n_steps, steps, predictor=predictor, corrector=corrector)
    dimensions, chain = len(shape) - 1, steps in (0, sde.N) and grid in ("", "uniform")
    if chain:
        steps = 0  # as many as N says when it is sampled
        _check_chain(sde, predictor, continuous, eps, probability_flow, dimensions)
    else:
        steps = steps or sde.N
        sde = _other_steps(sde, predictor, continuous, steps, grid)
        visited = _times_by_steps(sde, eps, grid)
        check_steps(sde, predictor, visited, steps, probability_flow, dimensions)
        chain = not _takes_any_step(predictor)
    if predictor is EulerMaruyamaPredictor:
        check_levels(sde, continuous)
    times_of = functools.cache(_times_by_steps(sde, eps, grid, start_time, stop_time))

    def times_now() -> Tensor:
        return times_of(steps or sde.N)

    shown = sde if chain else along(sde, times_now())
    to_data = bool(times_now()[-1] == 0)  # else another part goes on from x, with its noise

    def follow(x, score_fn, noise, **watch):
        made = [
            corrector_step(sde, score_fn, corrector, snr, n_steps, noise),
            predictor_step(sde, score_fn, predictor, probability_flow, noise, chain=chain),
        ]
        for constraint in constraints:
            made = [constraint.wrap(shown, step, noise) for step in made]
        x, x_mean = run_steps(x, times_now().to(x), made, **watch)
        return x_mean if denoise and to_data else x

    shared = continuous, device, constraints, differentiable, parametrization
    return sampler_of(shown, shape, inverse_scaler, follow, lambda: times_now()[0], *shared)


def _check_settings(snr: float, n_steps: int, steps: int, **classes) -> None:
    for kind, name in classes.items():
        if isinstance(name, str):
            raise ValueError(f"{kind} = {name!r} is a name: give the class, get_{kind}({name!r})")
    if not (0 <= snr < math.inf and n_steps >= 0 and steps >= 0):
        raise ValueError(
            f"a sampler's snr, n_steps and steps are at least 0, not {snr}, {n_steps} and {steps}"
        )


def _times_by_steps(sde: SDE, eps: float, grid: str, *part: float | None) -> Callable:
    """The times of a run, or of a part of one, as a function of the steps of the whole."""
    return lambda steps: visited_times(sde, eps, *part, steps=steps, grid=grid)


def _check_chain(
    sde: SDE,
    predictor: type[Predictor] | None,
    continuous: bool,
    eps: float,
    probability_flow: bool,
    dimensions: int,
) -> None:
    """Refuse a published chain whose samples would be those of another process.

    A network of discrete levels knows those of one chain alone, see `checked_levels`.
    """
    if continuous:
        check_chain(sde, predictor, dimensions)
        warn_of_chain(sde, predictor, visited_times(sde, eps), probability_flow, dimensions)
    elif isinstance(sde, LinearSDE):
        with contextlib.suppress(NotImplementedError):  # sub-VP is read by its marginals
            checked_levels(sde)


def _other_steps(
    sde: SDE, predictor: type[Predictor] | None, continuous: bool, steps: int, grid: str
) -> SDE:
    """The process as a predictor needs it for other steps than those of its own chain."""
    if not continuous:
        raise ValueError(
            f"a network of discrete noise levels is sampled at all {sde.N} of them, not in "
            f"{steps or sde.N} steps on another grid: use a network trained with "
            "training.continuous = True, or a solver such as sampling.method = 'ddim'"
        )
    if _takes_any_step(predictor):
        return sde
    if grid not in ("", "uniform"):
        raise ValueError(
            f"{getattr(predictor, '__name__', predictor)} makes the steps of the process's own "
            "chain, and no others: leave sampling.time_grid empty, or let it be a subclass of "
            "sampling.Predictor that defines step(x, t, s)"
        )
    # It only knows a chain of N uniform steps: give it one.
    return sde.with_steps(steps)


def _takes_any_step(predictor: Callable | None) -> bool:
    """Of what makes predictors; a function, or a class without our base, is asked for the steps of
    the chain alone."""
    made = predictor.func if isinstance(predictor, functools.partial) else predictor
    if not (isinstance(made, type) and issubclass(made, Predictor)):
        return made is None
    return made.takes_any_step()


def predictor_step(
    sde: SDE,
    score_fn: Callable,
    predictor: type[Predictor] | None,
    probability_flow: bool = False,
    noise: Noise | None = None,
    *,
    chain: bool = True,
) -> Step:
    """The step of a predictor class; None means no predictor.

    Args:
        chain: make the steps of the process's own chain.
    """
    built = (predictor or NonePredictor)(sde, score_fn, probability_flow)
    if noise is not None:
        built.noise = noise
    if not isinstance(built, Predictor):
        return lambda x, t, s: built.update_fn(x, t)
    if built.takes_any_step() and not chain:
        return built.step
    return lambda x, t, s: built.chain_step(x, t)


def corrector_step(
    sde: SDE,
    score_fn: Callable,
    corrector: type[Corrector] | None,
    snr: float,
    n_steps: int,
    noise: Noise | None = None,
) -> Step:
    """The step of a corrector class, at the time t; None means no corrector."""
    built = (corrector or NoneCorrector)(sde, score_fn, snr, n_steps)
    if noise is not None:
        built.noise = noise
    return lambda x, t, s: built.update_fn(x, t)


def shared_predictor_update_fn(
    x, t, sde, model, predictor, probability_flow, continuous, *, parametrization=None
):
    """One predictor step of a network at (x, t): (x, x_mean)."""
    score_fn = get_data_score_fn(sde, model, False, continuous, parametrization=parametrization)
    return predictor_step(sde, score_fn, predictor, probability_flow)(x, t, None)


def shared_corrector_update_fn(
    x, t, sde, model, corrector, continuous, snr, n_steps, *, parametrization=None
):
    """One round of corrector steps of a network at (x, t): (x, x_mean)."""
    score_fn = get_data_score_fn(sde, model, False, continuous, parametrization=parametrization)
    return corrector_step(sde, score_fn, corrector, snr, n_steps)(x, t, None)
