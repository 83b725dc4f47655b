"""What a user hands in for editing: images, and masks that say which part of them is known."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import image_shape
from score_lib.data.images import ImageFiles, OneFile, decode, open_images
from score_lib.data.loading import get_dataset
from score_lib.data.sources import DataError, Source, Subset
from score_lib.data.stream import ImageStream


class Inputs(NamedTuple):
    """Images with what is known about them.

    Attributes:
        images: (n, C, H, W) float32 in [0, 1].
        labels: (n,) int64, or None where no two classes are known.
        names: file names, or numbers in the data set or array.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]


def read_inputs(config, path: str, count: int, split: str = "test") -> Inputs:
    """The first images at a path, or of the configured data set; neither flipped nor dequantised.

    Args:
        config: reads `data.*`; the shape is the configured one, to which files are cropped and
            resized.
        path: an image file, a folder, a .zip, .npy or .npz; "" is the configured data set.
        count: images wanted; fewer come back where there are fewer.
        split: "train" or "test", the part of the data set; a path is not split.
    Raises:
        DataError: nothing there, no image, one that cannot be read, or a count below 1.
    """
    if count < 1:
        raise DataError(f"{count} images were asked for: at least 1 is needed")
    source = _open_path(config, path) if path else _open_part(config, split)
    numbers = np.arange(min(count, len(source)))
    stream = ImageStream(Subset(source, numbers), count, evaluation=True)
    batch = next(iter(stream))
    names = source.names if isinstance(source, ImageFiles) else map(str, numbers)
    labels = batch["label"] if source.num_classes > 1 else None
    return Inputs(batch["image"], labels, list(names)[: len(numbers)])


def _open_part(config, split: str) -> Source:
    if split not in ("train", "test"):
        raise DataError(f"the data set has no part {split!r}: known are 'train' and 'test'")
    _, _, info = get_dataset(config, evaluation=True)
    return info.sources[split]


def _open_path(config, path: str) -> Source:
    on_error = config.data.get("on_error", "raise")
    source = open_images(path, image_shape(config), on_error, what="images to edit")
    # Files like those that were trained on have the same grey levels; others have 256, also where
    # the data set has its own number.
    if config.data.dataset == "IMAGES":
        source.levels = config.data.get("levels", 0) or source.levels
    return source


def read_mask(path: str, shape: tuple[int, int, int]) -> Tensor:
    """What is known of images: 1 where it is, and 0 where it is open.

    Args:
        path: an image file, white where known and black where open; or an .npy of (H, W),
            (1, H, W) or (C, H, W) that holds 0 and 1, or 0 and 255.
        shape: (C, H, W) of the images.
    Returns:
        (1, H, W), or (C, H, W) where the channels differ in what is known; float32.
    Raises:
        DataError: nothing there, not a mask, another size, or values in between.
    """
    file = pathlib.Path(os.path.expanduser(path))
    if not file.is_file():
        raise DataError(f"there is no mask file {path!r}")
    is_array = file.suffix.lower() == ".npy"
    values = _mask_array(file) if is_array else _mask_pixels(file)
    if values.shape not in ((1, *shape[1:]), tuple(shape)):
        raise DataError(
            f"the mask {file} has the shape {values.shape}, but the images have {tuple(shape)}, "
            f"(channels, height, width): a mask is as high and wide as they are, and not resized"
        )
    known = 1 if is_array and not (values > 1).any() else 255
    if (others := np.unique(values[(values != 0) & (values != known)])).size:
        shown = ", ".join(map(str, others[:3].tolist())) + (", ..." if others.size > 3 else "")
        raise DataError(
            f"the mask {file} holds {shown} beside 0 (open) and {known} (known), where it should "
            f"hold nothing else (JPEG files blur such edges, PNG files keep them)"
        )
    return torch.from_numpy(np.asarray(values == known)).float()


def _mask_array(file: pathlib.Path) -> np.ndarray:
    try:
        # In place: the shape is looked at before anything of that size is in memory.
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged files make NumPy raise errors of nearly any type
        raise DataError(f"{file} is not a readable array: {error}") from error
    if not isinstance(values, np.ndarray):
        raise DataError(f"the mask {file} is an .npz inside: save one array as .npy")
    if values.dtype.kind not in "buif":
        raise DataError(f"the mask {file} holds {values.dtype} instead of 0 and 1")
    return values[None] if values.ndim == 2 else values


def _mask_pixels(file: pathlib.Path) -> np.ndarray:
    """The pixels of a gray image, (1, h, w) uint8."""
    *colors, opacity = decode(OneFile(file), file.name, channels=4)[0].numpy()
    if any((color != colors[0]).any() for color in colors) or (opacity != 255).any():
        raise DataError(
            f"the mask {file} is coloured or transparent: white is known, and black is open"
        )
    return colors[0][None]
