"""Compiled libraries, in the folder of PyTorch's extensions, where later processes find them."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable


def kept(name: str, about: str, make: Callable[[pathlib.Path], pathlib.Path]) -> str:
    """Path of a library, which is made unless it is there already.

    Processes do not wait for each other, nor for one that was killed: each makes its library in a
    folder of its own, and one that is complete takes its place at once.

    Args:
        name: of the folder that holds its versions.
        about: tells versions apart: all that the library is a function of.
        make: compiles it in a folder, and returns its path there.
    Raises:
        OSError: there is no place for it.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    folder = pathlib.Path(root).expanduser() / name
    path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(pathlib.Path(scratch)).replace(path)
    return os.fspath(path)
