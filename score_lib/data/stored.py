"""Arrays on disk, read row by row in little memory: .npy, .npz and .h5 files."""

import abc
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from score_lib.base.memory import total_memory
from score_lib.data.sources import DataError, PerProcess, log_unread, needed
from score_lib.disk.arrays import array_sizes, load_arrays, read_header

SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
# Names of the array of data that need not be told.
_USUAL = ("data", "x", "samples", "images", "arr_0")


class Rows(abc.ABC):
    """The rows of an array.

    Attributes:
        path: for messages.
        shape: of the whole array.
        dtype: as NumPy names it.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers, in their order, as a new array.

        Raises:
            DataError: they cannot be read.
        """


class NpyRows(Rows):
    """The rows of an .npy file, by reading and not by mapping it.

    The pages of a mapped file count as memory of the process, as many as are ever touched.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.shape, fortran, self.dtype = read_header(file, "it")
                self._start = file.tell()
        except Exception as error:  # damaged files make NumPy raise errors of nearly any type
            raise DataError(f"{path} is not a readable array: {error}") from error
        if self.dtype.hasobject:
            raise DataError(
                f"{path} holds Python objects, as of rows of unequal shapes: save one array of "
                "numbers, or sets of points in a file each, for data.dataset='POINTS'"
            )
        if not self.shape:
            raise DataError(f"{path} holds a single number: examples are the rows of an array")
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
        needed = self._start + self._row * self.shape[0]
        if (size := os.path.getsize(path)) < needed:
            whole = max(0, size - self._start) // max(1, self._row)
            raise DataError(
                f"{path} is cut short: it has {size} bytes, but its header promises {needed}; row "
                f"{whole} (from 0) is the first that is not whole"
            )
        check_end(path, needed)
        self._fortran = fortran and len(self.shape) > 1  # a row is spread over the file
        open_it = functools.partial(open, path, "rb", buffering=0)
        if self._fortran:
            open_it = functools.partial(np.load, path, mmap_mode="r", allow_pickle=False)
        self._file = PerProcess(open_it)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        if self._fortran:
            return np.ascontiguousarray(self._file()[numbers])
        rows = np.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        bytes_ = memoryview(rows.reshape(-1).view(np.uint8))
        for first, last in _runs(numbers):
            place = self._start + int(numbers[first]) * self._row
            self._read_into(bytes_[first * self._row : last * self._row], place)
        return rows

    def _read_into(self, part: memoryview, place: int) -> None:
        file = self._file()
        file.seek(place)
        while len(part):
            count = file.readinto(part)
            if not count:
                raise DataError(f"{self.path} ends at byte {file.tell()}, in the middle of a row")
            part = part[count:]


def check_end(path: pathlib.Path, end: int) -> None:
    """Refuse an .npy file that goes on behind its array, which would be read alone.

    Args:
        end: number of bytes of the header and the array.
    Raises:
        DataError: the file is longer.
    """
    if (size := os.path.getsize(path)) > end:
        raise DataError(
            f"{path} has {size} bytes, but its header promises {end}, as if another array had been "
            "saved behind the first: save a single one, of all rows"
        )


class LoadedRows(Rows):
    """The rows of an array in memory."""

    def __init__(self, path: pathlib.Path, array: np.ndarray):
        self.path, self._array = path, array
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, numbers: np.ndarray) -> np.ndarray:
        return self._array[numbers]


class H5Rows(Rows):
    """The rows of a data set in an HDF5 file."""

    def __init__(self, path: pathlib.Path, name: str):
        self.path, self._name = path, name
        self._data = PerProcess(functools.partial(_open_h5, path, name))
        self.shape, self.dtype = self._data().shape, self._data().dtype

    def read(self, numbers: np.ndarray) -> np.ndarray:
        data = self._data()
        rows = np.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        try:
            for first, last in _runs(numbers):
                start = int(numbers[first])
                rows[first:last] = data[start : start + last - first]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: a row of {self._name!r} is not readable: {error}"
            ) from error
        return rows


def open_rows(path: pathlib.Path, key: str = "") -> tuple[Rows, np.ndarray | None]:
    """The rows of an array in a file, and labels that are stored with them, or None.

    Labels are the array "labels" of an .npz or .h5, and `NAME_labels.npy` beside `NAME.npy`.

    Args:
        path: .npy, .npz, .h5 or .hdf5.
        key: name of the array in an .npz or .h5; "": the only one, or one of the usual names.
    Raises:
        DataError: there is no such file or array, or it is damaged; names it.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} should be an array: {', '.join(SUFFIXES)}")
    if suffix == ".npy":
        if key:
            raise DataError(f"data.key = {key!r} names an array in an .npz or .h5, not in {path}")
        beside = path.with_name(f"{path.stem}_labels.npy")
        labels = NpyRows(beside) if beside.is_file() else None
        return NpyRows(path), None if labels is None else labels.read(np.arange(len(labels)))
    if suffix == ".npz":
        return _open_npz(path, key)
    names = _names_of_h5(path)
    rows = H5Rows(path, _chosen(path, names, key))
    labels = H5Rows(path, "labels") if "labels" in names else None
    return rows, None if labels is None else labels.read(np.arange(len(labels)))


def _open_npz(path: pathlib.Path, key: str) -> tuple[Rows, np.ndarray | None]:
    try:
        array, labels = load_npz(path, lambda names: _chosen(path, names, key))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    if array.ndim == 0:
        raise DataError(f"{path} holds a single number: examples are the rows of an array")
    return LoadedRows(path, array), labels


def load_npz(
    path: pathlib.Path, choose: Callable[[list[str]], str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """One of the arrays in an .npz, and "labels" or None.

    Args:
        choose: gives its name among all.
    Raises:
        DataError: they do not fit in memory.
        ValueError: the file is damaged.
    """
    sizes = array_sizes(path)
    name = choose(list(sizes))
    wanted = [one for one in (name, "labels") if one in sizes]
    if (size := sum(sizes[one] for one in wanted)) > total_memory() // 2:
        raise DataError(
            f"{path} unpacks to {size / 2**30:.1f} GiB, more than half of the memory here: save "
            "the array as .npy, which is read row by row"
        )
    arrays = load_arrays(path, wanted)
    return arrays[name], arrays.get("labels")


def _chosen(path: pathlib.Path, names: list[str], key: str) -> str:
    """The array of data among the names in a file."""
    others = [name for name in names if name != "labels"]
    usual = [name for name in _USUAL if name in others]
    if key and key not in names:
        raise DataError(f"data.key = {key!r} is not in {path}, which holds {', '.join(names)}")
    if not key and len(others) != 1 and not usual:
        raise DataError(
            f"{path} holds {', '.join(names) or 'no array'}: name the array of data with data.key"
        )
    chosen = key or (usual or others)[0]
    log_unread(path, chosen, names)
    return chosen


def _names_of_h5(path: pathlib.Path) -> list[str]:
    h5py = _h5py()
    names: list[str] = []

    def add(name: str, thing: object) -> None:
        if isinstance(thing, h5py.Dataset) and thing.ndim > 0:
            names.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} is not a readable HDF5 file: {error}") from error
    return names


def _open_h5(path: pathlib.Path, name: str):
    return _h5py().File(path, "r")[name]


def _h5py():
    return needed("h5py", ".h5 files need the package h5py: pip install h5py==3.14.0, or save .npy")


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places [first, last) of consecutive numbers."""
    ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    first = 0
    for last in ends:
        if last > first:
            yield first, last
        first = last
