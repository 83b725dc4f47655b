"""IMAGES: the user's own images, from a folder, a zip file, an .npy or an .npz."""

import io
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from score_lib.data.arrays import open_array
from score_lib.data.files import BROKEN, IN_ZIP, OUTSIDE, Folder, OneFile, Zip, hidden, report
from score_lib.data.names import Names
from score_lib.data.pixels import MODES, Pixels, Unsuited, to_bytes
from score_lib.data.preprocess import MAX_PIXELS, fit
from score_lib.data.sources import (
    DataError,
    MissingDataError,
    Source,
    Subset,
    log_once,
    register_dataset,
)
from score_lib.data.splits import (
    Places,
    below_root,
    classes,
    counts,
    find_split,
    refuse_lonely_held_out,
)
from score_lib.disk.files import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow detects the format from the contents; some of its other formats run external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


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
    if isinstance(source, ImageFiles) and source.split:
        return _split_folders(source)
    if split not in ("", "tenths"):
        raise DataError(f"data.split={split!r} names folders, and {path} holds none")
    if isinstance(source, ImageFiles) and not split:
        refuse_lonely_held_out(source.places.folders, path)
    return _split_tenths(source, path)


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
        return ImageFiles(one, one.names, below_root(one.names), shape, meaning)
    raise DataError(
        f"{name}: {str(place)!r} is neither a folder nor a .zip, .npy or .npz file, nor an image "
        f"({', '.join(SUFFIXES)})"
    )


def _split_tenths(source: Source, path: str) -> tuple[Source, Source]:
    if len(source) < 10:
        log_once(f"{path}: all {len(source)} images are both trained on and held out: too few")
        return source, source
    numbers = np.arange(len(source))
    train, test = Subset(source, numbers[numbers % 10 != 9]), Subset(source, numbers[9::10])
    log_once(f"{path}: every tenth image is held out: {len(train)} to train on, {len(test)} not")
    return train, test


class ImageFiles(Source):
    """Image files of a folder or zip file, decoded when they are read.

    Args:
        files: the folder or zip file.
        names: the images in it.
        places: their folders below the root.
        pixels: what stored values mean.
        split: folders that are no classes, or None.
    """

    def __init__(
        self, files: Folder | Zip, names: Names, places: Places, shape, pixels, split=None
    ):
        self.files, self.names, self.places, self.shape = files, names, places, shape
        self.pixels, self.split = pixels, split
        inside = [split.others(folder) if split else folder for folder in places.folders]
        labels = classes(inside)
        by_folder = torch.tensor([labels.get(folder[0], 0) if folder else 0 for folder in inside])
        self._labels = by_folder[torch.from_numpy(places.numbers)]
        self.class_to_idx = {} if "" in labels else labels
        self.num_classes = len(labels)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        channels, height, width = self.shape
        images = [
            fit(decode(self.files, self.names[n], channels, self.pixels), height, width)
            for n in numbers
        ]
        return torch.cat(images), self._labels[numbers]


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
    bad = _bad_links(files, on_error)
    is_image = [_named_image(name) and name not in bad for name in files.names]
    others = [k for k, chosen in enumerate(is_image) if not chosen]
    others = [name for name in files.names.chosen(np.array(others, dtype=int)) if name not in bad]
    report(files, others, "are not images")
    found = files.names.chosen(np.flatnonzero(is_image))
    if not len(found):
        raise DataError(
            f"there is no image in {files.path}: names of images end in {', '.join(SUFFIXES)}"
        )
    if on_error == "skip":
        found = _readable(files, found, shape[0], pixels)
    places = below_root(found)
    source = ImageFiles(files, found, places, shape, pixels, find_split(places.folders, split))
    source.images([0])  # a wrong depth or transparency is an error here, before training starts
    return source


def _bad_links(files: Folder | Zip, on_error: str) -> dict[str, str]:
    """The links that cannot be followed and are left out, and the kind of each."""
    bad = files.bad_links()
    hurt = [
        name
        for name, kind in bad.items()
        if (kind == BROKEN and not hidden(name))
        or (kind in (OUTSIDE, IN_ZIP) and _named_image(name))
    ]
    if hurt and on_error == "raise":
        raise DataError(
            f"{printable(min(hurt))} in {files.path} is {bad[min(hurt)]}: mend or remove it, or "
            f"leave such files out with data.on_error=skip"
        )
    for kind in sorted(set(bad.values())):
        report(files, [name for name in bad if bad[name] == kind], f"are each {kind}")
    return bad


def _named_image(name: str) -> bool:
    return not hidden(name) and name.lower().endswith(SUFFIXES)


def _readable(files: Folder | Zip, names: Names, channels: int, pixels: Pixels) -> Names:
    """The images that can be decoded; the others are reported."""

    def is_readable(name: str) -> bool:
        try:
            decode(files, name, channels, pixels)
        except Unsuited:
            raise  # not a fault of the file: an option is missing
        except DataError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        readable = np.array(list(pool.map(is_readable, names)))
    report(files, list(names.chosen(~readable)), "cannot be read")
    if not readable.any():
        raise DataError(f"none of the {len(names)} images in {files.path} can be read")
    return names.chosen(readable)


def _split_folders(source: ImageFiles) -> tuple[Source, Source]:
    files, places, split = source.files, source.places, source.split
    folders = [split.part(folder) for folder in places.folders]
    totals = places.totals(folders)
    train, held_out = (counts({name: totals[name]}) for name in (split.train, split.held_out))
    others = {name: n for name, n in totals.items() if name not in (split.train, split.held_out)}
    others = counts(others) or "nothing"
    log_once(f"{files.path}: trained on: {train}; held out: {held_out}; left out: {others}")
    trained_on = np.array([folder == split.train for folder in folders])[places.numbers]
    held_out = np.array([folder == split.held_out for folder in folders])[places.numbers]
    used = np.flatnonzero(trained_on | held_out)
    names, places, trained_on = source.names.chosen(used), places.chosen(used), trained_on[used]
    source = ImageFiles(files, names, places, source.shape, source.pixels, split)
    return Subset(source, np.flatnonzero(trained_on)), Subset(source, np.flatnonzero(~trained_on))
