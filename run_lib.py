"""Training, evaluation and sampling runs: joins processes, networks, data and files.

Randomness is a function of the seed and of what it is for: each training step seeds the generator
with (seed, "train", step), so that a run that was stopped and one that was not are the same, and
what is logged or sampled in between changes nothing.
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import losses
from control_lib import control  # noqa: F401  (a mode of its own)
from datasets import get_dataset
from eval_lib import TASKS, Job, check_folder, find_checkpoints, fingerprint, make_statistics
from experiment import Run, restored, setup, step_fns
from utils.checkpoints import restore_checkpoint, save_checkpoint
from utils.files import atomic_write, open_folder
from utils.images import is_picture, make_grid, save_grid, to_uint8
from utils.logs import MetricsLog, Rate, messages_to, progress_bar
from utils.reports import write_report
from utils.tensors import derive_seed


def train(config, workdir: str | os.PathLike) -> None:
    """Train, from the last checkpoint in the folder where there is one.

    Files: `checkpoints-meta/checkpoint.pth` every `training.snapshot_freq_for_preemption` steps;
    `checkpoints/checkpoint_{step // snapshot_freq}.pth` and `samples/iter_{step}/` every
    `training.snapshot_freq` steps and at the end; `metrics.jsonl`, `tensorboard/`, `stdout.txt`
    and `config.json`.

    Args:
        config: the experiment.
        workdir: folder of the run; made if need be.
    Raises:
        ValueError: the config, or a checkpoint in the folder, does not fit.
        OSError: the folder cannot be written.
        FloatingPointError: the loss is not finite; the last good checkpoint is left alone.
    """
    run = setup(config)
    meta = pathlib.Path(workdir) / "checkpoints-meta" / "checkpoint.pth"
    run.state = restore_checkpoint(meta, {**run.state, "position": 0}, run.device)
    data = _training_data(run)
    # Last, so that a mistake in any of the above changes no file.
    workdir = open_folder(workdir, run.config)
    with (
        messages_to(workdir / "stdout.txt"),
        MetricsLog(workdir, run.state["step"]) as log,
    ):
        _train(run, data, workdir, log)


def _train(
    run: Run, data: tuple[Iterator, Iterator], workdir: pathlib.Path, log: MetricsLog
) -> None:
    state, options = run.state, run.config.training
    train_step, eval_step = step_fns(run)
    train_batches, eval_batches = data
    guard = losses.LossGuard()
    rate = Rate(options.batch_size)
    logging.info("training from step %d to %d on %s", state["step"], options.n_iters, run.device)
    with progress_bar(options.n_iters, state["step"], "step") as bar:
        while state["step"] < options.n_iters:
            left = options.n_iters - state["step"]
            for _ in range(min(options.get("n_jitted_steps", 1), left)):
                torch.manual_seed(derive_seed(run.config.seed, "train", state["step"]))
                batch = next(train_batches)
                loss = train_step(state, run.scaler(batch["image"]), batch["label"])
                state["position"] += len(batch["label"])
                guard.watch(loss + train_step.grad_norm, state["step"])
            step = state["step"]
            bar.update(step - bar.n)
            last = step >= options.n_iters
            if every(step, options.log_freq):
                guard.check()
                _log_training(log, rate, step, loss, train_step.grad_norm, state["optimizer"])
            if every(step, options.eval_freq):
                torch.manual_seed(derive_seed(run.config.seed, "eval", step))
                batch = next(eval_batches)
                eval_loss = eval_step(state, run.scaler(batch["image"]), batch["label"]).item()
                log.write(step, eval_loss=eval_loss)
                logging.info("step %d: evaluation loss %.4e", step, eval_loss)
            if every(step, options.snapshot_freq) or last:
                guard.check()
                _snapshot(run, workdir, step, log)
            # Last, so that a run that was killed in between does all of the above again.
            if every(step, options.snapshot_freq_for_preemption) or last:
                guard.check()
                _save(run, workdir / "checkpoints-meta" / "checkpoint.pth")


def _training_data(run: Run) -> tuple[Iterator[dict], Iterator[dict]]:
    """Endless batches for training and for its evaluation loss, from where the run stands."""
    data, options = run.config.data, run.config.training
    train_ds, eval_ds, info = get_dataset(run.config, data.uniform_dequantization)
    run.check_labels(info)
    evaluations = run.state["step"] // options.eval_freq
    train_ds.to(run.device).seek(run.state["position"])
    eval_ds.to(run.device).seek(evaluations * options.batch_size)
    return iter(train_ds), iter(eval_ds)


def _log_training(log, rate, step, loss, grad_norm, optimizer) -> None:
    values = {
        "training_loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "learning_rate": optimizer.param_groups[0]["lr"],
    }
    images_per_second = rate.at(step)
    log.write(step, machine={"images_per_second": images_per_second}, **values)
    logging.info(
        "step %d: training loss %.4e, gradient norm %.3g, %.0f images/s",
        step,
        values["training_loss"],
        values["grad_norm"],
        images_per_second,
    )


def _snapshot(run: Run, workdir: pathlib.Path, step: int, log: MetricsLog) -> None:
    """A numbered checkpoint, and samples from its averaged weights."""
    number = step // run.config.training.snapshot_freq
    _save(run, workdir / "checkpoints" / f"checkpoint_{number}.pth")
    if not run.config.training.snapshot_sampling:
        return
    shown = _save_samples(workdir / "samples" / f"iter_{step}", run.first_samples(), run.levels)
    if is_picture(shown.shape):
        log.image(step, "samples", make_grid(shown))


def _save(run: Run, path: pathlib.Path) -> None:
    save_checkpoint(path, {**run.state, "config": run.config.to_json_best_effort()})


def _save_samples(folder: pathlib.Path, images: Tensor, levels: int) -> Tensor:
    """Write `sample.np`, bytes with channels last, and `sample.png`; returns what they show."""
    pixels = to_uint8(images, levels)
    with atomic_write(folder / "sample.np") as file:
        np.save(file, pixels.numpy(), allow_pickle=False)
    shown = pixels.movedim(-1, 1) / 255
    save_grid(folder / "sample.png", shown)
    return shown


def every(step: int, frequency: int) -> bool:
    """Whether something that happens every `frequency` steps happens after this one."""
    return frequency > 0 and step % frequency == 0


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
        OSError: checkpoints are missing (all of them are named), or a folder cannot be written.
    """
    run = setup(config)
    del run.state["optimizer"]
    checkpoints = find_checkpoints(run.config, pathlib.Path(workdir))
    folder = pathlib.Path(workdir) / eval_folder
    check_folder(run.config, folder)
    folder = open_folder(folder, run.config)
    records = []
    with messages_to(folder / "stdout.txt"):
        for label, path in checkpoints.items():
            restore_checkpoint(path, run.state, run.device, must_exist=True)
            job = Job(run, folder, label, fingerprint(run.config, path))
            record = {"checkpoint": label, "step": run.state["step"]}
            with run.state["ema"].applied(run.state["model"].parameters()):
                for option, task in TASKS.items():
                    if run.config.eval[option]:
                        record |= task(job)
            records.append(record)
            write_report(folder, records)
    return records


def sample(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Draw `sampling.num_samples` samples from a checkpoint: `samples/step_{step}/sample.{np,png}`.

    The checkpoint is `eval.checkpoint`, or the run's latest.

    Returns:
        the folder with the samples.
    """
    run = restored(config, workdir)
    logging.info("drawing samples from step %d", run.state["step"])
    folder = pathlib.Path(workdir) / "samples" / f"step_{run.state['step']}"
    _save_samples(folder, run.first_samples(), run.levels)
    logging.info("samples are in %s", folder)
    return folder


def fid_stats(config) -> pathlib.Path:
    """Write the statistics of the configured data set: `assets/stats/` or `eval.stats`.

    Returns:
        the file.
    """
    return make_statistics(setup(config))
