"""Quality while training: a figure of the averaged weights every `training.metrics_freq` steps.

Of images it is the FID of samples, of other data the distance of samples to held-out data, and of a
classifier its accuracy.  Samples have the same numbers and noise each time, so that figures differ
by the weights alone.  The best figure so far is part of the state of a run, as "best".
"""

import dataclasses
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.precision import matmul_precision
from models.zeros import Zeros
from score_lib.base import distributed
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.disk.files import printable
from score_lib.disk.fit import CheckpointError
from score_lib.disk.logs import MetricsLog, SilentLog
from score_lib.disk.pictures import check_samples_finite
from score_lib.metrics.distances import frechet_distance
from score_lib.metrics.stats import Statistics
from score_lib.option_table import TABLE
from score_lib.options import complete
from score_lib.runs.accuracy import Answers, levels_by_noise
from score_lib.runs.comparisons import HeldOutExamples, distances_of, tell_shares
from score_lib.runs.heldout import HeldOut
from score_lib.runs.setup import Run, in_batches
from score_lib.runs.start import BEST
from score_lib.runs.statistics import comparable_extractor, data_statistics
from score_lib.samplers.configured import OF_ONE_METHOD, sampler_text

# Of the fast sampler, which evaluates the network once more to denoise the last step.
_STEPS = 20
# Distances need so many examples.
_LEAST = 4
# Of networks that diverge, or of memory that does not suffice.
_FAILURES = (ArithmeticError, RuntimeError, ValueError)


@dataclasses.dataclass
class Quality:
    """Figures of the averaged weights of a run, and which of them is the best.

    Attributes:
        run: its present weights are measured.
        name: of the figure that checkpoints are compared by.
        parts: pieces of work, each of which one process does.
        of_part: gives a piece's rows, (b, ...), on the CPU.
        figures_of: the figures, by name, of the rows of all pieces.
        facts: plain values that say how it is measured; only figures with the same are compared.
        data: the held-out examples that are read.
        loss: of a figure, of which the best has the least.
    """

    run: Run
    name: str
    parts: Sequence
    of_part: Callable[[Any], Tensor]
    figures_of: Callable[[Tensor], dict[str, float]]
    facts: dict[str, object]
    data: HeldOut | None = None
    loss: Callable[[float], float] = float

    def measure(self) -> dict[str, float] | str:
        """The figures of the present averages, or in words why there are none.

        Several processes share the samples, and all get the same result.
        """
        ema, model = self.run.state["ema"], self.run.state["model"]
        finite = torch.stack([p.isfinite().all() for p in ema.shadow_params]).all()
        if not distributed.on_main(lambda: bool(finite)):
            return "the averaged weights are not finite"
        with matmul_precision("float32"), ema.applied(model.parameters()):
            rows = distributed.dealt_out(self.parts, lambda part: _attempt(self.of_part, part))
            found = distributed.on_main(lambda: _attempt(self._figures, rows))
        if self.data is not None:
            self.data.release()
        return found

    def _figures(self, rows: list[Tensor | str]) -> dict[str, float] | str:
        for part in rows:
            if isinstance(part, str):
                return part
        figures = self.figures_of(torch.cat(rows))
        if not math.isfinite(figures[self.name]):
            return f"it is {figures[self.name]}"
        return figures

    def report(
        self, log: MetricsLog | SilentLog, step: int, found: dict[str, float] | str, best: dict
    ) -> dict:
        """Log the result of a measurement; returns the best one so far, perhaps this."""
        if isinstance(found, str):
            log.write(step, facts={self.name: None, **self._logged()})
            _warn("step %d: no %s: %s", step, self.name, found)
            return best
        log.write(step, facts=self._logged(), **found)
        value = found[self.name]
        if better := not best or self.loss(value) < self.loss(best["value"]):
            best = {"step": step, "value": value, "figure": self.name, **self.facts}
        logging.info(
            "step %d: %s %.4f%s", step, self.name, value,
            ", the best so far" if better else f"; best: {self.text(best)}",
        )  # fmt: skip
        return best

    def _logged(self) -> dict[str, object]:
        return {key: value for key, value in self.facts.items() if key != "against"}

    def text(self, best: dict) -> str:
        """The best measurement in words."""
        return f"{best['value']:.4f} at step {best['step']}"

    def known(self, best: object) -> dict:
        """The best measurement in a checkpoint, which may hold anything; {} if there is none.

        One that was made in another way cannot be compared, and does not count.
        """
        if not isinstance(best, dict) or not best:
            return {}
        value, step = best.get("value"), best.get("step")
        if not isinstance(value, float) or not math.isfinite(value) or not isinstance(step, int):
            return {}
        if {"step": step, "value": value, "figure": self.name, **self.facts} == best:
            return best
        _warn(
            "the best %s so far, %s, was measured in another way: %s begins anew",
            printable(str(best.get("figure"))), self.text(best), BEST.name,
        )  # fmt: skip
        return {}


