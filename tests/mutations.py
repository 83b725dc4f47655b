"""Break the wiring on purpose, one line at a time, and see that the tests notice.

    python tests/mutations.py            # all, some minutes
    python tests/mutations.py ema seed   # those whose name holds a word

Each mutation of `mutations.txt` is applied to a copy of the project, in which the tests named with
it then have to fail.  Line by line, the text holds

    @ FILE TESTS   the file of the mutations that follow, and their tests
    NAME           of a mutation
    - CODE         part of a line of the file, or of several lines, that occurs once
    + CODE         what it is replaced by; nothing if there is no such line
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Mutation:
    """Replace `old` by `new` in a file; `tests` have to fail then."""

    name: str
    file: str
    tests: tuple[str, ...]
    lines: dict[str, list[str]]

    @property
    def old(self) -> str:
        return "\n".join(self.lines["-"])

    @property
    def new(self) -> str:
        return "\n".join(self.lines["+"])


def read_mutations(text: str) -> list[Mutation]:
    """Those of a text as above."""
    found: list[Mutation] = []
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "@":
            file, *names = rest.split()
            tests = tuple(f"tests/{name}" for name in names)
        elif mark in ("-", "+"):
            found[-1].lines[mark].append(rest)
        elif line:
            found.append(Mutation(line, file, tests, {"-": [], "+": []}))
    return found


MUTATIONS = read_mutations((ROOT / "tests/mutations.txt").read_text(encoding="utf-8"))


def copied(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the project's files."""
    copy = folder / "project"
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for file in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy / file)
    return copy


def passes(copy: pathlib.Path, tests: tuple[str, ...]) -> bool:
    """Whether tests pass in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *tests], cwd=copy, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: pytest ended with {result.returncode}\n{result.stdout}")
    return result.returncode == 0


def is_caught(mutation: Mutation, folder: pathlib.Path) -> bool:
    """Whether the tests fail in a copy of the project with the mutation."""
    copy = copied(folder)
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return not passes(copy, mutation.tests)


def main() -> None:
    """Apply the chosen mutations one by one; exit code 1 if one goes unnoticed."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for tests in dict.fromkeys(mutation.tests for mutation in chosen):
            if not passes(copied(folder), tests):
                sys.exit(f"{' '.join(tests)} fail without any mutation")
        for mutation in chosen:
            caught = is_caught(mutation, folder)
            print(f"{'caught' if caught else 'MISSED'}: {mutation.name}", flush=True)
            if not caught:
                missed.append(mutation.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
