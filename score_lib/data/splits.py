"""Which files of a folder are trained on, which are held out, and the classes of both."""

import collections
import itertools
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from score_lib.data.sources import DataError
from score_lib.disk.files import printable

TRAINING = ("train", "training")
# The first kind that is there is held out; the others are left out.
HELD_OUT = (
    ("test", "testing"),
    ("holdout", "heldout", "hold-out", "held-out", "hold_out", "held_out"),
    ("val", "valid", "validation", "dev", "eval"),
)
# As in val2017 and valid_64x64.
_NUMBER = re.compile(r"[-_. ]?[0-9]+(x[0-9]+)?$")
Parts = tuple[str, ...]  # the folders that a file is in, from the root down


class Places(NamedTuple):
    """The folders of very many files: each distinct one, and the number of that of each file."""

    folders: list[Parts]
    numbers: np.ndarray  # (N,) int32

    def chosen(self, files: np.ndarray) -> "Places":
        """The folders of some of the files; those without any of them are left out."""
        used, numbers = np.unique(self.numbers[files], return_inverse=True)
        return Places([self.folders[k] for k in used], numbers.astype(np.int32))

    def totals(self, names: Iterable[str]) -> dict[str, int]:
        """Number of files by name, from a name for each folder."""
        totals = collections.Counter()
        sizes = np.bincount(self.numbers, minlength=len(self.folders))
        for name, size in zip(names, sizes.tolist(), strict=True):
            totals[name] += size
        return totals


class Split(NamedTuple):
    """Folders whose files are trained on and held out, at a level below the root."""

    level: int
    train: str
    held_out: str

    def part(self, folder: Parts) -> str:
        """The folder of a file at this level; "" without one."""
        return folder[self.level] if len(folder) > self.level else ""

    def others(self, folder: Parts) -> Parts:
        """The folders without that one."""
        return folder[: self.level] + folder[self.level + 1 :]


def places_of(names: Iterable[str]) -> Places:
    """The folders of files, at least one."""
    known: dict[str, int] = {}
    numbers = [known.setdefault(name[: name.rfind("/") + 1], len(known)) for name in names]
    folders = [pathlib.PurePosixPath(folder).parts for folder in known]
    return Places(folders, np.array(numbers, dtype=np.int32))


def below_root(names: Iterable[str]) -> Places:
    """The folders of files, at least one, without those that all files share."""
    folders, numbers = places_of(names)
    pairs = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Places([folder[common:] for folder in folders], numbers)


def find_split(folders: Sequence[Parts], wanted: str | None) -> Split | None:
    """The folders of the split, or None where every tenth image is held out.

    Args:
        wanted: `data.split`: "" for folders of the usual names, in any case; "tenths" or "last" for
            none; "TRAIN:HELDOUT" for folders of these names.  None is "" where no split is needed.
    Raises:
        DataError: there are no such folders, or several of the usual names.
    """
    if wanted in ("tenths", "last"):
        return None
    for level in range(max(map(len, folders))):
        names = {folder[level] for folder in folders if len(folder) > level}
        if wanted:
            train, _, held_out = wanted.partition(":")
            if {train, held_out} <= names:
                return Split(level, train, held_out)
        elif found := usual(names, strict=wanted is not None):
            return Split(level, *found)
    if wanted:
        known = sorted({folder[0] for folder in folders if folder})
        raise DataError(
            f"data.split={wanted!r} names folders that do not lie side by side among the data: "
            f"there are {', '.join(map(printable, known[:20])) or 'none'}"
        )
    return None


def two_parts(wanted: str) -> tuple[str, str]:
    """The names of the part to train on and of the part to hold out, from `data.split`.

    Raises:
        DataError: these are not two names.
    """
    names = wanted.split(":")
    if len(names) != 2:
        raise DataError(
            f"data.split={wanted!r} should name the part to train on and the part to hold out, as "
            f"in data.split=train:validation, or be tenths"
        )
    return names[0], names[1]


def usual(names: Collection[str], strict: bool, kind: str = "folder") -> tuple[str, str] | None:
    """Names for the part to train on and the part to hold out, if some are the usual ones.

    Raises:
        DataError: with `strict`, several are those of one part; calls each a `kind`.
    """
    train = [name for name in names if name.lower() in TRAINING]
    kinds = [[name for name in names if name.lower() in others] for others in HELD_OUT]
    held_out = next(filter(None, kinds), [])
    if not train or not held_out:
        return None
    if strict and len(several := max(train, held_out, key=len)) > 1:
        raise DataError(
            f"the {kind}s {', '.join(sorted(several))} all have names of one part of the data: "
            f"choose two {kind}s, as in data.split={min(train)}:{min(held_out)}"
        )
    return min(train), min(held_out)


def refuse_lonely_held_out(folders: Sequence[Parts], place: str, shared: Parts) -> None:
    """Refuse to train on a folder whose name says that it is held out.

    Args:
        shared: the folders above these, which all files are in.
    Raises:
        DataError: names the folder, and the options.
    """
    for level in range(max(map(len, folders), default=0)):
        names = {folder[level] for folder in folders if len(folder) > level}
        if found := _held_out(names):
            break
    else:
        names, found = set(), _held_out(shared)
    if found:
        # First of all one that is called train2017 or the like.
        others = ((not name.lower().startswith(TRAINING), name) for name in names - set(found))
        _, other = min(others, default=(True, "TRAIN"))
        raise DataError(
            f"{place} has a folder {found[0]}, as if to hold out, but none called train: set "
            f"data.split={other}:{found[0]}, or data.split=tenths where it is a class"
        )


def _held_out(names: Collection[str]) -> list[str]:
    """Those with a name of held-out data, or one with a number, as val2017 beside train2017."""
    words = {name: name.lower() for name in names}
    bare = {name: _NUMBER.sub("", word) for name, word in words.items()}
    if usual(set(bare.values()), strict=False):
        words = bare
    return sorted(name for name in names if words[name] in itertools.chain(*HELD_OUT))


def natural(name: str) -> tuple[list, str]:
    """A key that sorts names with numbers in them by the numbers: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    for k, digits in enumerate(parts[1::2]):
        number = digits.lstrip("0")  # compared as text: Python limits the length of an int
        parts[2 * k + 1] = (len(number), number)
    return parts, name


def classes(folders: Iterable[Parts]) -> dict[str, int]:
    """Class -> label: first-level folders in natural order; {"": 0} unless all files have one.

    Raises:
        DataError: the names of two are the same letters in different bytes.
    """
    names = {folder[0] if folder else "" for folder in folders}
    titles = {""} if "" in names else names
    spelt: dict[str, str] = {}
    for title in titles:
        letters = unicodedata.normalize("NFC", title)
        if spelt.setdefault(letters, title) != title:
            raise DataError(
                f"two folders of classes are called {letters}, in composed and in decomposed "
                f"letters of Unicode: give both the same name, as in train/ and test/"
            )
    return {title: label for label, title in enumerate(sorted(titles, key=natural))}


def counts(totals: Mapping[str, int], many: str) -> str:
    """For messages: train/ (12 images), test/ (3 images), where `many` is "images"."""
    return ", ".join(
        f"{printable(folder)}/ ({n} {many})" if folder else f"no folder ({n} {many})"
        for folder, n in sorted(totals.items())
    )
