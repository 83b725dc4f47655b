"""Write the images of a data set as PNG files, in a folder for each class.

    python -m score_lib.data.export NAME FOLDER [--split train] [--path PATH]

NAME is a value of `data.dataset`, such as CIFAR10.  `data.dataset=IMAGES` reads FOLDER back: the
same pixels, labels and split.  A command that was stopped goes on where it was.
"""

import argparse
import io
import pathlib
import re

import numpy as np
import torch
from torch import Tensor

from score_lib.base.mistakes import brief_mistakes
from score_lib.data.files import OneFile
from score_lib.data.images import opened
from score_lib.data.loading import DatasetInfo, get_streams
from score_lib.data.pixels import MODES
from score_lib.data.public import SMALL
from score_lib.data.sources import DATASETS, DataError, Source
from score_lib.disk.files import atomic_write, remove_leftovers
from score_lib.disk.logs import progress_bar

# Channels and side of data sets that are not resized.
STORED = {name: (known.channels, known.side) for name, known in SMALL.items()}
STORED |= {"DIGITS": (1, 8), "COLOR_DIGITS": (3, 8)}
# Images that are read at once.
CHUNK = 64


def export(source: Source, folder: pathlib.Path) -> int:
    """Write the images of a source as FOLDER/LABEL_CLASS/NUMBER.png; returns how many were new.

    Without labels they are in FOLDER itself.  Labels are read back as they were if every class has
    an image, as in all public data sets, since IMAGES numbers the folders.  Files appear whole or
    not at all, and those that are there already are compared with the images.

    Raises:
        DataError: the data are no images, or a file that is there holds another one, or none.
        OSError: the folder cannot be written.
    """
    if source.dtype != torch.uint8 or len(source.shape) != 3:
        raise DataError(
            f"only images of grey levels are written as PNG, and these data are "
            f"{str(source.dtype).removeprefix('torch.')} of shape {source.shape}"
        )
    titles = {label: name for name, label in source.class_to_idx.items()}
    digits, written = len(str(len(source) - 1)), 0
    with progress_bar(len(source), 0, "image") as bar:
        for first in range(0, len(source), CHUNK):
            numbers = np.arange(first, min(first + CHUNK, len(source)))
            images, labels = source.read(numbers)
            for row, number in enumerate(numbers.tolist()):
                place = folder
                if source.num_classes > 1 and labels is not None:
                    label = int(labels[row])
                    place = folder / class_folder(label, titles.get(label, ""))
                written += _write(place / f"{number:0{digits}}.png", images[row])
            bar.update(len(numbers))
    return written


def class_folder(label: int, name: str) -> str:
    """A folder name that sorts by the label; signs that file systems may not take are replaced."""
    plain = re.sub(r"[^\w -]", "-", name)
    return str(label) if plain in ("", str(label)) else f"{label}_{plain}"


def _write(path: pathlib.Path, image: Tensor) -> bool:
    """Write an image (C, H, W) unless it is there; returns whether it was written."""
    from PIL import Image

    pixels = image.movedim(0, -1).numpy()
    if path.exists():
        with opened(OneFile(path), path.name) as (stored, _):
            same = stored.mode == MODES[len(image)] and stored.size == image.shape[:0:-1]
            same = same and np.array_equal(np.array(stored).reshape(pixels.shape), pixels)
        if not same:
            raise DataError(f"{path} holds another image: choose another folder, or remove it")
        return False
    encoded = io.BytesIO()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(encoded, "PNG")
    with atomic_write(path) as file:
        file.write(encoded.getvalue())
    return True


def _open(options: argparse.Namespace) -> DatasetInfo:
    """The data set that the command line names."""
    DATASETS.get(options.name)  # before a size is asked for
    channels, side = STORED.get(options.name.upper(), (3, None))
    side = options.image_size or side
    if side is None:
        raise DataError(f"{options.name} has no size of its own: give one, as in --image_size 64")
    names = ("path", "data_dir", "category", "tfrecords_path")
    data = {name: value for name in names if (value := getattr(options, name))}
    data |= {"dataset": options.name, "image_size": side, "centered": False}
    data["num_channels"] = options.num_channels or channels
    sizes = {"batch_size": CHUNK}
    return get_streams({"data": data, "training": sizes, "eval": sizes}, evaluation=True)[2]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="value of data.dataset, such as CIFAR10")
    parser.add_argument("folder", type=pathlib.Path, help="where to write")
    parser.add_argument("--split", choices=("train", "test"), help="one of them (default: both)")
    for option in ("--path", "--data_dir", "--category", "--tfrecords_path"):
        parser.add_argument(option, default="", help=f"as data.{option[2:]} of a config")
    for option in ("--image_size", "--num_channels"):
        parser.add_argument(option, type=int, default=0, help="default: as stored")
    return parser.parse_args()


def main() -> None:
    """Write what the command line names; exits with a sentence where that fails."""
    options = _parse()
    with brief_mistakes(before=f"{options.name} was not exported: "):
        sources = _open(options).sources
        for split in [options.split] if options.split else sources:
            folder = options.folder / split
            remove_leftovers(folder, *folder.glob("*/"))
            new = export(sources[split], folder)
            print(f"{folder}: {len(sources[split])} images, {new} of them new")


if __name__ == "__main__":
    main()
