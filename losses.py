"""Denoising score matching, noisy classification, and the optimisation step.

[S21, section 3.3, appendices C and I.1]

The losses of score SDEs, SMLD and DDPM are one formula, |s score(x_t) + z|^2 with
x_t = m x_0 + s z; they differ in how the noise level is drawn and in how it is weighted.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.utils import get_model_fn, get_score_fn
from sde_lib import SDE
from utils.distributed import average, draw_apart, replicated, share_of_batch
from utils.tensors import batch_mul


class Draws(NamedTuple):
    """What a loss draws for a batch: noise levels (times, or indices), (B,), and noise (B, *D)."""

    level: Tensor
    z: Tensor


class NoiseLevels(abc.ABC):
    """The noise levels that a network is trained at, and how likely each is."""

    @abc.abstractmethod
    def draw(self, count: int, device: torch.device) -> Tensor:
        """Noise levels, (count,), from PyTorch's global generator."""

    @abc.abstractmethod
    def at(self, uniform: Tensor) -> Tensor:
        """The noise levels that uniform numbers in [0, 1], (B,), stand for."""

    @abc.abstractmethod
    def marginal(self, batch: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of x at a level, given the batch."""


class ContinuousLevels(NoiseLevels):
    """Times uniform on [eps, T]."""

    def __init__(self, sde: SDE, eps: float = 1e-5):
        self.sde, self.eps = sde, eps

    def draw(self, count, device):
        return self.at(torch.rand(count, device=device))

    def at(self, uniform):
        return uniform * (self.sde.T - self.eps) + self.eps

    def marginal(self, batch, level):
        return self.sde.marginal_prob(batch, level)


class DiscreteLevels(NoiseLevels):
    """Noise indices uniform on the N levels of a discrete chain."""

    def __init__(self, sde: SDE):
        self.sde = sde

    def draw(self, count, device):
        return torch.randint(0, self.sde.N, (count,), device=device)

    def at(self, uniform):
        return (uniform * self.sde.N).long().clamp(max=self.sde.N - 1)

    def marginal(self, batch, level):
        scale, std = self.sde.discrete_coeffs(level)
        return batch_mul(scale, batch), std


class NoisyLoss(abc.ABC):
    """A loss of what a network makes of data at randomly drawn noise levels.

    Called as `loss_fn(model, batch, labels=None)`, with the batch (B, *D) in the network's range,
    it draws levels, then noise, and gives the mean loss of the batch.  `draw` and `per_sample` are
    its halves: a batch that is split into parts can be drawn for as a whole.

    Args:
        levels: the noise levels.
        train: whether dropout is on.
    """

    def __init__(self, levels: NoiseLevels, train: bool):
        self.levels, self.train = levels, train

    def __call__(self, model: Callable, batch: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.per_sample(model, batch, self.draw(batch), labels).mean()

    def draw(self, batch: Tensor, noise: Callable | None = None) -> Draws:
        """Noise levels and noise for a batch.

        They come from PyTorch's global generator, or from a source of standard normal noise that
        is called like `torch.randn_like`.  Of several processes with equal generators, each gets
        its share of what one would draw for the batch of all.
        """
        count = batch.shape[0]
        if noise is None:
            row = {"dtype": batch.dtype, "device": batch.device}
            return Draws(
                share_of_batch(lambda n: self.levels.draw(n, batch.device), count),
                share_of_batch(lambda n: torch.randn(n, *batch.shape[1:], **row), count),
            )
        uniform = torch.special.ndtr(noise(batch.new_empty(count)))
        return Draws(self.levels.at(uniform), noise(batch))

    @abc.abstractmethod
    def per_sample(
        self, model: Callable, batch: Tensor, draws: Draws, labels: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample, (B,), for given noise levels and noise."""


class DenoisingLoss(NoisyLoss):
    """|s score(x_t) + z|^2, the mean over dimensions or half the sum.

    Args:
        reduce_mean: average over dimensions; otherwise half the sum.
    """

    def __init__(self, levels: NoiseLevels, train: bool, reduce_mean: bool):
        super().__init__(levels, train)
        self.sde, self.reduce_mean = levels.sde, reduce_mean

    def per_sample(self, model, batch, draws, labels=None):
        """Loss of each sample, (B,), for given noise levels and noise; labels are not looked at."""
        residual, weight = self.weighted_residual(model, batch, draws)
        square = residual.square().flatten(1)
        losses = square.mean(1) if self.reduce_mean else 0.5 * square.sum(1)
        return losses * weight

    @abc.abstractmethod
    def weighted_residual(self, model, batch, draws) -> tuple[Tensor, Tensor]:
        """s score + z, (B, *D), and its weight, (B,)."""


class _ContinuousLoss(DenoisingLoss):
    """Weight 1 or g^2 / s^2.  [S21, equation 7]"""

    def __init__(self, sde, train, reduce_mean, continuous, likelihood_weighting, eps):
        super().__init__(ContinuousLevels(sde, eps), train, reduce_mean)
        self.continuous, self.likelihood_weighting = continuous, likelihood_weighting

    def weighted_residual(self, model, batch, draws):
        t, z = draws
        mean, std = self.levels.marginal(batch, t)
        x_t = mean + batch_mul(std, z)
        score = get_score_fn(self.sde, model, self.train, self.continuous)(x_t, t)
        weight = torch.ones_like(std)
        if self.likelihood_weighting:
            weight = (self.sde.sde(torch.zeros_like(batch), t)[1] / std) ** 2
        return batch_mul(std, score) + z, weight


class _DiscreteLoss(DenoisingLoss):
    """Weight 1 at each of the N noise levels."""

    def __init__(self, sde, train, reduce_mean):
        super().__init__(DiscreteLevels(sde), train, reduce_mean)

    def weighted_residual(self, model, batch, draws):
        label, z = draws
        mean, std = self.levels.marginal(batch, label)
        output = get_model_fn(model, self.train)(mean + batch_mul(std, z), label)
        return batch_mul(std, self.sde.score_from_output(output, std)) + z, torch.ones_like(std)


class ClassifierLoss(NoisyLoss):
    """Cross-entropy of a classifier that sees noisy data and their noise level.

    [S21, appendix I.1.]  The classifier is a function of x_t (B, *D) and s(t) (B,), whatever the
    process, and gives logits (B, K).
    """

    def per_sample(self, model, batch, draws, labels=None):
        return nn.functional.cross_entropy(
            self.logits(model, batch, draws), labels, reduction="none"
        )

    def logits(self, model: Callable, batch: Tensor, draws: Draws) -> Tensor:
        """What the classifier says of noisy data, (B, K)."""
        mean, std = self.levels.marginal(batch, draws.level)
        return get_model_fn(model, self.train)(mean + batch_mul(std, draws.z), std)


def get_sde_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> DenoisingLoss:
    """Loss over continuous time, t uniform on [eps, T].  [S21, equation 7]

    Args:
        sde: the forward process.
        train: whether dropout is on.
        reduce_mean: average over dimensions; otherwise half the sum.
        continuous: whether the network is told continuous times.
        likelihood_weighting: weight g(t)^2 of Song et al. 2021 (*Maximum Likelihood Training*),
            instead of s(t)^2.
        eps: smallest time.
    Returns:
        `loss_fn(model, batch)`.
    """
    return _ContinuousLoss(sde, train, reduce_mean, continuous, likelihood_weighting, eps)


def get_smld_loss_fn(vesde: SDE, train: bool, reduce_mean: bool = False) -> DenoisingLoss:
    """Loss over the noise levels of SMLD (NCSN).  [S21, equation 1]"""
    return _DiscreteLoss(vesde, train, reduce_mean)


def get_ddpm_loss_fn(vpsde: SDE, train: bool, reduce_mean: bool = True) -> DenoisingLoss:
    """Loss over the steps of DDPM.  [S21, equation 3]"""
    return _DiscreteLoss(vpsde, train, reduce_mean)


def get_classifier_loss_fn(sde: SDE, train: bool, continuous: bool = True) -> ClassifierLoss:
    """Loss of a noise-conditional classifier, at the levels that a score network is trained at.

    Args:
        sde: the forward process.
        train: whether dropout is on.
        continuous: all times of [1e-5, T], or the levels of a discrete chain.
    Returns:
        `loss_fn(model, batch, labels)`, with labels (B,) int64.
    """
    return ClassifierLoss(ContinuousLevels(sde) if continuous else DiscreteLevels(sde), train)


def get_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool,
    continuous: bool,
    likelihood_weighting: bool,
    objective: str = "score",
) -> NoisyLoss:
    """The loss that suits a config: over continuous time, or over the chain's own levels.

    Args:
        objective: "score", or "classifier" of the data's labels.
    Raises:
        ValueError: likelihood weighting with discrete levels, or an unknown objective.
    """
    if objective == "classifier":
        return get_classifier_loss_fn(sde, train, continuous)
    if objective != "score":
        raise ValueError(
            f"unknown training.objective {objective!r}: known are 'score' and 'classifier'"
        )
    if continuous:
        return get_sde_loss_fn(sde, train, reduce_mean, likelihood_weighting=likelihood_weighting)
    if likelihood_weighting:
        raise ValueError(
            "training.likelihood_weighting needs training.continuous = True: the losses of SMLD "
            "and DDPM have weights of their own"
        )
    return _DiscreteLoss(sde, train, reduce_mean)


