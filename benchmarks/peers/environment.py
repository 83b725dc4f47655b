"""A virtual environment with the peers, which also sees the packages of this interpreter."""

import os
import pathlib
import subprocess
import sys
import sysconfig

PACKAGES = ("diffusers==0.42.1", "torchdiffeq==0.2.5")
MODULES = ("diffusers", "torchdiffeq")
# The peers come in the versions above, and Diffusers imports these only where it finds them.
HIDDEN = (*MODULES, "torchvision", "transformers", "accelerate")
ROOT = pathlib.Path(__file__).parents[2]


def python_of(folder: str | os.PathLike) -> str:
    """The interpreter of the environment in a folder, which is made if need be.

    Raises:
        OSError: it has to be made, and packages cannot be installed.
    """
    folder = pathlib.Path(folder)
    python = folder.resolve() / "bin" / "python"
    if _complete(python):
        return str(python)
    print(f"installing {', '.join(PACKAGES)} into {folder}", flush=True)
    _must([sys.executable, "-m", "venv", str(folder)], folder)
    _link_packages(folder)
    pip = [str(python), "-m", "pip", "install", "--no-input", "--quiet", "--retries", "1"]
    _must([*pip, *PACKAGES], folder)
    return str(python)


def _link_packages(folder: pathlib.Path) -> None:
    """Let the environment see the packages of this interpreter, so that PyTorch is the same.

    With --system-site-packages it would see those of the interpreter that this environment is made
    from.
    """
    linked = folder.resolve() / "linked"
    linked.mkdir(exist_ok=True)
    for package in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        place = linked / package.name
        if not (package.name.startswith(HIDDEN) or package.suffix == ".pth" or place.exists()):
            place.symlink_to(package)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "linked.pth").write_text(f"{linked}\n")


def variables(threads: int) -> dict[str, str]:
    """Environment variables of all contestants: threads alike, and no network."""
    shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **shared, **offline, "PYTHONPATH": str(ROOT)}


def _complete(python: pathlib.Path) -> bool:
    if not python.exists():
        return False
    wanted = [f"importlib.metadata.version({name!r})" for name in MODULES]
    code = f"import importlib.metadata; print({', '.join(wanted)})"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.split() == [package.partition("==")[2] for package in PACKAGES]


def _must(command: list[str], folder: pathlib.Path) -> None:
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        said = (made.stderr or made.stdout).strip().splitlines()
        reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1:])
        raise OSError(
            f"the peers' environment {folder} cannot be made ({reason}): connect to a package "
            "index, or give one that exists as --environment"
        )
