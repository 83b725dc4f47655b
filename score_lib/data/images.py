"""IMAGES: the user's own images, from a folder, a zip file, an .npy or an .npz."""

import abc
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from score_lib.data.arrays import open_array
from score_lib.data.files import Folder, OneFile, Zip
from score_lib.data.folders import (
    Tree,
    divided,
    is_named,
    open_tree,
    readable,
    split_tree,
)
from score_lib.data.names import Names
from score_lib.data.pixels import MODES, Pixels, to_bytes
from score_lib.data.preprocess import MAX_PIXELS, fit
from score_lib.data.sources import DataError, MissingDataError, Source, register_dataset
from score_lib.data.splits import below_root
from score_lib.disk.files import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow detects the format from the contents; some of its other formats run external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE = "image"


# Options of every data set of image files.
FILE_OPTIONS = {
    name: f"data.{name}" for name in ("path", "on_error", "split", "range", "background", "levels")
}


@register_dataset(name="IMAGES", options=FILE_OPTIONS)
def images(
    shape: tuple[int, int, int], path: str, on_error: str, split: str, **pixels
) -> tuple[Source, Source]:
    """The images at a path, centre-cropped and resized to (C, H, W).

    With folders side by side for training and for holding out, such as `train/` and `test/`, the
    latter is held out; see `splits.find_split`.  Otherwise every tenth image in the order of names
    (or of the array) is held out, and fewer than ten images are all in both splits.
    """
    if not path:
        raise MissingDataError(
            "data.path is empty: data.dataset='IMAGES' reads a folder, a .zip, .npy or .npz there"
        )
    source = open_images(path, shape, on_error, name="data.path", split=split, **pixels)
    if isinstance(source, ImageFiles):
        return split_tree(source.tree, source.of, path, split, IMAGE)
    return divided(source, path, IMAGE, split)


def open_images(
    path: str,
    shape: tuple[int, int, int],
    on_error: str = "raise",
    *,
    name: str = "images",
    split: str | None = None,
    **pixels,
) -> Source:
    """All images at a path, in the order of names (or of the array), resized to `shape`.

    Args:
        path: an image file, a folder, a .zip, .npy or .npz; messages call it `name`.
        on_error: "raise" for an image that cannot be read, or "skip" it.
        split: see `splits.find_split`: a folder of a split is no class.
        pixels: of `Pixels`.
    """
    meaning = check_options(shape, on_error, **pixels)
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        return _image_files(Folder(place), shape, on_error, split, meaning)
    if not place.is_file():
        raise DataError(f"{name}: there is no file or folder {str(place)!r}")
    suffix = place.suffix.lower()
    if suffix == ".zip":
        return _image_files(Zip(place), shape, on_error, split, meaning)
    if suffix in (".npy", ".npz"):
        return open_array(place, shape, meaning)
    if suffix in SUFFIXES:
        one = OneFile(place)
        return ImageFiles(Tree(one, one.names, below_root(one.names), None), shape, meaning)
    raise DataError(
        f"{name}: {str(place)!r} is neither a folder nor a .zip, .npy or .npz file, nor an image "
        f"({', '.join(SUFFIXES)})"
    )