def get_quality(run: Run, workdir: str | os.PathLike) -> Quality | None:
    """The measurements that a config asks for, whose cost is logged; None if it asks for none.

    Raises:
        OSError: statistics of the data, or weights of the extractor, are missing.
        ValueError: they do not fit, or the data have too few held-out examples or no labels.
    """
    if not run.config.training.metrics_freq:
        return None
    logging.info("%s", cost_of(run))
    if run.objective == "classifier":
        return _of_answers(run)
    sampling = fast_sampling(run)
    count = run.config.training.metrics_samples
    describe, chosen = _features(run, workdir) if run.pictures else _examples(run, count)
    show = sys.stderr.isatty() and distributed.is_main()
    chosen["facts"] = {
        "num_samples": count,
        "sampler": sampler_text(sampling.config),
        **chosen["facts"],
    }
    return Quality(
        run,
        parts=in_batches(range(count), run.config.training.batch_size),
        of_part=lambda part: describe(sampling.draw(part, progress=show)),
        **chosen,
    )


def cost_of(run: Run) -> str:
    """The cost of a config's measurements, in words.

    Raises:
        ValueError: as `fast_sampling`.
    """
    options = run.config.training
    if run.objective == "classifier":
        repeats = run.config.eval.accuracy_num_repeats
        return (
            f"measured every {options.metrics_freq} steps: all held-out examples, by {repeats} "
            "evaluations of the network for each"
        )
    sampling, count = fast_sampling(run), options.metrics_samples
    each = evaluations_of(sampling)
    cost = "as many evaluations of the network as it chooses"
    if each is not None:
        # A backward pass costs about two forward passes.
        steps = each * count / (3 * options.batch_size)
        cost = f"{each * count} evaluations of the network, as {steps:.3g} training steps"
    return (
        f"measured every {options.metrics_freq} steps: {count} samples by "
        f"{sampler_text(sampling.config)}; {cost}"
    )


def _of_answers(run: Run) -> Quality:
    """The accuracy of a classifier at the least noise, as an evaluation reports it."""
    loss_fn = run.loss_fn(train=False)
    (_, least), *_ = levels_by_noise(run, loss_fn, 2)
    answers = Answers(run, loss_fn, least)
    count = len(answers.data.stream.source)
    return Quality(
        run,
        name="accuracy",
        parts=range(len(answers.data)),
        of_part=lambda number: answers.of_batch(number).cpu(),
        figures_of=lambda right: {"accuracy": float(right.numpy().mean())},
        facts={"num_data": count, "against": answers.data.info.name},
        data=answers.data,
        loss=lambda accuracy: -accuracy,
    )


def _features(run: Run, workdir: str | os.PathLike) -> tuple[Callable, dict]:
    """Of images: their features, and the rest of a `Quality` by the distance of features."""
    real = data_statistics(run, workdir)
    extractor = comparable_extractor(run, real, workdir)
    extractor.with_spatial = False
    moments = real.moments(run.device) if distributed.is_main() else None

    def features(samples: Tensor) -> Tensor:
        # In memory as an evaluation reads them from its files: so their rounding is the same.
        images = run.to_bytes(samples).clone(memory_format=torch.contiguous_format)
        return extractor(images)["pool_3"]

    def distance(pool_3: Tensor) -> dict[str, float]:
        fake = Statistics.of(extractor, pool_3).moments(run.device)
        return {extractor.distance: frechet_distance(moments, fake)}

    facts = {"against": real.describe()}
    return features, {"name": extractor.distance, "figures_of": distance, "facts": facts}


