"""Training: `--mode train`.

Randomness is a function of the seed and its use: each training step seeds the generator with
(seed, "train", step).  So an interrupted run equals an uninterrupted one, and logging or sampling
in between changes nothing.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from models.precision import matmul_precision
from score_lib.base import distributed
from score_lib.base.preemption import Preempted, StopSignals
from score_lib.base.profiles import profile_name
from score_lib.base.tensors import derive_seed
from score_lib.data.loading import check_levels, get_streams
from score_lib.data.sources import DataError, Source
from score_lib.data.standardization import fit
from score_lib.data.stream import ImageStream
from score_lib.disk import snapshots
from score_lib.disk.checkpoints import set_damaged_aside
from score_lib.disk.files import locked, open_folder, remove_leftovers
from score_lib.disk.logs import (
    MetricsLog,
    Rate,
    SilentLog,
    kept_messages,
    messages_to,
    progress_bar,
)
from score_lib.disk.wandb_log import WandbWriter
from score_lib.disk.writer import CheckpointWriter
from score_lib.losses.optimization import LossGuard, apply_settings
from score_lib.losses.steps import check_parts
from score_lib.runs.courses import (
    LAST,
    kept_best,
    same_examples,
    set_abandoned_aside,
    set_other_step_aside,
)
from score_lib.runs.examples import Examples, present_examples, record_examples
from score_lib.runs.history import beginning_of, record_config
from score_lib.runs.quality import Quality, get_quality, is_best_file
from score_lib.runs.samples import save_samples
from score_lib.runs.setup import Run, setup
from score_lib.runs.start import BEST, META, Resumed, load_latest

Streams = tuple[ImageStream, ImageStream]


def train(config, workdir: str | os.PathLike) -> None:
    """Train, from the last checkpoint in the folder where there is one.

    Files: `checkpoints-meta/checkpoint.pth` every `training.snapshot_freq_for_preemption` steps,
    with `training.keep_meta_checkpoints` predecessors; in `checkpoints/` those of `snapshot_name`,
    and `samples/iter_{step}/`, every `training.snapshot_freq` steps and at the end;
    `checkpoints/best.pth`, the one of the best of the figures of `training.metrics_freq`;
    `posthoc/`, snapshots of `training.posthoc_profiles` every `training.posthoc_freq` steps;
    `metrics.jsonl`, `tensorboard/`, `stdout.txt`, `config.json` and `config_history.jsonl`.

    Args:
        workdir: folder of the run; made if need be.
    Raises:
        ValueError: the config, or a checkpoint in the folder, does not fit.
        OSError: the folder cannot be written, or another run is in it.
        FloatingPointError: the loss or a weight is not finite; the last good checkpoint is left
            alone.
        Preempted: SIGTERM or SIGUSR1 asked to stop: the step was finished and a checkpoint written.
    """
    run, workdir = setup(config), pathlib.Path(workdir)
    run.add_optimizer()
    check_parts(run.state["model"], run.config.training.grad_accumulation)
    with kept_messages() as said:  # how the data are read
        streams = training_streams(run)
        # Or the first snapshot would refuse unknown ones.
        run.conditions.classes_of_samples(range(1), run.state["class_to_idx"])
        quality = get_quality(run, workdir)
        present = present_examples(*(stream.source for stream in streams))
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        # Last, so that a mistake in any of the above changes no file.
        distributed.on_main(lambda: stack.enter_context(locked(workdir)))
        resumed = resume(run, workdir)
        with stop.at_once():
            standardize(run, streams[0].source)
        applied = apply_settings(run.config, run.state)
        log = SilentLog()
        if distributed.is_main():
            open_folder(workdir, run.config)
            stack.enter_context(messages_to(workdir / "stdout.txt", said))
            set_useless_aside(run, workdir, resumed, present)
            start = run.state.get("start")
            record_config(workdir, run.state["step"], run.config, resumed.config, applied, start)
            project = run.config.training.wandb
            others = [WandbWriter(project, workdir, run.config)] if project else []
            due = quality.name if quality is not None and run.state["metrics_due"] else None
            log = stack.enter_context(MetricsLog(workdir, run.state["step"], others, due))
        if quality is not None:
            run.state["best"] = known_best(quality, workdir, run.state, present)
        record_examples(run, present, resumed.config)
        writer = stack.enter_context(CheckpointWriter())
        stack.enter_context(matmul_precision(run.config.training.precision))
        Training(run, streams, workdir, log, writer, stop, quality).run_to_the_end()


def training_streams(run: Run, dequantize: bool | None = None) -> Streams:
    """This process's share of endless batches, for training and for its evaluation loss.

    Args:
        dequantize: by uniform noise; None: as `data.uniform_dequantization` says.
    Raises:
        ValueError: the data or their labels do not fit, or a batch cannot be split evenly.
    """
    _check_share(run.config.training)
    if dequantize is None:
        dequantize = run.config.data.uniform_dequantization
    ranks = {"rank": distributed.rank(), "world": distributed.world()}
    train_ds, eval_ds, info = get_streams(run.config, dequantize, device=run.device, **ranks)
    check_levels(run.config, info)
    run.check_labels(info)
    run.state["class_to_idx"] = info.class_to_idx
    return train_ds, eval_ds


def standardize(run: Run, source: Source) -> None:
    """Fit the scaler of continuous data to those of a new run; a resumed one has its own.

    Raises:
        DataError: they cannot be standardised, see `standardization.fit`.
    """
    if run.continuous and not run.scaler.fitted:
        how = run.config.data.standardize
        logging.info(
            "mean and deviation of %d examples, for data.standardize = %r", len(source), how
        )
        run.scaler.load_state_dict(distributed.on_main(lambda: fit(source, how, run.kind)))


def _check_share(training) -> None:
    size, accumulation = training.batch_size, training.grad_accumulation
    parts = distributed.world() * accumulation
    if size % distributed.world() or size < parts:
        raise ValueError(
            f"training.batch_size = {size} cannot be split evenly among {distributed.world()} "
            f"processes, in training.grad_accumulation = {accumulation} parts each: "
            f"{-(-size // parts) * parts} can"
        )


def resume(run: Run, workdir: pathlib.Path) -> Resumed:
    """Load what the run begins with, see `load_latest`, and remove leftovers.

    Raises:
        ValueError: it does not fit, see `load_latest`; or a classifier was trained with other
            labels than the data have now.
    """
    classes = run.state["class_to_idx"]
    resumed = load_latest(run.config, run.state, run.device, workdir)
    run.check_classes(classes)
    run.state["class_to_idx"] = classes
    if distributed.is_main():
        checkpoints = workdir / META.parent, workdir / "checkpoints"
        folders = *checkpoints, workdir / snapshots.FOLDER
        remove_leftovers(workdir, *folders, *workdir.glob("samples/iter_*"))
    return resumed


def set_useless_aside(run: Run, workdir: pathlib.Path, resumed: Resumed, present: Examples) -> None:
    """Set damaged checkpoints aside, and files of a course that the run has left."""
    if resumed.path is not None:
        set_damaged_aside(workdir / META, resumed.path)
    set_abandoned_aside(workdir, run.config, run.state, resumed, present)


def known_best(quality: Quality, workdir: pathlib.Path, state: dict, present: Examples) -> dict:
    """The best measurement in a restored state, if it counts: see `Quality.known`, `kept_best`.

    One on other examples of the data than the present ones does not.
    """
    best = quality.known(state["best"])
    if best and not same_examples(state, present):
        logging.warning(
            "the data have changed: the search for the best %s begins anew", quality.name
        )
        best = {}
    return distributed.on_main(lambda: kept_best(workdir, state["step"], best))


class Training:
    """The training of a run from its present state on.

    Args:
        run: with the state to continue from.
        streams: batches for training and for its evaluation loss.
        workdir: folder of the run.
        log: for numbers and pictures.
        writer: for checkpoints.
        stop: tells whether a signal has asked to stop.
        quality: measures the averaged weights; None: nothing does.
    """

    def __init__(
        self,
        run: Run,
        streams: Streams,
        workdir: pathlib.Path,
        log: MetricsLog | SilentLog,
        writer: CheckpointWriter,
        stop: StopSignals,
        quality: Quality | None = None,
    ):
        self.run, self.workdir, self.log, self.writer, self.stop = run, workdir, log, writer, stop
        self.quality = quality
        self.state, self.options = run.state, run.config.training
        self.train_step, self.eval_step = run.step_fns()
        train_ds, eval_ds = streams
        train_ds.seek(self.state["position"])
        evaluations = self.state["step"] // self.options.eval_freq
        eval_ds.seek(evaluations * self.options.batch_size)
        self.train_batches, self.eval_batches = iter(train_ds), iter(eval_ds)
        self.begun = self.state["step"]
        self.guard, self.rate = LossGuard(), Rate(self.options.batch_size)
        self.stop_asked = distributed.AnyProcess()

    def run_to_the_end(self) -> None:
        """Train, and log, evaluate, save and sample when each is due.

        Raises:
            OSError: a file cannot be written.
            FloatingPointError: the loss or a weight is not finite.
            Preempted: a signal asked to stop, and a checkpoint of the last step was written.
        """
        state, options = self.state, self.options
        logging.info(
            "training from step %d to %d on %s, processes: %d",
            state["step"], options.n_iters, self.run.device, distributed.world(),
        )  # fmt: skip
        if state["snapshot_due"] or state["metrics_due"]:
            self._make_due()
            self._save_meta()
        elif self._is_best() and not distributed.on_main(
            lambda: is_best_file(self.workdir / BEST, state["best"])
        ):
            self._save(BEST)  # a kill came between the state and this copy of it
        with progress_bar(options.n_iters, state["step"], "step") as bar:
            while state["step"] < options.n_iters:
                loss = self._steps()
                bar.update(state["step"] - bar.n)
                self._after_step(loss, last=state["step"] >= options.n_iters)
                self.writer.check()
        self.writer.wait()
        if distributed.is_main():
            set_other_step_aside(self.workdir / LAST, state["step"])
            self._tell_best()
        distributed.barrier()

    def _tell_best(self) -> None:
        if self.quality is None or not self.state["best"]:
            return
        name, best = self.quality.name, self.quality.text(self.state["best"])
        if is_best_file(self.workdir / BEST, self.state["best"]):
            logging.info("best %s: %s, in %s", name, best, BEST)
        else:
            logging.warning("best %s: %s; %s is not its checkpoint", name, best, BEST)

    def _steps(self) -> Tensor:
        """Steps up to the next multiple of `training.n_jitted_steps`; returns the last one's loss.

        A run may resume between two multiples, where one of another length has ended.
        """
        state, options = self.state, self.options
        at_once = options.n_jitted_steps - state["step"] % options.n_jitted_steps
        for _ in range(min(at_once, options.n_iters - state["step"])):
            torch.manual_seed(derive_seed(self.run.config.seed, "train", state["step"]))
            batch = self._next_batch()
            loss = self.train_step(state, *self.run.arguments(batch))
            state["position"] += options.batch_size
            self.guard.watch(loss + self.train_step.grad_norm, state["step"])
        return loss

    def _next_batch(self) -> dict[str, Tensor]:
        """A batch for a step, and `eval_batch` for an evaluation that is due after it; where none
        can be read, or a signal asks to stop meanwhile, the steps made so far are saved.

        Raises:
            DataError, Preempted: no batch can be read, or a signal asked to stop.
        """
        try:
            with waiting_for_data(self.stop):
                batch = next(self.train_batches)
                if every(self.state["step"] + 1, self.options.eval_freq):
                    self.eval_batch = next(self.eval_batches)
            return batch
        except (Preempted, DataError):
            if self.state["step"] > self.begun:
                self._save_meta()
            raise

    def _after_step(self, loss: Tensor, last: bool) -> None:
        state, options = self.state, self.options
        step = state["step"]
        if every(step, options.log_freq):
            self._log_training(loss)
        if every(step, options.eval_freq):
            self._evaluate()
        if every(step, options.posthoc_freq):
            self._save_snapshot()
        if every(step, options.snapshot_freq) or last:
            self._save_numbered()
            state["snapshot_due"] = options.snapshot_sampling
        state["metrics_due"] = every(step, options.metrics_freq)
        self._make_due()
        # Last: a run killed before this line repeats all of the above.
        stopping = self.stop_asked(self.stop.requested) and not last
        meta_due = every(step, options.snapshot_freq_for_preemption)
        if meta_due or last or stopping or self._is_best():
            self._save_meta()
        if stopping:
            self.writer.wait()
            distributed.barrier()
            raise Preempted

    def _log_training(self, loss: Tensor) -> None:
        self.guard.check()
        step = self.state["step"]
        values = {
            "training_loss": distributed.average(loss).item(),
            "grad_norm": self.train_step.grad_norm.item(),
            "learning_rate": self.state["optimizer"].param_groups[0]["lr"],
        }
        rate = self.rate.at(step)
        machine = {} if rate is None else {"images_per_second": rate}
        self.log.write(step, machine=machine, **values)
        logging.info(
            "step %d: training loss %.4e, gradient norm %.3g%s",
            step, values["training_loss"], values["grad_norm"],
            "" if rate is None else f", {rate:.0f} images/s",
        )  # fmt: skip

    def _evaluate(self) -> None:
        step = self.state["step"]
        torch.manual_seed(derive_seed(self.run.config.seed, "eval", step))
        with matmul_precision("float32"):
            loss = self.eval_step(self.state, *self.run.arguments(self.eval_batch))
        loss = loss.item()
        self.log.write(step, eval_loss=loss)
        logging.info("step %d: evaluation loss %.4e", step, loss)

    def _make_due(self) -> None:
        """Samples and figures of the averaged weights; an interrupted run makes them again."""
        try:
            with self.rate.paused():
                if self.state["snapshot_due"] and self.options.snapshot_sampling:
                    self._draw_samples()
                if self.state["metrics_due"] and self.quality is not None:
                    self._measure(self.quality)
        except (Preempted, DataError):
            self._save_meta()
            raise

    def _measure(self, quality: Quality) -> None:
        with self.stop.at_once():
            found = quality.measure()
        state = self.state
        state["best"] = quality.report(self.log, state["step"], found, state["best"])
        state["metrics_due"] = False

    def _is_best(self) -> bool:
        """Whether the present weights are those of the best figure so far."""
        return self.quality is not None and self.state["best"].get("step") == self.state["step"]

    def _draw_samples(self) -> None:
        with self.stop.at_once():
            samples = self.run.first_samples()
        self.state["snapshot_due"] = False
        if not distributed.is_main():
            return
        step = self.state["step"]
        try:
            picture = save_samples(self.workdir / f"samples/iter_{step}", samples, self.run)
        except FloatingPointError as error:  # training may still mend the network
            logging.warning("step %d: no samples: %s", step, error)
            return
        if picture is not None:
            self.log.image(step, "samples", picture)

    def _save_snapshot(self) -> None:
        names = [profile_name(sigma_rel) for sigma_rel in self.options.posthoc_profiles]
        if not names:
            return
        self._check_finite()
        if not distributed.is_main():
            return
        named, step = self.state["averages"].named, self.state["step"]
        averages = {name: named[name].shadow_params for name in names}
        path = snapshots.path_of(self.workdir, step, names)
        contents = snapshots.contents_of(step, averages, beginning_of(self.workdir))
        self.writer.save_contents(path, contents, kind="snapshot")

    def _save_numbered(self) -> None:
        step, frequency = self.state["step"], self.options.snapshot_freq
        path = pathlib.Path("checkpoints", snapshot_name(step, frequency))
        # The end of a run replaces an earlier end.
        if every(step, frequency) and distributed.is_main():
            set_other_step_aside(self.workdir / path, step)
        self._save(path)

    def _save_meta(self) -> None:
        # The state comes first, so that a best checkpoint is never ahead of the run.
        best = [BEST] if self._is_best() else []
        self._save(META, self.options.keep_meta_checkpoints, best)

    def _save(
        self, name: str | os.PathLike, keep: int = 0, also: Sequence[os.PathLike] = ()
    ) -> None:
        self._check_finite()
        if distributed.is_main():
            state = {**self.state, "config": self.run.config.to_json_best_effort()}
            also = [self.workdir / other for other in also]
            self.writer.save(self.workdir / name, state, keep, also)

    def _check_finite(self) -> None:
        self.guard.check_weights(self.state["model"].parameters(), self.state["step"])


def waiting_for_data(stop: StopSignals) -> contextlib.AbstractContextManager:
    """Context for a step's batch, which may never come: a request to stop is followed at once; not
    of several processes, where each makes one more step, by which it tells the others of it."""
    return stop.at_once() if distributed.world() == 1 else contextlib.nullcontext()


def snapshot_name(step: int, frequency: int) -> str:
    """File of the snapshot after a step: numbered by step // frequency, as the published ones.

    The end of a run between two snapshots replaces no numbered one: it is `checkpoint_last.pth`.
    """
    number = step // frequency
    return LAST.name if number and step % frequency else f"checkpoint_{number}.pth"


def every(step: int, frequency: int) -> bool:
    """Whether an event of a frequency (in steps; 0 is never) is due after this step."""
    return frequency > 0 and step % frequency == 0
