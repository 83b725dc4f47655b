"""IMAGES: the user's own images, from a folder, a zip file, an .npy or an .npz."""

import io
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from score_lib.data.arrays import open_array
from score_lib.data.files import Folder, OneFile, Zip
from score_lib.data.folders import Noun, Tree, open_tree, split_tenths, split_tree
from score_lib.data.names import Names
from score_lib.data.pixels import MODES, Pixels, to_bytes
from score_lib.data.preprocess import MAX_PIXELS, fit
from score_lib.data.sources import DataError, MissingDataError, Source, register_dataset
from score_lib.data.splits import below_root
from score_lib.disk.files import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow detects the format from the contents; some of its other formats run external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
IMAGE = Noun("image", "images")


@register_dataset(
    name="IMAGES",
    options={
        "path": "data.path",
        "on_error": "data.on_error",
        "split": "data.split",
        "range": "data.range",
        "background": "data.background",
        "levels": "data.levels",
    },
)
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
    if split not in ("", "tenths"):
        raise DataError(f"data.split={split!r} names folders, and {path} holds none")
    return split_tenths(source, path, IMAGE)


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
    if on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error={on_error!r} must be 'raise' or 'skip'")
    if shape[0] not in MODES:
        raise DataError(
            f"data.num_channels={shape[0]} must be 1 (gray), 3 (RGB) or 4 (RGBA) for image files"
        )
    meaning = Pixels(**pixels).check()
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


class ImageFiles(Source):
    """Image files, decoded, cropped and resized when they are read.

    Args:
        tree: the files.
        shape: (C, H, W).
        pixels: what stored values mean.
    """

    def __init__(self, tree: Tree, shape: tuple[int, int, int], pixels: Pixels):
        self.tree, self.shape, self.pixels = tree, shape, pixels
        self.class_to_idx, self.num_classes = tree.class_to_idx, tree.num_classes

    def of(self, tree: Tree) -> "ImageFiles":
        """Other files, read in the same way."""
        return ImageFiles(tree, self.shape, self.pixels)

    @property
    def names(self) -> Names:
        """Of the files, in the order of numbers."""
        return self.tree.names

    def __len__(self) -> int:
        return len(self.tree)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        channels, height, width = self.shape
        images = [
            fit(decode(self.tree.files, self.names[n], channels, self.pixels), height, width)
            for n in numbers
        ]
        return torch.cat(images), self.tree.labels[numbers]


def decode(files: Folder | Zip, name: str, channels: int, pixels: Pixels) -> Tensor:
    """One image as (1, C, h, w) uint8; the first frame of an animation."""
    with opened(files, name) as (image, where):
        return to_bytes(image, where, channels, pixels)


@contextmanager
def opened(files: Folder | Zip, name: str) -> Iterator[tuple]:
    """Context with an image, not yet loaded, and its name for messages.

    Raises:
        DataError: it cannot be read, or what is done inside fails.
    """
    from PIL import Image, UnidentifiedImageError

    where = f"{printable(name)} in {files.path}"
    try:
        with Image.open(io.BytesIO(files.read(name)), formats=FORMATS) as image:
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
