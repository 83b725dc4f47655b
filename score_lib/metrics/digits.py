"""A small classifier of 8 x 8 digits, for distances that need no download.

Its weights come with the project; `assets/train_digits_classifier.py` trains them.
"""

import pathlib

import numpy as np
import torch
from torch import Tensor, nn

from score_lib.disk.arrays import load_arrays
from score_lib.disk.files import file_digest
from score_lib.metrics.extractors import Extractor, register_extractor

WEIGHTS = pathlib.Path(__file__).parents[2] / "assets" / "digits_classifier.npz"


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers: 8 x 8 images to 64 features and 10 logits."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
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
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 10) of images (B, 1, 8, 8) in [0, 1]."""
        features = self.trunk(x)
        return features, self.head(features)


@register_extractor
class DigitsExtractor(Extractor):
    """Features and class scores of gray 8 x 8 images from a `DigitsClassifier`.

    The weights are an .npz of its state dict; "" is the project's own file.
    """

    name = "digits"
    resize = "none"
    batch_size = 1024
    classes_of = ("DIGITS",)

    def __init__(self, weights: str = "", device: torch.device | str = "cpu"):
        path = pathlib.Path(weights) if weights else WEIGHTS
        arrays = load_arrays(path)
        self.device = torch.device(device)
        self.network = DigitsClassifier().to(self.device).eval()
        try:
            if not all(v.dtype == np.float32 and np.isfinite(v).all() for v in arrays.values()):
                raise ValueError("not all values are finite and float32")
            self.network.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()})
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold the weights of the digits classifier: run "
                "`python -m assets.train_digits_classifier` for the project's own file"
            ) from error
        self.digest = file_digest(path)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] != (8, 8, 1):
            raise ValueError(
                "the digits classifier takes gray images of 8 x 8, (B, 8, 8, 1), not "
                f"{tuple(images.shape)}: choose another extractor with --config.eval.extractor"
            )
        return self.network(images.movedim(-1, 1).to(self.device).float() / 255)
