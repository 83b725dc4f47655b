"""A config as objects: process, scalers and, when first used, the network.

A mode builds what it needs: statistics of a data set need no network, and only training needs an
optimiser.  Every mode draws samples through `Run.draw`.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from models.ema import ExponentialMovingAverage
from models.precision import accelerated, matmul_precision
from models.utils import create_model
from score_lib.base import distributed
from score_lib.base.devices import resolve_device
from score_lib.base.tensors import SampleNoise, image_shape
from score_lib.data.loading import DatasetInfo, get_data_inverse_scaler, get_data_scaler
from score_lib.data.sources import named
from score_lib.disk import checkpoints
from score_lib.losses.objectives import NoisyLoss, get_loss_fn, levels_of
from score_lib.losses.optimization import get_optimizer, optimization_manager
from score_lib.losses.steps import get_step_fn
from score_lib.options import checked
from score_lib.parametrization import parametrization_of
from score_lib.runs.history import check_same_output, trained_config
from score_lib.samplers.configured import get_sampling_fn, get_short_sampling_fn
from score_lib.sdes.process import SDE
from score_lib.sdes.published import create_sde

# The checkpoint at which training resumes, in the folder of a run.
META = pathlib.Path("checkpoints-meta", "checkpoint.pth")


@dataclasses.dataclass
class Run:
    """The objects that a config describes.

    Attributes:
        config: complete and checked.
        scaler, inverse_scaler: from [0, 1] to the network's range and back.
        shape: of one image, (C, H, W).
    """

    config: ConfigDict
    device: torch.device
    sde: SDE
    scaler: Callable[[Tensor], Tensor]
    inverse_scaler: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]

    @functools.cached_property
    def state(self) -> dict:
        """ "model", "ema", "step" (updates made) and "class_to_idx" (names of classes -> labels),
        built when first used."""
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.manual_seed(self.config.seed)
            model = create_model(self.config, self.device)
        ema = ExponentialMovingAverage(model.parameters(), self.config.model.ema_rate)
        return {"model": model, "ema": ema, "step": 0, "class_to_idx": {}}

    def add_optimizer(self) -> None:
        """Put the "optimizer" into the state, for training."""
        self.state["optimizer"] = get_optimizer(self.config, self.state["model"].parameters())

    @property
    def objective(self) -> str:
        """The training objective: "score" or "classifier"."""
        return self.config.training.objective

    @property
    def levels(self) -> int:
        """Grey levels of the images that are written."""
        return self.config.data.levels or 256

    @property
    def reading(self) -> dict:
        """Keywords that say how the network is read: `continuous` and `parametrization`."""
        return {
            "continuous": self.config.training.continuous,
            "parametrization": parametrization_of(self.config),
        }

    def check_labels(self, info: DatasetInfo) -> None:
        """Refuse data whose labels a classifier cannot learn.

        Raises:
            ValueError: there are no labels, more classes than the classifier has, or others.
        """
        classes = self.config.data.num_classes
        if self.objective == "classifier" and not 1 < info.num_classes <= classes:
            raise ValueError(
                f"a classifier of data.num_classes = {classes} cannot learn the labels of "
                f"{info.name}, which has {info.num_classes if info.num_classes > 1 else 0} classes"
            )
        self.check_classes(info.class_to_idx)

    def check_classes(self, found: dict[str, int]) -> None:
        """Refuse classes of the data that a classifier has not learned.

        Raises:
            ValueError: its checkpoint records other labels for them.
        """
        learned = self.state["class_to_idx"]
        if self.objective == "classifier" and learned and found and learned != found:
            raise ValueError(
                f"the classifier was trained with the labels {named(learned)}, but the data have "
                f"{named(found)}: give it data with the same folders of classes"
            )

    def loss_fn(self, train: bool) -> NoisyLoss:
        """The loss that the config trains its network with."""
        return get_loss_fn(self.sde, train, **self._loss_options())

    def step_fns(self) -> tuple[Callable, Callable]:
        """The training step, in the configured precision, and the evaluation step, in float32.

        Call them inside `matmul_precision` of the training's.
        """
        options = self.config.training
        shared = self._loss_options()
        train_step = get_step_fn(
            self.sde,
            True,
            optimization_manager(self.config),
            accumulation=options.grad_accumulation,
            prepare=lambda model: distributed.replicated(
                accelerated(model, options.precision, options.compile)
            ),
            **shared,
        )
        return train_step, get_step_fn(self.sde, False, **shared)

    def _loss_options(self) -> dict:
        options = self.config.training
        return {
            "reduce_mean": options.reduce_mean,
            "likelihood_weighting": options.likelihood_weighting,
            "objective": options.objective,
            "noise_levels": levels_of(self.config),
            "weighting": options.weighting,
            **self.reading,
        }

    @contextlib.contextmanager
    def sampling_network(self) -> Iterator[nn.Module]:
        """Context with the network for sampling: averaged, in `sampling.precision`, compiled."""
        model = self._accelerated
        with (
            self.state["ema"].applied(model.parameters()),
            matmul_precision(self.config.sampling.precision),
        ):
            yield model

    @functools.cached_property
    def _accelerated(self) -> nn.Module:
        options = self.config.sampling
        return accelerated(self.state["model"], options.precision, options.compile)

    def draw(
        self, indices: range, seed: int | None = None, *, progress: bool = False, **options
    ) -> Tensor:
        """Samples by the configured sampler: the one way in which any mode draws.

        Args:
            indices: numbers of the samples; sample k is a function of the seed and k.
            seed: default: the run's.
            options: of `get_sampling_fn`, such as `constraints`.
        Returns:
            Images (B, *D) in [0, 1].
        Raises:
            ValueError: the config is a classifier's, which draws no samples.
        """
        if self.objective != "score":
            raise ValueError(
                f"a network of training.objective = {self.objective!r} draws no samples: choose "
                "the config and the checkpoint of a score network"
            )
        seed = self.config.seed if seed is None else seed
        shape, eps = (len(indices), *self.shape), self.sde.sampling_eps
        sampler = get_sampling_fn(self.config, self.sde, shape, self.inverse_scaler, eps, **options)
        noise = SampleNoise(seed, indices, self.device)
        with self.sampling_network() as model:
            images, _ = sampler(model, noise=noise, progress=progress)
        return images

    def first_samples(self) -> Tensor:
        """The first `sampling.num_samples` images of the run's seed, (B, *D), on the CPU.

        In batches no larger than training's, so that they fit into memory;
        several processes share the batches.
        """
        indices = range(self.config.sampling.num_samples)
        progress = sys.stderr.isatty() and distributed.is_main()
        parts = in_batches(indices, self.config.training.batch_size)
        drawn = distributed.dealt_out(parts, lambda part: self.draw(part, progress=progress).cpu())
        return torch.cat(drawn)


def in_batches(indices: range, size: int) -> list[range]:
    """Consecutive parts of at most a size."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def setup(config) -> Run:
    """Check a config, build everything but the network, and dry-run it with a zero network.

    Raises:
        ValueError: an unknown name, a misspelt option, a value out of range, or options that do
            not go together.
        NotImplementedError: the process cannot do what the config asks for.
    """
    config, unknown = checked(config)
    for key in unknown:
        logging.warning("no code is known to read the option %s", key)
    run = Run(
        config=config,
        device=resolve_device(config.device),
        sde=create_sde(config),
        scaler=get_data_scaler(config),
        inverse_scaler=get_data_inverse_scaler(config),
        shape=image_shape(config),
    )
    _dry_run(run)
    return run


