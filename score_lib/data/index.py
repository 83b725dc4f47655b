"""Indexes: listings of large folders, kept in files for later starts."""

import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from score_lib.data.listing import SMALL, Listing, is_current, list_tree
from score_lib.data.names import Names
from score_lib.disk.arrays import load_arrays, save_arrays

log = logging.getLogger(__name__)

_VERSION = 1
_NAMES = ("names", "links", "folders")
_ARRAYS = [f"{name}_{part}" for name in _NAMES for part in ("text", "ends")]


def known_listing(path: pathlib.Path) -> Listing:
    """The listing of a folder: that of its index, if it has one that is up to date.

    Otherwise the folder is listed, and if it is large, or had an index, it gets one: a hidden file
    in the folder, or, where that cannot be written, in the user's cache.  Several processes may do
    so at once: an index is written whole or not at all, and each of them is right.

    Raises:
        DataError: see `list_tree`.
    """
    fault = ""
    for file in index_places(path):
        try:
            listing = _load(file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            fault = f"{error}"
        else:
            if is_current(path, listing):
                return listing
            fault = f"{file} is out of date"
    if fault:
        log.warning("%s is listed again: the index %s", path, fault)
    listing = list_tree(path)
    if fault or len(listing.names) >= SMALL:
        _save(path, listing)
    return listing


def index_places(path: pathlib.Path, kind: str = "index") -> Iterator[pathlib.Path]:
    """Where an index of a folder may be: as a hidden file in it, or in the user's cache."""
    yield path / f".score_lib_{kind}.npz"
    if file := cache_file(kind, path, ".npz"):
        yield file


def cache_file(
    kind: str, path: str | os.PathLike, suffix: str, *state: object
) -> pathlib.Path | None:
    """A file in the user's cache for what is known of a path in a state; None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # a user without a home
        return None
    name = os.fsencode(os.path.realpath(path)) + "".join(f"\n{part}" for part in state).encode()
    digest = hashlib.blake2b(name, digest_size=16).hexdigest()
    return pathlib.Path(cache, "score_lib", f"{kind}_{digest}{suffix}")


def save_index(path: pathlib.Path, about: str, kind: str = "index", **arrays: np.ndarray) -> None:
    """Write an index of a folder to the first place that can be written, if any."""
    errors = []
    for file in index_places(path, kind):
        try:
            save_arrays(file, **arrays)
        except OSError as error:
            errors.append(str(error))
        else:
            log.info("%s: an index of %s is kept in %s", path, about, file)
            return
    log.warning("%s is listed at each start, since no index can be kept: %s", path, errors[-1])


def _save(path: pathlib.Path, listing: Listing) -> None:
    arrays = {"states": listing.states, "begun": np.int64(listing.begun)}
    for name in _NAMES:
        arrays |= packed_names(name, getattr(listing, name))
    save_index(path, f"{len(listing.names)} files", version=np.int64(_VERSION), **arrays)


def _load(file: pathlib.Path) -> Listing:
    """Read an index.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or something else.
    """
    arrays = load_arrays(file, ["version", "begun", "states", *_ARRAYS])
    states = arrays["states"]
    if any(arrays[name].shape or arrays[name].dtype != np.int64 for name in ("version", "begun")):
        raise ValueError(f"{file} holds something else")
    if arrays["version"] != _VERSION:
        raise ValueError(f"{file} is of version {arrays['version']}, not {_VERSION}")
    names = [unpacked_names(file, arrays, name) for name in _NAMES]
    if states.dtype != np.int64 or states.shape != (len(names[-1]), 4) or names[-1][0]:
        raise ValueError(f"{file} holds something else")
    return Listing(*names, states, int(arrays["begun"]))


def packed_names(name: str, names: Names) -> dict[str, np.ndarray]:
    """Names as arrays of an index."""
    return {f"{name}_text": names.text, f"{name}_ends": names.ends}


def unpacked_names(file: pathlib.Path, arrays: Mapping[str, np.ndarray], name: str) -> Names:
    """Names in an index; ValueError unless its arrays are those of names."""
    text, ends = arrays[f"{name}_text"], arrays[f"{name}_ends"]
    plain = text.dtype == np.uint8 and ends.dtype == np.int64 and text.ndim == ends.ndim == 1
    edges = np.concatenate([[0], ends, [text.size]]) if plain else np.array([1, 0])
    if (np.diff(edges) < 0).any() or edges[-2] != edges[-1]:
        raise ValueError(f"{file} holds something else")
    return Names(text, ends)
