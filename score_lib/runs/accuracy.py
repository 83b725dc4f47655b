"""Right and wrong answers of a noise-conditional classifier for held-out examples."""

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.losses.objectives import ClassifierLoss, Draws
from score_lib.runs.heldout import HeldOut
from score_lib.runs.setup import Run


class Answers:
    """The answers at one noise level, batch by batch.

    Args:
        run: its network's weights at the time of a call are used.
        level: the noise level, a scalar, as of `ClassifierLoss.levels`.
    Attributes:
        data: the held-out examples.
    Raises:
        ValueError: the data have no labels, or others than the network learns.
    """

    def __init__(self, run: Run, loss_fn: ClassifierLoss, level: Tensor):
        self.run, self.loss_fn, self.level = run, loss_fn, level
        self.seed = derive_seed(run.config.seed, "accuracy")
        self.data = HeldOut(run, "test", run.config.data.uniform_dequantization, self.seed)
        run.check_labels(self.data.info)

    @torch.no_grad()
    def of_batch(self, number: int) -> Tensor:
        """The share of noise draws for which each example gets its label, (B,) float64."""
        run, repeats = self.run, self.run.config.eval.accuracy_num_repeats
        images, labels, _ = self.data.read(number)
        noise = SampleNoise(self.seed, self.data.indices(number), run.device)
        right = torch.zeros(len(images), dtype=torch.int64, device=run.device)
        for _ in range(repeats):
            draws = Draws(self.level.expand(len(images)), noise(images))
            right += self.loss_fn.logits(run.state["model"], images, draws).argmax(1) == labels
        return right.double() / repeats


def correct_shares(run: Run, loss_fn: ClassifierLoss, level: Tensor) -> dict[str, np.ndarray]:
    """`Answers.of_batch` of all held-out examples, which several processes share."""
    answers = Answers(run, loss_fn, level)
    return {"correct": answers.data.map(answers.of_batch)}


def levels_by_noise(run: Run, loss_fn: ClassifierLoss, count: int) -> list[tuple[int, Tensor]]:
    """So many noise levels, from the first of `loss_fn.levels` to the last, with their numbers.

    They are in the order of s / m, from least noise to most: the indices of SMLD's levels count
    down.
    """
    levels = loss_fn.levels.at(torch.linspace(0, 1, count, device=run.device))
    m, s = loss_fn.levels.marginal(torch.ones(count, *run.shape, device=run.device), levels)
    order = (s / m.flatten(1)[:, 0]).argsort(stable=True)
    return [(number, levels[number]) for number in order.tolist()]
