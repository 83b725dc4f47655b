"""Imports point downwards only, and importing a module does no work."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import source_code
from source_code import ROOT, imported_modules, project_files

BOTTOM = {"utils", "op"}
MIDDLE = BOTTOM | {"sde_lib", "models"}
METHODS = {"losses", "sampling", "solvers", "likelihood", "latent", "controllable_generation"}
ALL_BELOW = MIDDLE | {"operators"} | METHODS | {"datasets", "evaluation", "configs"}
MODES = {"train_lib", "eval_lib", "control_lib"}

# What each module or package may import from the project, besides itself.
LAYERS = {
    "utils": set(),
    "op": set(),
    "sde_lib": BOTTOM,
    "models": BOTTOM,
    "operators": BOTTOM,
    "losses": MIDDLE,
    "sampling": MIDDLE,
    "likelihood": MIDDLE,
    "latent": MIDDLE | {"sampling"},
    "solvers": MIDDLE | {"sampling"},
    "controllable_generation": MIDDLE | {"sampling", "operators"},
    "datasets": {"utils"},
    "evaluation": {"utils"},
    "configs": set(),
    "experiment": ALL_BELOW,
    "train_lib": ALL_BELOW | {"experiment"},
    "eval_lib": ALL_BELOW | {"experiment"},
    "control_lib": ALL_BELOW | {"experiment"},
    "run_lib": ALL_BELOW | {"experiment"} | MODES,
    "main": ALL_BELOW | {"run_lib"},
    "demo": ALL_BELOW | {"run_lib", "experiment"} | MODES,
    "benchmarks": ALL_BELOW | {"run_lib", "experiment"} | MODES,
    "assets": ALL_BELOW,  # scripts that made what is stored there
}


def top_level(file: pathlib.Path) -> str:
    return file.parts[0].removesuffix(".py")


def upward_imports(file: pathlib.Path) -> list[str]:
    """Where a file imports what its layer must not know, as "file:line imports module"."""
    layer = top_level(file)
    forbidden = LAYERS.keys() - LAYERS[layer] - {layer}
    return [
        f"{file}:{node.lineno} imports {module}"
        for module, node in imported_modules(file)
        if module.split(".")[0] in forbidden
    ]


def test_every_module_has_its_layer():
    assert {top_level(file) for file in project_files()} <= LAYERS.keys()


def test_imports_point_downwards():
    assert [arrow for file in project_files() for arrow in upward_imports(file)] == []


def test_imports_that_point_upwards_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(source_code, "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/layers.py").write_text(
        "import utils.files, torch\n"
        "from . import ema\n"
        "from .utils import get_model\n"
        "from .. import sde_lib\n"
        "def late():\n"
        "    import losses.parts as parts\n"
        "    from configs.defaults import base\n"
    )
    assert upward_imports(pathlib.Path("models/layers.py")) == [
        "models/layers.py:4 imports sde_lib",
        "models/layers.py:6 imports losses.parts",
        "models/layers.py:7 imports configs.defaults.base",
    ]


def test_configs_are_plain_values():
    plain = sys.stdlib_module_names | {"configs", "ml_collections"}
    for file in project_files():
        if top_level(file) == "configs":
            assert {module.split(".")[0] for module, _ in imported_modules(file)} <= plain, file


def test_what_trains_and_samples_needs_no_tensorflow():
    users = {
        top_level(file)
        for file in project_files()
        for module, _ in imported_modules(file)
        if module.startswith("tensorflow")
    }
    assert users <= {"datasets", "evaluation"}


IMPORT_ALL = """
import importlib, sys
import absl.app, ml_collections.config_flags, numpy, torch

work = []

def audit(event, arguments):
    if event in ("subprocess.Popen", "os.system", "socket.connect", "os.mkdir"):
        work.append((event, str(arguments)))
    elif event == "open" and set(str(arguments[1])) & set("wax+"):
        work.append((event, str(arguments[0])))

sys.addaudithook(audit)
for module in sys.argv[1:]:
    importlib.import_module(module)
    loaded = [m for m in HEAVY if m in sys.modules]
    assert not loaded, f"importing {module} loads {loaded}"
    assert not work, f"importing {module} does {work}"
assert not torch.cuda.is_initialized()
"""
HEAVY = [
    "tensorflow",
    "tensorflow_datasets",
    "tensorflow_gan",
    "tensorflow_hub",
    "torchvision",
    "torch_fidelity",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "tensorboard",
    "sklearn",
    "PIL",
    "matplotlib",
]


def test_importing_does_no_work():
    names = [
        ".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in project_files()
    ]
    result = subprocess.run(
        [sys.executable, "-B", "-c", f"HEAVY = {HEAVY}\n{IMPORT_ALL}", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout, "importing prints"
