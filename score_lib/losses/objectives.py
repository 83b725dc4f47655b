"""Training objectives: losses of a network's output on noisy data.  [S21, section 3.3, appendix C]

The losses of score SDEs, SMLD and DDPM are one formula, |s score(x_t) + z|^2 with
x_t = m x_0 + s z; they differ in how the noise level is drawn and in how it is weighted.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.conditioning import NEVER, Condition, Dropping, Given
from score_lib.base.distributed import share_of_batch
from score_lib.base.tensors import batch_mul, check_batch, normal_noise, rows
from score_lib.losses.levels import ContinuousLevels, DiscreteLevels, NoiseLevels, levels_named
from score_lib.losses.weightings import weighting_of
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import classifier_label, get_data_score_fn, get_model_fn, reading_of_level
from score_lib.sdes.process import SDE


class Draws(NamedTuple):
    """The random numbers of a loss: noise levels (times, or indices), (B,), noise (B, *D), and
    whether the condition is dropped, (B,), or None where it never is."""

    level: Tensor
    z: Tensor
    dropped: Tensor | None = None


class NoisyLoss(abc.ABC):
    """A loss of a network's output on data at randomly drawn noise levels.

    Called as `loss_fn(model, batch, labels=None)`, with the batch (B, *D) in the network's range,
    it draws levels, then noise, and returns the mean loss of the batch.  `draw` and `per_sample`
    are its halves: a batch that is processed in parts is drawn for as a whole.

    Args:
        train: whether dropout is on.
        dropping: of conditions in training.
    """

    def __init__(self, levels: NoiseLevels, train: bool, dropping: Dropping = NEVER):
        self.levels, self.train, self.dropping = levels, train, dropping

    def __call__(
        self,
        model: Callable,
        batch: Tensor,
        labels: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        return self.per_sample(model, batch, self.draw(batch), labels, condition).mean()

    def draw(self, batch: Tensor, noise: Callable | None = None) -> Draws:
        """Noise levels and noise for a batch, then whether its condition is dropped.

        They come from PyTorch's global generator, or from a source of standard normal noise that
        is called like `torch.randn_like`.  Each of several processes with equal generators gets
        its share of the draws for the whole batch.

        Raises:
            ValueError: the batch holds integers, complex numbers or no sample.
        """
        check_batch(batch)
        count = batch.shape[0]
        if noise is None:
            row = {"dtype": batch.dtype, "device": batch.device}
            return Draws(
                share_of_batch(lambda n: self.levels.draw(n, batch.device), count),
                share_of_batch(lambda n: torch.randn(n, *batch.shape[1:], **row), count),
                self._drop(lambda: share_of_batch(lambda n: torch.rand(n, **row), count)),
            )

        draw = normal_noise(noise)

        def uniform() -> Tensor:
            return torch.special.ndtr(draw(batch.new_empty(count)))

        return Draws(self.levels.at(uniform()), draw(batch), self._drop(uniform))

    def _drop(self, uniform: Callable[[], Tensor]) -> Tensor | None:
        rate = self.dropping.rate if self.train else 0.0
        return uniform() < rate if rate else None

    def noised(self, batch: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """x_t = m x_0 + s z, (B, *D), and s, (B,)."""
        mean, std = self.levels.marginal(batch, draws.level)
        return mean + batch_mul(std, draws.z), std

    @abc.abstractmethod
    def per_sample(
        self,
        model: Callable,
        batch: Tensor,
        draws: Draws,
        labels: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Tensor:
        """Loss of each sample, (B,), for given draws.

        Args:
            labels: (B,), which a classifier needs.
            condition: of a conditional score network, see `models.conditioning`.
        """


class DenoisingLoss(NoisyLoss):
    """|s score(x_t) + z|^2, the mean over dimensions or half the sum.

    Args:
        reduce_mean: average over dimensions; otherwise half the sum.
        dropping: of conditions in training.
    """

    def __init__(
        self, levels: NoiseLevels, train: bool, reduce_mean: bool, dropping: Dropping = NEVER
    ):
        super().__init__(levels, train, dropping)
        self.sde, self.reduce_mean = levels.sde, reduce_mean

    def per_sample(self, model, batch, draws, labels=None, condition=None):
        """Loss of each sample, (B,), for given draws; labels are ignored."""
        residual, weight = self.weighted_residual(
            self._given(model, draws, condition), batch, draws
        )
        square = rows(residual.square())
        losses = square.mean(1) if self.reduce_mean else 0.5 * square.sum(1)
        return losses * weight

    def _given(self, model: Callable, draws: Draws, condition: Condition | None) -> Callable:
        """The model of (x, labels) with its condition, dropped where the draws say so."""
        if not condition:
            return model
        return Given(model, **self.dropping.apply(condition, draws.dropped))

    @abc.abstractmethod
    def weighted_residual(self, model, batch, draws) -> tuple[Tensor, Tensor]:
        """s score + z, (B, *D), and its weight, (B,)."""


class _ContinuousLoss(DenoisingLoss):
    """At times of [eps, T], weighted as `weighting_of` says."""

    def __init__(self, levels, train, reduce_mean, continuous, parametrization, weight, dropping):
        super().__init__(levels, train, reduce_mean, dropping)
        self.continuous, self.parametrization = continuous, parametrization
        self.weight = weight

    def weighted_residual(self, model, batch, draws):
        t, z, _ = draws
        x_t, std = self.noised(batch, draws)
        reading = {"continuous": self.continuous, "parametrization": self.parametrization}
        score = get_data_score_fn(self.sde, model, self.train, **reading)(x_t, t)
        return batch_mul(std, score) + z, self.weight(x_t, t, std) * self.levels.weight(t)


class _DiscreteLoss(DenoisingLoss):
    """At each of the N noise levels, weighted as `weighting_of` says."""

    def __init__(self, sde, train, reduce_mean, parametrization, weighting, dropping=NEVER):
        super().__init__(DiscreteLevels(sde), train, reduce_mean, dropping)
        self.chosen = chosen = get_parametrization(parametrization)
        self.weight = weighting_of(weighting, self.sde, False, chosen, continuous=False)

    def weighted_residual(self, model, batch, draws):
        level, z, _ = draws
        x_t, std = self.noised(batch, draws)
        coeffs = self.sde.discrete_coeffs(level)
        reading = reading_of_level(self.sde, x_t, level, coeffs, self.chosen)
        score = reading.score(get_model_fn(model, self.train)(reading.given, reading.label))
        return batch_mul(std, score) + z, self.weight(x_t, level, std)


def get_sde_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
    *,
    parametrization: Parametrization | str | None = None,
    noise_levels: str | Callable[[SDE, float], ContinuousLevels] = "",
    weighting: str = "",
    dropping: Dropping = NEVER,
) -> DenoisingLoss:
    """Loss over continuous time, t uniform on [eps, T].  [S21, equation 7]

    Args:
        train: whether dropout is on.
        reduce_mean: average over dimensions; otherwise half the sum.
        continuous: whether the network is told continuous times.
        likelihood_weighting: weight g(t)^2 of Song et al. 2021 (*Maximum Likelihood Training*),
            instead of s(t)^2.
        eps: smallest time.
        parametrization: what the network's output is, see `get_score_fn`.
        noise_levels: "", "lognormal" for times as in `LogNormalLevels`, or "likelihood" as in
            `LikelihoodLevels`; or a function of the process and eps that makes them.
        weighting: in place of the weight s(t)^2, see `weighting_of`.
        dropping: of conditions in training.
    Returns:
        `loss_fn(model, batch, labels=None, condition=None)`; labels are ignored.
    Raises:
        ValueError: an unknown name, or options that exclude each other.
    """
    levels = levels_named(noise_levels, sde, eps)
    chosen = get_parametrization(parametrization)
    weight = weighting_of(weighting, levels.sde, likelihood_weighting, chosen)
    return _ContinuousLoss(levels, train, reduce_mean, continuous, chosen, weight, dropping)


def get_smld_loss_fn(
    vesde: SDE,
    train: bool,
    reduce_mean: bool = False,
    *,
    parametrization: Parametrization | str | None = None,
    weighting: str = "",
) -> DenoisingLoss:
    """Loss over the noise levels of SMLD (NCSN).  [S21, equation 1]"""
    return _DiscreteLoss(vesde, train, reduce_mean, parametrization, weighting)


def get_ddpm_loss_fn(
    vpsde: SDE,
    train: bool,
    reduce_mean: bool = True,
    *,
    parametrization: Parametrization | str | None = None,
    weighting: str = "",
    dropping: Dropping = NEVER,
) -> DenoisingLoss:
    """Loss over the steps of DDPM.  [S21, equation 3]"""
    return _DiscreteLoss(vpsde, train, reduce_mean, parametrization, weighting, dropping)


class ClassifierLoss(NoisyLoss):
    """Cross-entropy of a classifier that sees noisy data and their noise level.

    [S21, appendix I.1.]  The classifier is a function of x_t (B, *D) and a label (B,), which is
    s(t) or, if its class says so, the time step: see `classifier_label`.  It gives logits (B, K).
    """

    def per_sample(self, model, batch, draws, labels=None, condition=None):
        return nn.functional.cross_entropy(
            self.logits(model, batch, draws), labels, reduction="none"
        )

    def logits(self, model: Callable, batch: Tensor, draws: Draws) -> Tensor:
        """The classifier's logits for noisy data, (B, K)."""
        x_t, std = self.noised(batch, draws)
        label = classifier_label(model, self.levels.step(draws.level), std)
        return get_model_fn(model, self.train)(x_t, label)


