"""Compiles the CUDA kernels at first use, and loads them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading

import torch

_SOURCE = pathlib.Path(__file__).with_name("kernels.cu")
_FLAGS = "-O3 -std=c++17 -shared -Xcompiler -fPIC"
_USUAL_HOME = "/usr/local/cuda"
_SECONDS = 600  # nvcc needs a few
_NINJA = """\
rule nvcc
  command = {nvcc} {flags} -o $out $in
build kernels.so: nvcc {source}
"""

_POINTER, _INT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FUNCTIONS = {
    "upfirdn2d": [_INT] + 3 * [_POINTER] + 12 * [_INT] + [_POINTER],
    "leaky_relu": [_INT] + 4 * [_POINTER] + 3 * [_INT] + 2 * [_REAL] + [_INT, _POINTER],
    "probe": [_INT],
}
_one_at_a_time = threading.Lock()


def kernels(device: torch.device) -> ctypes.CDLL | None:
    """The compiled kernels for a GPU; None where there are none, which is logged once.

    The first call compiles, for some seconds, unless an earlier process has.
    """
    with _one_at_a_time:
        return _kernels(device)


@functools.cache
def _kernels(device: torch.device) -> ctypes.CDLL | None:
    try:
        library = load(compiled(torch.cuda.get_device_capability(device)))
        if error := library.probe(device.index):
            raise OSError(error.decode())
    except (OSError, subprocess.SubprocessError) as error:
        _say_once(str(error))
        return None
    return library


def compiled(capability: tuple[int, int]) -> pathlib.Path:
    """The shared library for a compute capability, compiled if it is not in the cache.

    The cache is a folder of the user's; names tell source, compiler and architecture, so that a
    change of any compiles anew.  Processes that compile at once do so each by itself, and the
    library takes its name when it is whole.

    Raises:
        OSError: the compiler or ninja is missing, or the cache cannot be written.
        subprocess.SubprocessError: the compiler fails.
    """
    nvcc, flags = _nvcc(), f"{_FLAGS} -arch=sm_{capability[0]}{capability[1]}"
    version = _output(nvcc, "--version")
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{_SOURCE.read_text()}\n{version}\n{flags}".encode())
    library = _cache() / f"kernels-{digest.hexdigest()}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            script = _NINJA.format(nvcc=_quoted(nvcc), flags=flags, source=_escaped(_SOURCE))
            pathlib.Path(folder, "build.ninja").write_text(script)
            _output(_ninja(), "-C", folder)
            os.replace(pathlib.Path(folder, "kernels.so"), library)
    return library


def load(path: str | os.PathLike) -> ctypes.CDLL:
    """A compiled `kernels.cu`.

    Raises:
        OSError: it cannot be loaded.
    """
    library = ctypes.CDLL(os.fspath(path))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library


def _cache() -> pathlib.Path:
    # Where PyTorch keeps compiled extensions too.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(base, "torch_extensions")
    return pathlib.Path(root, "score_sde_op").absolute()


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    folders = [os.path.join(home, "bin")] if home else []
    return _program("nvcc", *folders, os.environ.get("PATH", ""), f"{_USUAL_HOME}/bin")


def _ninja() -> str:
    # It is often installed beside an interpreter whose folder is not in PATH.
    return _program("ninja", os.path.dirname(sys.executable), os.environ.get("PATH", ""))


def _program(name: str, *folders: str) -> str:
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    return path


def _output(*command: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_SECONDS
    )
    if result.returncode:
        said = " ".join((result.stdout + result.stderr).split())
        raise subprocess.SubprocessError(f"{command[0]} failed: {said[-400:]}")
    return result.stdout


def _quoted(program: str) -> str:
    """A program's path in a command of ninja's."""
    return shlex.quote(program).replace("$", "$$")


def _escaped(path: pathlib.Path) -> str:
    """A path in a list of ninja's."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


@functools.cache
def _say_once(reason: str) -> None:
    logging.warning("no CUDA kernels, their place is taken by plain PyTorch: %s", reason)
