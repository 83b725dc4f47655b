"""Memory of the host and of devices: its size, its peaks, and how the C library keeps it."""

import ctypes
import os
import pathlib
import re
import sys

import torch

from score_lib.base.cgroups import limits

# Parameters of glibc's `mallopt`, and their values in bytes; older versions refuse more than
# 32 MiB for the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGE_MMAP, _OLDER_MMAP = 2**31 - 1, 1 << 30, 32 << 20


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system and requests them again, zeroed page by page,
    at every layer: a tenth of a training step on a CPU.  Blocks of a gigabyte and more are still
    returned.  A setting of the whole process, so programs call this, not functions of the library.
    A no-op without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        accepted = libc.mallopt(_MMAP_THRESHOLD, _LARGE_MMAP)
        if not accepted:
            libc.mallopt(_MMAP_THRESHOLD, _OLDER_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)


def total_memory(device: torch.device | None = None) -> int:
    """Bytes of memory of a device; of this machine without one, or of a CPU.

    A machine has no more than the control groups of the process may take, and 16 GiB where its size
    is unknown.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        size = 16 << 30
    allowed = [int(text) for text in limits("memory", "memory.max", "memory.limit_in_bytes")]
    return min([size, *allowed])


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak of the whole process then


def peak_memory(device: torch.device) -> int:
    """Most bytes held at one time: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def held_memory(device: torch.device) -> int:
    """Bytes held now, as in `peak_memory`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def _of_process(name: str) -> int:
    """Bytes of a figure of Linux; elsewhere the peak of the whole process, or 0."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.M)[1]) << 10
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
