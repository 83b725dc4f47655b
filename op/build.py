"""Compiles the CUDA kernels at first use, through PyTorch, and loads them."""

import ctypes
import functools
import logging
import os
import pathlib
import subprocess
import threading

import torch

from .libraries import kept

SOURCE = pathlib.Path(__file__).with_name("kernels.cu")

# PyTorch switches off the conversions of half-precision types, which the kernels use.
CUDA_FLAGS = ("-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__")

_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "upfirdn2d": [_INT] + 3 * [_POINTER] + 13 * [_INT] + [_POINTER],
    "leaky_relu": [_INT] + 4 * [_POINTER] + 3 * [_INT] + 2 * [_REAL] + [_INT, _POINTER],
    "probe": [_INT],
}
_one_at_a_time = threading.Lock()


def kernels(device: torch.device, source: str | os.PathLike = SOURCE) -> ctypes.CDLL | None:
    """The compiled kernels for a GPU; None, logged once, where they cannot be compiled or run.

    The first call compiles, for some seconds; later processes reuse the library in the folder of
    PyTorch's extensions.
    """
    with _one_at_a_time:
        return _kernels(device.index, source)


@functools.cache
def _kernels(index: int, source: str | os.PathLike) -> ctypes.CDLL | None:
    try:
        library = compiled(source)
        if error := library.probe(index):
            raise OSError(error.decode())
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:400]
        logging.warning("no CUDA kernels, falling back to PyTorch: %s", reason)
        return None
    return library


def _capabilities() -> list[tuple[int, int]]:
    """The kinds of GPUs here, for which PyTorch compiles."""
    return sorted({torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())})


def compiled(source: str | os.PathLike) -> ctypes.CDLL:
    """Compile `kernels.cu`, unless the library is there already, and load it.

    Args:
        source: a name that ends in `.cu` is compiled for the GPUs here, in `.cpp` for the host.
    Raises:
        OSError, RuntimeError, ImportError, SubprocessError: it cannot be compiled or loaded.
    """
    from torch.utils import cpp_extension

    name = f"score_lib_{pathlib.Path(source).stem}"

    def make(folder: pathlib.Path) -> pathlib.Path:
        path = cpp_extension.load(
            name,
            [os.fspath(source)],
            extra_cuda_cflags=list(CUDA_FLAGS),
            build_directory=os.fspath(folder),
            is_python_module=False,
        )
        return pathlib.Path(path)

    made_for = os.environ.get("TORCH_CUDA_ARCH_LIST") or str(_capabilities())
    about = torch.__version__, str(torch.version.cuda), made_for, *CUDA_FLAGS
    text = pathlib.Path(source).read_text()
    library = ctypes.CDLL(kept(name, "\n".join([*about, text]), make))
    for symbol, arguments in _FUNCTIONS.items():
        function = getattr(library, symbol)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library
