"""The interface of feature extractors, and their registry."""

import abc
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from score_lib.base.registry import Registry

EXTRACTORS = Registry("feature extractor", options={"weights": "eval.extractor_weights"})


class Extractor(abc.ABC):
    """A network that computes features of images and, optionally, class scores.

    A subclass is built as `cls(weights=..., device=...)`; empty `weights` are its default ones.
    It raises OSError for weights that are missing, and ValueError for weights that do not fit.

    Attributes:
        name: its name as `eval.extractor`.
        resize: the filter that resizes images for the network; features depend on it.
        digest: hash of the weights.
        batch_size: images that the network processes at once.
        classes_of: names of the data sets whose labels its class scores are of.
        distance: name of the Fréchet distance of its features in reports.
        has_spatial: whether it can compute spatial features, for the sFID.
        with_spatial: whether it does.
    """

    name: str
    resize: str
    digest: str
    batch_size = 64
    classes_of: tuple[str, ...] = ()
    distance = "fid"
    has_spatial = False
    with_spatial = False

    @abc.abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor | None, ...]:
        """Features (b, F) and class scores (b, K) or None, of uint8 images (b, H, W, C).

        With `with_spatial`, also the spatial features (b, S).
        """

    @property
    def identity(self) -> str:
        """Its name, weights and filter, in words that `Statistics.made_by` repeats."""
        return described(self.name, self.digest, self.resize)

    def __call__(self, images: Tensor | np.ndarray) -> dict[str, Tensor | None]:
        """For uint8 images (B, H, W, C): "pool_3" (B, F), and "logits" (B, K) or None.

        With `with_spatial`, also "spatial" (B, S).  All are float32 on the CPU.
        """
        images = torch.as_tensor(images)
        if images.dim() != 4 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                "features are computed from uint8 images (B, H, W, C), not from "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        parts = zip(*map(self.features, images.split(self.batch_size)), strict=True)
        names = ("pool_3", "logits", "spatial")[: 3 if self.with_spatial else 2]
        return {
            name: None if values[0] is None else torch.cat(values).float().cpu()
            for name, values in zip(names, parts, strict=True)
        }


def described(name: str, digest: str, resize: str) -> str:
    """An extractor in words, such as "'digits' (weights 9f31, resize: none)"."""
    return f"{name!r} (weights {digest}, resize: {resize})"


def register_extractor(cls: type | None = None, *, name: str | None = None, **entry) -> Callable:
    """Decorator: makes an `Extractor` available as `eval.extractor`; see `Registry.register`.

    The default name is the class's attribute `name`.  The default options feed `weights` from
    `eval.extractor_weights`.
    """
    if cls is None:
        return functools.partial(register_extractor, name=name, **entry)
    return EXTRACTORS.register(cls, name=name or cls.name, **entry)


def as_rgb(images: Tensor) -> Tensor:
    """Colour images (B, H, W, 3) from colour or gray ones, (B, H, W, 1)."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            "the Inception networks take colour or gray images, with 3 or 1 channels, not "
            f"{images.shape[-1]}: register an extractor for such data"
        )
    return images.expand(*images.shape[:-1], 3)
