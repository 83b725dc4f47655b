"""The names of all files below a folder, and whether they are still those."""

import contextlib
import hashlib
import os
import time
from typing import NamedTuple

import numpy as np

from score_lib.data.names import Names
from score_lib.data.sources import DataError
from score_lib.disk.logs import progress_bar

# Name of an index, which is kept in the folder that it describes and is none of its files.
INDEX = ".score_lib_index.npz"
# Fewer files are listed within 0.05 s, so that an index would save nothing that is felt.
SMALL = 10_000
# Times of folders are no finer than this on any usual file system: nanoseconds.
_TICK = 2 * 10**9
# Levels of folders; system calls refuse longer paths.
_DEEPEST = 900


class Listing(NamedTuple):
    """All names below a folder, with "/" between folders, and the state in which they were found.

    Attributes:
        names: files, and links of any kind, sorted.
        links: those that are links.
        folders: the folder itself, as "", and all folders below it.
        states: of each folder, (F, 4) int64: times of the last change of its entries and of
            itself, inode, and a digest of the names in it.
        begun: when the listing began, in nanoseconds.
    """

    names: Names
    links: Names
    folders: Names
    states: np.ndarray
    begun: int


class _Entries(NamedTuple):
    """The names in one folder."""

    files: list[str]
    links: list[str]
    folders: list[str]

    def digest(self) -> int:
        """A number that differs, except by an odd chance, wherever the entries do."""
        text = "//".join("/".join(sorted(names)) for names in self)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "little", signed=True)


def list_tree(path: str | os.PathLike) -> Listing:
    """List a folder and all folders below it.  Links to folders are not followed.

    Raises:
        DataError: a folder cannot be listed, or folders are too deep.
    """
    begun, names, links, states = time.time_ns(), [], [], {}
    waiting = [""]
    with contextlib.ExitStack() as stack:
        bar = None
        while waiting:
            folder = waiting.pop()
            if folder.count("/") >= _DEEPEST:
                raise DataError(f"{path} has folders inside folders that are too deep")
            try:
                # The times are taken first, so that a change during the listing is seen later.
                times, entries = _times(_below(path, folder)), _scan(_below(path, folder))
            except OSError as error:
                raise DataError(
                    f"the folder {error.filename} cannot be listed: {error.strerror}"
                ) from error
            states[folder] = *times, entries.digest()
            prefix = f"{folder}/" if folder else ""
            names += [prefix + name for name in entries.files + entries.links]
            links += [prefix + name for name in entries.links]
            waiting += [prefix + name for name in entries.folders]
            if bar is None and len(names) > SMALL:
                bar = stack.enter_context(progress_bar(None, 0, " files"))
            if bar is not None:
                bar.update(len(names) - bar.n)
    numbers = np.array(list(states.values()), dtype=np.int64)
    return Listing(Names.of(sorted(names)), Names.of(links), Names.of(states), numbers, begun)


def is_current(path: str | os.PathLike, listing: Listing) -> bool:
    """Whether a folder still holds the names of a listing, without listing most of it.

    A file that is added, removed or renamed changes the times of its folder.  Where this cannot be
    relied on, the names are compared: in folders changed so shortly before the listing that a
    later change may have the same time, and in the folder itself, where an index may be written.
    """
    try:
        for folder, (*times, digest) in zip(listing.folders, listing.states.tolist(), strict=True):
            place = _below(path, folder)
            if folder and _times(place) != tuple(times):
                return False
            doubtful = not folder or max(times[:2]) > listing.begun - _TICK
            if doubtful and _scan(place).digest() != digest:
                return False
    except OSError:  # a folder is gone
        return False
    return True


def _below(path: str | os.PathLike, folder: str) -> str:
    return os.path.join(path, folder) if folder else os.fspath(path)


def _times(folder: str) -> tuple[int, int, int]:
    found = os.stat(folder)
    inode = (found.st_ino + 2**63) % 2**64 - 2**63  # as a signed number
    return found.st_mtime_ns, found.st_ctime_ns, inode


def _scan(folder: str) -> _Entries:
    entries = _Entries([], [], [])
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_symlink():
                entries.links.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                entries.folders.append(entry.name)
            elif entry.name != INDEX and not entry.name.startswith(f".{INDEX}."):  # being written
                entries.files.append(entry.name)
    return entries
