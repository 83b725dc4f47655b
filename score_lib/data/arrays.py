"""Images in an .npy file, which is memory-mapped, or in an .npz file, which is loaded."""

import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from score_lib.data.pixels import Pixels, need_range
from score_lib.data.preprocess import MAX_PIXELS, fit
from score_lib.data.sources import (
    DataError,
    PerProcess,
    Source,
    checked_labels,
    log_once,
    log_unread,
)
from score_lib.data.stored import check_end, load_npz

CHANNELS = (1, 3, 4)
# Values that are checked at once.
CHUNK = 1 << 24


class ArrayImages(Source):
    """An array of images: uint8, or others that are rounded to 256 levels.

    `array` returns it in the process that calls it: (N, h, w), (N, C, h, w) or, if
    `channels_last`, (N, h, w, C), with any h and w.
    """

    def __init__(
        self,
        array: Callable[[], np.ndarray],
        channels_last: bool,
        labels: Tensor | None,
        shape: tuple[int, int, int],
        pixels: Pixels,
    ):
        self._array, self._channels_last = array, channels_last
        self._pixels = pixels
        self._labels, self.shape = labels, shape
        self.num_classes = 1 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self._array())

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None]:
        rows = np.asarray(self._array()[numbers])
        if self._pixels.range:
            rows = self._pixels.scale(rows)
        elif rows.dtype != np.uint8:
            rows = np.round(rows * 255).astype(np.uint8)
        images = torch.from_numpy(rows)
        if images.dim() == 3:
            images = images[:, None]
        elif self._channels_last:
            images = images.permute(0, 3, 1, 2)
        images = fit(images, *self.shape[1:], self._pixels.levels or 256)
        return images, None if self._labels is None else self._labels[numbers]


def open_array(path: pathlib.Path, shape: tuple[int, int, int], pixels: Pixels) -> ArrayImages:
    """The images (N, H, W), (N, H, W, C) or (N, C, H, W) of a file, and the labels of an .npz.

    Unless the values are uint8 and all of them allowed, they are checked: one pass over the file.

    Raises:
        DataError: not an array that NumPy reads without pickle, not an array of images, or with
            values that are out of bounds; names the row.
    """
    try:
        if path.suffix.lower() == ".npz":
            images, labels = load_npz(path, functools.partial(_array_of_images, path))
            array = functools.partial(np.asarray, images)
        else:
            load = functools.partial(np.load, path, mmap_mode="r", allow_pickle=False)
            array, labels = PerProcess(load), None
            check_end(path, array().offset + array().nbytes)
        stored, kind = array().shape, array().dtype
    except DataError:
        raise
    except Exception as error:  # damaged files make NumPy raise errors of nearly any type
        reason = error.__cause__ or error  # the cause does not repeat the path
        raise DataError(f"{path} is not a readable array: {reason}") from error
    if kind.kind not in "buif":
        raise DataError(f"{path} holds {kind}: images are numbers, best of all uint8")
    channels_last = _channels_last(path, stored, shape)
    labels = checked_labels(path, labels, stored[0], "image")
    _check_values(path, array(), pixels)
    return ArrayImages(array, channels_last, labels, shape, pixels)


def _check_values(path: pathlib.Path, array: np.ndarray, pixels: Pixels) -> None:
    """Refuse values that are out of bounds, in parts that need little memory."""
    kind, floats = array.dtype, array.dtype.kind == "f"
    if kind == np.uint8 and not pixels.range and not pixels.levels:
        return
    size = max(1, CHUNK // math.prod(array.shape[1:]))
    parts = ((first, array[first : first + size]) for first in range(0, len(array), size))
    if kind != np.uint8 and not floats and not pixels.range:
        raise need_range(str(path), kind, max(part.max() for _, part in parts))
    for first, part in parts:
        try:
            pixels.check_values(str(path), part)
        except DataError:
            for row, image in enumerate(part, start=first):
                pixels.check_values(f"row {row} (from 0) of {path}", image)
    if kind != np.uint8 and pixels.fewer_levels:
        raise DataError(
            f"{path} holds {kind}, which are rounded to 256 grey levels, but data.levels="
            f"{pixels.levels}: save the levels 0 to {pixels.levels - 1} as uint8, or set "
            f"data.levels=0"
        )
    if kind != np.uint8:
        log_once(f"{path} holds {kind.name}: values are rounded to 256 grey levels")


def _array_of_images(path: pathlib.Path, names: list[str]) -> str:
    """The one that is meant among the names of the arrays in a file."""
    others = [name for name in names if name != "labels"]
    known = [name for name in ("images", "samples", "arr_0") if name in others]
    if not known and len(others) != 1:
        raise DataError(f"{path} holds {names}: name the array of images 'images'")
    images = (known or others)[0]
    log_unread(path, images, names)
    return images


def _channels_last(path: pathlib.Path, stored: tuple[int, ...], shape: tuple) -> bool:
    """Whether the last dimension holds the channels; checks that the array is one of images."""
    channels_last = len(stored) == 4 and stored[3] in CHANNELS and stored[1:] != shape
    if len(stored) == 3:
        stored = (*stored, 1)
    elif len(stored) == 4 and stored[1] in CHANNELS and not channels_last:
        stored = (stored[0], *stored[2:], stored[1])
    elif not channels_last:
        raise DataError(
            f"{path} holds an array of shape {stored}: images are (N, H, W), (N, H, W, C) or "
            f"(N, C, H, W)"
        )
    if stored[3] != shape[0]:
        raise DataError(
            f"{path} holds images of {stored[3]} channels, but data.num_channels={shape[0]}: set "
            f"it to {stored[3]}, or convert the images"
        )
    if 0 in stored:
        raise DataError(f"{path} holds no images: its shape is {stored}")
    if stored[1] * stored[2] > MAX_PIXELS:
        raise DataError(
            f"{path} holds images of {stored[1]} x {stored[2]}, above the limit of {MAX_PIXELS} "
            f"pixels"
        )
    return channels_last
