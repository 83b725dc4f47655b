"""Threads of the host: how many a process may use, and how they wait for each other.

PyTorch shares most layers among OpenMP threads.  A thread that has done its part waits for the
others by spinning, for milliseconds: good where the cores are idle.  Where another program runs on
them, the spinning thread holds the core that a late one needs, and training slows down many times.
Programs therefore call `wait_without_spinning` before PyTorch is imported: this module imports
nothing that does.  Functions of the library leave threads as they are.
"""

import logging
import os
import sys

from score_lib.base.cgroups import limits

# Variables that say how OpenMP threads wait: of the standard, of GNU's library, of Intel's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Variables that say how many threads there are.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Rounds of spinning before a thread of GNU's OpenMP sleeps; by default 300,000 or more.
SPINS = 1000


def wait_without_spinning() -> None:
    """Let OpenMP threads of this process, and of those it starts, sleep soon when they wait.

    A no-op where a variable of `WAITING` is set, and where PyTorch is imported: too late then.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    os.environ["KMP_BLOCKTIME"] = "0"


def settle_threads() -> None:
    """Use no more threads than the process may have cores, and log how many there are.

    PyTorch counts the cores that the process is bound to; a container may allow less time on them.
    A number that the user set stays.
    """
    import torch

    allowed = cores()
    if torch.get_num_threads() > allowed and not any(name in os.environ for name in COUNTS):
        torch.set_num_threads(allowed)
    waiting = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    logging.info(
        "%d CPU threads for %d cores, waiting by %s; to change it, set OMP_NUM_THREADS and "
        "OMP_WAIT_POLICY",
        torch.get_num_threads(), allowed, ", ".join(waiting) or "the default of OpenMP",
    )  # fmt: skip


def cores() -> int:
    """Cores that this process may keep busy: it is bound to them, and its control groups allow it.

    Part of a core counts for nothing: threads beyond the quota would all be stopped for a while.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = limits("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas = (map(int, text.split()) for text in found)
    return max(1, min([bound or 1, *(time // period for time, period in quotas)]))
