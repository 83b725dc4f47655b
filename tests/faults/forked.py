"""Calls in a child process: their result, duration and memory.

The limit of memory is on the growth of the child's resident memory.  A limit on its address space
would also count memory that PyTorch reserves and never touches.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

MIB = 1 << 20


class Outcome(NamedTuple):
    """Outcome of a call.

    Attributes:
        error: the exception's type; "" where there was none, or the signal that ended the child.
        message: of the exception.
        result: the call's return value, or None.
        seconds: how long it took.
        growth: by how many MiB resident memory grew at its peak.
    """

    error: str
    message: str
    result: object
    seconds: float
    growth: float


def call(function: Callable[[], object], seconds: float, growth: float) -> Outcome:
    """Call a function in a fork of this process, which is ended once it exceeds a limit.

    Args:
        function: its result must be picklable.
        seconds: time that it may take.
        growth: MiB by which resident memory may grow.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(function, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    before, reason = _resident(process.pid), ""
    while not ours.poll(0.02):
        if time.monotonic() - start > seconds:
            reason = "took too long"
        elif (_resident(process.pid) - before) / MIB > 2 * growth:
            reason = "took too much memory"
        if reason:
            process.kill()
            break
    try:
        outcome = None if reason else ours.recv()
    except EOFError:
        reason = "died"
    process.join()
    if reason:
        return Outcome(reason, f"exit code {process.exitcode}", None, time.monotonic() - start, 0)
    return outcome


def _child(function: Callable[[], object], pipe) -> None:
    result, error, message = None, "", ""
    torch.set_num_threads(1)  # those of the parent are not there, and would be waited for
    with open(os.devnull, "w") as nowhere:  # log output does not matter here
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that the parent kept would be used without growth
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    before, start = _resident(os.getpid()), time.monotonic()
    try:
        result = function()
    except BaseException as raised:
        kinds = (ValueError, OSError)
        known = next((kind.__name__ for kind in kinds if isinstance(raised, kind)), "")
        error, message = known or type(raised).__name__, str(raised)
    seconds = time.monotonic() - start
    pipe.send(Outcome(error, message, result, seconds, (_peak() - before) / MIB))


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def _peak() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
