"""Feature extractors behind one small interface, and how a config chooses one."""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from score_lib.base.registry import Registry

_EXTRACTORS = Registry("feature extractor")


class Extractor(abc.ABC):
    """A network that turns images into features, and into class scores where it has any.

    A subclass is built as `cls(weights, device)`, where an empty `weights` means its own.

    Attributes:
        name: what `eval.extractor` says.
        resize: which filter brings images to the network's size; features depend on it.
        digest: hash of the weights.
        batch_size: images that the network sees at once.
    """

    name: str
    resize: str
    digest: str
    batch_size = 64

    @abc.abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (b, F) and class scores (b, K) or None, of uint8 images (b, H, W, C)."""

    def __call__(self, images: Tensor | np.ndarray) -> dict[str, Tensor | None]:
        """Features of images, in float32 on the CPU.

        Args:
            images: (B, H, W, C) uint8.
        Returns:
            "pool_3" (B, F), and "logits" (B, K) or None.
        Raises:
            ValueError: the images are of another type, or of a size that the network cannot take.
        """
        images = torch.as_tensor(images)
        if images.dim() != 4 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                "features are computed from uint8 images (B, H, W, C), not from "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        pool_3, logits = zip(*map(self.features, images.split(self.batch_size)), strict=True)
        return {
            "pool_3": torch.cat(pool_3).float().cpu(),
            "logits": None if logits[0] is None else torch.cat(logits).float().cpu(),
        }


def register_extractor(cls: type | None = None, *, name: str | None = None) -> Callable:
    """Class decorator: `config.eval.extractor` then knows the class by its `name`."""

    def add(cls: type) -> type:
        return _EXTRACTORS.register(cls, name=name or cls.name)

    return add if cls is None else add(cls)


def get_extractor(config, device: torch.device | str | None = None) -> Extractor:
    """The extractor that a config chooses with `eval.extractor` and `eval.extractor_weights`.

    "" is "digits" for that data set, and "inception" for all others.

    Args:
        config: the experiment.
        device: where the network runs; by default the first GPU where there is one.
    Raises:
        ValueError: an unknown name, or weights that do not fit.
        OSError: the weights are not there and cannot be downloaded.
    """
    default = "digits" if config.data.dataset == "DIGITS" else "inception"
    cls = _EXTRACTORS.get(config.eval.get("extractor", "") or default)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return cls(config.eval.get("extractor_weights", ""), torch.device(device))


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) of colour or gray ones, (B, H, W, 1)."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            "the Inception networks take colour or gray images, with 3 or 1 channels, not "
            f"{images.shape[-1]}: register an extractor for such data"
        )
    return images.expand(*images.shape[:-1], 3)
