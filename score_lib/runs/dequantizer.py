"""Learned dequantization: `--mode train_dequantizer`, and `eval.dequantizer`, which uses it.

Only the flow of the noise is trained; the score network stays as it is.  Randomness is a function
of the seed and the step, so that an interrupted run equals an uninterrupted one.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor

from models.dequantizer import Dequantizer
from models.ema import ExponentialMovingAverage
from models.precision import matmul_precision
from score_lib.base import distributed
from score_lib.base.preemption import Preempted, StopSignals
from score_lib.base.tensors import derive_seed, seeded
from score_lib.data.sources import DataError
from score_lib.data.stream import ImageStream
from score_lib.dequantization import (
    Dequantization,
    LearnedDequantization,
    UniformDequantization,
    get_dequantization_loss_fn,
)
from score_lib.disk import checkpoints
from score_lib.disk.files import locked, open_folder, remove_leftovers
from score_lib.disk.logs import MetricsLog, SilentLog, kept_messages, messages_to, progress_bar
from score_lib.disk.writer import CheckpointWriter
from score_lib.losses.optimization import (
    LossGuard,
    get_optimizer,
    optimization_manager,
    set_optimizer,
)
from score_lib.runs.history import trained_config
from score_lib.runs.setup import Run
from score_lib.runs.train import every, training_streams, waiting_for_data
from score_lib.runs.trained import restored

# The checkpoint of a run's dequantizer, in the folder of the run.
DEQUANTIZER = pathlib.Path("dequantizer", "checkpoint.pth")
_EMA_RATE = 0.999


def train_dequantizer(config, workdir: str | os.PathLike) -> None:
    """Train the dequantizer of a score network, from its last checkpoint where there is one.

    The network is that of `eval.checkpoint` or the run's latest.  Files, in `dequantizer/`:
    `checkpoint.pth` every `training.snapshot_freq_for_preemption` steps and at the end, with
    `training.keep_meta_checkpoints` predecessors; `metrics.jsonl`, `tensorboard/`, `stdout.txt` and
    `config.json`.

    Args:
        workdir: folder of the run.
    Raises:
        FileNotFoundError: there is no score network.
        ValueError: the config, its process or a checkpoint does not fit.
        OSError: the folder cannot be written, or another training is in it.
        FloatingPointError: the loss or a weight is not finite; the last good checkpoint is left
            alone.
        Preempted: SIGTERM or SIGUSR1 asked to stop: the step was finished and a checkpoint written.
    """
    run, path = restored(config, workdir), pathlib.Path(workdir) / DEQUANTIZER
    if run.objective != "score":
        raise ValueError(
            f"a dequantizer needs the density of a score network, and training.objective = "
            f"{run.objective!r}: choose the config and the checkpoint of a score network"
        )
    if run.continuous:
        raise ValueError(
            f"a dequantizer is for grey levels: data.dataset = {run.config.data.dataset!r} holds "
            "continuous values, which have a density as they are"
        )
    with kept_messages() as said:
        stream, _ = training_streams(run, dequantize=False)
    state = _new_state(run, stream.source.levels)
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(locked(path.parent)))
        _resume(path, state, run)
        log = SilentLog()
        if distributed.is_main():
            open_folder(path.parent, run.config)
            remove_leftovers(path.parent)
            stack.enter_context(messages_to(path.parent / "stdout.txt", said))
            log = stack.enter_context(MetricsLog(path.parent, state["step"]))
        writer = stack.enter_context(CheckpointWriter())
        stack.enter_context(matmul_precision("float32"))
        Training(run, state, stream, path, log, writer, stop).run_to_the_end()


def get_dequantization(run: Run, levels: int, workdir: str | os.PathLike) -> Dequantization:
    """The dequantization that `eval.dequantizer` asks for: uniform, or a trained one.

    Args:
        levels: grey levels of the data.
        workdir: folder of the run.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it is none of a dequantizer for such data.
    """
    path = dequantizer_file(run.config, workdir)
    if path is None:
        return UniformDequantization(levels)
    contents = checkpoints.read_checkpoint(path, run.device)
    trained = trained_config(path, contents)
    if trained is None or not isinstance(contents.get("levels"), int):
        raise checkpoints.CheckpointError(
            f"{path} is no dequantizer: train one with --mode train_dequantizer"
        )
    if contents["levels"] != levels:
        raise checkpoints.CheckpointError(
            f"{path} is a dequantizer of {contents['levels']} grey levels, but the data have "
            f"{levels}: train one with --mode train_dequantizer"
        )
    flow, average = _flow(trained, run)
    checkpoints.restore_contents(path, contents, {"model": flow, "ema": average, "step": 0})
    average.copy_to(flow.parameters())
    return LearnedDequantization(levels, flow)


def dequantizer_file(config, workdir: str | os.PathLike) -> pathlib.Path | None:
    """The checkpoint that `eval.dequantizer` names; None for uniform noise.

    Raises:
        FileNotFoundError: there is no such file.
    """
    chosen = config.eval.dequantizer
    if not chosen:
        return None
    path = pathlib.Path(workdir) / DEQUANTIZER if chosen == "run" else pathlib.Path(chosen)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no dequantizer at {path}: train it with --mode train_dequantizer, or set "
            "eval.dequantizer to a file, or to '' for uniform noise"
        )
    return path


def _flow(config, run: Run) -> tuple[Dequantizer, ExponentialMovingAverage]:
    """A new flow for the run's images as a config describes it, and its average."""
    options = config.dequantizer
    sizes = {"nf": options.nf, "num_layers": options.num_layers, "num_bins": options.num_bins}
    with seeded(derive_seed(run.config.seed, "dequantizer")):  # weights are drawn on the CPU
        flow = Dequantizer(run.shape, **sizes).to(run.device)
    return flow, ExponentialMovingAverage(flow.parameters(), _EMA_RATE)


