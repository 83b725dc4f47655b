"""The project's own source as syntax trees: which files there are, what they import and which
options of a config they read.
"""

from __future__ import annotations

import ast
import pathlib
from collections import defaultdict
from collections.abc import Iterator

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parent.parent
SECTIONS = ("data", "model", "training", "optim", "sampling", "control", "eval")
_METHODS = set(dir(ConfigDict()))


def project_files(leave_out: tuple[str, ...] = ("tests",)) -> list[pathlib.Path]:
    """Python files of the project, relative to its root."""
    tops = (
        top for top in ROOT.iterdir() if top.name[0] != "." and top.name not in (*leave_out, "runs")
    )
    files = (file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top]))
    return sorted(file.relative_to(ROOT) for file in files if file.suffix == ".py")


def parse(file: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=str(file))


def imported_modules(file: pathlib.Path) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute names of the modules that a file imports, anywhere in it, and the statements.

    `from package import name` counts as `package.name`: it may be a module.
    """
    package = file.parent.parts
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from ((f"{module}.{alias.name}".lstrip("."), node) for alias in node.names)


class ConfigReads(ast.NodeVisitor):
    """Options that a module reads from a config, as "section.name".

    Follows `config.model.nf`, `self.config.model.nf`, names that stand for a section
    (`model = config.model`, then `model.nf`) and `config.data.get("levels", 0)`.  Of sections that
    are read by a computed name, such as `config.eval[name]`, it notes that they are, and every
    text in the module: the name must be one of them.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.reads: dict[str, list[str]] = defaultdict(list)
        self.defaults: list[tuple[str, ast.expr | None, str]] = []
        self.computed: set[str] = set()
        self.texts: set[str] = set()
        # What names stand for: "" the config, "model" a section, None something else.
        self._scopes: list[dict[str, str | None]] = [{}]
        self._attributes: dict[str, str | None] = {}
        self._modules: set[str] = set()
        self.visit(parse(file))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        # A parameter hides a section of the same name outside; one called config is a config.
        self._scopes.append({a.arg: None for a in every if a.arg != "config"})
        self.generic_visit(node)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        self._modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                self._bind(name, self._stands_for(value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._stands_for(node.value)
        is_section = owner == "" and node.attr in SECTIONS
        is_read = isinstance(node.ctx, ast.Load) and node.attr not in _METHODS
        if owner is not None and is_read and not is_section:
            self._note(owner, node.attr, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "get" and node.args:
            owner, name = self._stands_for(function.value), node.args[0]
            if owner is not None and isinstance(name, ast.Constant):
                key = self._note(owner, name.value, node)
                default = node.args[1] if len(node.args) > 1 else None
                self.defaults.append((key, default, f"{self.file}:{node.lineno}"))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        owner = self._stands_for(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            if isinstance(node.slice, ast.Constant):
                self._note(owner, node.slice.value, node)
            elif owner:
                self.computed.add(owner)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def _note(self, owner: str, name: str, node: ast.AST) -> str:
        key = f"{owner}.{name}".lstrip(".")
        self.reads[key].append(f"{self.file}:{node.lineno}")
        return key

    def _bind(self, target: ast.expr, meaning: str | None) -> None:
        if isinstance(target, ast.Name) and target.id != "config":
            self._scopes[-1][target.id] = meaning
        elif isinstance(target, ast.Attribute):
            self._attributes[target.attr] = meaning

    def _stands_for(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            for scope in reversed(self._scopes):
                if node.id in scope:
                    return scope[node.id]
            return "" if node.id == "config" else None
        if not isinstance(node, ast.Attribute):
            return None
        if self._stands_for(node.value) == "":
            return node.attr if node.attr in SECTIONS else None
        owner = node.value.id if isinstance(node.value, ast.Name) else None
        if owner == "self" and node.attr in self._attributes:
            return self._attributes[node.attr]
        return "" if node.attr == "config" and owner not in self._modules else None
