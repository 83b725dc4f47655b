"""Time and memory that a config will take, told before it is run: for `--mode check`.

Its parts are tried out (`runs.trial`) and counted as `runs.train` and `runs.measures` do them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from models.zeros import Zeros
from score_lib.base.memory import total_memory
from score_lib.checks.network import Cost
from score_lib.checks.process import few_entries
from score_lib.data.public import only_prepared
from score_lib.data.stream import ImageStream
from score_lib.runs.measures import CHECKED_SHARE
from score_lib.runs.quality import fast_sampling
from score_lib.runs.setup import Run
from score_lib.runs.trial import LIKELIHOOD, Trial, try_out
from score_lib.samplers.configured import get_sampling_fn

# Evaluations of samplers whose steps depend on the network: on trained ones they are about these.
ADAPTIVE = {"ode": 150, "adaptive": 300}
# Units of time and memory, by the least number of seconds or bytes.
_TIMES = {
    31557600: "years",
    86400: "days",
    3600: "hours",
    60: "minutes",
    1: "s",
    1e-3: "ms",
    1e-6: "us",
}
_SIZES = {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "kB"}


class Estimate(NamedTuple):
    """Seconds and bytes that a run will take.

    Attributes:
        trial: seconds and bytes of its parts.
        training: seconds by part, such as "steps", without the start of the program.
        evaluation: seconds of the evaluation of one checkpoint, by option of `eval.enable_*`.
    """

    trial: Trial
    training: dict[str, float]
    evaluation: dict[str, float]


def estimate(run: Run, cost: Cost, stream: ImageStream | None, sizes: Mapping) -> Estimate:
    """Try a few steps, and estimate training and evaluation.

    Args:
        cost: of the network for one datum.
        stream: of the training data; None: they are not on this machine.
        sizes: numbers of data by part, "train" and "test"; without them, of none.
    """
    trial = try_out(run, cost, stream)
    draw = _evaluations_of_sampler(run) * trial.sampling
    return Estimate(trial, _training(run, trial, draw), _evaluation(run, trial, draw, sizes))


def _training(run: Run, trial: Trial, draw: float) -> dict[str, float]:
    options = run.config.training
    steps = options.n_iters

    def times(frequency: int) -> int:
        return steps // frequency if frequency > 0 else 0

    snapshots = times(options.snapshot_freq)
    snapshots += steps != snapshots * options.snapshot_freq  # the one at the end
    states = times(options.snapshot_freq_for_preemption)
    states += steps != states * options.snapshot_freq_for_preemption
    found = {
        "steps": steps * trial.step,
        "losses": times(options.eval_freq) * options.batch_size * trial.forward,
        "checkpoints": (snapshots + states) * trial.checkpoint,
    }
    if options.snapshot_sampling and run.objective == "score":
        each = run.config.sampling.num_samples * draw + trial.pictures
        found["samples"] = snapshots * each
    if measured := times(options.metrics_freq):
        found["quality"] = measured * _measurement(run, trial)
    return found


def _measurement(run: Run, trial: Trial) -> float:
    """Seconds to draw the samples of a measurement while training."""
    options = run.config.training
    if run.objective != "score":
        return 0.0
    try:
        with only_prepared():
            fast = fast_sampling(run)
    except ValueError:  # a check tells of it in a line of its own
        return 0.0
    return options.metrics_samples * _evaluations_of_sampler(fast) * trial.sampling


def _evaluation(run: Run, trial: Trial, draw: float, sizes: Mapping) -> dict[str, float]:
    options = run.config.eval
    test, few = sizes.get("test", 0), sizes.get(run.bpd_part, 0)
    few = min(few, options.bpd_num_images or few)
    levels = options.vlb_num_times or run.sde.N
    found = {
        "enable_loss": test * options.loss_num_repeats * trial.forward,
        "enable_accuracy": test
        * options.accuracy_num_levels
        * options.accuracy_num_repeats
        * trial.forward,
        "enable_bpd": few * options.bpd_num_repeats * _likelihood(options) * trial.likelihood,
        # With a backward pass.
        "enable_elbo": few * options.elbo_num_times * 3 * trial.forward,
        "enable_vlb": few * levels * trial.forward,
        "enable_sampling": options.num_samples * draw,
    }
    return {name: seconds for name, seconds in found.items() if options[name]}


def _likelihood(options) -> float:
    """Evaluations of the network that a likelihood takes."""
    # Three to begin with, and half the steps once more for a part of the images.
    steps = options.bpd_steps
    return 3 + steps * (1 + CHECKED_SHARE / 2) if steps else LIKELIHOOD


def _evaluations_of_sampler(run: Run) -> int:
    """Evaluations of the network that a sample takes."""
    if run.objective != "score":
        return 0
    method = run.config.sampling.method
    if method in ADAPTIVE:
        return ADAPTIVE[method]
    shape = (1, *few_entries(run.shape))
    sampler = get_sampling_fn(run.config, run.sde, shape, lambda x: x, run.sde.sampling_eps)
    return sampler(run.conditioned(Zeros().to(run.device), {}))[1]


def training_text(run: Run, found: Estimate) -> str:
    """The time of training in words."""
    trial, options = found.trial, run.config.training
    parts = [f"{name} {duration(seconds)}" for name, seconds in found.training.items() if seconds]
    total = duration(sum(found.training.values()))
    return (
        f"about {duration(trial.step)} a step of {options.batch_size} on {run.device} "
        f"({trial.how}), {total} for {options.n_iters} steps: {', '.join(parts)}"
    )


def evaluation_text(run: Run, found: Estimate) -> str:
    """The time of an evaluation in words; "" where none can be told."""
    named = {name.removeprefix("enable_"): time for name, time in found.evaluation.items()}
    parts = [f"{name} {duration(seconds)}" for name, seconds in named.items() if seconds > 0]
    if not parts:
        return ""
    text = f"of a checkpoint about {duration(sum(named.values()))}: {', '.join(parts)}"
    if run.pictures and "sampling" in named:
        text += ", without features of images"
    if untold := [name for name, seconds in named.items() if seconds == 0]:
        text += f"; without {' and '.join(untold)}, whose data are not here"
    return text


def memory_text(run: Run, found: Estimate) -> tuple[str, bool]:
    """The largest memory of training in words, and whether the machine has as much."""
    needed, there = found.trial.memory, total_memory(run.device)
    where = "this machine" if run.device.type == "cpu" else str(run.device)
    fits = needed <= there
    text = f"about {size(needed)} at most, {where} has {size(there)}"
    if not fits:
        text += (
            ": training will fail here. Try a smaller training.batch_size, a larger "
            "training.grad_accumulation or model.checkpoint_activations=True"
        )
    return text, fits


def duration(seconds: float) -> str:
    """Such as "3.4 minutes"."""
    return _in_units(seconds, _TIMES)


def size(count: float) -> str:
    """Such as "410 MB"."""
    return _in_units(count, _SIZES)


def _in_units(value: float, units: Mapping[float, str]) -> str:
    unit = next((unit for unit in units if value >= unit), min(units))
    shown = value / unit
    return f"{shown:.0f} {units[unit]}" if shown >= 100 else f"{shown:.2g} {units[unit]}"
