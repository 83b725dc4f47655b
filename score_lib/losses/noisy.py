"""Losses of a network's output on noisy data."""

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.distributed import share_of_batch
from score_lib.losses.noise_levels import NoiseLevels


class Draws(NamedTuple):
    """The random numbers of a loss: noise levels (times, or indices), (B,), and noise (B, *D)."""

    level: Tensor
    z: Tensor


class NoisyLoss(abc.ABC):
    """A loss of a network's output on data at randomly drawn noise levels.

    Called as `loss_fn(model, batch, labels=None)`, with the batch (B, *D) in the network's range,
    it draws levels, then noise, and returns the mean loss of the batch.  `draw` and `per_sample`
    are its halves: a batch that is processed in parts is drawn for as a whole.

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
        is called like `torch.randn_like`.  Each of several processes with equal generators gets
        its share of the draws for the whole batch.
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
