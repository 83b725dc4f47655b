"""Training, evaluation and sampling runs: joins processes, networks, data and files.

Randomness is a function of the seed and of what it is for: each training step seeds the generator
with (seed, "train", step), so that a run that was stopped and one that was not are the same, and
what is logged or sampled in between changes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import losses
from configs.checks import check_values
from configs.defaults import check_keys, complete
from datasets import get_data_inverse_scaler, get_data_scaler, get_dataset
from eval_lib import TASKS, Job, check_folder, find_checkpoints, fingerprint, make_statistics
from models.ema import ExponentialMovingAverage
from models.utils import create_model, resolve_device
from sampling import get_sampling_fn
from sde_lib import SDE, create_sde
from utils.checkpoints import restore_checkpoint, save_checkpoint
from utils.files import atomic_write, open_folder
from utils.images import is_picture, make_grid, save_grid, to_uint8
from utils.logs import MetricsLog, Rate, messages_to, progress_bar
from utils.memory import keep_freed_memory
from utils.reports import write_report
from utils.tensors import SampleNoise, derive_seed, image_shape


@dataclasses.dataclass
class Run:
    """What training, evaluation and sampling have in common.

    Attributes:
        config: with all options filled in.
        state: "model", "optimizer", "ema", and "step", the updates made so far.
        scaler, inverse_scaler: from [0, 1] to the network's range and back.
        shape: of one image, (C, H, W).
    """

    config: object
    device: torch.device
    sde: SDE
    state: dict
    scaler: Callable[[Tensor], Tensor]
    inverse_scaler: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Grey levels of the images that are written."""
        return self.config.data.get("levels", 0) or 256

    def sampler(self, count: int) -> Callable:
        """The configured sampler, for batches of `count` images."""
        sde = _sampling_sde(self.config)
        return get_sampling_fn(
            self.config, sde, (count, *self.shape), self.inverse_scaler, sde.sampling_eps
        )

    def sample(self, indices: range, seed: int, progress: bool = False) -> Tensor:
        """Images number `indices` of a seed, (B, C, H, W), from the averaged weights."""
        model = self.state["model"]
        noise = SampleNoise(seed, indices, self.device)
        with self.state["ema"].applied(model.parameters()):
            images, _ = self.sampler(len(indices))(model, noise=noise, progress=progress)
        return images

    def first_samples(self) -> Tensor:
        """The first `sampling.num_samples` images of the run's seed, (B, C, H, W).

        In batches no larger than training's, so that what can be trained can be sampled.
        """
        indices = range(self.config.sampling.get("num_samples", 64))
        at_once, progress = self.config.training.batch_size, sys.stderr.isatty()
        parts = [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
        return torch.cat([self.sample(part, self.config.seed, progress) for part in parts])


def setup(config) -> Run:
    """Build everything that a config describes.

    Raises:
        ValueError: an unknown name, a misspelt option, a value out of range, or options that do
            not go together.
        NotImplementedError: the process cannot do what the config asks for.
    """
    config = complete(config)
    for key in check_keys(config):
        logging.warning("nothing is known to read the option %s", key)
    check_values(config)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    model = create_model(config, device)
    run = Run(
        config=config,
        device=device,
        sde=create_sde(config),
        state={
            "model": model,
            "optimizer": losses.get_optimizer(config, model.parameters()),
            "ema": ExponentialMovingAverage(model.parameters(), config.model.ema_rate),
            "step": 0,
        },
        scaler=get_data_scaler(config),
        inverse_scaler=get_data_inverse_scaler(config),
        shape=image_shape(config),
    )
    _rehearse(run)
    return run


def _rehearse(run: Run) -> None:
    """Compute a loss and draw a sample in two steps, with a network that knows nothing.

    What cannot be done should not wait for the first snapshot.
    """
    run.sampler(1)
    network, images = _Nothing().to(run.device), torch.zeros(1, *run.shape, device=run.device)
    _, eval_step = step_fns(run)
    ema = ExponentialMovingAverage(network.parameters(), decay=0.0)
    eval_step({"model": network, "ema": ema}, images)
    sde = _in_steps(run.config, 2)
    sampler = get_sampling_fn(run.config, sde, images.shape, run.inverse_scaler, sde.sampling_eps)
    sampler(network, noise=torch.zeros_like)


class _Nothing(torch.nn.Module):
    """A network that is always 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x


def _sampling_sde(config) -> SDE:
    """The process in `sampling.num_steps` steps, or in as many as it was trained with."""
    steps = config.sampling.get("num_steps", 0)
    if not steps:
        return create_sde(config)
    if not config.training.continuous:
        raise ValueError(
            f"sampling.num_steps = {steps} needs training.continuous = True: a network of discrete "
            f"noise levels is sampled at all {config.model.num_scales} of them"
        )
    return _in_steps(config, steps)


def _in_steps(config, steps: int) -> SDE:
    """The configured process in another number of steps."""
    config = ConfigDict(config).copy_and_resolve_references()
    config.model.num_scales = steps
    return create_sde(config)


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
                batch = next(train_batches)["image"]
                loss = train_step(state, run.scaler(batch))
                state["position"] += len(batch)
                guard.watch(loss + train_step.grad_norm, state["step"])
            step = state["step"]
            bar.update(step - bar.n)
            last = step >= options.n_iters
            if every(step, options.log_freq):
                guard.check()
                _log_training(log, rate, step, loss, train_step.grad_norm, state["optimizer"])
            if every(step, options.eval_freq):
                torch.manual_seed(derive_seed(run.config.seed, "eval", step))
                eval_loss = eval_step(state, run.scaler(next(eval_batches)["image"])).item()
                log.write(step, eval_loss=eval_loss)
                logging.info("step %d: evaluation loss %.4e", step, eval_loss)
            if every(step, options.snapshot_freq) or last:
                guard.check()
                _snapshot(run, workdir, step, log)
            # Last, so that a run that was killed in between does all of the above again.
            if every(step, options.snapshot_freq_for_preemption) or last:
                guard.check()
                _save(run, workdir / "checkpoints-meta" / "checkpoint.pth")


def step_fns(run: Run) -> tuple[Callable, Callable]:
    """The training and the evaluation step."""
    options = run.config.training
    shared = {
        "reduce_mean": options.reduce_mean,
        "continuous": options.continuous,
        "likelihood_weighting": options.likelihood_weighting,
    }
    optimize_fn = losses.optimization_manager(run.config)
    accumulation = options.get("grad_accumulation", 1)
    return (
        losses.get_step_fn(run.sde, True, optimize_fn, accumulation=accumulation, **shared),
        losses.get_step_fn(run.sde, False, **shared),
    )


def _training_data(run: Run) -> tuple[Iterator[dict], Iterator[dict]]:
    """Endless batches for training and for its evaluation loss, from where the run stands."""
    data, options = run.config.data, run.config.training
    train_ds, eval_ds, _ = get_dataset(run.config, data.uniform_dequantization)
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
    run = setup(config)
    del run.state["optimizer"]
    workdir = pathlib.Path(workdir)
    path = run.config.eval.get("checkpoint", "") or workdir / "checkpoints-meta" / "checkpoint.pth"
    restore_checkpoint(path, run.state, run.device, must_exist=True)
    logging.info("drawing samples from step %d", run.state["step"])
    folder = workdir / "samples" / f"step_{run.state['step']}"
    _save_samples(folder, run.first_samples(), run.levels)
    logging.info("samples are in %s", folder)
    return folder


def fid_stats(config) -> pathlib.Path:
    """Write the statistics of the configured data set: `assets/stats/` or `eval.stats`.

    Returns:
        the file.
    """
    return make_statistics(setup(config))