def _examples(run: Run, most: int) -> tuple[Callable, dict]:
    """Of other data: the values, and the rest of a `Quality` by their distance to held-out data."""
    data = HeldOutExamples(run, most)
    if len(data) < _LEAST:
        raise ValueError(
            f"training.metrics_freq = {run.config.training.metrics_freq} needs {_LEAST} or more "
            f"held-out examples to compare samples with, and {data.name} has {len(data)}: set it "
            "to 0, or see data.split"
        )
    tell_shares(run, most, data)

    def values(samples: Tensor) -> Tensor:
        check_samples_finite(samples)
        return samples.cpu()

    chosen = {
        "name": "sliced_w2",
        "figures_of": lambda samples: distances_of(run, samples, data.read()),
        "facts": {"num_data": len(data), "against": data.name},
    }
    if run.kind == "points":  # 0.5 where samples and data cannot be told apart
        chosen |= {"name": "nearest_neighbour_accuracy", "loss": lambda share: abs(share - 0.5)}
    return values, chosen


def _warn(message: str, *values: object) -> None:
    """Say once what all processes know."""
    if distributed.is_main():
        logging.warning(message, *values)


def _attempt(compute: Callable, *arguments) -> Any:
    """The result, or in words why there is none, since other processes wait for either."""
    try:
        return compute(*arguments)
    except _FAILURES as error:
        return str(error) or type(error).__name__


def fast_sampling(run: Run) -> Run:
    """A run that draws samples of the same weights by `training.metrics_sampler`.

    That is the run itself with "configured", or where its sampler is as fast.

    Raises:
        ValueError: the process suits no fast sampler.
    """
    options = run.config.sampling
    short = options.respacing if options.method == "chain" else 1 <= options.num_steps <= _STEPS
    configured = run.config.training.metrics_sampler == "configured"
    if configured or (short and (evaluations_of(run) or math.inf) <= _STEPS + 1):
        return run
    config = complete(run.config)
    with config.unlocked():
        config.sampling.update(_fast_options(run))
    # The network, too, is shared once it is built.
    other = dataclasses.replace(run, config=config)
    if "state" in vars(run):
        other.state = run.state
    try:
        evaluations_of(other)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"training.metrics_freq cannot draw samples by {sampler_text(config)}: {error}; set "
            "training.metrics_sampler = 'configured'"
        ) from error
    return other


def _fast_options(run: Run) -> dict[str, object]:
    """Options of `sampling`: DPM-Solver++, or DDIM for a network of discrete levels."""
    shared = {"noise_removal": True}
    shared |= {name.removeprefix("sampling."): TABLE[name].default for name in OF_ONE_METHOD}
    solver = {"method": "dpmpp_2m", "num_steps": _STEPS, **shared}
    if run.config.training.continuous:
        return solver
    try:
        levels = len(run.sde.discrete_chain()[0])
    except NotImplementedError:
        return solver
    ddim = {"variance": "ddim", "clip": run.pictures, "clip_noise": True}
    kept = {"num_steps": 0, "respacing": str(min(_STEPS, levels)), "shift_mean": False}
    return {"method": "chain", **ddim, **kept, **shared}


def evaluations_of(run: Run) -> int | None:
    """Evaluations of the network for a sample, by a run with a network of zeros.

    None if the sampler chooses its steps as it goes.
    """
    if run.config.sampling.method in ("ode", "adaptive"):
        return None
    sampler = run.sampler(1)
    network, seen = Zeros().to(run.device), []
    network.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    condition = run.conditions.of_samples(range(1), {})
    sampler(run.conditioned(network, condition), noise=torch.zeros_like)
    return sum(seen)


def is_best_file(path: pathlib.Path, best: dict) -> bool:
    """Whether a file is the undamaged checkpoint of a measurement."""
    try:
        return path.is_file() and read_checkpoint(path, mapped=True).get("best") == best
    except CheckpointError:
        return False
