"""Kernels for a CPU: compiled at first use with the C++ compiler of the machine, and called."""

import ctypes
import functools
import logging
import os
import pathlib
import subprocess
import threading

import torch
from torch import Tensor

from . import dispatch
from .libraries import kept

SOURCE = pathlib.Path(__file__).with_name("host_kernels.cpp")
DTYPES = torch.float32, torch.bfloat16  # in the order of the codes in host_kernels.cpp

_FLAGS = (
    *("-std=gnu++17", "-O3", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
# By what PyTorch's own kernels use here: a home folder can be shared by several kinds of machines.
_PROCESSORS = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}

_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "group_norm_silu": [_INT] + 7 * [_POINTER] + 4 * [_INT] + [_REAL, _INT],
    "group_norm_silu_backward": [_INT] + 11 * [_POINTER] + 5 * [_INT],
    "rescaled_sum": [_INT] + 3 * [_POINTER] + [_INT, _REAL, _INT],
}
_SMALL = 2**15  # numbers that one thread works on, as in PyTorch: also in forked processes
_one_at_a_time = threading.Lock()


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels take features like x, as OP_BACKEND=cpu asks: of one of `DTYPES`, without
    forward mode and transforms of `torch.func`; otherwise as `is_chosen`."""
    return (
        is_chosen(x)
        and x.dtype in DTYPES
        and not dispatch.is_transformed()
        and kernels() is not None
    )


def is_chosen(x: Tensor) -> bool:
    """Whether OP_BACKEND=cpu asks for other ways than the default for x, which is on a CPU, and not
    traced by a compiler: it fuses PyTorch's functions itself.

    Raises:
        ValueError: an unknown OP_BACKEND.
    """
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and dispatch.backend() == "cpu"


def launch(name: str, x: Tensor, *arguments: Tensor | int | float) -> None:
    """Run a function of `host_kernels.cpp`, with one thread for little work, otherwise with all.

    Args:
        name: of the function.
        x: has the dtype.
        arguments: those between dtype and threads; tensors stand for their addresses.
    """
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    threads = torch.get_num_threads() if x.numel() >= _SMALL else 1
    getattr(kernels(), name)(DTYPES.index(x.dtype), *given, threads)


def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None, logged once, where they cannot be compiled.

    The first call compiles, for a second; later processes reuse the library in the folder of
    PyTorch's extensions.
    """
    with _one_at_a_time:
        return _kernels(SOURCE)


@functools.cache
def _kernels(source: pathlib.Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(compiled(source))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", error)).split())[:400]
        logging.warning("no CPU kernels, falling back to PyTorch: %s", reason)
        return None
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def compiled(source: pathlib.Path) -> str:
    """Path of a library that is compiled from a source, unless it is there already.

    Raises:
        OSError, CalledProcessError: no compiler, no place for the library, or an error in it.
    """
    processor = _PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [os.environ.get("CXX") or "c++", *_FLAGS, *processor]

    def make(folder: pathlib.Path) -> pathlib.Path:
        new = folder / "library.so"
        output = {"check": True, "capture_output": True, "text": True}
        subprocess.run([*command, os.fspath(source), "-o", os.fspath(new)], **output)
        return new

    return kept("score_lib_host", "\n".join([*command, source.read_text()]), make)
