"""Files that are whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np


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
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it has no space for
        raise


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
        if path.exists() and path.read_text(encoding="utf-8") != text:
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


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read an .npz without running code that it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not an .npz of plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or not an .npz of plain arrays ({error})") from error


# What reading damaged bytes as an .npz may raise.
_DAMAGED = (
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
