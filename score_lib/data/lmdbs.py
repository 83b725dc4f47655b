"""LSUN from the LMDB databases that its authors publish: one image file per key."""

import contextlib
import functools
import os
import pathlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from score_lib.data import preprocess
from score_lib.data.files import MAX_BYTES
from score_lib.data.images import decode
from score_lib.data.pixels import Pixels
from score_lib.data.sources import DataError, Source, needed
from score_lib.disk.files import file_state

_ONE_AT_A_TIME = threading.Lock()


def open_lsun(path: str, category: str, shape: tuple[int, int, int]) -> tuple[Source, Source]:
    """The images of a category, (3, H, H): those to train on and the 300 of the validation part.

    Args:
        path: the folder of CATEGORY_train_lmdb/ and CATEGORY_val_lmdb/.
        category: such as "church_outdoor".
    Raises:
        DataError: a database or the package `lmdb` is missing, or a database is damaged.
    """
    root = pathlib.Path(os.path.expanduser(path))
    folders = [root / f"{category}_{part}_lmdb" for part in ("train", "val")]
    for folder in folders:
        if not _file(folder).is_file():
            raise DataError(
                f"data.path: there is no {_file(folder)}: unpack {folder.name}.zip of LSUN's "
                f"authors in {root}, or leave data.path empty for tensorflow-datasets"
            )
    return LmdbImages(folders[0], shape), LmdbImages(folders[1], shape)


class LmdbImages(Source):
    """The image files in a database, in the order of its keys, cropped and resized as published."""

    def __init__(self, folder: pathlib.Path, shape: tuple[int, int, int]):
        self._files, self.shape = Database(folder), shape
        self._keys = _keys(str(folder), file_state(_file(folder)))
        if not len(self):
            raise DataError(f"there is no image in {folder}")
        self.images([0])  # a wrong kind of database is an error here, before training starts

    def __len__(self) -> int:
        return len(self._keys[1]) - 1

    def read(self, numbers: np.ndarray) -> tuple[Tensor, None]:
        joined, ends = self._keys
        names = [joined[ends[n] : ends[n + 1]].decode("latin-1") for n in numbers.tolist()]
        images = [decode(self._files, name, 3, Pixels()) for name in names]
        return torch.cat([preprocess.lsun(image, self.shape[1]) for image in images]), None


class Database:
    """The values of an LMDB database as files; their names are the keys in Latin-1."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder

    def read(self, name: str) -> bytes:
        """The file of a key."""
        with _transaction(self.path) as transaction:
            value = transaction.get(name.encode("latin-1"))
            if value is None or len(value) > MAX_BYTES:
                raise OSError("it is missing, or too large for an image")
            return bytes(value)


@functools.lru_cache(maxsize=2)  # of millions of images; a run opens its data several times
def _keys(folder: str, state: tuple[int, int]) -> tuple[bytes, np.ndarray]:
    """All keys, joined, and where each starts, with the end; cached until the file changes."""
    with _transaction(pathlib.Path(folder)) as transaction:
        keys = list(map(bytes, transaction.cursor().iternext(keys=True, values=False)))
    return b"".join(keys), np.cumsum([0, *map(len, keys)])


@contextlib.contextmanager
def _transaction(folder: pathlib.Path) -> Iterator:
    """Context in which a database is open for reading.

    The library opens a database once in a process and counts those of the process that it was
    forked from, so none stays open.  Opening takes a hundredth of the time to decode an image.
    """
    lmdb = needed("lmdb", f"{folder} needs lmdb, which is missing: pip install lmdb")
    file = _file(folder)
    with _ONE_AT_A_TIME:
        try:
            with lmdb.open(str(folder), readonly=True, lock=False, readahead=False) as environment:
                _check_size(file, environment)
                with environment.begin(buffers=True) as transaction:
                    yield transaction
        except lmdb.Error as error:
            raise DataError(f"{file} is not a readable LMDB database: {error}") from error


def _file(folder: pathlib.Path) -> pathlib.Path:
    return (folder / "data").with_suffix(".mdb")


def _check_size(file: pathlib.Path, environment) -> None:
    """Refuse a file that is cut off: reading behind its end, as mapped, would kill the process."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (size := file.stat().st_size) < needed:
        raise DataError(f"{file} is cut off: it has {size} of {needed} bytes: unpack it again")