def _new_state(run: Run, levels: int) -> dict:
    """A dequantizer's training state, before its first step; the run's network is averaged."""
    network = run.state["model"]
    run.state["ema"].copy_to(network.parameters())
    network.requires_grad_(False)
    flow, average = _flow(run.config, run)
    optimizer = get_optimizer(run.config, flow.parameters())
    state = {"model": flow, "ema": average, "optimizer": optimizer, "step": 0, "position": 0}
    return state | {"levels": levels, "score_step": run.state["step"]}


def _resume(path: pathlib.Path, state: dict, run: Run) -> None:
    """Load the last undamaged checkpoint of the dequantizer, if there is one.

    Raises:
        CheckpointError: it is of another dequantizer, or of other data.
    """
    known = {key: state[key] for key in ("levels", "score_step")}
    restored = checkpoints.restore_latest(path, state, run.device)
    if state["levels"] != known["levels"]:
        raise checkpoints.CheckpointError(
            f"{path} was trained on {state['levels']} grey levels, but the data have "
            f"{known['levels']}: move it away to start from scratch"
        )
    if state["score_step"] != known["score_step"]:
        logging.warning(
            "%s was trained for the score network of step %s; training goes on for that of step %s",
            path, state["score_step"], known["score_step"],
        )  # fmt: skip
    if distributed.is_main():
        checkpoints.set_damaged_aside(path, restored)
    state |= known
    for key, (before, after) in set_optimizer(run.config, state["optimizer"]).items():
        logging.warning("from step %d on, %s = %r instead of %r", state["step"], key, after, before)


