"""IMAGES: the user's own images, from a folder, a zip file, an .npy or an .npz."""

import functools
import io
import itertools
import logging
import os
import pathlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from score_lib.data.arrays import open_array
from score_lib.data.preprocess import MAX_PIXELS, fit
from score_lib.data.sources import DataError, PerProcess, Source, Subset, register_dataset
from score_lib.disk.arrays import open_member
from score_lib.disk.files import printable

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELD_OUT_FOLDERS = ("test", "val", "validation")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Pillow detects the format from the contents; some of its other formats run external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Limit on an encoded file, above the size of any image within MAX_PIXELS.
MAX_BYTES = 1 << 29


@register_dataset(name="IMAGES", options={"path": "data.path", "on_error": "data.on_error"})
def images(shape: tuple[int, int, int], path: str, on_error: str) -> tuple[Source, Source]:
    """The images at a path, centre-cropped and resized to (C, H, W).

    With folders `train/` and one of `test/`, `val/` or `validation/`, the latter is held out.
    Otherwise every tenth image in the order of names (or of the array) is held out, and fewer than
    ten images are all in both splits.
    """
    if not path:
        raise DataError(
            "data.path is empty: data.dataset='IMAGES' reads a folder, a .zip, .npy or .npz there"
        )
    source = open_images(path, shape, on_error, name="data.path")
    return _split_files(source) if isinstance(source, ImageFiles) else _split_tenths(source)


def open_images(
    path: str, shape: tuple[int, int, int], on_error: str = "raise", *, name: str = "images"
) -> Source:
    """All images at a path, in the order of names (or of the array), resized to `shape`.

    Args:
        path: an image file, a folder, a .zip, .npy or .npz; messages call it `name`.
        on_error: "raise" for an image that cannot be read, or "skip" it.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error={on_error!r} must be 'raise' or 'skip'")
    if shape[0] not in MODES:
        raise DataError(
            f"data.num_channels={shape[0]} must be 1 (gray), 3 (RGB) or 4 (RGBA) for image files"
        )
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        return _image_files(Folder(place), shape, on_error)
    if not place.is_file():
        raise DataError(f"{name}: there is no file or folder {str(place)!r}")
    suffix = place.suffix.lower()
    if suffix == ".zip":
        return _image_files(Zip(place), shape, on_error)
    if suffix in (".npy", ".npz"):
        return open_array(place, shape)
    if suffix in SUFFIXES:
        return ImageFiles(OneFile(place), {place.name: (place.name,)}, 0, shape)
    raise DataError(
        f"{name}: {str(place)!r} is neither a folder nor a .zip, .npy or .npz file, nor an image "
        f"({', '.join(SUFFIXES)})"
    )


def _split_tenths(source: Source) -> tuple[Source, Source]:
    if len(source) < 10:
        return source, source
    numbers = np.arange(len(source))
    return Subset(source, numbers[numbers % 10 != 9]), Subset(source, numbers[9::10])


class Folder:
    """Names of the files below a folder, and their contents.

    Links to folders are not followed, nor are links to files outside the folder.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.names = []
        try:
            for folder, folders, files in os.walk(path, onerror=_cannot_list):
                linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                inside = pathlib.Path(folder).relative_to(path)
                self.names += [(inside / name).as_posix() for name in files + linked]
        except RecursionError as error:
            raise DataError(f"{path} has folders inside folders that are too deep") from error

    def read(self, name: str) -> bytes:
        file = self.path / name
        if file.is_symlink() and not file.resolve().is_relative_to(self.path.resolve()):
            raise OSError("it is a link that leads out of the folder")
        return self._contents(file)

    def _contents(self, file: pathlib.Path) -> bytes:
        if not file.is_file():  # reading a pipe or device may never end
            raise OSError("it is not a regular file")
        _check_size(file.stat().st_size)
        return file.read_bytes()


class OneFile(Folder):
    """A single file as a folder with one name.  It may be a link to anywhere."""

    def __init__(self, path: pathlib.Path):
        self.path, self.names = path.parent, [path.name]

    def read(self, name: str) -> bytes:
        return self._contents(self.path / name)


