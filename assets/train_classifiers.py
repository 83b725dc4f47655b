"""Train the classifiers whose features are used for metrics of small gray images.

    python -m assets.train_classifiers digits
    python -m assets.train_classifiers fashion_mnist

Trains on the training split and prints the accuracy on the held-out split.  On a CPU the first
takes half a minute, the second 17 minutes on two cores.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from configs.data import digits_defaults, fashion_mnist_defaults
from datasets import Source, get_streams
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import save_arrays
from score_lib.disk.pictures import to_uint8
from score_lib.metrics.classifiers import (
    ClassifierExtractor,
    DigitsExtractor,
    FashionExtractor,
    SmallClassifier,
)

BATCH_SIZE, LEARNING_RATE = 64, 2e-3


class Recipe(NamedTuple):
    """How a classifier is trained.

    Attributes:
        defaults: its data.
        distortion, shift: standard deviations of the entries of a random linear map, and of a
            random shift in halves of a side.
        noise: the width of uniform noise, about one grey level: samples lie between the levels.
        smoothing: of labels.
        threads: how many there are, which the order of summation depends on.
    """

    extractor: type[ClassifierExtractor]
    defaults: Callable[[], ConfigDict]
    epochs: int
    distortion: float
    shift: float
    noise: float
    smoothing: float
    threads: int


RECIPES = {
    "digits": Recipe(DigitsExtractor, digits_defaults, 120, 0.1, 0.08, 1 / 8, 0.02, 1),
    "fashion_mnist": Recipe(
        FashionExtractor, fashion_mnist_defaults, 15, 0.03, 0.03, 1 / 64, 0.0, 2
    ),
}


def main() -> None:
    """Train, report and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--path", help="folder of the data, if not that of the config")
    options = parser.parse_args()
    recipe = RECIPES[options.name]
    config = recipe.defaults()
    if options.path:
        config.data.path = options.path
    train(recipe, config)


def train(recipe: Recipe, config: ConfigDict) -> None:
    """Train the network of an extractor on the data of a config, and write its weights."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(0)
    info = get_streams(config, evaluation=True)[2]
    train, held_out = (examples(info.sources[split]) for split in ("train", "test"))
    network = fit(recipe, *train)
    for name, (images, labels) in {"training": train, "held-out": held_out}.items():
        print(f"accuracy on {len(labels)} {name} images: {accuracy(network, images, labels):.2%}")
    arrays = {key: value.numpy() for key, value in network.state_dict().items()}
    save_arrays(recipe.extractor.own_weights(), **arrays)


def examples(source: Source) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) in [0, 1], rounded to multiples of 1 / 255, and labels (N,)."""
    images, labels = source.read(np.arange(len(source)))
    pixels = to_uint8(images / (source.levels - 1))
    return pixels.movedim(-1, 1) / 255, labels


def fit(recipe: Recipe, images: Tensor, labels: Tensor) -> SmallClassifier:
    """The network, trained with cross-entropy on perturbed images."""
    network = recipe.extractor.network_class()
    steps = recipe.epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        logits = network(perturb(recipe, images[rows]))[1]
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def perturb(recipe: Recipe, images: Tensor) -> Tensor:
    """Slightly rotated, sheared, scaled and shifted images, with noise."""
    identity = torch.eye(2, 3)
    change = torch.tensor([[recipe.distortion, recipe.distortion, recipe.shift]] * 2)
    maps = identity + change * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + (torch.rand_like(moved) - 0.5) * recipe.noise).clamp(0, 1)


@torch.no_grad()
def accuracy(network: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified correctly."""
    found = [network(part)[1].argmax(dim=1) for part in images.split(1000)]
    return (torch.cat(found) == labels).double().mean().item()


if __name__ == "__main__":
    with brief_mistakes():
        main()