def check_options(shape: tuple[int, int, int], on_error: str, **pixels) -> Pixels:
    """The options of image files, if they are sound.

    Args:
        shape: (C, H, W).
        on_error: "raise" or "skip".
        pixels: of `Pixels`.
    Raises:
        DataError: names the option.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error={on_error!r} must be 'raise' or 'skip'")
    if shape[0] not in MODES:
        raise DataError(
            f"data.num_channels={shape[0]} must be 1 (gray), 3 (RGB) or 4 (RGBA) for image files"
        )
    return Pixels(**pixels).check()


class EncodedImages(Source):
    """Encoded images that are decoded, centre-cropped and resized when they are read.

    Args:
        path: where they are, for messages.
        shape: (C, H, W) of the results.
        pixels: the meaning of stored values.
        labels: (N,) int64.
        class_to_idx: name of a class -> its label.
    """

    def __init__(self, path: pathlib.Path, shape, pixels: Pixels, labels: Tensor, class_to_idx):
        self.path, self.shape, self.pixels, self._labels = path, shape, pixels, labels
        self.class_to_idx = class_to_idx

    @abc.abstractmethod
    def encoded(self, number: int) -> bytes:
        """The file of an image; OSError or ValueError where there is none."""

    @abc.abstractmethod
    def name(self, number: int) -> str:
        """Its name within the path, for messages."""

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        size = *self.shape[1:], self.pixels.levels or 256
        images = [fit(self.decoded(n), *size) for n in numbers.tolist()]
        return torch.cat(images), self._labels[numbers]

    def decoded(self, number: int) -> Tensor:
        """One image as it is stored, (1, C, h, w) uint8; the first frame of an animation."""
        where = f"{printable(self.name(number))} in {self.path}"
        with opened_bytes(functools.partial(self.encoded, number), where) as (image, _):
            return to_bytes(image, where, self.shape[0], self.pixels)

    def readable(self, numbers: np.ndarray) -> np.ndarray:
        """Those of the numbers whose images can be decoded; the others are reported.

        Raises:
            DataError: none can, or an option is missing.
        """
        return readable(self, numbers, self.decoded, self.name, IMAGE)


class ImageFiles(EncodedImages):
    """Image files of a folder or zip file; labels are the classes of their folders.

    Args:
        tree: the files.
        shape: (C, H, W).
        pixels: the meaning of stored values.
    """

    def __init__(self, tree: Tree, shape: tuple[int, int, int], pixels: Pixels):
        super().__init__(tree.files.path, shape, pixels, tree.labels, tree.class_to_idx)
        self.tree, self.num_classes = tree, tree.num_classes

    def of(self, tree: Tree) -> "ImageFiles":
        """Other files, read in the same way."""
        return ImageFiles(tree, self.shape, self.pixels)

    @property
    def names(self) -> Names:
        """Of the files, in the order of numbers."""
        return self.tree.names

    def encoded(self, number: int) -> bytes:
        """See `EncodedImages`."""
        return self.tree.files.read(self.names[number])

    def name(self, number: int) -> str:
        """See `EncodedImages`."""
        return self.names[number]


def decode(files: Folder | Zip, name: str, channels: int, pixels: Pixels) -> Tensor:
    """One image as (1, C, h, w) uint8; the first frame of an animation."""
    with opened(files, name) as (image, where):
        return to_bytes(image, where, channels, pixels)


def opened(files: Folder | Zip, name: str) -> AbstractContextManager[tuple]:
    """Context with an image, not yet loaded, and its name for messages.

    Raises:
        DataError: it cannot be read, or what is done inside fails.
    """
    return opened_bytes(functools.partial(files.read, name), f"{printable(name)} in {files.path}")


@contextmanager
def opened_bytes(read: Callable[[], bytes], where: str) -> Iterator[tuple]:
    """Context with the image in the bytes that a function gives; see `opened`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read()), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"it is {size}, above the limit of {MAX_PIXELS} pixels")
            yield image, where
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is not a readable image: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make decoders raise errors of nearly any type
        raise DataError(f"{where} is not a readable image: {error}") from error


def _image_files(
    files: Folder | Zip, shape, on_error: str, split: str | None, pixels: Pixels
) -> ImageFiles:
    """All images of a folder or zip file."""

    def is_image(name: str) -> Tensor:
        return decode(files, name, shape[0], pixels)

    tree = open_tree(files, SUFFIXES, IMAGE, split, is_image if on_error == "skip" else None)
    source = ImageFiles(tree, shape, pixels)
    source.images([0])  # a wrong depth or transparency is an error here, before training starts
    return source


def named_image(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return is_named(name, SUFFIXES)
