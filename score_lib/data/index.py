"""Indexes: listings of large folders, kept in files for later starts."""

import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from score_lib.data.listing import INDEX, SMALL, Listing, is_current, list_tree
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
    for file in _places(path):
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


def _places(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where the index of a folder may be."""
    yield path / INDEX
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # not for a user without a home
        name = os.fsencode(os.path.realpath(path))
        digest = hashlib.blake2b(name, digest_size=16).hexdigest()
        yield pathlib.Path(cache, "score_lib", f"index_{digest}.npz")


def _save(path: pathlib.Path, listing: Listing) -> None:
    """Write an index to the first place that can be written, if any."""
    arrays = {"states": listing.states, "begun": np.int64(listing.begun)}
    for name in _NAMES:
        names = getattr(listing, name)
        arrays |= {f"{name}_text": names.text, f"{name}_ends": names.ends}
    errors = []
    for file in _places(path):
        try:
            save_arrays(file, version=np.int64(_VERSION), **arrays)
        except OSError as error:
            errors.append(str(error))
        else:
            log.info("%s: an index of %d files is kept in %s", path, len(listing.names), file)
            return
    log.warning("%s is listed at each start, since no index can be kept: %s", path, errors[-1])


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
    names = [_names(file, arrays[f"{name}_text"], arrays[f"{name}_ends"]) for name in _NAMES]
    if states.dtype != np.int64 or states.shape != (len(names[-1]), 4) or names[-1][0]:
        raise ValueError(f"{file} holds something else")
    return Listing(*names, states, int(arrays["begun"]))


def _names(file: pathlib.Path, text: np.ndarray, ends: np.ndarray) -> Names:
    plain = text.dtype == np.uint8 and ends.dtype == np.int64 and text.ndim == ends.ndim == 1
    edges = np.concatenate([[0], ends, [text.size]]) if plain else np.array([1, 0])
    if (np.diff(edges) < 0).any() or edges[-2] != edges[-1]:
        raise ValueError(f"{file} holds something else")
    return Names(text, ends)
