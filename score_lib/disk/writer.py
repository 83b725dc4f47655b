"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from score_lib.disk.checkpoints import contents_of, write_contents


class CheckpointWriter:
    """Context that copies training states to the host and writes the copies in a thread.

    Training waits for the copy only: on a GPU for its launch.  The memory of the copy, as large as
    a checkpoint, is kept for the next one.  One file is written at a time.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._copy: dict = {}

    def save(self, path: str | os.PathLike, state: dict, keep: int = 0) -> None:
        """Begin to write a state as it is now, see `save_checkpoint`.

        Raises:
            OSError: the previous file could not be written.
        """
        self.wait()
        self._copy = _copied(contents_of(state), self._copy)
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied is not None:
            copied.record()
        self._writing = self._thread.submit(_write, path, self._copy, keep, copied)

    def check(self) -> None:
        """Say so if a file could not be written.

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

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except OSError as unwritten:
            if error is None:
                raise
            logging.error("%s", unwritten)  # beside the error that is under way
        finally:
            self._thread.shutdown()


def _write(path: str | os.PathLike, contents: dict, keep: int, copied) -> None:
    if copied is not None:
        copied.synchronize()
    write_contents(path, contents, keep)


def _copied(value: Any, old: Any) -> Any:
    """A copy of nested values, tensors on the host, in the memory of an older copy if that fits."""
    if isinstance(value, Tensor):
        if not isinstance(old, Tensor) or (old.shape, old.dtype) != (value.shape, value.dtype):
            old = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return old.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        olds = old if isinstance(old, dict) else {}
        return {key: _copied(part, olds.get(key)) for key, part in value.items()}
    if isinstance(value, list):
        olds = old if isinstance(old, list) and len(old) == len(value) else [None] * len(value)
        return [_copied(part, older) for part, older in zip(value, olds, strict=True)]
    return value
