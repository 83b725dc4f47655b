"""Noise-conditional classification.  [S21, appendix I.1]"""

from collections.abc import Callable

from torch import Tensor, nn

from score_lib.base.tensors import batch_mul
from score_lib.losses.noise_levels import ContinuousLevels, DiscreteLevels
from score_lib.losses.noisy import Draws, NoisyLoss
from score_lib.scores import get_model_fn
from score_lib.sdes.process import SDE


class ClassifierLoss(NoisyLoss):
    """Cross-entropy of a classifier that sees noisy data and their noise level.

    [S21, appendix I.1.]  The classifier is a function of x_t (B, *D) and s(t) (B,) for every
    process, and gives logits (B, K).
    """

    def per_sample(self, model, batch, draws, labels=None):
        return nn.functional.cross_entropy(
            self.logits(model, batch, draws), labels, reduction="none"
        )

    def logits(self, model: Callable, batch: Tensor, draws: Draws) -> Tensor:
        """The classifier's logits for noisy data, (B, K)."""
        mean, std = self.levels.marginal(batch, draws.level)
        return get_model_fn(model, self.train)(mean + batch_mul(std, draws.z), std)


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
