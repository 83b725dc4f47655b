"""The schedulers of Diffusers beside our processes.

A scheduler holds the noise levels that a network was trained with, and how its pipeline samples.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from score_lib.exchange.errors import ExchangeError, checked_options, wrong_class, wrong_value
from score_lib.option_kinds import Check, between, flag, one_of
from score_lib.sdes.process import SDE
from score_lib.sdes.published import VESDE, VPSDE, CosineVPSDE

_MOST_STEPS = 1_000_000
_STEPS = between(1, _MOST_STEPS)
_LEVEL = between(1e-12, 1e12)

# Options of each scheduler: what they are where a file lacks them, and what is read.
_VE: dict[str, tuple[object, Check]] = {
    "num_train_timesteps": (2000, _STEPS),
    "snr": (0.15, between(0.0, 1e6)),
    "sigma_min": (0.01, _LEVEL),
    "sigma_max": (1348.0, _LEVEL),
    "sampling_eps": (1e-5, between(0.0, 0.5)),
    "correct_steps": (1, between(0, 10_000)),
}
_CHAIN: dict[str, tuple[object, Check]] = {
    "num_train_timesteps": (1000, _STEPS),
    "beta_start": (1e-4, between(1e-12, 0.999)),
    "beta_end": (0.02, between(1e-12, 0.999)),
    "beta_schedule": ("linear", one_of("linear", "squaredcos_cap_v2")),
    "trained_betas": (None, Check("null", lambda value: value is None)),
    "prediction_type": ("epsilon", one_of("epsilon", "sample", "v_prediction")),
    "clip_sample": (True, flag),
    "clip_sample_range": (1.0, between(1e-12, 1e12)),
    "thresholding": (False, Check("false", lambda value: value is False)),
    "timestep_spacing": ("leading", one_of("leading", "linspace", "trailing")),
    "steps_offset": (0, between(0, _MOST_STEPS)),
    "rescale_betas_zero_snr": (False, Check("false", lambda value: value is False)),
}
_DDPM = {**_CHAIN, "variance_type": ("fixed_small", one_of("fixed_small", "fixed_large"))}
_DDIM = {**_CHAIN, "set_alpha_to_one": (True, flag)}
SCHEDULERS = {"ScoreSdeVeScheduler": _VE, "DDPMScheduler": _DDPM, "DDIMScheduler": _DDIM}
# Options without effect here: of thresholding, which is off, and of the kind of arrays in 2022.
_WITHOUT_EFFECT = {"dynamic_thresholding_ratio", "sample_max_value", "tensor_format"}
# The pipeline that belongs to each.
PIPELINES = {kind: kind.replace("Scheduler", "Pipeline") for kind in SCHEDULERS}
# The steps of a pipeline of chains where it is not told how many.
_STEPS_BY_DEFAULT = {"DDPMPipeline": 1000, "DDIMPipeline": 50}
# Variances of a step, and what a network predicts: their names, and ours.
_VARIANCES = {"fixed_small": "small", "fixed_large": "large", "ddim": "ddim"}
_PREDICTIONS = {"epsilon": "", "sample": "x0", "v_prediction": "v"}


class Process(NamedTuple):
    """A process as a scheduler describes it.

    Attributes:
        sde: the process.
        config: options of ours by section.
        sampling: how its pipeline samples, by its own names; complete.
        notes: sentences for the user.
    """

    sde: SDE
    config: dict[str, dict]
    sampling: dict[str, object]
    notes: list[str]


def read(path, stored: Mapping[str, object], pipeline: str = "") -> Process:
    """The process of a scheduler.

    Args:
        path: for messages.
        stored: the contents of its file.
        pipeline: the class that samples with it; "": the one that belongs to it.
    Raises:
        ExchangeError: an unknown scheduler or option, an option of a wrong kind, or noise levels
            that no process here has.
    """
    kind = stored.get("_class_name")
    if not isinstance(kind, str) or kind not in SCHEDULERS:
        raise wrong_class(path, kind, SCHEDULERS)
    stored = _todays(path, stored)
    if kind == "DDPMScheduler" and pipeline == "DDIMPipeline":  # which makes one of its own of it
        kind = "DDIMScheduler"
        stored = {name: value for name, value in stored.items() if name != "variance_type"}
    effect = "the noise levels or what the network predicts"
    options = checked_options(path, stored, SCHEDULERS[kind], _WITHOUT_EFFECT, effect)
    try:
        if kind == "ScoreSdeVeScheduler":
            return _variance_exploding(options)
        return _chain(options, _STEPS_BY_DEFAULT.get(pipeline or PIPELINES[kind], 0))
    except ValueError as error:  # noise levels that do not grow, or too few
        raise ExchangeError(f"{path} describes no process: {error}") from error


def _todays(path, stored: Mapping[str, object]) -> Mapping[str, object]:
    """Options by today's names: in 2022 `predict_epsilon` said what the network predicts.

    Raises:
        ExchangeError: it is no truth value, or contradicts today's.
    """
    if (predicts_noise := stored.get("predict_epsilon")) is None:
        return stored
    if not isinstance(predicts_noise, bool):
        raise wrong_value(path, "predict_epsilon", predicts_noise, "true or false")
    prediction = "epsilon" if predicts_noise else "sample"
    today = stored.get("prediction_type", prediction)
    if today != prediction:
        raise wrong_value(
            path, "prediction_type", today, f"{prediction!r}, as predict_epsilon says"
        )
    others = {name: value for name, value in stored.items() if name != "predict_epsilon"}
    return others | {"prediction_type": prediction}


def _variance_exploding(options: dict[str, object]) -> Process:
    N, corrects = options["num_train_timesteps"], options["correct_steps"] > 0
    levels = {"sigma_min": float(options["sigma_min"]), "sigma_max": float(options["sigma_max"])}
    config = {
        "model": {**levels, "num_scales": N},
        "training": {"sde": "vesde", "continuous": True, "reduce_mean": False},
        "sampling": {
            "predictor": "reverse_diffusion",
            "corrector": "langevin" if corrects else "none",
            "snr": float(options["snr"]),
            "n_steps_each": options["correct_steps"],
        },
    }
    sde = VESDE(**levels, N=N)
    sde.sampling_eps = float(options["sampling_eps"])
    note = (
        f"sampling starts at sigma_max = {sde.sigma_max:g}, as the scheduler says; training may "
        "have gone to another noise level"
    )
    notes = [note]
    if sde.sampling_eps != VESDE.sampling_eps:
        notes.append(
            f"the scheduler stops at sampling_eps = {sde.sampling_eps:g}, and so does the process; "
            f"no option of a config says it, and modes of main.py stop at {VESDE.sampling_eps:g}"
        )
    return Process(sde, config, options, notes)


def _chain(options: dict[str, object], steps_by_default: int) -> Process:
    N = options["num_train_timesteps"]
    model = {"num_scales": N, "parametrization": _PREDICTIONS[options["prediction_type"]]}
    if options["beta_schedule"] == "linear":
        betas = {"beta_min": options["beta_start"] * N, "beta_max": options["beta_end"] * N}
        sde, name, model = VPSDE(**betas, N=N), "vpsde", {**model, **betas}
    else:
        sde, name = CosineVPSDE(N, continuous=False), "cosine_vpsde"
    # Options of the scheduler for DDIM are told apart by one that it alone has.
    variance = _VARIANCES[options.get("variance_type", "ddim")]
    steps = {"method": "chain", "variance": variance, "clip": options["clip_sample"]}
    notes = _notes_of_chain(options)
    if 0 < steps_by_default < N:
        steps["respacing"] = _respacing(options, steps_by_default)
        if _ends_with_noise(options, steps_by_default):
            steps["noise_removal"] = False
        notes.append(
            f"the pipeline makes {steps_by_default} of {N} steps unless it is told how many, and "
            f"so does the config: sampling.respacing = {steps['respacing']!r}; '' is all of them"
        )
    config = {
        "model": model,
        "training": {"sde": name, "continuous": False, "reduce_mean": True},
        "sampling": {
            **steps,
            "clip_noise": False,
            "predictor": "ancestral_sampling",
            "corrector": "none",
        },
    }
    return Process(sde, config, options, notes)


def _notes_of_chain(options: Mapping[str, object]) -> list[str]:
    notes = [
        f"the scheduler has {key} = {options[key]}, and the sampler here has {usual} only"
        for key, usual in (("clip_sample_range", 1), ("set_alpha_to_one", True))
        if options.get(key, usual) != usual
    ]
    spacing, offset = options["timestep_spacing"], options["steps_offset"]
    if offset and spacing == "leading":
        also = " with sampling.noise_removal = False" if _ends_with_noise(options, 50) else ""
        if "variance_type" not in options:
            also = f", if N // n is above {offset}; else n steps of theirs end at a noisy level"
        notes.append(
            f"the scheduler has steps_offset = {offset}: its steps, such as 50 of them, are those "
            f"of sampling.respacing = {_respacing(options, 50)!r}{also}"
        )
    if spacing == "trailing" and options.get("variance_type") == "fixed_large":
        notes.append(
            "the scheduler has timestep_spacing = 'trailing' and variance_type = 'fixed_large': "
            "where the lowest level that it visits is above 0, its last step adds noise, as with "
            "sampling.noise_removal = False"
        )
    if "variance_type" not in options and spacing != "leading":
        exact = ", which is the same where n divides N" if spacing == "trailing" else ""
        notes.append(
            f"the scheduler has timestep_spacing = {spacing!r}, with which n steps of DDIM there "
            f"go from a level to the one N // n below, and here to the next visited one{exact}"
        )
    return notes


def _ends_with_noise(options: Mapping[str, object], steps: int) -> bool:
    """Whether the last of so many steps, less than all, adds noise.

    Theirs leave it out at level 0 alone, and only this variance is not 0 at the last step.
    """
    lowest = {"linspace": 0, "leading": options["steps_offset"]}
    lowest["trailing"] = round(options["num_train_timesteps"] / steps) - 1
    return options.get("variance_type") == "fixed_large" and lowest[options["timestep_spacing"]] > 0


def _respacing(options: Mapping[str, object], steps: int) -> str:
    """`sampling.respacing` for so many steps of a scheduler."""
    spacing, offset = options["timestep_spacing"], options["steps_offset"]
    if spacing == "leading" and offset:
        return f"leading{steps}+{offset}"
    return f"{steps}" if spacing == "linspace" else f"{spacing}{steps}"


def spacing_of(respacing: str, kind: str) -> dict[str, object] | None:
    """The options of a scheduler by which it visits the levels of `sampling.respacing`.

    Args:
        respacing: see `kept_levels`.
        kind: the scheduler; DDIM makes other steps than between the levels of "linspace".
    Returns:
        None: it cannot.
    """
    text = respacing.replace(" ", "")
    if text in ("", "0"):
        return {}
    found = re.fullmatch(r"(leading|trailing|)\d+(?:\+(\d+))?", text)
    spacing = found and (found[1] or "linspace")
    if not found or (spacing == "linspace" and kind == "DDIMScheduler"):
        return None
    return {"timestep_spacing": spacing, "steps_offset": int(found[2] or 0)}


def other_range(sde: SDE, centered: bool) -> str:
    """How a network's range contradicts that of the pipeline of its process; "" where it does not.

    Args:
        centered: `data.centered`, whether the range is [-1, 1] instead of [0, 1].
    """
    exploding = isinstance(sde, VESDE)
    if exploding and centered:
        return "the network's range is [-1, 1], but the pipeline cuts samples to [0, 1]"
    if not exploding and not centered:
        return "the network's range is [0, 1], but the pipeline maps samples from [-1, 1]"
    return ""


# --- Writing -----------------------------------------------------------------------------------


def described(config, sde: SDE, changes: Mapping[str, object]) -> dict[str, object]:
    """The contents of a scheduler's file for a process of ours.

    Args:
        config: complete, of the network: how it was trained and is sampled.
        changes: options of the scheduler that take precedence, by its own names; `_class_name`
            selects DDIMScheduler.
    Raises:
        ExchangeError: no scheduler has this process, its pipeline has another range of data, or an
            option is unknown or of a wrong kind.
    """
    if isinstance(sde, VESDE) and config.training.continuous:
        options = _of_variance_exploding(config, sde)
    elif isinstance(sde, VPSDE | CosineVPSDE) and not config.training.continuous:
        options = _of_chain(config, sde, changes.get("_class_name"))
    else:
        times = "all times" if config.training.continuous else "discrete noise levels"
        raise ExchangeError(
            f"no scheduler of theirs is {sde!r} with {times}: only VESDE with all times, and VPSDE "
            "and CosineVPSDE with discrete levels; without a process, the network alone is written"
        )
    if problem := other_range(sde, config.data.centered):
        raise ExchangeError(
            f"data.centered = {config.data.centered} cannot be written with a scheduler: {problem}"
            "; without a process, sde=None, the network alone is written"
        )
    options |= {name: value for name, value in changes.items() if name != "_diffusers_version"}
    kind = options["_class_name"]
    for name in options.keys() - SCHEDULERS.get(kind, options).keys() - {"_class_name"}:
        raise ExchangeError(f"the scheduler {kind} has no option {name}")
    again = read("the scheduler to write", options)
    if not _same(again.sde, sde):
        raise ExchangeError(f"the options given for the scheduler are {again.sde!r}, not {sde!r}")
    return options


def _same(sde: SDE, other: SDE) -> bool:
    """Whether two processes have the same noise levels, up to rounding."""
    names = ("N", "sigma_min", "sigma_max", "beta_0", "beta_1")
    pairs = [(getattr(sde, name, 0), getattr(other, name, 0)) for name in names]
    return type(sde) is type(other) and all(math.isclose(a, b) for a, b in pairs)


def _of_variance_exploding(config, sde: VESDE) -> dict[str, object]:
    if config.model.parametrization:
        raise ExchangeError(
            f"model.parametrization = {config.model.parametrization!r} cannot be written: their "
            "ScoreSdeVeScheduler takes the output as the score"
        )
    corrects = config.sampling.corrector != "none"
    return {
        "_class_name": "ScoreSdeVeScheduler",
        "num_train_timesteps": sde.N,
        "snr": config.sampling.snr,
        "sigma_min": sde.sigma_min,
        "sigma_max": sde.sigma_max,
        "sampling_eps": sde.sampling_eps,
        "correct_steps": config.sampling.n_steps_each if corrects else 0,
    }


def _of_chain(config, sde: VPSDE | CosineVPSDE, kind: str | None) -> dict[str, object]:
    """Without the sampler of chains: as the ancestral sampler."""
    ours, sampling = config.model.parametrization, config.sampling
    names = {value: key for key, value in _PREDICTIONS.items()} | {"noise": "epsilon"}
    if ours not in names:
        raise ExchangeError(
            f"model.parametrization = {ours!r} cannot be written: their schedulers know "
            f"{', '.join(_PREDICTIONS)}"
        )
    chain = sampling.method == "chain"
    variance = sampling.variance if chain else "large"
    kind = kind or ("DDIMScheduler" if variance == "ddim" else "DDPMScheduler")
    options = {name: default for name, (default, _) in SCHEDULERS.get(kind, {}).items()}
    options |= {"num_train_timesteps": sde.N, "prediction_type": names[ours]}
    options["clip_sample"] = chain and sampling.clip
    if kind == "DDPMScheduler":
        theirs = {value: key for key, value in _VARIANCES.items() if value != "ddim"}
        options["variance_type"] = theirs.get(variance, "fixed_small")
    if isinstance(sde, VPSDE):
        options |= {"beta_start": sde.beta_0 / sde.N, "beta_end": sde.beta_1 / sde.N}
    else:
        options["beta_schedule"] = "squaredcos_cap_v2"
    if chain:
        options |= spacing_of(str(sampling.respacing), kind) or {}
    return {"_class_name": kind, **options}