class Training:
    """The training of a dequantizer from its present state on.

    Args:
        run: its score network has the weights to use.
        state: live, as a checkpoint holds it.
        stream: of grey levels.
        path: of the checkpoint.
        log: for numbers.
        writer: for checkpoints.
        stop: tells whether a signal has asked to stop.
    """

    def __init__(
        self,
        run: Run,
        state: dict,
        stream: ImageStream,
        path: pathlib.Path,
        log: MetricsLog | SilentLog,
        writer: CheckpointWriter,
        stop: StopSignals,
    ):
        self.run, self.state, self.path = run, state, path
        self.log, self.writer, self.stop, self.begun = log, writer, stop, state["step"]
        flow = distributed.replicated(state["model"])
        dequantize = LearnedDequantization(state["levels"], flow)
        scalers = run.scaler, run.inverse_scaler
        self.loss_fn = get_dequantization_loss_fn(run.sde, dequantize, *scalers, **run.reading)
        self.optimize = optimization_manager(run.config)
        stream.seek(state["position"])
        self.batches: Iterator[dict[str, Tensor]] = iter(stream)
        self.guard, self.stop_asked = LossGuard(), distributed.AnyProcess()

    def run_to_the_end(self) -> None:
        """Train, and log and save when each is due.

        Raises:
            OSError: a file cannot be written.
            FloatingPointError: the loss or a weight is not finite.
            Preempted, DataError: a signal asked to stop, or no batch can be read; a checkpoint of
                the last step was written.
        """
        state, options = self.state, self.run.config.training
        last = self.run.config.dequantizer.n_iters
        logging.info("training the dequantizer from step %d to %d", state["step"], last)
        with progress_bar(last, state["step"], "step") as bar:
            while state["step"] < last:
                bpd, norm = self._step()
                bar.update()
                if every(state["step"], options.log_freq):
                    self._log(bpd, norm)
                done = state["step"] >= last
                stopping = self.stop_asked(self.stop.requested) and not done
                if every(state["step"], options.snapshot_freq_for_preemption) or done or stopping:
                    self._save(options.keep_meta_checkpoints)
                if stopping:
                    self.writer.wait()
                    distributed.barrier()
                    raise Preempted
                self.writer.check()
        self.writer.wait()
        distributed.barrier()

    def _step(self) -> tuple[Tensor, Tensor]:
        """One update; the batch's estimate of bits/dim before it, and the gradient's norm."""
        state, config = self.state, self.run.config
        torch.manual_seed(derive_seed(config.seed, "train_dequantizer", state["step"]))
        batch = self._next_batch()
        _, _, condition = self.run.arguments(batch, dequantized=False)
        state["optimizer"].zero_grad()
        model = self.run.network(condition)
        loss = self.loss_fn(model, batch["image"]).mean()
        loss.backward()
        parameters = list(state["model"].parameters())
        # The flow starts at the identity, which needs no warm-up; its rate is constant.
        settings = {"lr": config.dequantizer.lr, "warmup": 0, "cooldown": 0}
        norm = self.optimize(state["optimizer"], parameters, step=state["step"], **settings)
        state["ema"].update(parameters)
        state["step"] += 1
        state["position"] += config.training.batch_size
        self.guard.watch(loss.detach() + norm, state["step"])
        return loss.detach(), norm

    def _next_batch(self) -> dict[str, Tensor]:
        try:
            with waiting_for_data(self.stop):
                return next(self.batches)
        except (Preempted, DataError):
            if self.state["step"] > self.begun:
                self._save(self.run.config.training.keep_meta_checkpoints)
            raise

    def _log(self, bpd: Tensor, norm: Tensor) -> None:
        self.guard.check()
        step = self.state["step"]
        values = {"training_bpd": distributed.average(bpd).item(), "grad_norm": norm.item()}
        self.log.write(step, **values)
        logging.info("step %d: about %.3f bits/dim", step, values["training_bpd"])

    def _save(self, keep: int) -> None:
        self.guard.check_weights(self.state["model"].parameters(), self.state["step"])
        if distributed.is_main():
            state = {**self.state, "config": self.run.config.to_json_best_effort()}
            self.writer.save(self.path, state, keep)
