"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from score_lib.base.memory import total_memory

# Predecessors of a file that may be kept.
MOST_KEPT = 9


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is complete and on disk.

    A crash, a full disk or an exception leaves the previous file of that name as it was.
    The folder is made if need be.

    Args:
        path: the final name.
        mode: "wb" or "w".
    Raises:
        OSError: the folder or file cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should be as readable as any other.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is None:
            # NumPy's own words for a full disk, "64 requested and 12 written".
            raise OSError(f"{path} cannot be written: {error}") from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it has no space for
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def _sync_folder(folder: pathlib.Path) -> None:
    """Put a folder's list of names on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Context whose errors of the operating system say which file they are about."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def with_earlier(path: str | os.PathLike) -> list[pathlib.Path]:
    """A file's name and those of predecessors that may be kept: a.pth, a.1.pth (latest), ..."""
    path = pathlib.Path(path)
    numbers = range(1, MOST_KEPT + 1)
    return [path, *(path.with_suffix(f".{k}{path.suffix}") for k in numbers)]


def keep_earlier(path: str | os.PathLike, keep: int) -> None:
    """Let a file that is about to be replaced stay as its own predecessor, see `with_earlier`.

    Of predecessors, `keep` stay.  At every moment the file itself is there.
    """
    path, *earlier = with_earlier(path)[: keep + 1]
    if not earlier or not path.exists():
        return
    if earlier[0].exists() and os.path.samefile(path, earlier[0]):
        return  # kept already, before a replacement that came to nothing
    for newer, older in reversed(list(itertools.pairwise(earlier))):
        if newer.exists():
            os.replace(newer, older)
    try:
        os.link(path, earlier[0])
    except OSError:  # a file system without links
        shutil.copyfile(path, earlier[0])


def remove_leftovers(*folders: str | os.PathLike) -> None:
    """Remove what writers that were killed have left; no other process may be writing there."""
    for folder in folders:
        for path in pathlib.Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def open_folder(folder: str | os.PathLike, config) -> pathlib.Path:
    """Make a run's folder and write the resolved config into it, as `config.json`.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = pathlib.Path(folder)
    text = json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True) + "\n"
    path = folder / "config.json"
    try:
        if path.exists() and path.read_bytes() != text.encode():
            logging.warning("the config differs from the one in %s, which is replaced", path)
        with atomic_write(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"the work directory {folder} cannot be written: {error}") from error
    return folder


def file_digest(path: str | os.PathLike) -> str:
    """A short hash of a file's contents."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed .npz, whole or not at all."""
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_arrays(
    path: str | os.PathLike, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Read an .npz without running code that it may hold, and within the memory there is.

    Args:
        path: the file.
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
    """An .npz and its arrays by name; what goes wrong in the context becomes a ValueError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # a pipe would be waited for
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
    version = np.lib.format.read_magic(start)
    if version not in _HEADERS:
        raise ValueError(f"{member.filename} is in version {version} of the format, not 1 or 2")
    shape, _, dtype = _HEADERS[version](start)
    count, size = math.prod(shape), member.file_size - start.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if min(shape, default=0) < 0 or count * dtype.itemsize != size or count > member.file_size:
        raise ValueError(
            f"{member.filename} should be {dtype} of shape {shape}, which is not {size} bytes"
        )
    with open_member(archive, member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Above what NumPy itself agrees to read.
_LONGEST_HEADER = 1 << 14


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    """A file inside a zip file, for reading stretch by stretch.

    `read(n)` of what this returns takes memory for n bytes, whatever the zip file says about
    sizes; `read()` may take any amount.

    Raises:
        ValueError: the file is encrypted, or packed by a method whose reader has no such bound.
    """
    if member.flag_bits & 1:
        raise ValueError("it is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = zipfile.compressor_names.get(member.compress_type, member.compress_type)
        raise ValueError(f"it is packed by the method {name!r}: pack it as plain 'deflate'")
    return archive.open(member)


def printable(text: str, limit: int = 300) -> str:
    """Words from a file as part of a message: one line, no control characters, not endless."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
