"""One example per file, in a folder or zip file: which files, their classes and their split."""

import functools
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from score_lib.data.files import BROKEN, IN_ZIP, OUTSIDE, Folder, Zip, hidden, report
from score_lib.data.names import Names
from score_lib.data.pixels import Unsuited
from score_lib.data.sources import DataError, Source, Subset, log_once
from score_lib.data.splits import (
    Parts,
    Places,
    Split,
    below_root,
    classes,
    counts,
    find_split,
    refuse_lonely_held_out,
)
from score_lib.disk.files import printable


class Tree:
    """Files of a folder or zip file, with classes and a split by the folders that they are in.

    Args:
        files: the folder or zip file.
        names: the files in it that are examples.
        places: their folders below the root.
        split: folders that are no classes, or None.
    Attributes:
        labels: (N,) int64.
        class_to_idx, num_classes: see `Source`.
    """

    def __init__(self, files: Folder | Zip, names: Names, places: Places, split: Split | None):
        self.files, self.names, self.places, self.split = files, names, places, split
        inside = [split.others(folder) if split else folder for folder in places.folders]
        labels = classes(inside)
        by_folder = torch.tensor([labels.get(folder[0], 0) if folder else 0 for folder in inside])
        self.labels = by_folder[torch.from_numpy(places.numbers)]
        self.class_to_idx = {} if "" in labels else labels
        self.num_classes = len(labels)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def above(self) -> Parts:
        """The folders that all files are in, from the root down to those of `places`."""
        whole = pathlib.PurePosixPath(self.names[0]).parts[:-1]
        return whole[: len(whole) - len(self.places.folders[self.places.numbers[0]])]

    def chosen(self, numbers: np.ndarray) -> "Tree":
        """The files of these numbers; classes without any are none of theirs."""
        names, places = self.names.chosen(numbers), self.places.chosen(numbers)
        return Tree(self.files, names, places, self.split)


def open_tree(
    files: Folder | Zip,
    suffixes: tuple[str, ...],
    noun: str,
    split: str | None,
    decode: Callable[[str], object] | None,
) -> Tree:
    """The files whose names end in one of the suffixes; the others are reported.

    Args:
        noun: how messages call an example, such as "image"; several of them with an s.
        split: see `find_split`.
        decode: for `data.on_error=skip`: raises a DataError for the files to leave out.  None: no
            file is left out, and a link that cannot be followed is an error.
    Raises:
        DataError: there are none.
    """
    names = _find(files, suffixes, noun, "raise" if decode is None else "skip")
    if decode is not None:
        everything, name = np.arange(len(names)), names.__getitem__
        good = readable(files, everything, lambda number: decode(name(number)), name, noun)
        names = names.chosen(good)
    places = below_root(names)
    return Tree(files, names, places, find_split(places.folders, split))


def _find(files: Folder | Zip, suffixes: tuple[str, ...], noun: str, on_error: str) -> Names:
    wanted = functools.partial(is_named, suffixes=suffixes)
    bad = bad_links(files, wanted, on_error)
    is_example = np.array([wanted(name) and name not in bad for name in files.names], dtype=bool)
    others = [name for name in files.names.chosen(~is_example) if name not in bad]
    report(files, others, f"are not {noun}s")
    if not is_example.any():
        raise DataError(
            f"there is no {noun} in {files.path}: names of {noun}s end in {', '.join(suffixes)}"
        )
    return files.names.chosen(np.flatnonzero(is_example))


