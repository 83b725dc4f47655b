"""Compiles the CUDA kernels at first use, through PyTorch, and loads them."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import pathlib
import subprocess
import threading

import torch

SOURCE = pathlib.Path(__file__).with_name("kernels.cu")

_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "upfirdn2d": [_INT] + 3 * [_POINTER] + 12 * [_INT] + [_POINTER],
    "leaky_relu": [_INT] + 4 * [_POINTER] + 3 * [_INT] + 2 * [_REAL] + [_INT, _POINTER],
    "probe": [_INT],
}
_one_at_a_time = threading.Lock()


def kernels(device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernels for a GPU; None, logged once, where they cannot be compiled.

    The first call compiles, which takes seconds; later processes find the library in the folder
    of PyTorch's extensions.
    """
    with _one_at_a_time:
        return _kernels(device.index)


@functools.cache
def _kernels(index: int) -> ctypes.CDLL | None:
    try:
        library = compiled(SOURCE)
        if error := library.probe(index):
            raise OSError(error.decode())
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:400]
        logging.warning("no CUDA kernels, falling back to PyTorch: %s", reason)
        return None
    return library


def compiled(source: str | os.PathLike) -> ctypes.CDLL:
    """Compile `kernels.cu`, unless it is compiled already, and load it.

    Args:
        source: a name that ends in `.cu` is compiled for GPUs, in `.cpp` for the host.
    Raises:
        OSError, RuntimeError, ImportError, SubprocessError: it cannot be compiled or loaded.
    """
    from torch.utils import cpp_extension

    name = f"score_lib_{pathlib.Path(source).stem}"
    path = cpp_extension.load(name, [os.fspath(source)], is_python_module=False)
    library = ctypes.CDLL(path)
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library