def restored(config, workdir: str | os.PathLike) -> Run:
    """The run of a config, with the weights of `eval.checkpoint` or the run's latest.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config or the checkpoint does not fit.
    """
    run = setup(config)
    chosen = run.config.eval.checkpoint
    load_trained(run, chosen or pathlib.Path(workdir) / META, latest=not chosen)
    return run


def load_trained(run: Run, path: str | os.PathLike, *, latest: bool = False) -> None:
    """Load trained weights: of a file, or of the latest undamaged one among its predecessors.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it does not fit the network, or was trained with other options that decide
            what its output means.
    """
    run.state["config"] = ""
    restore = checkpoints.restore_latest if latest else checkpoints.restore_checkpoint
    restore(path, run.state, run.device, must_exist=True)
    trained = trained_config(path, {"config": run.state.pop("config")})
    if trained is not None:
        check_same_output(path, trained, run.config)


def from_checkpoint(path: str | os.PathLike, device: torch.device) -> Run:
    """The run of the config inside a checkpoint, with the checkpoint's weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, or holds no config, as published ones do not.
    """
    contents = checkpoints.read_checkpoint(path, device)
    if not contents.get("config"):
        raise checkpoints.CheckpointError(
            f"{path} holds no config, so that its network is unknown: use a checkpoint that was "
            "trained here"
        )
    config = ConfigDict(json.loads(contents["config"]))
    config.device = str(device)
    run = setup(config)
    checkpoints.restore_contents(path, contents, run.state)
    return run


def _dry_run(run: Run) -> None:
    """One loss and two sampling steps of a network of zeros, so that config errors surface now."""
    _, eval_step = run.step_fns()
    if run.objective != "score":
        return
    network = _Zeros().to(run.device)
    images = torch.zeros(1, *run.shape, device=run.device)
    ema = ExponentialMovingAverage(network.parameters(), decay=0.0)
    eval_step({"model": network, "ema": ema}, images)
    eps = run.sde.sampling_eps
    sampler = get_short_sampling_fn(run.config, run.sde, images.shape, run.inverse_scaler, eps)
    sampler(network, noise=torch.zeros_like)


class _Zeros(nn.Module):
    """A network whose output is always 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.weight * x
