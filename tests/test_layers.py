"""Imports point downwards only, doors hold no logic, and importing a module does no work."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOORS = {
    "checks",
    "controllable_generation",
    "datasets",
    "evaluation",
    "likelihood",
    "losses",
    "models.foreign",
    "run_lib",
    "sampling",
    "sde_lib",
    "utils",
}

# Which rooms each room may import, besides itself and those below these.
ROOMS = {
    "score_lib.base": [],
    "op": ["score_lib.base"],
    "score_lib.disk": ["score_lib.base"],
    "score_lib.option_kinds": [],
    "score_lib.option_table": ["score_lib.option_kinds"],
    "score_lib.option_conflicts": ["score_lib.option_kinds"],
    "score_lib.options": ["score_lib.option_conflicts", "score_lib.option_table"],
    "score_lib.sdes": ["score_lib.base", "score_lib.options"],
    "score_lib.parametrization": ["score_lib.sdes"],
    "score_lib.scores": ["score_lib.parametrization"],
    "models": ["op", "score_lib.scores"],
    "score_lib.exchange": ["models", "score_lib.disk"],
    "score_lib.losses": ["models", "score_lib.sdes", "score_lib.scores"],
    "score_lib.samplers": ["score_lib.sdes", "score_lib.scores"],
    "score_lib.likelihood": ["score_lib.sdes", "score_lib.scores"],
    "score_lib.elbo": ["score_lib.likelihood"],
    "score_lib.vlb": ["score_lib.sdes", "score_lib.scores"],
    "score_lib.dequantization": ["models", "score_lib.elbo", "score_lib.losses"],
    "score_lib.inverse": ["score_lib.samplers"],
    "score_lib.data": ["score_lib.disk", "score_lib.options"],
    "score_lib.metrics": ["score_lib.disk", "score_lib.options"],
    "score_lib.checks": ["models", "score_lib.likelihood", "score_lib.inverse"],
    "score_lib.runs": [
        "configs",
        "score_lib.exchange",
        "score_lib.elbo",
        "score_lib.vlb",
        "score_lib.dequantization",
        "score_lib.checks",
        "score_lib.data",
        "score_lib.metrics",
    ],
    "configs": ["score_lib.options"],
}
# Folders of programs, which may import anything.
PROGRAMS = ("assets", "benchmarks", "examples", "main")


def modules() -> dict[str, pathlib.Path]:
    """Modules of the project by name, without tests."""
    folders = ("assets", "benchmarks", "configs", "examples", "models", "op", "score_lib")
    files = [*ROOT.glob("*.py"), *(f for name in folders for f in (ROOT / name).rglob("*.py"))]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in sorted(names.items())}


MODULES = modules()


def room(module: str) -> str | None:
    """The room that a module is in; None for a door, a program and `score_lib` itself."""
    if module in DOORS:  # `models.foreign` is inside of a package, and its room above that
        return None
    inside = [name for name in ROOMS if f"{module}.".startswith(f"{name}.")]
    return max(inside, key=len, default=None)


def below(name: str) -> set[str]:
    """A room and all rooms that it may import."""
    return {name}.union(*map(below, ROOMS[name]))


def arrows_up(module: str, imported: set[str], *, directly: bool = True) -> list[str]:
    """Imports of a module of a room that point to a door, a program or a higher room."""
    allowed = below(room(module))
    if directly and room(module) == "models":
        allowed -= {"score_lib.sdes"}  # peers, joined by score_lib.scores
    targets = (name for name in imported if name in MODULES and name != "score_lib")
    return sorted(f"{module} imports {name}" for name in targets if room(name) not in allowed)


def imports(file: pathlib.Path, module: str) -> Iterator[str]:
    """Absolute names of modules that a file imports, anywhere in it.

    `from package import name` counts as `package` and `package.name`: it may be a module.
    """
    is_package = file.name == "__init__.py"
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            yield from (source, *(f"{source}.{alias.name}".lstrip(".") for alias in node.names))
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


@pytest.fixture(scope="module")
def probed():
    """Effects of importing all modules of a room, the doors, or those of a folder of programs."""
    groups = {}
    for module in MODULES:
        group = room(module) or ("doors" if module in DOORS else module.split(".")[0])
        groups.setdefault(group, []).append(module)
    command = [sys.executable, ROOT / "tests/import_probe.py", *map(",".join, groups.values())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(groups, json.loads(result.stdout).values(), strict=True))


# --- Arrows ------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    places = {name for name in MODULES if room(name) is None}
    assert {n for n in places if n.split(".")[0] not in PROGRAMS} == {"score_lib", *DOORS}


def test_imports_in_the_source_point_downwards():
    rooms = {module: file for module, file in MODULES.items() if room(module)}
    assert [a for m, file in rooms.items() for a in arrows_up(m, set(imports(file, m)))] == []


@pytest.mark.slow
def test_modules_that_are_loaded_are_below(probed):
    assert len(probed) > len(ROOMS)
    for name in set(ROOMS) & set(probed):
        assert arrows_up(name, set(probed[name]["loaded"]), directly=False) == []


def test_upward_imports_are_found(tmp_path):
    file = tmp_path / "layers.py"
    file.write_text(
        "import op.build, torch\n"
        "from . import ema\n"
        "from .utils import get_model\n"
        "from .. import sde_lib\n"
        "def late():\n"
        "    import score_lib.losses.steps as steps\n"
        "    importlib.import_module('score_lib.sdes.process')\n"
        "    from configs import defaults\n"
    )
    assert arrows_up("models.layers", set(imports(file, "models.layers"))) == [
        "models.layers imports configs",
        "models.layers imports configs.defaults",
        "models.layers imports score_lib.losses.steps",
        "models.layers imports score_lib.sdes.process",
        "models.layers imports sde_lib",
    ]


# --- Doors and packages ------------------------------------------------------------------------


def is_plain(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring or an import."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_holds_no_logic(door):
    tree = ast.parse(MODULES[door].read_text())
    assert ast.get_docstring(tree)
    assert all(map(is_plain, tree.body))


def test_packages_import_nothing():
    """Only models and op do, whose names users import from the package."""
    for name, file in MODULES.items():
        if file.name == "__init__.py" and name.startswith("score_lib"):
            body = ast.parse(file.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), name


def test_the_top_level_stays_small():
    assert len(list(ROOT.glob("*.py"))) <= 11


# --- No work -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_does_no_work(probed):
    for group, found in probed.items():
        did = {key: value for key, value in found.items() if value and key != "loaded"}
        assert not did, f"importing {group}: {did}"


def test_options_and_configs_need_no_torch(tmp_path):
    code = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from configs import defaults
assert all(map(defaults.load, defaults.experiments()))
heavy = [m for m in ("torch", "numpy", "tensorflow") if m in sys.modules]
assert not heavy, heavy
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_doors_open_beside_modules_of_the_same_names(tmp_path):
    """A user's project comes first on the path, and has files of the names of other doors."""
    for name in ("utils", "data", "datasets", "metrics", "evaluation", "ops", "options"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    code = (
        "import utils, data, datasets, metrics, evaluation\n"
        "import sampling, run_lib, losses, likelihood, sde_lib, controllable_generation\n"
        "assert utils.mine and datasets.mine and metrics.mine\n"
        "import torch; sampling.get_predictor('none'), run_lib.train, losses.get_optimizer"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0


def test_a_room_says_what_each_of_its_modules_is():
    for front in (ROOT / "score_lib").glob("*/__init__.py"):
        modules = {path.stem for path in front.parent.glob("*.py")} - {"__init__"}
        text = front.read_text()
        assert sorted(name for name in modules if f"`{name}`" not in text) == [], front.parent
