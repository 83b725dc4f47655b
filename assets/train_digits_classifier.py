"""Train the classifier whose features are used for metrics of 8 x 8 digits.

    python -m assets.train_digits_classifier

Trains on the training split of DIGITS and prints the accuracy on the held-out split.  Takes half a
minute on a CPU.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.data import digits_defaults
from datasets import Source, get_streams
from evaluation import DigitsClassifier
from score_lib.disk.arrays import save_arrays
from score_lib.disk.pictures import to_uint8
from score_lib.metrics.digits import WEIGHTS

EPOCHS, BATCH_SIZE, LEARNING_RATE = 120, 64, 2e-3


def main() -> None:
    """Train, report and write the weights."""
    # One thread, since the order of summation depends on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    info = get_streams(digits_defaults(), evaluation=True)[2]
    train, held_out = (examples(info.sources[split]) for split in ("train", "test"))
    network = fit(DigitsClassifier(), *train)
    for name, (images, labels) in {"training": train, "held-out": held_out}.items():
        print(f"accuracy on {len(labels)} {name} digits: {accuracy(network, images, labels):.2%}")
    save_arrays(WEIGHTS, **{key: value.numpy() for key, value in network.state_dict().items()})


def examples(source: Source) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1], rounded to multiples of 1 / 255, and labels (N,)."""
    images, labels = source.read(np.arange(len(source)))
    pixels = to_uint8(images / (source.levels - 1))
    return pixels.movedim(-1, 1) / 255, labels


def fit(network: DigitsClassifier, images: Tensor, labels: Tensor) -> DigitsClassifier:
    """The network, trained with cross-entropy on perturbed images."""
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        logits = network(perturb(images[rows]))[1]
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def perturb(images: Tensor) -> Tensor:
    """Slightly rotated, sheared, scaled and shifted images, with noise of about one grey level.

    Samples of a model lie between the grey levels of the data, hence the noise.
    """
    identity = torch.eye(2, 3)
    change = torch.tensor([[0.1, 0.1, 0.08], [0.1, 0.1, 0.08]])
    maps = identity + change * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + (torch.rand_like(moved) - 0.5) / 8).clamp(0, 1)


@torch.no_grad()
def accuracy(network: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified correctly."""
    return (network(images)[1].argmax(dim=1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
