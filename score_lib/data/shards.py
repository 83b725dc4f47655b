"""Data sets in several files, shards: which files there are, and which of them are held out."""

import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from score_lib.data.files import hidden, refuse_broken
from score_lib.data.folders import split_tenths
from score_lib.data.images import IMAGE
from score_lib.data.sources import DataError, Source, Subset, log_once
from score_lib.data.splits import HELD_OUT, two_parts, usual
from score_lib.disk.files import printable

# Limit on the files of a pattern: a misprint may mean billions.
MOST = 1 << 17
_COUNTED = re.compile(r"(.*)-\d+-of-(\d{1,9})[^/]*", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")


def shard_files(path: str, suffixes: tuple[str, ...]) -> tuple[pathlib.Path, list[str]]:
    """The folder of a data set, and the names of its files below it, sorted.

    Links are followed to files, wherever they are, and not to folders.

    Args:
        path: a folder, which is searched recursively, a file, or a pattern of files with braces,
            such as "shard-{000000..000012}.tar" or "{train,val}.tar".
        suffixes: how the files' names end, in lower case.
    Raises:
        DataError: there is no such file, one is a broken link, or a folder cannot be listed.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        names = sorted(_below(place, suffixes))
        if not names:
            raise DataError(f"data.path: there is no file in {place} that ends in {_or(suffixes)}")
        return place, names
    expanded = list(itertools.islice(expand(str(place)), MOST + 1))
    if len(expanded) > MOST:
        raise DataError(f"data.path={path!r} stands for more than {MOST} files")
    if not expanded:
        raise DataError(
            f"data.path={path!r} stands for no file: ranges go up, as in {{000000..000012}}"
        )
    for name in expanded:
        if not os.path.isfile(name):
            raise DataError(f"data.path: there is no file or folder {name!r}")
        if not name.lower().endswith(suffixes):
            raise DataError(f"data.path: the name of {name} must end in {_or(suffixes)}")
    root = pathlib.Path(os.path.commonpath([os.path.dirname(name) or "." for name in expanded]))
    return root, sorted({os.path.relpath(name, root) for name in expanded})


def _below(place: pathlib.Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    for folder, folders, files in os.walk(place, onerror=_refuse):
        folders[:] = itertools.filterfalse(hidden, folders)  # some, of systems, cannot be listed
        for file in itertools.filterfalse(hidden, files):
            path = os.path.join(folder, file)
            if not file.lower().endswith(suffixes):
                continue
            if os.path.isfile(path):
                yield pathlib.PurePath(os.path.relpath(path, place)).as_posix()
            else:
                refuse_broken(path)


def _refuse(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror}") from error


def _or(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes)


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces stands for: ranges of numbers, or alternatives."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    for choice in _choices(found[1]):
        yield from expand(pattern[: found.start()] + choice + pattern[found.end() :])


def _choices(inside: str) -> Iterator[str]:
    if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside):
        first, last = numbers.groups()
        width = len(first) if first[0] == "0" else 0
        return (str(n).zfill(width) for n in range(int(first), int(last) + 1))
    return iter(inside.split(","))


class Shards(NamedTuple):
    """The files of a data set that are used, below a root.

    Attributes:
        train: whether each is trained on; None: every tenth image of all files is held out.
        held_out: whether each is held out.
    """

    root: pathlib.Path
    names: list[str]
    train: np.ndarray | None = None
    held_out: np.ndarray | None = None

    def divided(
        self, source: Source, numbers: np.ndarray, files: np.ndarray
    ) -> tuple[Source, Source]:
        """The examples of a source with these numbers that are trained on, and those held out.

        Args:
            files: the number of the file that each of them is in.
        Raises:
            DataError: there are none in one of these parts.
        """
        if self.train is None:
            return split_tenths(Subset(source, numbers), str(self.root), IMAGE)
        parts = []
        for goal, chosen in (("train on", self.train), ("hold out", self.held_out)):
            parts.append(Subset(source, numbers[chosen[files]]))
            if not len(parts[-1]):
                raise DataError(f"{self.root} has no image to {goal} in the files of that part")
        return tuple(parts)


def split_shards(root: pathlib.Path, names: Sequence[str], wanted: str) -> Shards:
    """Which files are trained on and which are held out; the others are left out.

    Their folders and the words of their own names say so: `train/000.tar`, `photos-val-000.tar`.

    Args:
        wanted: `data.split`: "" for the usual names, see `splits`, else every tenth image;
            "tenths" for the latter; "TRAIN:HELDOUT" for files with these words.
    Raises:
        DataError: there are no such files, or several that might be meant.
    """
    if wanted == "tenths":
        return Shards(root, list(names))
    words = [_words(name) for name in names]
    chosen = _chosen_parts(set().union(*words), wanted, root)
    if chosen is None:
        return Shards(root, list(names))
    train, held_out = (np.array([part in own for own in words]) for part in chosen)
    if chosen[0] != chosen[1] and (both := np.flatnonzero(train & held_out)).size:
        name = printable(names[both[0]])
        raise DataError(f"{name} in {root} is called both {chosen[0]} and {chosen[1]}")
    used = np.flatnonzero(train | held_out)
    log_once(
        f"{root}: trained on: {train.sum()} files of {chosen[0]}; held out: {held_out.sum()} of "
        f"{chosen[1]}; left out: {len(names) - len(used)}"
    )
    return Shards(root, [names[k] for k in used], train[used], held_out[used])


def require_complete(root: pathlib.Path, names: Sequence[str]) -> None:
    """Refuse files called ...-00002-of-00005 unless there are as many, of one total.

    Raises:
        DataError: some are missing, or there are two totals; names those that are there.
    """
    counted = filter(None, map(_COUNTED.fullmatch, names))
    totals: dict[str, str] = {}
    for (start, total), count in Counter(found.groups() for found in counted).items():
        if totals.setdefault(start, total) != total:
            raise DataError(
                f"{root} has files {printable(start)}-...-of-{totals[start]} and -of-{total}, two "
                "versions of the same data: remove one"
            )
        if count != int(total):
            raise DataError(
                f"{root} has {count} of the files {printable(start)}-...-of-{total}: get the "
                "others, or name those to use by a pattern in data.path"
            )


def _chosen_parts(known: set[str], wanted: str, place: pathlib.Path) -> Sequence[str] | None:
    """The words that mark files to train on, and files to hold out; None without such."""
    if wanted:
        chosen = two_parts(wanted)
        if not known.issuperset(chosen):
            shown = ", ".join(map(printable, sorted(known)[:20]))
            raise DataError(
                f"data.split={wanted!r} names parts that {place} does not have: files and folders "
                f"there are called {shown}"
            )
        return chosen
    if found := usual(known, strict=True, kind="part"):
        return found
    held_out = set(itertools.chain(*HELD_OUT))
    if lonely := sorted(name for name in known if name.lower() in held_out):
        raise DataError(
            f"{place} has a part called {lonely[0]}, as if to hold out, but none called train: "
            f"set data.split=TRAIN:{lonely[0]}, or data.split=tenths to train on it"
        )
    return None


def _words(name: str) -> set[str]:
    """The folders of a file, its name without numbers, and the words in that."""
    *folders, own = pathlib.PurePosixPath(name).parts
    stem = re.sub(r"([-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?)?\.\w+$", "", own)
    return {word for word in (*folders, stem, *re.split(r"[-_. ]+", stem)) if word}
