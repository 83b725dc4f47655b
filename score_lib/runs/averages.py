"""The averaged weights of a checkpoint that `eval.ema` chooses, or that its snapshots give.

Names of averages: "", the main one; "none", the weights themselves; a rate of `model.ema_rates`;
"posthoc_S", the power-function profile of relative standard deviation S at the checkpoint's step;
and "posthoc_S@STEP", at an earlier step.
"""

import itertools
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch.nn import Parameter

from models.ema import Averages, ExponentialMovingAverage
from score_lib.base.decays import PowerDecay
from score_lib.base.profiles import POSTHOC, Profile, gamma_of, profile_name, weights_of
from score_lib.disk import snapshots
from score_lib.disk.files import text_digest
from score_lib.disk.fit import CheckpointError, check_average
from score_lib.disk.snapshots import Stored
from score_lib.losses.optimization import ema_decay, half_life
from score_lib.options import complete
from score_lib.runs.history import beginning_of

# The main average, as a file that holds one alone records it.
MAIN = "main"
# Relative error of a profile above which its average is doubtful.
_DOUBTFUL = 0.05


def get_ema(config, parameters: Iterable[Parameter]) -> ExponentialMovingAverage:
    """The main average: of `model.ema_rate`, or of `model.ema_halflife` if that is set."""
    return ExponentialMovingAverage(parameters, ema_decay(config), schedule=half_life(config))


def get_averages(config, parameters: Iterable[Parameter]) -> Averages:
    """Those of `model.ema_rates` and `training.posthoc_profiles`, by name."""
    config, parameters = complete(config), list(parameters)
    named = {
        _rate_name(rate): ExponentialMovingAverage(parameters, rate)
        for rate in config.model.ema_rates
    }
    for sigma_rel in config.training.posthoc_profiles:
        schedule = PowerDecay(gamma_of(sigma_rel))
        average = ExponentialMovingAverage(parameters, 1.0, schedule=schedule)
        named[profile_name(sigma_rel)] = average
    return Averages(named)


