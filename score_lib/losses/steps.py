"""One step of training or evaluation."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.conditioning import UNCONDITIONAL, Condition, for_batch
from models.ema import averaged
from score_lib.base.distributed import (
    average,
    check_gradients,
    draw_apart,
    is_shared,
    replicated,
    unwrapped,
    world,
)
from score_lib.losses.objectives import Draws, get_loss_fn
from score_lib.sdes.process import SDE

# Their statistics are those of the samples that they see together.
_OF_BATCHES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_parts(model: nn.Module, accumulation: int) -> None:
    """Refuse to train a network on parts of a batch, where its layers keep statistics of a part.

    Gradients would be those of smaller batches, and each process would have averages of its own,
    of which a checkpoint holds the main one's.  The network is put into training mode.

    Args:
        accumulation: parts of a process's share of the batch.
    Raises:
        ValueError: there are several parts or processes, and such a layer.
    """
    if world() * accumulation == 1:
        return
    for name, layer in model.train().named_modules():
        if layer.training and _sees_others(layer, accumulation):
            raise ValueError(
                f"the network's {type(layer).__name__} {name!r} keeps statistics of a batch, which "
                f"is computed in parts (processes: {world()}, training.grad_accumulation = "
                f"{accumulation}): take a layer such as GroupNorm, or train in one process with "
                "training.grad_accumulation = 1; SyncBatchNorm takes several GPUs"
            )


def _sees_others(layer: nn.Module, accumulation: int) -> bool:
    """Whether a layer's output or state follows from the samples of a part of the batch."""
    if isinstance(layer, nn.SyncBatchNorm):  # processes share its statistics
        return accumulation > 1
    return isinstance(layer, _OF_BATCHES) or getattr(layer, "track_running_stats", False)


def get_step_fn(
    sde: SDE,
    train: bool,
    optimize_fn: Callable | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    accumulation: int = 1,
    prepare: Callable[[nn.Module], nn.Module] = replicated,
    **options,
) -> Callable:
    """One step of training, or one evaluation with the averaged weights.

    Each of several processes gets its share of the batch.  Gradients and the evaluation loss are
    those of the whole batch; the training loss is that of the share.  A network that the caller has
    wrapped, as in `DistributedDataParallel`, shares gradients by itself, and the evaluation loss is
    then that of the share, too: a single process may ask for it.

    Args:
        train: train, or evaluate.
        optimize_fn: as made by `optimization_manager`; needed to train.
        reduce_mean, continuous, likelihood_weighting: see `get_sde_loss_fn`.
        accumulation: parts into which a training batch is split, to save memory; at most as many
            as it has samples.  Noise is drawn for the whole batch, and the step that is clipped
            sees the gradient of the whole batch.
        prepare: returns the module to train in the network's place, which shares its parameters;
            default: averages gradients over processes.
        options: of the loss, such as `objective` and `parametrization`: see `get_loss_fn`.
    Returns:
        `step_fn(state, batch, labels=None, condition=None)`, giving the mean loss, a scalar on the
        device; only a classifier needs labels, and a conditional network a condition, for each
        sample or once for all.  `state` holds the live "model", "optimizer", "ema", perhaps further
        "averages", and the number "step" of updates made; training changes them in place and leaves
        the gradient's norm in `step_fn.grad_norm`.
    Raises:
        ValueError: as in `get_loss_fn`, or there is no `optimize_fn` to train with; in a step: as
            in `check_parts` and, of the default `prepare`, in `replicated` and `check_gradients`.
    """
    loss_fn = get_loss_fn(sde, train, reduce_mean, continuous, likelihood_weighting, **options)
    if train and optimize_fn is None:
        raise ValueError(
            "a training step needs optimize_fn: give that of losses.optimization_manager(config)"
        )
    if train:
        return _TrainStep(loss_fn, optimize_fn, accumulation, prepare)

    @torch.no_grad()
    def eval_step(state, batch, labels=None, condition=None):
        with averaged(state["ema"], state["model"].parameters()):
            loss = loss_fn(state["model"], batch, labels, condition)
            return loss if world() == 1 or is_shared(state["model"]) else average(loss)

    return eval_step


class _TrainStep:
    def __init__(self, loss_fn, optimize_fn, accumulation, prepare):
        self.loss_fn, self.optimize_fn = loss_fn, optimize_fn
        self.accumulation, self.prepare = accumulation, prepare
        self.grad_norm: Tensor | None = None
        self._model: nn.Module | None = None

    def __call__(
        self,
        state: dict,
        batch: Tensor,
        labels: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        model, optimizer = state["model"], state["optimizer"]
        if first := self._model is not model:
            network = self.prepare(model)  # which may replace layers
            check_parts(unwrapped(network), self.accumulation)
            self._model, self._network = model, network
        optimizer.zero_grad()
        loss = self._backward(batch, labels, for_batch(condition or UNCONDITIONAL, batch))
        if first and self.prepare is replicated:
            check_gradients(model)
        self.grad_norm = self.optimize_fn(optimizer, model.parameters(), step=state["step"])
        state["step"] += 1
        state["ema"].update(model.parameters())
        if "averages" in state:
            state["averages"].update(model.parameters())
        return loss

    def _backward(self, batch, labels, condition):
        """Gradient of the batch's mean loss, part by part."""
        draws, total = self.loss_fn.draw(batch), 0.0
        draw_apart()
        parts = max(1, min(self.accumulation, len(batch)))  # none of them empty
        for number in range(parts):
            part, level, z, dropped, label, *values = (
                None if tensor is None else tensor.tensor_split(parts)[number]
                for tensor in (batch, *draws, labels, *condition.values())
            )
            given = dict(zip(condition, values, strict=True))
            with self._averaging(number + 1 == parts):
                losses = self.loss_fn.per_sample(
                    self._network, part, Draws(level, z, dropped), label, given
                )
                loss = losses.mean() * (len(part) / len(batch))
                loss.backward()
            total = total + loss.detach()
        return total

    def _averaging(self, last: bool):
        """Context for a part of the batch: processes exchange gradients once, at the last."""
        if last or not hasattr(self._network, "no_sync"):
            return contextlib.nullcontext()
        return self._network.no_sync()
