"""A config as objects: process, scalers and, when first used, the network.

A mode builds what it needs: statistics of a data set need no network, and only training needs an
optimiser.  Every mode draws samples through `Run.draw`.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from models.adm_configured import WithVariances
from models.conditioning import Condition, Dropping, Guided, given, taken_by
from models.ema import ExponentialMovingAverage
from models.precision import accelerated, matmul_precision
from models.utils import create_model
from models.zeros import Zeros
from score_lib.base import distributed
from score_lib.base.devices import resolve_device
from score_lib.base.registry import Registry
from score_lib.base.tensors import SampleNoise, data_shape, seeded
from score_lib.data.kinds import check_options, is_continuous, kind_of
from score_lib.data.loading import DatasetInfo, get_scaling
from score_lib.data.sources import named
from score_lib.disk.pictures import to_uint8
from score_lib.losses.levels import levels_of
from score_lib.losses.objectives import NoisyLoss, get_loss_fn
from score_lib.losses.optimization import get_optimizer, optimization_manager
from score_lib.losses.steps import get_step_fn
from score_lib.options import checked
from score_lib.parametrization import parametrization_of
from score_lib.runs.averages import get_averages, get_ema
from score_lib.runs.conditions import Conditions
from score_lib.runs.units import BitsPerDim, Nats
from score_lib.samplers.configured import (
    OF_STEPS,
    get_sampling_fn,
    get_short_sampling_fn,
    unread,
)
from score_lib.scores import label_at
from score_lib.sdes.process import SDE
from score_lib.sdes.published import create_sde


@dataclasses.dataclass
class Run:
    """The objects that a config describes.

    Attributes:
        config: complete and checked.
        scaler, inverse_scaler: from the data to the network's range and back.  Grey levels are in
            [0, 1]; the scaler of continuous values is a `Standardization`.
        shape: of one example, such as (C, H, W).
        trained: the config that loaded weights were trained with, if it is known.
        checkpoint: the name of their file, see `name_of`; "" for initial weights.
    """

    config: ConfigDict
    device: torch.device
    sde: SDE
    scaler: Callable[[Tensor], Tensor]
    inverse_scaler: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    trained: ConfigDict | None = None
    checkpoint: str = ""

    @functools.cached_property
    def state(self) -> dict:
        """ "model", "ema", "step" (updates made), "class_to_idx" (names of classes -> labels) and,
        of continuous data, "standardization"; built when first used."""
        with seeded(self.config.seed):  # weights are drawn on the CPU
            model = create_model(self.config, self.device)
        ema = get_ema(self.config, model.parameters())
        state = {"model": model, "ema": ema, "step": 0, "class_to_idx": {}}
        return state | ({"standardization": self.scaler} if self.continuous else {})

    def add_optimizer(self) -> None:
        """Put the "optimizer" into the state, for training, and "averages" beside the main one if
        the config asks for any."""
        parameters = list(self.state["model"].parameters())
        self.state["optimizer"] = get_optimizer(self.config, parameters)
        averages = get_averages(self.config, parameters)
        if averages.named:
            self.state["averages"] = averages

    @property
    def objective(self) -> str:
        """The training objective: "score" or "classifier"."""
        return self.config.training.objective

    @functools.cached_property
    def kind(self) -> str:
        """The kind of the data, such as "images"."""
        return kind_of(self.config)

    @functools.cached_property
    def continuous(self) -> bool:
        """Whether the data are continuous values, in the user's units, and not grey levels."""
        return is_continuous(self.config)

    @property
    def pictures(self) -> bool:
        """Whether the data are images of grey levels, of which feature extractors know."""
        return self.kind == "images" and not self.continuous

    @property
    def levels(self) -> int:
        """Grey levels of the images that are written."""
        return self.config.data.levels or 256

    def to_bytes(self, samples: Tensor) -> Tensor:
        """Samples of grey levels as bytes of the data that the network learns, see `to_uint8`."""
        dequantised = self.config.data.uniform_dequantization
        return to_uint8(samples, self.levels, dequantised=dequantised)

    @property
    def reading(self) -> dict:
        """Keywords that say how the network is read: `continuous` and `parametrization`."""
        return {
            "continuous": self.config.training.continuous,
            "parametrization": parametrization_of(self.config),
        }

    @property
    def bpd_part(self) -> str:
        """The part of the data whose likelihoods are measured: "train" or "test"."""
        return self.config.eval.dataset or self.config.eval.bpd_dataset

    @functools.cached_property
    def unit(self) -> BitsPerDim | Nats:
        """The unit of log-likelihoods."""
        if self.continuous:
            return Nats(self.scaler)
        return BitsPerDim(self.inverse_scaler, math.prod(self.shape))

    @functools.cached_property
    def conditions(self) -> Conditions:
        """The conditions of the network, by data and by the numbers of samples."""
        return Conditions(self.config, self.shape, self.scaler, self.device)

    def zeros(self, count: int) -> dict[str, Tensor]:
        """A batch as of a stream, which needs no data: black images in [0, 1], or zeros."""
        images = torch.zeros(count, *self.shape, device=self.device)
        labels = torch.zeros(count, dtype=torch.int64, device=self.device)
        return {"image": images, "label": labels}

    def arguments(
        self, batch: dict[str, Tensor], dequantized: bool | None = None
    ) -> tuple[Tensor, Tensor, Condition]:
        """A stream's batch as arguments of a step: in the network's range, labels, condition.

        Args:
            dequantized: whether its images are; default: `data.uniform_dequantization`.
        """
        data, labels, features = batch["image"], batch["label"], batch.get("features")
        condition = self.conditions.of_data(data, labels, features, dequantized=dequantized)
        return self.scaler(data), labels, condition

    def conditioned(self, network: nn.Module, condition: Condition) -> nn.Module:
        """The network for sampling, with a condition, guided as `sampling.guidance_scale` says."""
        options = self.config.sampling
        if (options.method, options.variance) == ("chain", "learned"):
            network = WithVariances(network)
        if not condition or options.guidance_scale == 1:
            return given(network, condition)
        interval = None
        if options.guidance_interval:
            first, last = options.guidance_interval
            if first > self.sde.T or last < 0:
                raise ValueError(
                    f"sampling.guidance_interval = {options.guidance_interval} holds no time of "
                    f"the process, from 0 to T = {self.sde.T:g}: set it to () for all times"
                )
            # At other times a label may be no number.
            times = torch.tensor(options.guidance_interval, device=self.device).clamp(0, self.sde.T)
            ends = label_at(self.sde, times, **self.reading, dimensions=len(self.shape)).tolist()
            interval = min(ends), max(ends)
        null, scale = taken_by(self.config).null, options.guidance_scale
        return Guided(network, condition, null, scale, interval=interval)

    @property
    def needs_labels(self) -> bool:
        """Whether the network learns labels, or is told them."""
        return self.objective == "classifier" or "classes" in self.conditions.kinds

    def check_labels(self, info: DatasetInfo) -> None:
        """Refuse data whose labels the network cannot learn.

        Raises:
            ValueError: there are none, more classes than the network has, or others.
        """
        if self.needs_labels:
            info.check_labels(self.config.data.num_classes)
        self.check_classes(info.class_to_idx)

    def check_classes(self, found: dict[str, int]) -> None:
        """Refuse classes of the data that the network has not learned.

        Raises:
            ValueError: its checkpoint records other labels for them.
        """
        learned = self.state["class_to_idx"]
        if self.needs_labels and learned and found and learned != found:
            raise ValueError(
                f"the network was trained with the labels {named(learned)}, but the data have "
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
        options, null = self.config.training, taken_by(self.config).null
        # Without its features, an augmented image would count as one of the data.
        kept = ("features",) if self.config.data.augment > 0 else ()
        return {
            "reduce_mean": options.reduce_mean,
            "likelihood_weighting": options.likelihood_weighting,
            "objective": options.objective,
            "noise_levels": levels_of(self.config),
            "weighting": options.weighting,
            "dropping": Dropping(options.condition_dropout, null, kept),
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

    def network(self, condition: Condition) -> nn.Module:
        """The network with a condition, in float32, for losses and likelihoods."""
        return given(accelerated(self.state["model"]), condition)

    @functools.cached_property
    def _accelerated(self) -> nn.Module:
        options = self.config.sampling
        return accelerated(self.state["model"], options.precision, options.compile)

    def sampler(self, count: int, *, short: bool = False, **options) -> Callable:
        """The configured sampler of so many samples, see `get_sampling_fn`.

        Args:
            short: its last two steps alone, see `get_short_sampling_fn`.
        """
        build = get_short_sampling_fn if short else get_sampling_fn
        shape, eps = (count, *self.shape), self.sde.sampling_eps
        return build(self.config, self.sde, shape, self.inverse_scaler, eps, **options)

    def draw(self, indices: range, seed: int | None = None, **options) -> Tensor:
        """The samples of `draw_counted`."""
        return self.draw_counted(indices, seed, **options)[0]

    def draw_counted(
        self,
        indices: range,
        seed: int | None = None,
        *,
        condition: Condition | None = None,
        progress: bool = False,
        **options,
    ) -> tuple[Tensor, float]:
        """Samples by the configured sampler: the one way in which any mode draws.

        Args:
            indices: numbers of the samples; sample k is a function of the seed and k.
            seed: default: the run's.
            condition: of each sample; default: that of its number.
            options: of `get_sampling_fn`, such as `constraints`.
        Returns:
            (B, *D), images in [0, 1], continuous values in the user's units; evaluations.
        Raises:
            ValueError: the config is a classifier's, which draws no samples.
        """
        if self.objective != "score":
            raise ValueError(
                f"a network of training.objective = {self.objective!r} draws no samples: choose "
                "the config and the checkpoint of a score network"
            )
        seed = self.config.seed if seed is None else seed
        sampler = self.sampler(len(indices), **options)
        noise = SampleNoise(seed, indices, self.device)
        if condition is None:
            condition = self.conditions.of_samples(indices, self.state["class_to_idx"])
        with self.sampling_network() as network:
            return sampler(self.conditioned(network, condition), noise=noise, progress=progress)

    def first_samples(self) -> Tensor:
        """The first `sampling.num_samples` samples of the run's seed, (B, *D), on the CPU.

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
        ValueError: an unknown name, a misspelt option, or values that are wrong, alone or together.
        NotImplementedError: the process cannot do what the config asks for.
    """
    config, unknown = checked(config)
    for key in sorted({*unknown} - Registry.fed_by):
        logging.warning("no code is known to read the option %s", key)
    check_options(config)
    device = resolve_device(config.device)
    scaler, inverse_scaler = get_scaling(config, device)
    run = Run(config, device, create_sde(config), scaler, inverse_scaler, data_shape(config))
    _dry_run(run)
    return run


def _dry_run(run: Run) -> None:
    """One loss and two sampling steps of a network of zeros, so that config errors surface now."""
    _, eval_step = run.step_fns()
    if run.objective != "score":
        return
    for key, value in unread(run.config, OF_STEPS).items():
        method = run.config.sampling.method
        logging.warning("%s = %r counts for nothing in samples by %r", key, value, method)
    network = Zeros().to(run.device)
    ema = ExponentialMovingAverage(network.parameters(), decay=0.0)
    images, labels, condition = run.arguments(run.zeros(1))
    eval_step({"model": network, "ema": ema}, images, labels, condition)
    sampler = run.sampler(1, short=True)
    sampler(run.conditioned(network, condition), noise=torch.zeros_like)
