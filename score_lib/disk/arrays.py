"""Arrays in .npz files, and members of zip files, read without pickle and in bounded memory."""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from score_lib.base.memory import total_memory
from score_lib.disk.files import atomic_write, printable


def save_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed .npz, whole or not at all."""
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_arrays(
    path: str | os.PathLike, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Read an .npz without running code that it may hold, and within the available memory.

    Args:
        names: which of its arrays; by default all.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not an .npz of plain arrays, or too large.
    """
    with _open_npz(path) as (archive, members):
        chosen = {name: members[name] for name in (members if names is None else names)}
        size = sum(member.file_size for member in chosen.values())
        if size > total_memory() // 2:
            raise ValueError(f"it unpacks to {size / 2**30:.1f} GiB, over half of the memory here")
        return {name: _read_array(archive, member) for name, member in chosen.items()}


def known_type(values: np.ndarray) -> np.ndarray:
    """An array of a file in a type that PyTorch has: of this byte order, and at most 64 bits."""
    dtype = values.dtype.newbyteorder("=")
    long = dtype.kind == "f" and dtype.itemsize > 8
    return values.astype(np.float64 if long else dtype, copy=False)


def array_sizes(path: str | os.PathLike) -> dict[str, int]:
    """Bytes that each array of an .npz unpacks to, by name, from its list of contents alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not an .npz.
    """
    with _open_npz(path) as (_, members):
        return {name: member.file_size for name, member in members.items()}


@contextlib.contextmanager
def _open_npz(
    path: str | os.PathLike,
) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An .npz and its arrays by name; errors in the context become a ValueError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # reading a pipe would block
        with zipfile.ZipFile(path) as archive:
            yield archive, {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files make readers raise errors of nearly any type
        reason = printable(str(error) or type(error).__name__)
        raise ValueError(f"{path} is damaged or not an .npz of plain arrays ({reason})") from error


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array; memory is taken only once its header agrees with the size of the member."""
    with open_member(archive, member) as file:
        start = io.BytesIO(file.read(_LONGEST_HEADER))
    _check_header(start, member.filename, member.file_size)
    with open_member(archive, member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def parse_array(content: bytes) -> np.ndarray:
    """The array in the contents of an .npy file, read-only: no memory is taken for it.

    Raises:
        ValueError: they are damaged, or not a plain array.
    """
    start = io.BytesIO(content[:_LONGEST_HEADER])
    shape, fortran, dtype = _check_header(start, "it", len(content))
    flat = np.frombuffer(content, dtype, math.prod(shape), start.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _check_header(
    start: IO[bytes], name: str, total: int
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype of an .npy file of `total` bytes."""
    shape, fortran, dtype = read_header(start, name)
    count, size = math.prod(shape), total - start.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if count * dtype.itemsize != size or count > total:
        raise ValueError(f"{name} should be {dtype} of shape {shape}, which is not {size} bytes")
    return shape, fortran, dtype


def read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype of an .npy file, which is read up to its data.

    Raises:
        ValueError: it is damaged, or of a later version; calls it by a name.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"{name} is in version {version} of the format, not 1 or 2")
    shape, fortran, dtype = _HEADERS[version](file)
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has the shape {shape}")
    return shape, fortran, dtype


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Above NumPy's own limit.
_LONGEST_HEADER = 1 << 14


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A file inside a zip file, for reading in parts.

    `read(n)` of the result takes memory for n bytes, whatever the zip file claims; `read()` may
    take any amount.

    Raises:
        ValueError: the file is encrypted, or packed by a method whose reader has no such bound.
    """
    if member.flag_bits & 1:
        raise ValueError("it is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = zipfile.compressor_names.get(member.compress_type, member.compress_type)
        raise ValueError(f"it is packed by the method {name!r}: pack it with 'deflate'")
    return archive.open(member)
