"""Checkpoints and snapshots that are written while training goes on."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from score_lib.disk.checkpoints import contents_of, write_contents


class CheckpointWriter:
    """Context that copies training states to the host and writes the copies in a thread.

    Training waits for the copy only: on a GPU for its launch.  The memory of the copy, as large as
    a checkpoint, is kept for the next one.  One file is written at a time, in the order of calls.

    Args:
        write: called in the thread with path, contents and `keep`.
    """

    def __init__(self, write: Callable[[str | os.PathLike, dict, int], None] = write_contents):
        self._write = write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._copies: dict[str, dict] = {}

    def save(
        self,
        path: str | os.PathLike,
        state: dict,
        keep: int = 0,
        also: Sequence[str | os.PathLike] = (),
    ) -> None:
        """Start writing the present state, see `save_checkpoint`.

        Args:
            also: further files of the same contents, each written after those before it.
        Raises:
            OSError: the previous file could not be written.
        """
        self.save_contents(path, contents_of(state), keep, also=also)

    def save_contents(
        self,
        path: str | os.PathLike,
        contents: dict,
        keep: int = 0,
        kind: str = "checkpoint",
        also: Sequence[str | os.PathLike] = (),
    ) -> None:
        """Start writing contents, see `write_contents`.

        Args:
            kind: contents of a kind are alike, and share the memory of their copies.
            also: see `save`.
        Raises:
            OSError: the previous file could not be written.
        """
        self.wait()
        copy = self._copies[kind] = _copied(contents, self._copies.get(kind))
        copied = [torch.cuda.current_stream(gpu).record_event() for gpu in _gpus(contents)]
        self._writing = self._thread.submit(
            self._run, {path: keep, **dict.fromkeys(also, 0)}, copy, copied
        )

    def _run(
        self, files: dict[str | os.PathLike, int], copy: dict, copied: list[torch.cuda.Event]
    ) -> None:
        for event in copied:
            event.synchronize()
        for path, keep in files.items():
            self._write(path, copy, keep)

    def check(self) -> None:
        """Raise the error of a file that could not be written.

        Raises:
            OSError: the disk is full, the folder is gone, ...
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except OSError as unwritten:
            if error is None:
                raise
            logging.error("%s", unwritten)  # in addition to the error being raised
        finally:
            self._thread.shutdown()


def _copied(value: Any, old: Any) -> Any:
    """A copy of nested values, tensors on the host, in the memory of an older copy if that fits."""
    if isinstance(value, Tensor):
        if not isinstance(old, Tensor) or (old.shape, old.dtype) != (value.shape, value.dtype):
            old = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        # Of no other device is the end of a copy waited for before the file is written.
        return old.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        olds = old if isinstance(old, dict) else {}
        return {key: _copied(part, olds.get(key)) for key, part in value.items()}
    if isinstance(value, list):
        olds = old if isinstance(old, list) and len(old) == len(value) else [None] * len(value)
        return [_copied(part, older) for part, older in zip(value, olds, strict=True)]
    return value


def _gpus(value: Any) -> set[torch.device]:
    """The GPUs of nested values, which need not be the current one."""
    if isinstance(value, Tensor):
        return {value.device} if value.is_cuda else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(_gpus, parts))