def is_named(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is taken for an example, by its name."""
    return not hidden(name) and name.lower().endswith(suffixes)


def bad_links(files: Folder | Zip, wanted: Callable[[str], bool], on_error: str) -> dict[str, str]:
    """The links that cannot be followed and are left out, and the kind of each.

    Raises:
        DataError: with "raise", for a link that an example may have been meant by.
    """
    bad = files.bad_links()
    hurt = [
        name
        for name, kind in bad.items()
        if (kind == BROKEN and not hidden(name)) or (kind in (OUTSIDE, IN_ZIP) and wanted(name))
    ]
    if hurt and on_error == "raise":
        raise DataError(
            f"{printable(min(hurt))} in {files.path} is {bad[min(hurt)]}: mend or remove it, or "
            f"leave such files out with data.on_error=skip"
        )
    for kind in sorted(set(bad.values())):
        report(files, [name for name in bad if bad[name] == kind], f"are each {kind}")
    return bad


def readable(
    files: Folder | Zip,
    numbers: np.ndarray,
    decode: Callable[[int], object],
    name: Callable[[int], str],
    noun: str,
) -> np.ndarray:
    """Those of the numbers whose examples can be decoded; the others are reported.

    Args:
        files: where they are.
        decode: raises a DataError for an example that cannot be decoded.
        name: of an example, for the report.
    Raises:
        Unsuited: not a fault of the file: an option is missing.
        DataError: none can be read.
    """

    def is_readable(number: int) -> bool:
        try:
            decode(number)
        except Unsuited:
            raise
        except DataError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        good = np.array(list(pool.map(is_readable, numbers.tolist())), dtype=bool)
    report(files, [name(number) for number in numbers[~good].tolist()], "cannot be read")
    if not good.any():
        raise DataError(f"none of the {len(numbers)} {noun}s in {files.path} can be read")
    return numbers[good]


def split_tree(
    tree: Tree, source_of: Callable[[Tree], Source], path: str, wanted: str, noun: str
) -> tuple[Source, Source]:
    """Training and held-out part of files: by their folders, or else every tenth is held out.

    Args:
        source_of: makes the examples of files.
        path: of the data, as the user named it.
        wanted: `data.split`.
    """
    split = tree.split
    if not split:
        if not wanted:
            refuse_lonely_held_out(tree.places.folders, path, tree.above)
        return split_tenths(source_of(tree), path, noun, last=wanted == "last")
    parts = [split.part(folder) for folder in tree.places.folders]
    _tell(tree, parts, noun)
    trained_on, held_out = (
        np.array([part == chosen for part in parts])[tree.places.numbers]
        for chosen in (split.train, split.held_out)
    )
    used = np.flatnonzero(trained_on | held_out)
    source, trained_on = source_of(tree.chosen(used)), trained_on[used]
    return Subset(source, np.flatnonzero(trained_on)), Subset(source, np.flatnonzero(~trained_on))


def _tell(tree: Tree, parts: list[str], noun: str) -> None:
    """Log how many files are trained on, held out and left out."""
    totals, split = tree.places.totals(parts), tree.split
    train, held_out = (
        counts({name: totals[name]}, f"{noun}s") for name in (split.train, split.held_out)
    )
    others = {name: n for name, n in totals.items() if name not in (split.train, split.held_out)}
    others = counts(others, f"{noun}s") or "nothing"
    log_once(f"{tree.files.path}: trained on: {train}; held out: {held_out}; left out: {others}")


def divided(source: Source, path: str, noun: str, wanted: str) -> tuple[Source, Source]:
    """`split_tenths` of a source without folders, as `data.split` says.

    Raises:
        DataError: it names folders.
    """
    if wanted not in ("", "tenths", "last"):
        raise DataError(f"data.split={wanted!r} names folders, and {path} holds none")
    return split_tenths(source, path, noun, last=wanted == "last")


def split_tenths(
    source: Source, path: str, noun: str, *, last: bool = False
) -> tuple[Source, Source]:
    """Every tenth example is held out, or the last tenth; fewer than ten are all in both parts."""
    size = len(source)
    if size < 10:
        log_once(f"{path}: all {size} {noun}s are both trained on and held out: too few")
        return source, source
    numbers = np.arange(size)
    held_out = numbers >= size - size // 10 if last else numbers % 10 == 9
    train, test = Subset(source, numbers[~held_out]), Subset(source, numbers[held_out])
    which = "the last tenth" if last else f"every tenth {noun}"
    log_once(f"{path}: {which} is held out: {len(train)} to train on, {len(test)} not")
    return train, test