def get_classifier_loss_fn(sde: SDE, train: bool, continuous: bool = True) -> ClassifierLoss:
    """Loss of a noise-conditional classifier, at the levels that a score network is trained at.

    Args:
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
    *,
    parametrization: Parametrization | str | None = None,
    noise_levels: str | Callable[[SDE, float], ContinuousLevels] = "",
    weighting: str = "",
    dropping: Dropping = NEVER,
) -> NoisyLoss:
    """The loss that suits a config: over continuous time, or over the chain's own levels.

    Args:
        objective: "score", or "classifier" of the data's labels.
        parametrization, noise_levels, weighting, dropping: of a score network, see
            `get_sde_loss_fn`.
    Raises:
        ValueError: an option of continuous times with discrete levels, or an unknown objective.
    """
    if objective == "classifier":
        return get_classifier_loss_fn(sde, train, continuous)
    if objective != "score":
        raise ValueError(
            f"unknown training.objective {objective!r}: known are 'score' and 'classifier'"
        )
    shared = {"parametrization": parametrization, "weighting": weighting, "dropping": dropping}
    if continuous:
        shared["noise_levels"] = noise_levels
        return get_sde_loss_fn(sde, train, reduce_mean, True, likelihood_weighting, **shared)
    if noise_levels:
        raise ValueError(
            f"training.noise_levels = {noise_levels!r} needs training.continuous = True: the "
            "losses of SMLD and DDPM have levels of their own, set it to ''"
        )
    if likelihood_weighting:
        raise ValueError(
            "training.likelihood_weighting needs training.continuous = True: the losses of SMLD "
            "and DDPM have weights of their own"
        )
    return get_ddpm_loss_fn(sde, train, reduce_mean, **shared)
