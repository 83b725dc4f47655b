"""An experiment as objects: what a config describes, built once for every mode."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor

import losses
from configs.checks import check_values
from configs.defaults import check_keys, complete
from datasets import DatasetInfo, get_data_inverse_scaler, get_data_scaler
from models.ema import ExponentialMovingAverage
from models.precision import accelerated, matmul_precision
from models.utils import create_model, resolve_device
from sampling import get_sampling_fn
from sde_lib import SDE, create_sde
from utils import distributed
from utils.checkpoints import CheckpointError, latest_whole, read_checkpoint, restore_checkpoint
from utils.memory import keep_freed_memory
from utils.tensors import SampleNoise, image_shape

# Where training goes on, in the folder of a run.
META = pathlib.Path("checkpoints-meta", "checkpoint.pth")


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
    def objective(self) -> str:
        """What the network is trained for: "score" or "classifier"."""
        return self.config.training.get("objective", "score")

    @property
    def num_classes(self) -> int:
        """Classes that a classifier tells apart."""
        return self.config.data.get("num_classes", 0)

    def check_labels(self, info: DatasetInfo) -> None:
        """Refuse data whose labels a classifier cannot learn.

        Raises:
            ValueError: there are no labels, or more classes than the classifier has.
        """
        if self.objective == "classifier" and not 1 < info.num_classes <= self.num_classes:
            raise ValueError(
                f"a classifier of data.num_classes = {self.num_classes} cannot learn the labels of "
                f"{info.name}, of which there are {info.num_classes if info.num_classes > 1 else 0}"
            )

    @property
    def levels(self) -> int:
        """Grey levels of the images that are written."""
        return self.config.data.get("levels", 0) or 256

    def sampler(self, count: int, **options) -> Callable:
        """The configured sampler, for batches of `count` images; options are `get_sampling_fn`'s.

        Raises:
            ValueError: the config is a classifier's, which draws no samples.
        """
        if self.objective != "score":
            raise ValueError(
                f"a network of training.objective = {self.objective!r} draws no samples: choose "
                "the config and the checkpoint of a score network"
            )
        sde = sampling_sde(self.config)
        shape = (count, *self.shape)
        return get_sampling_fn(
            self.config, sde, shape, self.inverse_scaler, sde.sampling_eps, **options
        )

    @functools.cached_property
    def sampling_model(self) -> torch.nn.Module:
        """The network as it samples: in the precision, and compiled, as `sampling` says."""
        options = self.config.sampling
        return accelerated(
            self.state["model"], options.get("precision", "float32"), options.get("compile", "")
        )

    def sample(self, indices: range, seed: int, progress: bool = False) -> Tensor:
        """Images number `indices` of a seed, (B, C, H, W), from the averaged weights."""
        model, sampler = self.sampling_model, self.sampler(len(indices))
        noise = SampleNoise(seed, indices, self.device)
        with (
            self.state["ema"].applied(model.parameters()),
            matmul_precision(self.config.sampling.get("precision", "float32")),
        ):
            images, _ = sampler(model, noise=noise, progress=progress)
        return images

    def first_samples(self) -> Tensor:
        """The first `sampling.num_samples` images of the run's seed, (B, C, H, W).

        In batches no larger than training's, so that what can be trained can be sampled; several
        processes share the batches.
        """
        indices = range(self.config.sampling.get("num_samples", 64))
        at_once = self.config.training.batch_size
        progress = sys.stderr.isatty() and distributed.is_main()
        parts = [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
        return torch.cat(
            distributed.dealt_out(
                parts, lambda part: self.sample(part, self.config.seed, progress).cpu()
            )
        )


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


def restored(config, workdir: str | os.PathLike) -> Run:
    """What a config describes, with the weights of `eval.checkpoint` or the run's latest.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config or the checkpoint does not fit.
    """
    run = setup(config)
    del run.state["optimizer"]
    path = run.config.eval.get("checkpoint", "")
    latest = pathlib.Path(workdir) / META
    path = path or distributed.on_main(lambda: latest_whole(latest)) or latest
    restore_checkpoint(path, run.state, run.device, must_exist=True)
    return run


def from_checkpoint(path: str | os.PathLike, device: torch.device) -> Run:
    """What the config inside a checkpoint describes, with the checkpoint's weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, or holds no config, as published ones do not.
    """
    stored = read_checkpoint(path).get("config")
    if not stored:
        raise CheckpointError(
            f"{path} does not say what its network is: it holds no config. Give a checkpoint that "
            "was trained here"
        )
    config = ConfigDict(json.loads(stored))
    config.device = str(device)
    run = setup(config)
    del run.state["optimizer"]
    restore_checkpoint(path, run.state, run.device, must_exist=True)
    return run


def _rehearse(run: Run) -> None:
    """Compute a loss and draw a sample in two steps, with a network that knows nothing.

    What cannot be done should not wait for the first snapshot.
    """
    _, eval_step = step_fns(run)
    if run.objective != "score":
        return
    run.sampler(1)
    network, images = _Nothing().to(run.device), torch.zeros(1, *run.shape, device=run.device)
    ema = ExponentialMovingAverage(network.parameters(), decay=0.0)
    eval_step({"model": network, "ema": ema}, images)
    short = _in_steps(run.config, 2)
    sde = create_sde(short)
    sampler = get_sampling_fn(short, sde, images.shape, run.inverse_scaler, sde.sampling_eps)
    sampler(network, noise=torch.zeros_like)


class _Nothing(torch.nn.Module):
    """A network that is always 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x


def sampling_sde(config) -> SDE:
    """The process in `sampling.num_steps` steps, or in as many as it was trained with.

    Solvers have grids of their own, for which the process stays as it was trained.
    """
    steps = config.sampling.get("num_steps", 0)
    if not steps or config.sampling.method.lower() not in ("pc", "ode"):
        return create_sde(config)
    if not config.training.continuous:
        raise ValueError(
            f"sampling.num_steps = {steps} needs training.continuous = True: a network of discrete "
            f"noise levels is sampled at all {config.model.num_scales} of them, or by one of the "
            "solvers of few steps, such as sampling.method = 'ddim'"
        )
    return create_sde(_in_steps(config, steps))


def _in_steps(config, steps: int) -> ConfigDict:
    """A config whose process, and whose sampling, is in another number of steps."""
    config = ConfigDict(config).copy_and_resolve_references()
    config.model.num_scales = steps
    config.sampling.num_steps = steps
    return config


def get_loss_fn(run: Run, train: bool) -> losses.NoisyLoss:
    """The loss that the config trains its network with."""
    return losses.get_loss_fn(run.sde, train, **_loss_options(run))


def step_fns(run: Run) -> tuple[Callable, Callable]:
    """The training step, in the configured precision, and the evaluation step, in float32.

    To be called inside `matmul_precision` of the training's.
    """
    options, shared = run.config.training, _loss_options(run)
    precision, mode = options.get("precision", "float32"), options.get("compile", "")
    train_step = losses.get_step_fn(
        run.sde,
        True,
        losses.optimization_manager(run.config),
        accumulation=options.get("grad_accumulation", 1),
        prepare=lambda model: distributed.replicated(accelerated(model, precision, mode)),
        **shared,
    )
    return train_step, losses.get_step_fn(run.sde, False, **shared)


def _loss_options(run: Run) -> dict:
    options = run.config.training
    return {
        "reduce_mean": options.reduce_mean,
        "continuous": options.continuous,
        "likelihood_weighting": options.likelihood_weighting,
        "objective": run.objective,
    }