def names_of_averages(text: str) -> list[str]:
    """The names in `eval.ema`, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def one_average(text: str) -> str:
    """The name in `eval.ema`.

    Raises:
        ValueError: there are several.
    """
    name, *others = names_of_averages(text)
    if others:
        raise ValueError(f"eval.ema = {text!r} names several averages: only --mode eval takes them")
    return name


def start_averages(state: dict) -> None:
    """Begin the further averages of a restored training state that its checkpoint did not hold."""
    if (averages := state.get("averages")) and averages.fresh and state["step"]:
        names = ", ".join(sorted(averages.fresh))
        logging.info("averages that begin at the weights of step %d: %s", state["step"], names)
        averages.restart(state["model"].parameters())


def recorded(name: str) -> str:
    """The "average" of a file that holds one alone, by its name in `eval.ema`."""
    return _rate(name) or name.partition("@")[0] or MAIN


class _Wanted(NamedTuple):
    name: str
    sigma_rel: float
    step: int


@torch.no_grad()
def choose_average(path: pathlib.Path, state: dict, name: str, stored: Mapping[str, dict]) -> str:
    """Put an average into the "ema" of a restored state.

    Args:
        path: of the checkpoint; the snapshots are beside its folder.
        state: "model", "ema" and "step"; changed in place.  At an earlier step of a profile, that
            is the "step" then.  An "average" that is not "" names the only one of the file.
        name: see above.
        stored: the checkpoint's further averages: name -> state dict.
    Returns:
        a text that tells averages of the same checkpoint apart; "" for the main one.
    Raises:
        ValueError: there is no such average; the message lists those that there are.
        CheckpointError: an average does not fit, or a snapshot is damaged or of another network.
    """
    ema, alone = state["ema"], state.pop("average", "")
    is_main = not name or _rate(name) == _rate_name(ema.decay)
    if alone and name:
        same = is_main if alone == MAIN else alone == name or alone == _rate(name)
        if not same:
            raise ValueError(
                f"eval.ema = {name!r} is no average of {path}, which holds {alone!r} alone: set "
                "eval.ema to ''"
            )
        return name
    if is_main:
        return name
    if name == "none":
        _replace(ema, [p for p in state["model"].parameters() if p.requires_grad])
        return name
    wanted = _wanted(name, state["step"])
    key = profile_name(wanted.sigma_rel) if wanted else _rate(name)
    if key in stored and (wanted is None or wanted.step == state["step"]):
        _load(path, ema, key, stored)
        return name
    if wanted is None:
        known = ", ".join(repr(n) for n in ("", _rate_name(ema.decay), "none", *stored))
        raise ValueError(
            f"eval.ema = {name!r} is no average of {path}: known are {known}, and others such as "
            "'posthoc_0.12' if the run was trained with training.posthoc_profiles"
        )
    return _combine(path, state, wanted, stored)


def _rate_name(rate: float) -> str:
    return repr(float(rate))


def _rate(name: str) -> str:
    """The name of the rate that a text gives; "" if it is no number."""
    try:
        return _rate_name(float(name))
    except ValueError:
        return ""


def _wanted(name: str, step: int) -> _Wanted | None:
    """The profile of a name; None if it names none.

    Raises:
        ValueError: its step or its relative standard deviation is impossible.
    """
    width, *earlier = name.removeprefix(POSTHOC).split("@")
    if not name.startswith(POSTHOC) or not _rate(width) or len(earlier) > 1:
        return None
    gamma_of(float(width))
    if earlier and not (earlier[0].isdecimal() and 0 < int(earlier[0]) <= step):
        raise ValueError(
            f"eval.ema = {name!r} should have a step from 1 to that of the checkpoint, {step}"
        )
    return _Wanted(name, float(width), int(earlier[0]) if earlier else step)


def _replace(ema: ExponentialMovingAverage, tensors: list[torch.Tensor]) -> None:
    ema.load_state_dict({**ema.state_dict(), "shadow_params": tensors})


def _load(path: pathlib.Path, ema: ExponentialMovingAverage, key: str, stored: Mapping) -> None:
    check_average(path, stored[key], ema)
    try:
        ema.load_state_dict(stored[key])
    except ValueError as error:
        raise CheckpointError(
            f"{path} holds an average {key} that does not fit: {error}"
        ) from error


def _combine(path: pathlib.Path, state: dict, wanted: _Wanted, stored: Mapping) -> str:
    """The average of a profile, from snapshots and from the checkpoint's own averages."""
    ema, parts = state["ema"], _parts(path, state["step"], wanted, stored)
    profile = Profile(wanted.step, gamma_of(wanted.sigma_rel))
    weights, error = weights_of([part.profile for part in parts], profile)
    total = [torch.zeros_like(average) for average in ema.shadow_params]
    run = beginning_of(_workdir_of(path))
    weighted = list(zip(parts, weights.tolist(), strict=True))
    for file, group in itertools.groupby(weighted, key=lambda pair: pair[0].path):
        named = {part.name: weight for part, weight in group}
        if file == path:
            for key, weight in named.items():
                _load(path, ema, key, stored)
                torch._foreach_add_(total, ema.shadow_params, alpha=weight)
        else:
            snapshots.add_to(total, file, named, ema, run)
    _replace(ema, total)
    state["step"] = wanted.step
    doubtful = error > _DOUBTFUL
    logging.log(
        logging.WARNING if doubtful else logging.INFO,
        "%s at step %d: %d averages of %d steps give its profile with a relative error of %.1e%s",
        wanted.name, wanted.step, len(parts), len({part.step for part in parts}), error,
        ": a smaller training.posthoc_freq, or profiles nearer to it, would do better" * doubtful,
    )  # fmt: skip
    rounded = snapshots.rounding(weight for part, weight in weighted if part.path != path)
    if rounded > snapshots.COARSE:
        logging.warning(
            "%s at step %d: large weights of both signs bring the rounding of snapshots to %.1e of "
            "its numbers, above bfloat16's: choose a wider one, or train with a narrower profile "
            "among training.posthoc_profiles",
            wanted.name, wanted.step, rounded,
        )  # fmt: skip
    used = repr([(part.step, part.name) for part in parts])
    return f"{wanted.name} {text_digest(used)}"


def _workdir_of(path: pathlib.Path) -> pathlib.Path:
    """The folder of the run that a checkpoint is in."""
    return path.resolve().parent.parent


def _parts(path: pathlib.Path, step: int, wanted: _Wanted, stored: Mapping) -> list[Stored]:
    """The stored averages up to the wanted step, the checkpoint's own before snapshots.

    Raises:
        ValueError: there are none, or none of that step.
    """
    workdir = _workdir_of(path)
    own = [Stored(step, name, path) for name in stored if name.startswith(POSTHOC)]
    found = snapshots.find(workdir)
    if not own + found:
        raise ValueError(
            f"eval.ema = {wanted.name!r} needs stored profiles, but {path} holds none, and there "
            f"are no snapshots in {workdir / snapshots.FOLDER}: train with "
            "training.posthoc_profiles, such as (0.05, 0.1)"
        )
    parts = [part for part in found if part.step != step or not own] + own
    steps = sorted({part.step for part in parts if part.step <= step})
    if wanted.step not in steps:
        known = ", ".join(map(str, steps)) or f"none up to {step}"
        raise ValueError(
            f"eval.ema = {wanted.name!r} asks for step {wanted.step}, but there are averages of "
            f"the steps {known}: name one of them, as in '{POSTHOC}{wanted.sigma_rel:g}@STEP'"
        )
    return sorted(part for part in parts if part.step <= wanted.step)
