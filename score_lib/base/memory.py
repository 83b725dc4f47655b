"""Memory of the host: its size, and how the C library manages it."""

import ctypes
import os
import sys

# Parameters of glibc's `mallopt`, and their largest values.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 << 20


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system and requests them again, zeroed page by page,
    at every layer: a tenth of a training step on a CPU.  A setting of the whole process, so
    programs call this, not functions of the library.  A no-op without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)


def total_memory() -> int:
    """Bytes of memory in this machine; 16 GiB where that is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 16 << 30
