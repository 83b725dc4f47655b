"""Which images of a folder are trained on, which are held out, and the classes of both."""

import collections
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from score_lib.data.sources import DataError
from score_lib.disk.files import printable

TRAINING = ("train", "training")
# The first kind that is there is held out; the others are left out.
HELD_OUT = (
    ("test", "testing"),
    ("holdout", "heldout", "hold-out", "held-out", "hold_out", "held_out"),
    ("val", "valid", "validation", "dev", "eval"),
)
Parts = tuple[str, ...]  # of the name of a file: its folders, and its own name


class Split(NamedTuple):
    """Folders whose images are trained on and held out, at a level below the root."""

    level: int
    train: str
    held_out: str

    def part(self, parts: Parts) -> str:
        """The folder of an image at this level; "" without one."""
        return parts[self.level] if len(parts) > self.level + 1 else ""

    def others(self, parts: Parts) -> Parts:
        """The name without that folder."""
        return parts[: self.level] + parts[self.level + 1 :]


def below_root(names: Iterable[str]) -> dict[str, Parts]:
    """Name -> its folders and file name, without the folders that all images share."""
    parts = {name: pathlib.PurePosixPath(name).parts for name in names}
    folders = [part[:-1] for part in parts.values()]
    pairs = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return {name: part[common:] for name, part in parts.items()}


def find_split(parts: Mapping[str, Parts], wanted: str | None) -> Split | None:
    """The folders of the split, or None where every tenth image is held out.

    Args:
        wanted: `data.split`: "" for folders of the usual names, in any case; "tenths" for none;
            "TRAIN:HELDOUT" for folders of these names.  None is "" where no split is needed.
    Raises:
        DataError: there are no such folders, or several of the usual names.
    """
    if wanted == "tenths":
        return None
    for level in range(max(map(len, parts.values())) - 1):
        folders = {part[level] for part in parts.values() if len(part) > level + 1}
        if wanted:
            train, _, held_out = wanted.partition(":")
            if {train, held_out} <= folders:
                return Split(level, train, held_out)
        elif found := _usual(folders, strict=wanted is not None):
            return Split(level, *found)
    if wanted:
        known = sorted({part[0] for part in parts.values() if len(part) > 1})
        raise DataError(
            f"data.split={wanted!r} names folders that do not lie side by side among the images: "
            f"there are {', '.join(map(printable, known[:20])) or 'none'}"
        )
    return None


def _usual(folders: set[str], strict: bool) -> tuple[str, str] | None:
    train = [name for name in folders if name.lower() in TRAINING]
    kinds = [[name for name in folders if name.lower() in kind] for kind in HELD_OUT]
    held_out = next(filter(None, kinds), [])
    if not train or not held_out:
        return None
    if strict and len(several := max(train, held_out, key=len)) > 1:
        raise DataError(
            f"the folders {', '.join(sorted(several))} all have names of one part of the data: "
            f"choose two folders, as in data.split={min(train)}:{min(held_out)}"
        )
    return min(train), min(held_out)


def refuse_lonely_held_out(parts: Iterable[Parts], place: str) -> None:
    """Refuse to train on a folder whose name says that it is held out.

    Raises:
        DataError: names the folder, and the options.
    """
    folders = {part[0] for part in parts if len(part) > 1}
    if found := sorted(name for name in folders if name.lower() in itertools.chain(*HELD_OUT)):
        others = sorted(folders - set(found)) or ["TRAIN"]
        raise DataError(
            f"{place} has a folder {found[0]}, as if to hold out, but none called train: set "
            f"data.split={others[0]}:{found[0]}, or data.split=tenths where it is a class"
        )


def natural(name: str) -> tuple[list, str]:
    """A key that sorts names with numbers in them by the numbers: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    for k, digits in enumerate(parts[1::2]):
        number = digits.lstrip("0")  # compared as text: Python limits the length of an int
        parts[2 * k + 1] = (len(number), number)
    return parts, name


def classes(parts: Iterable[Parts]) -> dict[str, int]:
    """Class -> label: first-level folders in natural order; {"": 0} unless all images have one."""
    folders = {part[0] if len(part) > 1 else "" for part in parts}
    titles = {""} if "" in folders else folders
    return {title: label for label, title in enumerate(sorted(titles, key=natural))}


def counts(folders: Iterable[str]) -> str:
    """For messages: train/ (12 images), test/ (3 images)."""
    counted = sorted(collections.Counter(folders).items())
    return ", ".join(
        f"{printable(folder)}/ ({n} images)" if folder else f"no folder ({n} images)"
        for folder, n in counted
    )
