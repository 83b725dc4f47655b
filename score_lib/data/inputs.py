"""Images that a user hands in for editing, and masks that mark their known pixels."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import data_shape, image_shape
from score_lib.data.files import OneFile
from score_lib.data.images import FILE_OPTIONS, ImageFiles, open_images, opened
from score_lib.data.kinds import is_continuous, kind_of
from score_lib.data.loading import get_streams
from score_lib.data.pixels import Pixels, is_deep, to_bytes
from score_lib.data.sources import DATASETS, DataError, Source, Subset
from score_lib.data.stored import SUFFIXES, check_end
from score_lib.data.stream import ImageStream
from score_lib.data.values import arrays, open_array_source
from score_lib.options import complete


class Inputs(NamedTuple):
    """Images, or other data, with their labels and names.

    Attributes:
        images: (n, *D), grey levels in [0, 1], or continuous values.
        labels: (n,) int64, or None with fewer than two classes.
        names: file names, or numbers in the data set or array.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]


def read_inputs(config, path: str, count: int, split: str = "test") -> Inputs:
    """The first images at a path, or of the configured data set; neither flipped nor dequantized.

    Args:
        config: reads `data.*`; files are cropped and resized to the configured shape.
        path: an image file, a folder, a .zip, .npy or .npz; of ARRAYS, and for data that are no
            images, an .npy, .npz or .h5; "" is the configured data set.
        count: number of images, at least 1; fewer are returned if there are fewer.
        split: "train" or "test", for the data set; a path is not split.
    """
    config = complete(config)
    if count < 1:
        raise DataError(f"{count} images were asked for: at least 1 is needed")
    if path:
        source = _at_path(config, path)
    elif split in ("train", "test"):
        source = get_streams(config, evaluation=True)[2].sources[split]
    else:
        raise DataError(f"the data set has no split {split!r}: known are 'train' and 'test'")
    numbers = np.arange(min(count, len(source)))
    stream = ImageStream(Subset(source, numbers), count, evaluation=True)
    batch = next(iter(stream))
    names = source.names if isinstance(source, ImageFiles) else map(str, numbers)
    labels = batch["label"] if source.num_classes > 1 else None
    return Inputs(batch["image"], labels, list(names)[: len(numbers)])


def _at_path(config, path: str) -> Source:
    """Examples at a path that is not the data set's: images, or rows of an array."""
    data, place = config.data, pathlib.Path(os.path.expanduser(path))
    like_the_data = DATASETS.get(data.dataset) is arrays and place.suffix.lower() in SUFFIXES
    if is_continuous(config) or kind_of(config) != "images" or like_the_data:
        return open_array_source(place, data_shape(config), data.key, data.levels)
    # data.levels describes the data set.  Beside data sets of image files, files like these share
    # its grey levels; beside others they have 256.
    levels = data.levels if FILE_OPTIONS.items() <= DATASETS.feeds(data.dataset).items() else 0
    source = open_images(
        path,
        image_shape(config),
        data.on_error,
        name="images to edit",
        range=data.range,
        background=data.background,
        levels=levels,
    )
    source.levels = levels or source.levels
    return source


def read_mask(path: str, shape: tuple[int, ...]) -> Tensor:
    """A mask of the known entries: 1 where known, 0 where open.

    Args:
        path: an image file, white where known and black where open; or an .npy of (H, W),
            (1, H, W) or (C, H, W) that holds 0 and 1, or 0 and 255.
        shape: D, such as (C, H, W) of images.
    Returns:
        (1, H, W), or (C, H, W) for an array with one mask per channel; float32.
    """
    file = pathlib.Path(os.path.expanduser(path))
    if not file.is_file():
        raise DataError(f"there is no mask file {path!r}")
    is_array = file.suffix.lower() == ".npy"
    values = _mask_array(file, len(shape)) if is_array else _mask_pixels(file)
    if values.shape not in ((1, *shape[1:]), tuple(shape)):
        wanted = f"save an array of the shape {tuple(shape)}"
        if len(shape) == 3:
            wanted = f"make it {shape[1]} pixels high and {shape[2]} wide"
        raise DataError(
            f"the mask {file} has the shape {values.shape}, but the data have {tuple(shape)}, "
            f"channels first: masks are not resized, so {wanted}"
        )
    known = 1 if is_array and not (values > 1).any() else 255
    if (others := np.unique(values[(values != 0) & (values != known)])).size:
        shown = ", ".join(map(str, others[:3].tolist())) + (", ..." if others.size > 3 else "")
        raise DataError(
            f"the mask {file} holds {shown} beside 0 (open) and {known} (known), the only values "
            f"allowed: save it as PNG, since JPEG blurs edges"
        )
    return torch.from_numpy(np.asarray(values == known)).float()


def _mask_array(file: pathlib.Path, rank: int) -> np.ndarray:
    try:
        # Memory-mapped, so that the shape is checked before the array is loaded.
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged files make NumPy raise errors of nearly any type
        raise DataError(f"{file} is not a readable array: {error}") from error
    if not isinstance(values, np.ndarray):
        raise DataError(f"the mask {file} is an .npz file: save one array as .npy")
    check_end(file, values.offset + values.nbytes)
    if values.dtype.kind not in "buif":
        raise DataError(f"the mask {file} holds {values.dtype} instead of 0 and 1")
    return values[None] if values.ndim == rank - 1 else values


def _mask_pixels(file: pathlib.Path) -> np.ndarray:
    """The pixels of a gray image, (1, h, w) uint8."""
    with opened(OneFile(file), file.name) as (image, where):
        pixels = Pixels(range=(0, 65535)) if is_deep(image) else Pixels()
        *colors, opacity = to_bytes(image, where, 4, pixels)[0].numpy()
    if any((color != colors[0]).any() for color in colors) or (opacity != 255).any():
        raise DataError(
            f"the mask {file} is coloured or transparent: use white for known and black for open"
        )
    return colors[0][None]