def get_optimizer(config, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser.

    Raises:
        ValueError: `optim.optimizer` is not "Adam".
    """
    optim = config.optim
    if optim.optimizer.lower() != "adam":
        raise ValueError(f"unknown optim.optimizer {optim.optimizer!r}: known is 'Adam'")
    return torch.optim.Adam(
        params,
        lr=optim.lr,
        betas=(optim.beta1, 0.999),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        amsgrad=optim.get("amsgrad", False),
        fused=True,  # one pass over the parameters instead of ten
    )


def optimization_manager(config) -> Callable:
    """Linear warm-up, clipping of the gradient's norm, and the optimiser's step.

    Returns:
        `optimize_fn(optimizer, params, step)`, which returns the gradient's norm before clipping,
        a scalar on the device.  Its keywords lr, warmup (steps; 0 is none) and grad_clip (negative
        is none) default to the config's.
    """
    optim = config.optim

    def optimize_fn(
        optimizer, params, step, lr=optim.lr, warmup=optim.warmup, grad_clip=optim.grad_clip
    ):
        params = [p for p in params if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in params])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, warmup)
        if grad_clip >= 0:
            nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        optimizer.step()
        return norm

    return optimize_fn


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """Learning rate of the update after `step` others: linear warm-up from 0, then constant."""
    return lr * min(step / warmup, 1.0) if warmup > 0 else lr


def get_step_fn(
    sde: SDE,
    train: bool,
    optimize_fn: Callable | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    accumulation: int = 1,
    objective: str = "score",
    prepare: Callable[[nn.Module], nn.Module] = replicated,
) -> Callable:
    """One step of training, or one evaluation with the averaged weights.

    Of several processes, each is given its share of the batch; gradients and the loss of an
    evaluation are those of the whole batch, and the loss of a training step that of the share.

    Args:
        sde: the forward process.
        train: train, or evaluate.
        optimize_fn: as made by `optimization_manager`; needed to train.
        reduce_mean, continuous, likelihood_weighting: see `get_sde_loss_fn`.
        accumulation: parts into which a training batch is split, to save memory.  Noise is drawn
            for the whole batch, and the step that is clipped sees the gradient of the whole batch.
        objective: "score", or "classifier": see `get_loss_fn`.
        prepare: makes of the network what is trained in its place and shares its parameters; by
            default, several processes average their gradients.
    Returns:
        `step_fn(state, batch, labels=None)`, giving the mean loss, a scalar on the device; only a
        classifier needs labels.  `state` holds the live "model", "optimizer", "ema" and the number
        "step" of updates made; training changes them in place and leaves the gradient's norm in
        `step_fn.grad_norm`.
    """
    loss_fn = get_loss_fn(sde, train, reduce_mean, continuous, likelihood_weighting, objective)
    if train:
        return _TrainStep(loss_fn, optimize_fn, accumulation, prepare)

    @torch.no_grad()
    def eval_step(state, batch, labels=None):
        with state["ema"].applied(state["model"].parameters()):
            return average(loss_fn(state["model"], batch, labels))

    return eval_step


class _TrainStep:
    def __init__(
        self, loss_fn: NoisyLoss, optimize_fn: Callable, accumulation: int, prepare: Callable
    ):
        self.loss_fn, self.optimize_fn, self.accumulation = loss_fn, optimize_fn, accumulation
        self.prepare = prepare
        self.grad_norm: Tensor | None = None
        self._model: nn.Module | None = None

    def __call__(self, state: dict, batch: Tensor, labels: Tensor | None = None) -> Tensor:
        model, optimizer = state["model"], state["optimizer"]
        if self._model is not model:
            self._model, self._network = model, self.prepare(model)
        optimizer.zero_grad()
        loss = self._backward(batch, labels)
        self.grad_norm = self.optimize_fn(optimizer, model.parameters(), step=state["step"])
        state["step"] += 1
        state["ema"].update(model.parameters())
        return loss

    def _backward(self, batch, labels):
        """Gradient of the batch's mean loss, part by part."""
        draws, total = self.loss_fn.draw(batch), 0.0
        draw_apart()
        given = (batch, *draws) if labels is None else (batch, *draws, labels)
        parts = zip(*(tensor.tensor_split(self.accumulation) for tensor in given), strict=True)
        for number, (part, level, z, *label) in enumerate(parts, start=1):
            with self._averaging(number == self.accumulation):
                losses = self.loss_fn.per_sample(self._network, part, Draws(level, z), *label)
                loss = losses.mean() * (len(part) / len(batch))
                loss.backward()
            total = total + loss.detach()
        return total

    def _averaging(self, last: bool):
        """Context for a part of the batch: processes exchange gradients once, at the last."""
        if last or not hasattr(self._network, "no_sync"):
            return contextlib.nullcontext()
        return self._network.no_sync()


class LossGuard:
    """Stops a run whose loss or gradient is not finite.

    On a GPU the verdict stays there until it is asked for, so that nothing waits for the device.
    """

    def __init__(self):
        self.bad_step: Tensor | None = None

    def watch(self, value: Tensor, step: int) -> None:
        """Look at a step's value, a scalar; raises at once on the CPU."""
        bad = torch.where(value.isfinite(), torch.inf, float(step))
        self.bad_step = bad if self.bad_step is None else torch.minimum(self.bad_step, bad)
        if value.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise if a value was not finite.

        Raises:
            FloatingPointError: names the first such step.
        """
        if self.bad_step is not None and self.bad_step.isfinite():
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {int(self.bad_step)}: no "
                "checkpoint was written since. Try a smaller optim.lr, a longer optim.warmup, or "
                "optim.grad_clip = 1"
            )
