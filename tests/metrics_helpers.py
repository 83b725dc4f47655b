"""Features, statistics and a small extractor for the tests of `evaluation`."""

import math

import numpy as np

from evaluation import Extractor, Statistics


def features(rows, width, seed, scale=1.0):
    """Correlated, shifted, skewed features, as unlike a standard normal as a network's."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) / math.sqrt(width)
    return scale * np.maximum(rng.standard_normal((rows, width)) @ mixing + 0.3, 0) + 0.01 * seed


def some_statistics(**changes):
    values = {
        "pool_3": features(40, 6, 1).astype(np.float32),
        "logits": features(40, 3, 2).astype(np.float32),
        "extractor": "digits",
        "resize": "none",
        "digest": "abc",
        "dataset": "DIGITS",
    }
    return Statistics(**{**values, **changes})


class MeanColour(Extractor):
    name, resize, digest = "mean_colour", "none", "1"

    def __init__(self, weights="", device="cpu"):
        self.weights, self.device = weights, device

    def features(self, images):
        return images.float().mean(dim=(1, 2)), None
