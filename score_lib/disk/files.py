"""Files that are written whole or not at all, and folders that one run at a time works in."""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import IO

CONFIG = "config.json"
# Predecessors of a file that may be kept.
MOST_KEPT = 9
# Errors of a file system without locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", keep: int = 0) -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is complete and on disk.

    A crash, a full disk or an exception leaves the previous file of that name as it was.
    The folder is made if need be.

    Args:
        path: the final name.
        mode: "wb", or "w" for text in UTF-8.
        keep: how many earlier files of the name stay, see `with_earlier`.
    Raises:
        OSError: the folder or file cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should be as readable as any other.
        os.chmod(temporary, 0o666 & ~_umask())
        # A write that fails displaces no predecessor.
        _keep_earlier(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is None:
            # NumPy's message for a full disk is "64 requested and 12 written".
            raise OSError(f"{path} cannot be written: {error}") from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Context with a folder to fill, which takes its name only once it is complete.

    An earlier folder of that name is replaced; an exception leaves it as it was.

    Raises:
        OSError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new."))
    earlier = temporary.with_name(temporary.name.replace(".new.", ".old."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            os.replace(path, earlier)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        for leftover in (temporary, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


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
    """Context whose errors of the operating system name a file."""
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


def _keep_earlier(path: pathlib.Path, keep: int) -> None:
    """Keep a file that is about to be replaced as its own predecessor, see `with_earlier`.

    Of predecessors, `keep` stay.  Each is whole at every moment, and so is the file itself.
    """
    path, *earlier = with_earlier(path)[: keep + 1]
    if not earlier or not path.exists():
        return
    if earlier[0].exists() and os.path.samefile(path, earlier[0]):
        return  # kept already, before a replacement that did not come
    # A gap takes up what is before it: none of those behind it need go.
    in_a_row = len(list(itertools.takewhile(pathlib.Path.exists, earlier)))
    for newer, older in reversed(list(itertools.pairwise(earlier[: in_a_row + 1]))):
        os.replace(newer, older)
    link = earlier[0].with_name(f".{earlier[0].name}.link.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        with atomic_write(earlier[0]) as copy, path.open("rb") as source:
            shutil.copyfileobj(source, copy)
    else:
        os.replace(link, earlier[0])


def set_aside(path: str | os.PathLike, label: str) -> None:
    """Move a file or folder that must not count any more to `set_aside/` beside it, and log that.

    Args:
        label: why, for its new name: `set_aside/checkpoint_3_{label}.pth`, with a number added
            where there is such a file.
    """
    path = pathlib.Path(path)
    folder = path.parent / "set_aside"
    folder.mkdir(exist_ok=True)
    # The number behind the dot in a folder's step_2_0.999 is no suffix.
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    numbers = itertools.chain([""], (f"_{k}" for k in itertools.count(2)))
    names = (folder / f"{stem}_{label}{number}{suffix}" for number in numbers)
    aside = next(name for name in names if not name.exists())
    os.replace(path, aside)
    logging.warning("%s is set aside: it is now %s", path, aside)


def remove_leftovers(*folders: str | os.PathLike) -> None:
    """Remove temporary files of killed writers; no other process may be writing there."""
    for folder in folders:
        for path in pathlib.Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def open_folder(folder: str | os.PathLike, config) -> None:
    """Make a run's folder and write the resolved config into it, as `config.json`.

    Raises:
        OSError: the folder cannot be made or written.
    """
    text, path = _config_text(config), pathlib.Path(folder) / CONFIG
    try:
        if path.exists() and path.read_bytes() != text.encode():
            logging.warning("the config differs from the one in %s, which is replaced", path)
        write_text(path, text)
    except OSError as error:
        raise OSError(f"the work directory {folder} cannot be written: {error}") from error


def _config_text(config) -> str:
    return json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True) + "\n"


def make_way(folder: str | os.PathLike, config, *names: str) -> None:
    """Set a folder of results aside, see `set_aside`, unless they are by the same options.

    Args:
        names: of files in it, which make way instead of the folder.
    """
    folder = pathlib.Path(folder)
    record = folder / CONFIG
    if record.is_file() and record.read_bytes() == _config_text(config).encode():
        return
    for path in [folder / name for name in names] or [folder]:
        if path.exists():
            set_aside(path, "other_options")


def folder_of_results(
    workdir: str | os.PathLike, name: str | os.PathLike, option: str
) -> pathlib.Path:
    """The folder of a name inside a run's, which is not that of the run itself, or above it.

    Args:
        option: that gave the name.
    Raises:
        ValueError: results would replace the files of the run, such as its config.
    """
    workdir, folder = pathlib.Path(workdir), pathlib.Path(workdir, name)
    if workdir.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{option} puts results into {folder}, where they would replace files of the run: "
            "choose the name of a folder of their own"
        )
    return folder


def file_state(path: str | os.PathLike) -> tuple[int, int]:
    """Size and time of the last change, by which a file is taken for the same as before."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def text_digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """A short hash of a file's contents, or of a folder's names and contents."""
    path, digest = pathlib.Path(path), hashlib.blake2b(digest_size=8)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for member in files:
        if member != path:
            digest.update(member.relative_to(path).as_posix().encode())
        with member.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def printable(text: str, limit: int = 300) -> str:
    """Text from a file for a message: one line, no control characters, limited length."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


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
        return (folder / ".lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise OSError(f"the work directory {folder} cannot be written: {error}") from error


def _occupied(folder: str | os.PathLike, file: IO[str]) -> BlockingIOError:
    file.seek(0)
    return BlockingIOError(
        f"another run is at work in {folder} ({file.read(100) or 'process unknown'}): stop it "
        "first, or choose another folder"
    )
