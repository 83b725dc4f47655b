"""Threads of the host: how many a process may use, and how they wait for each other.

PyTorch shares most layers among OpenMP threads.  A thread that has done its part waits for the
others by spinning, for milliseconds: good where the cores are idle, since waking up takes longer
than many layers.  Where another program runs on them, the spinning thread holds the core that a
late one needs, and training slows down many times: there, threads had better sleep at once.
Programs therefore call `choose_waiting` before PyTorch is imported: this module imports
nothing that does.  Functions of the library leave threads as they are.
"""

import logging
import math
import os
import pathlib
import sys
import time

from score_lib.base.cgroups import limits

# Variables that say how OpenMP threads wait: of the standard, of GNU's library, of Intel's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Variables that say how many threads there are.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Rounds of spinning before a thread of GNU's OpenMP sleeps, on idle cores and on busy ones; by
# default 300,000 or more.
SPINS_IDLE, SPINS_BUSY = 10_000, 0
# Milliseconds of Intel's library, whose default is 200.
_BLOCKTIMES = {SPINS_IDLE: 1, SPINS_BUSY: 0}
_STAT = pathlib.Path("/proc/stat")
_LOOKS = 5


def choose_waiting() -> None:
    """Say how OpenMP threads of this process wait, and of those it starts: by how busy cores are.

    They spin for a short time, or not at all where other programs leave fewer idle cores than this
    process would use.  A no-op where a variable of `WAITING` is set, and where PyTorch is imported:
    too late then.
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    wanted = cores() - 0.3
    # A shell that starts programs is busy for a moment only.
    busy = all(idle_cores() < wanted for _ in range(_LOOKS))
    spins = SPINS_BUSY if busy else SPINS_IDLE
    os.environ["GOMP_SPINCOUNT"] = str(spins)
    os.environ["KMP_BLOCKTIME"] = str(_BLOCKTIMES[spins])


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


def idle_cores() -> float:
    """Cores that this process is bound to and that nothing uses while it sleeps for 0.1 s.

    Infinity where the system does not tell.
    """
    before = _ticks()
    time.sleep(0.1)
    after = _ticks()
    if not before or before.keys() != after.keys():
        return math.inf
    shares = []
    for core, (idle, total) in after.items():
        passed = total - before[core][1]
        shares.append((idle - before[core][0]) / passed if passed else 1.0)
    return sum(shares)


def _ticks() -> dict[str, tuple[int, int]]:
    """Ticks of the clock that a core was idle, and all of them, for each core of this process."""
    try:
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        bound = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # no Linux
        return {}
    counts = {name: list(map(int, rest[:8])) for name, *rest in lines if name in bound}
    # user nice system idle iowait irq softirq steal
    return {name: (ticks[3] + ticks[4], sum(ticks)) for name, ticks in counts.items()}


def cores() -> int:
    """Cores that this process may keep busy: it is bound to them, and its control groups allow it.

    Part of a core counts for nothing: threads beyond the quota would all be stopped for a while.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = limits("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas = (map(int, text.split()) for text in found)
    return max(1, min([bound or 1, *(time // period for time, period in quotas)]))
