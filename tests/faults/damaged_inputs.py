"""Give damaged and hostile files to every reader.

    PYTHONPATH=tests python -m faults.damaged_inputs [KIND ...]

Each is read in a process of its own.  It has to be refused by a ValueError or OSError, which the
command line shows as one message: one line, which names the file.  Nothing in it may be run,
nothing outside of its folder may change, and time and memory are bounded.  Where a flipped bit is
one that the format does not use or protect, the input may be read instead, unchanged or as
something of the right shape; such cases are counted apart.

The arguments choose kinds by the start of their names.  The exit code is 1 if anything went wrong.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator

from score_lib.disk.files import printable

from . import (
    bad_arrays,
    bad_checkpoints,
    bad_images,
    bad_points,
    bad_records,
    bad_workdirs,
    bad_zips,
)
from .cases import CANARY, Case
from .forked import Outcome, call

SECONDS = 20.0
MODULES = (
    bad_arrays,
    bad_checkpoints,
    bad_images,
    bad_points,
    bad_records,
    bad_workdirs,
    bad_zips,
)


def all_cases() -> Iterator[Case]:
    """Every damaged input, the same ones every time."""
    for module in MODULES:
        yield from module.cases()


class Result:
    """Outcome of one damaged input.

    Attributes:
        problems: messages about wrong behaviour; empty if there is none.
        accepted: it was read.
    """

    def __init__(self, case: Case, folder: pathlib.Path):
        inside, elsewhere = folder / "input", folder / "elsewhere"
        for made in (inside, elsewhere):
            made.mkdir()
        self.case, self.problems = case, []
        path = case.make(inside)
        before = _listing(folder)
        os.chdir(elsewhere)
        self.outcome = call(lambda: case.read(path), SECONDS, case.mebibytes)
        os.chdir("/")
        self.accepted = not self.outcome.error
        self._check_traces(folder, before)
        self._check_bounds()
        if self.accepted:
            self._check_accepted(folder)
        else:
            self._check_message(path)

    def _check_traces(self, folder: pathlib.Path, before: dict) -> None:
        if any((folder / place / CANARY).exists() for place in ("input", "elsewhere")):
            self.problems.append("code was run")
        after = _listing(folder)
        for path in before.keys() | after.keys():
            if "input" not in pathlib.Path(path).parts and before.get(path) != after.get(path):
                self.problems.append(f"{path} was changed, outside of its folder")

    def _check_bounds(self) -> None:
        if self.outcome.seconds > SECONDS:
            self.problems.append(f"it took {self.outcome.seconds:.1f} s")
        if self.outcome.growth > self.case.mebibytes:
            self.problems.append(f"it took {self.outcome.growth:.0f} MiB")

    def _check_accepted(self, folder: pathlib.Path) -> None:
        if self.case.expect == "refused":
            self.problems.append("it was read")
        if self.case.expect == "refused or same":
            (folder / "original").mkdir()
            original = self.case.original(folder / "original")
            expected = call(lambda: self.case.read(original), SECONDS, self.case.mebibytes)
            if expected.result != self.outcome.result or expected.error:
                self.problems.append("it was read as something else than it was")

    def _check_message(self, path: pathlib.Path) -> None:
        error, message, *_ = self.outcome
        if error not in ("ValueError", "OSError"):
            self.problems.append(f"{error}: {message[:200]}")
        elif self.case.expect == "read":
            self.problems.append(f"it was refused: {message}")
        elif not message.isprintable() or not 10 < len(message) < 1500:
            self.problems.append(f"the message is not one line of a sensible length: {message!r}")
        elif printable(path.name) not in message:
            self.problems.append(f"the message does not name the file: {message}")


def _listing(folder: pathlib.Path) -> dict[str, tuple]:
    """Everything below a folder, with sizes and modification times."""
    found = {}
    for place, folders, files in os.walk(folder):
        if pathlib.Path(place) == folder / "input":
            folders.clear()
            continue
        for name in folders + files:
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = status.st_size, status.st_mtime_ns
    return found


def run(case: Case) -> Result:
    """Give one damaged input to its reader."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="damaged_"))
    here = os.getcwd()
    try:
        return Result(case, folder)
    finally:
        os.chdir(here)
        if case.name == "folders in folders":  # too many of them for Python
            subprocess.run(["rm", "-rf", str(folder / "input")], check=True)
        shutil.rmtree(folder)


def table(results: list[Result]) -> str:
    """One line for each kind: tried, refused, read, worst time and growth of memory."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        kinds[result.case.kind].append(result)
        kinds["all"].append(result)
    kinds["all"] = kinds.pop("all")
    form = "{:38} {:>6} {:>8} {:>6} {:>7} {:>9} {:>9}"
    lines = [form.format("kind", "tried", "refused", "read", "wrong", "seconds", "MiB")]
    for kind, rows in kinds.items():
        outcomes: list[Outcome] = [row.outcome for row in rows]
        accepted = sum(row.accepted for row in rows)
        wrong = sum(bool(row.problems) for row in rows)
        worst = max(o.seconds for o in outcomes), max(o.growth for o in outcomes)
        lines.append(
            form.format(
                kind, len(rows), len(rows) - accepted, accepted, wrong or "-",
                f"{worst[0]:.2f}", f"{worst[1]:.0f}",
            )
        )  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the chosen kinds, print the table, and return the exit code."""
    chosen = [c for c in all_cases() if not arguments or c.kind.startswith(tuple(arguments))]
    results = [run(case) for case in chosen]
    print(table(results))
    wrong = [result for result in results if result.problems]
    for result in wrong:
        print(f"WRONG  {result.case.kind}, {result.case.name}: {'; '.join(result.problems)}")
    return 1 if wrong or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