class Zip:
    """Names of the files in a zip file, and their contents, read without unpacking it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._zip = PerProcess(functools.partial(zipfile.ZipFile, path))
        try:
            self.names = sorted({name for name in self._zip().namelist() if name[-1:] != "/"})
        except Exception as error:  # damaged files make it raise errors of nearly any type
            raise DataError(f"{path} is not a readable zip file: {error}") from error

    def read(self, name: str) -> bytes:
        member = self._zip().getinfo(name)
        _check_size(member.file_size)
        with open_member(self._zip(), member) as file:
            return file.read(member.file_size)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror}")


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(f"{size} bytes are too many for an image")


class ImageFiles(Source):
    """Image files of a folder or zip file, decoded when they are read.

    Args:
        files: the folder or zip file.
        parts: name of each image in it -> its folders and file name, below the root.
        level: an image's class is its folder at this level; without one, all are in one class.
    """

    def __init__(self, files: Folder | Zip, parts: dict[str, tuple[str, ...]], level: int, shape):
        self.files, self.parts, self.names, self.shape = files, parts, list(parts), shape
        folders = [part[level:-1] for part in parts.values()]
        titles = [folder[0] for folder in folders] if all(folders) else [""] * len(parts)
        classes = {title: number for number, title in enumerate(sorted(set(titles)))}
        self._labels = torch.tensor([classes[title] for title in titles])
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        channels, height, width = self.shape
        images = [fit(decode(self.files, self.names[n], channels), height, width) for n in numbers]
        return torch.cat(images), self._labels[numbers]


def decode(files: Folder | Zip, name: str, channels: int) -> Tensor:
    """One image as (1, C, h, w) uint8; the first frame of an animation."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    where = f"{printable(name)} in {files.path}"
    try:
        with Image.open(io.BytesIO(files.read(name)), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ValueError(f"it is {size}, above the limit of {MAX_PIXELS} pixels")
            pixels = _plain(ImageOps.exif_transpose(image)).convert(MODES[channels])
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is not a readable image: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make decoders raise errors of nearly any type
        raise DataError(f"{where} is not a readable image: {error}") from error
    array = np.array(pixels).reshape(pixels.height, pixels.width, channels)
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def _plain(image):
    """The image in a mode that Pillow converts to every other mode without loss or warning."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its values are floats of unknown range")
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip values above 255
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _image_files(files: Folder | Zip, shape, on_error: str) -> ImageFiles:
    """All images of a folder or zip file."""
    names = sorted(filter(_is_image, files.names))
    _report(files, sorted(set(files.names) - set(names)), "are not images")
    if not names:
        raise DataError(
            f"there is no image in {files.path}: names of images end in {', '.join(SUFFIXES)}"
        )
    if on_error == "skip":
        names = _readable(files, names, shape[0])
    parts = _parts_below_root(names)
    return ImageFiles(files, parts, 0 if _held_out_folder(parts) is None else 1, shape)


def _split_files(source: ImageFiles) -> tuple[Source, Source]:
    files, parts = source.files, source.parts
    held_out = _held_out_folder(parts)
    if held_out is None:
        return _split_tenths(source)
    both = {name: part for name, part in parts.items() if part[0] in ("train", held_out)}
    _report(files, sorted(set(parts) - set(both)), f"are neither in train/ nor in {held_out}/")
    source = ImageFiles(files, both, 1, source.shape)
    train = np.array([part[0] == "train" for part in both.values()])
    return Subset(source, np.flatnonzero(train)), Subset(source, np.flatnonzero(~train))


def _held_out_folder(parts: dict[str, tuple[str, ...]]) -> str | None:
    """The folder of held-out images beside `train/`, or None."""
    folders = {part[0] for part in parts.values() if len(part) > 1}
    known = (name for name in HELD_OUT_FOLDERS if name in folders)
    return next(known, None) if "train" in folders else None


def _is_image(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    hidden = any(part == "__MACOSX" or part[0] == "." for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _report(files: Folder | Zip, names: list[str], why: str) -> None:
    """Log how many files are left out, with the first names."""
    if names:
        shown = ", ".join(map(printable, names[:20])) + (", ..." if len(names) > 20 else "")
        log.warning("%s: %d left out because they %s: %s", files.path, len(names), why, shown)


def _readable(files: Folder | Zip, names: list[str], channels: int) -> list[str]:
    """The images that can be decoded; the others are reported."""

    def is_readable(name: str) -> bool:
        try:
            decode(files, name, channels)
        except DataError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        readable = list(itertools.compress(names, pool.map(is_readable, names)))
    _report(files, sorted(set(names) - set(readable)), "cannot be read")
    if not readable:
        raise DataError(f"none of the {len(names)} images in {files.path} can be read")
    return readable


def _parts_below_root(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Name -> its folders and file name, without the folders that all images share."""
    parts = {name: pathlib.PurePosixPath(name).parts for name in names}
    folders = [part[:-1] for part in parts.values()]
    pairs = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {name: part[common:] for name, part in parts.items()}
