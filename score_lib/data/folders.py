"""One example per file, in a folder or zip file: which files, their classes and their split."""

import abc
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.data.files import BROKEN, IN_ZIP, OUTSIDE, Folder, Zip, hidden, report
from score_lib.data.names import Names
from score_lib.data.pixels import Unsuited
from score_lib.data.sources import DataError, Source, Subset, log_once
from score_lib.data.splits import Places, classes, counts, refuse_lonely_held_out
from score_lib.disk.files import printable


class Noun(NamedTuple):
    """How messages call one example and several."""

    one: str
    many: str


class FileExamples(Source):
    """Files of a folder or zip file, one example each, decoded when they are read.

    Args:
        files: the folder or zip file.
        names: the files in it that are examples.
        places: their folders below the root.
        shape: of every example.
        split: folders that are no classes, or None.
    """

    noun: Noun

    def __init__(self, files: Folder | Zip, names: Names, places: Places, shape, split=None):
        self.files, self.shape, self.split = files, shape, split
        self._hold(names, places)

    def _hold(self, names: Names, places: Places) -> None:
        self.names, self.places = names, places
        split = self.split
        inside = [split.others(folder) if split else folder for folder in places.folders]
        labels = classes(inside)
        by_folder = torch.tensor([labels.get(folder[0], 0) if folder else 0 for folder in inside])
        self._labels = by_folder[torch.from_numpy(places.numbers)]
        self.class_to_idx = {} if "" in labels else labels
        self.num_classes = len(labels)

    def chosen(self, numbers: np.ndarray) -> "FileExamples":
        """The files of these numbers; classes without any are none of theirs."""
        other = copy.copy(self)
        other._hold(self.names.chosen(numbers), self.places.chosen(numbers))
        return other

    @abc.abstractmethod
    def decode(self, name: str) -> Tensor:
        """The example in a file, (1, *shape).

        Raises:
            DataError: it cannot be read; names the file.
        """

    def __len__(self) -> int:
        return len(self.names)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.cat([self.decode(self.names[n]) for n in numbers]), self._labels[numbers]


def find_files(files: Folder | Zip, suffixes: tuple[str, ...], noun: Noun, on_error: str) -> Names:
    """The files whose names end in one of the suffixes; the others are reported.

    Raises:
        DataError: there are none, or one is a link that cannot be followed.
    """

    def wanted(name: str) -> bool:
        return not hidden(name) and name.lower().endswith(suffixes)

    bad = _bad_links(files, wanted, on_error)
    is_example = np.array([wanted(name) and name not in bad for name in files.names], dtype=bool)
    others = [name for name in files.names.chosen(~is_example) if name not in bad]
    report(files, others, f"are not {noun.many}")
    if not is_example.any():
        raise DataError(
            f"there is no {noun.one} in {files.path}: names of {noun.many} end in "
            f"{', '.join(suffixes)}"
        )
    return files.names.chosen(np.flatnonzero(is_example))


def _bad_links(files: Folder | Zip, wanted: Callable[[str], bool], on_error: str) -> dict[str, str]:
    """The links that cannot be followed and are left out, and the kind of each."""
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


def readable(files: Folder | Zip, names: Names, decode: Callable[[str], Tensor], noun) -> Names:
    """The files that can be decoded; the others are reported.

    Raises:
        Unsuited: not a fault of the file: an option is missing.
        DataError: none can be read.
    """

    def is_readable(name: str) -> bool:
        try:
            decode(name)
        except Unsuited:
            raise
        except DataError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        good = np.array(list(pool.map(is_readable, names)))
    report(files, list(names.chosen(~good)), "cannot be read")
    if not good.any():
        raise DataError(f"none of the {len(names)} {noun.many} in {files.path} can be read")
    return names.chosen(good)


def split_files(source: FileExamples, path: str, wanted: str) -> tuple[Source, Source]:
    """Training and held-out part of files: by their folders, or else every tenth is held out.

    Args:
        source: with the split that `find_split` found for `wanted`.
        path: of the data, as the user named it.
        wanted: `data.split`.
    """
    if source.split:
        return _split_folders(source)
    if not wanted:
        refuse_lonely_held_out(source.places.folders, path)
    return split_tenths(source, path, source.noun)


def split_tenths(source: Source, path: str, noun: Noun) -> tuple[Source, Source]:
    """Every tenth example is held out; fewer than ten are all in both parts."""
    if len(source) < 10:
        log_once(f"{path}: all {len(source)} {noun.many} are both trained on and held out: too few")
        return source, source
    numbers = np.arange(len(source))
    train, test = Subset(source, numbers[numbers % 10 != 9]), Subset(source, numbers[9::10])
    log_once(
        f"{path}: every tenth {noun.one} is held out: {len(train)} to train on, {len(test)} not"
    )
    return train, test


def _split_folders(source: FileExamples) -> tuple[Source, Source]:
    places, split, many = source.places, source.split, source.noun.many
    folders = [split.part(folder) for folder in places.folders]
    totals = places.totals(folders)
    train, held_out = (counts({name: totals[name]}, many) for name in (split.train, split.held_out))
    others = {name: n for name, n in totals.items() if name not in (split.train, split.held_out)}
    others = counts(others, many) or "nothing"
    log_once(f"{source.files.path}: trained on: {train}; held out: {held_out}; left out: {others}")
    trained_on = np.array([folder == split.train for folder in folders])[places.numbers]
    held_out = np.array([folder == split.held_out for folder in folders])[places.numbers]
    used = np.flatnonzero(trained_on | held_out)
    trained_on, source = trained_on[used], source.chosen(used)
    return Subset(source, np.flatnonzero(trained_on)), Subset(source, np.flatnonzero(~trained_on))
