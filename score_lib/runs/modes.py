"""Training, evaluation, sampling and statistics runs, in one process or in several."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib

from models.precision import matmul_precision
from score_lib.base import distributed
from score_lib.base.preemption import StopSignals
from score_lib.disk.checkpoints import restore_checkpoint
from score_lib.disk.files import open_folder, remove_leftovers
from score_lib.disk.lock import locked
from score_lib.disk.logs import MetricsLog, SilentLog, messages_to
from score_lib.disk.reports import write_report
from score_lib.disk.writer import CheckpointWriter
from score_lib.runs.evaluate import (
    TASKS,
    Job,
    check_folder,
    find_checkpoints,
    fingerprint,
    make_statistics,
)
from score_lib.runs.setup import Run, restored, setup
from score_lib.runs.train import Training, resume, save_samples, training_streams


def train(config, workdir: str | os.PathLike) -> None:
    """Train, from the last checkpoint in the folder where there is one.

    Files: `checkpoints-meta/checkpoint.pth` every `training.snapshot_freq_for_preemption` steps,
    with `training.keep_meta_checkpoints` predecessors; `checkpoints/checkpoint_{k}.pth`, k =
    step // snapshot_freq, and `samples/iter_{step}/` every `training.snapshot_freq` steps and at
    the end; `metrics.jsonl`, `tensorboard/`, `stdout.txt` and `config.json`.

    Args:
        config: the experiment.
        workdir: folder of the run; made if need be.
    Raises:
        ValueError: the config, or a checkpoint in the folder, does not fit.
        OSError: the folder cannot be written, or another run is in it.
        FloatingPointError: the loss is not finite; the last good checkpoint is left alone.
        Preempted: SIGTERM or SIGUSR1 asked to stop: the step was finished and a checkpoint written.
    """
    run, workdir = setup(config), pathlib.Path(workdir)
    run.add_optimizer()
    streams = training_streams(run)
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        # Last, so that a mistake in any of the above changes no file.
        distributed.on_main(lambda: stack.enter_context(locked(workdir)))
        resume(run, workdir)
        log = SilentLog()
        if distributed.is_main():
            open_folder(workdir, run.config)
            stack.enter_context(messages_to(workdir / "stdout.txt"))
            log = stack.enter_context(MetricsLog(workdir, run.state["step"]))
        writer = stack.enter_context(CheckpointWriter())
        stack.enter_context(matmul_precision(run.config.training.precision))
        Training(run, streams, workdir, log, writer, stop).run_to_the_end()


def evaluate(config, workdir: str | os.PathLike, eval_folder: str = "eval") -> list[dict]:
    """Evaluate checkpoints by what `eval.enable_*` ask for; see `eval_lib` for the files.

    Started again after it was killed, it goes on with the first round that is missing.

    Args:
        config: the experiment.
        workdir: folder of the run.
        eval_folder: name of the folder for results, inside workdir.
    Returns:
        one record a checkpoint, as in `report.json`.
    Raises:
        ValueError: the config or a checkpoint does not fit, or the folder holds the rounds of
            another evaluation.
        OSError: checkpoints are missing (all of them are named), a folder cannot be written, or
            another evaluation is in it.
    """
    run = setup(config)
    checkpoints = distributed.on_main(lambda: find_checkpoints(run.config, pathlib.Path(workdir)))
    folder = pathlib.Path(workdir) / eval_folder
    distributed.on_main(lambda: check_folder(run.config, folder))
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: _enter(folder, stack))
        if distributed.is_main():
            open_folder(folder, run.config)
            stack.enter_context(messages_to(folder / "stdout.txt"))
        records = []
        for label, path in checkpoints.items():
            records.append(_evaluate_one(run, path, folder, label))
            distributed.on_main(lambda: write_report(folder, records))
    return records


def _enter(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Take the folder of an evaluation, and tidy it before any process writes there."""
    stack.enter_context(locked(folder))
    remove_leftovers(folder, *folder.glob("ckpt_*/"))


def _evaluate_one(run: Run, path: pathlib.Path, folder: pathlib.Path, label: str) -> dict:
    restore_checkpoint(path, run.state, run.device, must_exist=True)
    job = Job(run, folder, label, fingerprint(run.config, path))
    record = {"checkpoint": label, "step": run.state["step"]}
    weights = run.state["ema"].applied(run.state["model"].parameters())
    with weights, matmul_precision("float32"):
        for option, task in TASKS.items():
            if run.config.eval[option]:
                record |= task(job)
    return record


def sample(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Draw `sampling.num_samples` samples from a checkpoint: `samples/step_{step}/sample.{np,png}`.

    The checkpoint is `eval.checkpoint`, or the run's latest.

    Returns:
        the folder with the samples.
    """
    run = restored(config, workdir)
    logging.info("drawing samples from step %d", run.state["step"])
    folder = pathlib.Path(workdir) / "samples" / f"step_{run.state['step']}"
    images = run.first_samples()
    distributed.on_main(lambda: save_samples(folder, images, run.levels))
    logging.info("samples are in %s", folder)
    return folder


def fid_stats(config) -> pathlib.Path:
    """Write the statistics of the configured data set: `assets/stats/` or `eval.stats`.

    Returns:
        the file.
    """
    return make_statistics(setup(config))
