"""Columns of Arrow and Parquet files, by row and without loading the files."""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from score_lib.data.index import cache_file
from score_lib.data.sources import DataError, PerProcess, needed
from score_lib.disk.files import atomic_write, file_state
from score_lib.disk.logs import progress_bar

log = logging.getLogger(__name__)

SUFFIXES = (".arrow", ".parquet")
# The version that was tried.
PACKAGE = "pyarrow==26.0.1"
# Rows of Parquet files that are unpacked at once.
CHUNK = 256
# How a file of Arrow's format for random access starts; a stream has no such mark.
_MAGIC = b"ARROW1"


class Column(NamedTuple):
    """A column: its name, how it is stored, and how the package `datasets` describes it.

    Attributes:
        type: as pyarrow writes it, such as "int64" or "struct<bytes: binary, path: string>".
        feature: such as {"_type": "ClassLabel", "names": [...]}; empty without a description.
    """

    name: str
    type: str
    feature: dict


def arrow():
    """The package pyarrow, with the parts used here.

    Raises:
        DataError: it is missing.
    """
    missing = f"Arrow and Parquet files need the package pyarrow: pip install {PACKAGE}"
    for part in ("pyarrow.ipc", "pyarrow.parquet"):
        needed(part, missing)
    return needed("pyarrow", missing)


def columns_of(file: pathlib.Path) -> list[Column]:
    """The columns of an Arrow or Parquet file, from its header alone.

    Raises:
        DataError: it cannot be read.
    """
    pyarrow = arrow()
    try:
        if file.suffix.lower() == ".parquet":
            schema = pyarrow.parquet.read_schema(file)
        else:
            with pyarrow.memory_map(os.fspath(file)) as source:
                schema = _reader(source).schema
        record = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = (json.loads(record).get("info") or {}).get("features") or {}
        return [Column(f.name, str(f.type), dict(features.get(f.name) or {})) for f in schema]
    except Exception as error:  # damaged files make readers raise errors of nearly any type
        raise DataError(f"{file} is not a readable {file.suffix} file: {error}") from error


class Rows:
    """Columns of several files, memory-mapped in each process that reads them.

    A Parquet file can only be read by groups of rows, so its columns are unpacked once, into an
    Arrow file in the user's cache.

    Args:
        files: of the same columns.
        columns: which of them.
    Raises:
        DataError: a file is damaged, or cannot be unpacked.
    """

    def __init__(self, files: Sequence[pathlib.Path], columns: Sequence[str]):
        self._files, stored = list(files), [_mapped(file, columns) for file in files]
        self._opened = PerProcess(functools.partial(_open, self._files, stored, list(columns)))
        self._ends = np.cumsum([sum(b.num_rows for b in file) for file in self._opened().files])
        self._check()

    def _check(self) -> None:
        """Refuse files with places outside of them: to read there would end the process."""
        for file, batches in zip(self._files, self._opened().files, strict=True):
            try:
                for batch in batches:
                    batch.validate(full=True)  # reads the places, and no image
            except Exception as error:  # pyarrow raises errors of several types
                raise DataError(f"{file} is damaged: {error}") from error

    def __len__(self) -> int:
        return int(self._ends[-1])

    def files_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the file of each row."""
        return np.searchsorted(self._ends, rows, side="right")

    def place(self, row: int) -> tuple[int, int]:
        """Number of a row's file, and of the row within it."""
        file = int(self.files_of(row))
        return file, int(row) - int(self._ends[file - 1] if file else 0)

    def value(self, row: int, column: str):
        """A value as Python's: bytes, a number, a dictionary, or None."""
        _, batches, ends = self._opened()
        number = int(np.searchsorted(ends, row, side="right"))
        batch = batches[number]
        return batch.column(column)[int(row - ends[number]) + batch.num_rows].as_py()

    def integers(self, column: str, missing: int) -> np.ndarray:
        """A whole column of integers, (N,) int64; `missing` where there is none.

        Raises:
            DataError: it holds others.
        """
        parts = []
        for file, batches in zip(self._files, self._opened().files, strict=True):
            try:
                values = (batch.column(column).cast("int64") for batch in batches)
                parts += [part.fill_null(missing).to_numpy() for part in values]
            except Exception as error:  # pyarrow raises errors of several types
                raise DataError(
                    f"{file}: the column {column} holds other than whole numbers: {error}"
                ) from error
        return np.concatenate(parts)

    def titles(self, column: str, missing: int) -> tuple[np.ndarray, list[str]]:
        """A whole column of names: the number of each row's among all names, and these, sorted.

        Args:
            missing: the number where there is no name.
        Returns:
            (N,) int64, and the names.
        """
        batches = (batch.column(column).cast("string") for batch in self._opened().batches)
        found = arrow().chunked_array(batches, type="string")
        names = sorted(name for name in found.unique().to_pylist() if name is not None)
        numbers = {None: missing} | {name: number for number, name in enumerate(names)}
        return np.array([numbers[name] for name in found.to_pylist()], dtype=np.int64), names


class _Batches(NamedTuple):
    """The rows of open files, in batches that are parts of the mapped memory.

    Attributes:
        files: the batches of each file.
        batches: those of all files.
        ends: number of rows up to the end of each.
    """

    files: list[list]
    batches: list
    ends: np.ndarray


def _open(files: list[pathlib.Path], stored: list[pathlib.Path], columns: list[str]) -> _Batches:
    pyarrow, found = arrow(), []
    for file, place in zip(files, stored, strict=True):
        try:
            table = _reader(pyarrow.memory_map(os.fspath(place))).read_all()
            found.append(table.select(columns).to_batches())
        except Exception as error:  # damaged files make it raise errors of nearly any type
            raise DataError(f"{file} is damaged or cut off: {error}") from error
    batches = [batch for own in found for batch in own]
    return _Batches(found, batches, np.cumsum([batch.num_rows for batch in batches]))


def _reader(source):
    """A reader of the batches in an open Arrow file, of either format."""
    pyarrow = arrow()
    magic = source.read(len(_MAGIC))
    source.seek(0)
    return pyarrow.ipc.open_file(source) if magic == _MAGIC else pyarrow.ipc.open_stream(source)


def _mapped(file: pathlib.Path, columns: Sequence[str]) -> pathlib.Path:
    """An Arrow file with these columns of a file: itself, or in the cache."""
    if file.suffix.lower() != ".parquet":
        return file
    place = cache_file("rows", file, ".arrow", *file_state(file), *columns)
    if place is None:
        raise DataError(f"{file} must be unpacked, and there is no cache: set XDG_CACHE_HOME")
    if not place.is_file():
        log.info("%s is unpacked into %s, which later starts use", file, place)
        _unpack(file, place, columns)
    return place


def _unpack(file: pathlib.Path, place: pathlib.Path, columns: Sequence[str]) -> None:
    pyarrow = arrow()
    try:
        with (
            pyarrow.parquet.ParquetFile(file) as packed,
            progress_bar(packed.metadata.num_rows, 0, " rows") as bar,
            atomic_write(place) as target,
        ):
            schema = packed.schema_arrow
            schema = pyarrow.schema([schema.field(name) for name in columns])
            with pyarrow.ipc.new_stream(target, schema) as writer:
                for batch in packed.iter_batches(CHUNK, columns=list(columns)):
                    writer.write_batch(batch.select(columns))
                    bar.update(batch.num_rows)
    except Exception as error:  # damaged files make it raise errors of nearly any type
        raise DataError(f"{file} cannot be unpacked into {place}: {error}") from error
