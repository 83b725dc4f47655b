"""Imports groups of modules, each in a fork of one process that has loaded the libraries.

    python import_probe.py MODULE[,MODULE...] ...

prints for each group, as JSON: "loaded" (modules of the project that its import loaded), "heavy"
(optional packages among them), "work" (files written, processes started, connections), "printed"
and "errors".
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile

import absl.app
import absl.flags
import ml_collections.config_flags
import numpy
import torch
import torch.utils.data

assert absl and ml_collections and numpy  # loaded once, before the forks
HEAVY = {
    *("tensorflow", "tensorflow_datasets", "tensorflow_gan", "tensorflow_hub", "torch_fidelity"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "tensorboard", "torchvision"),
    *("sklearn", "PIL", "matplotlib"),
}


def probe(modules: list[str], root: str) -> dict:
    """Import modules and report the effects."""
    work, errors, before, printed = [], [], set(sys.modules), io.StringIO()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def audit(event, arguments):
        if sys.pycache_prefix in str(arguments[:1]):
            return  # compiled modules, which the next fork reads
        if event in ("subprocess.Popen", "os.system", "os.fork", "socket.connect", "os.mkdir"):
            work.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & writing:
            work.append(f"writes {arguments[0]}")

    sys.addaudithook(audit)
    for module in modules:
        try:
            with contextlib.redirect_stdout(printed):
                importlib.import_module(module)
        except Exception as failure:
            errors.append(f"{module}: {type(failure).__name__}: {failure}")
    if torch.cuda.is_initialized():
        work.append("initialises CUDA")
    new = sys.modules.keys() - before
    files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in new}
    return {
        "loaded": sorted(name for name in new if files[name].startswith(root)),
        "heavy": sorted(new & HEAVY),
        "work": list(work),
        "printed": printed.getvalue(),
        "errors": errors,
    }


def main() -> None:
    """Probe each group in a fork of its own."""
    sys.path[0] = root = os.getcwd()
    found, sys.dont_write_bytecode = {}, False
    with tempfile.TemporaryDirectory() as sys.pycache_prefix:
        for group in sys.argv[1:]:
            found[group] = probed_in_fork(group.split(","), root)
    print(json.dumps(found))


def probed_in_fork(modules: list[str], root: str) -> dict:
    """`probe` in a fork of this process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, json.dumps(probe(modules, root + os.sep)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        report = json.loads(pipe.read())
    os.waitpid(child, 0)
    return report


if __name__ == "__main__":
    main()
