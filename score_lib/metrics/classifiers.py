"""Small classifiers of gray images, for distances that need no download.

Their weights come with the project; `assets/train_classifiers.py` trains them.
"""

import pathlib

import numpy as np
import torch
from torch import Tensor, nn

from score_lib.disk.arrays import load_arrays
from score_lib.disk.files import file_digest
from score_lib.metrics.extractors import Extractor, register_extractor

ASSETS = pathlib.Path(__file__).parents[2] / "assets"


class SmallClassifier(nn.Module):
    """Features (B, 64) and the scores of 10 classes, of images (B, 1, side, side) in [0, 1].

    Args:
        trunk: computes the features.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, H, W) in [0, 1] -> features (B, D) and logits (B, K)."""
        features = self.trunk(x)
        return features, self.head(features)


class DigitsClassifier(SmallClassifier):
    """Three convolutions and two linear layers, for digits of 8 px."""

    def __init__(self):
        trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.GELU(),
        )
        super().__init__(trunk)


class Residual(nn.Module):
    """Two normalised convolutions, added to their input."""

    def __init__(self, channels: int):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, channels), nn.GELU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.branch(x)


class FashionClassifier(SmallClassifier):
    """A small residual network, for clothing of 28 px."""

    def __init__(self):
        trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            Residual(64),
            nn.MaxPool2d(2),
            Residual(64),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.GELU(),
        )
        super().__init__(trunk)


class ClassifierExtractor(Extractor):
    """Features and class scores of square gray images from a `SmallClassifier`.

    The weights are an .npz of its state dict; "" is the project's own file.

    Attributes:
        network_class: the network.
        side: of the images.
    """

    resize = "none"
    batch_size = 1024
    network_class: type[SmallClassifier]
    side: int

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        path = pathlib.Path(weights) if weights else self.own_weights()
        arrays = load_arrays(path)
        self.device = torch.device(device)
        self.network = self.network_class().to(self.device).eval()
        try:
            if not all(v.dtype == np.float32 and np.isfinite(v).all() for v in arrays.values()):
                raise ValueError("not all values are finite and float32")
            self.network.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold the weights of the {self.name} classifier: run "
                f"`python -m assets.train_classifiers {self.name}` for the project's own file"
            ) from error
        self.digest = file_digest(path)

    @classmethod
    def own_weights(cls) -> pathlib.Path:
        """The file of weights that comes with the project."""
        return ASSETS / f"{cls.name}_classifier.npz"

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (self.side, self.side, 1):
            raise ValueError(
                f"the {self.name} classifier takes gray images of {self.side} x {self.side}, (B, "
                f"{self.side}, {self.side}, 1), not {tuple(images.shape)}: choose another "
                "extractor with --config.eval.extractor"
            )
        return self.network(images.movedim(-1, 1).to(self.device).float() / 255)


@register_extractor
class DigitsExtractor(ClassifierExtractor):
    """Digits of 8 px."""

    name = "digits"
    classes_of = ("DIGITS",)
    network_class, side = DigitsClassifier, 8


@register_extractor
class FashionExtractor(ClassifierExtractor):
    """Fashion-MNIST, 28 px."""

    name = "fashion_mnist"
    classes_of = ("FASHION_MNIST",)
    network_class, side = FashionClassifier, 28
