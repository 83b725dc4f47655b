"""One run at a time in a folder."""

import contextlib
import errno
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

NAME = ".lock"

# Errors of a file system without locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Context in which no other process can enter the same folder; the folder is made if need be.

    The system holds the lock on behalf of this process and of none of its children, and takes it
    back however the process ends, so that nothing is left behind that must be removed by hand.

    Raises:
        BlockingIOError: another process is in it; names it.
        OSError: the folder cannot be made or written.
    """
    try:
        import fcntl
    except ImportError:  # only POSIX systems have it
        yield
        return
    with _lock_file(pathlib.Path(folder)) as file:
        try:
            # Not `flock`, whose locks are inherited by workers that may outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise _occupied(folder, file) from error
            logging.warning("the file system of %s has no locks: mind other runs", folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock_file(folder: pathlib.Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / NAME).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise OSError(f"the work directory {folder} cannot be written: {error}") from error


def _occupied(folder: str | os.PathLike, file: IO[str]) -> BlockingIOError:
    file.seek(0)
    return BlockingIOError(
        f"another run is at work in {folder} ({file.read(100) or 'process unknown'}): stop it "
        "first, or choose another folder"
    )
