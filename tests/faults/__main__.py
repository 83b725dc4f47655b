"""Kill runs, fill their disks, damage their files, and see whether anything is lost.

    PYTHONPATH=tests python -m faults [--quick] [--kills 100] [--seed 0] [--workdir FOLDER]

Small runs on digits are started, disturbed, and started again by the same command; they have to
end in bitwise the same weights, averages, logs and reports as runs that were left alone.  A table
prints the number tried and lost; the exit code is 1 if anything was.  About a quarter of an
hour on two cores, with --quick about a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator

from . import disks, files, folders, kills
from .runs import Bench, Result


def all_cases(bench: Bench, seed: int, count: int, quick: bool) -> Iterator[Result]:
    """Every disturbance; random ones are a function of the seed."""
    yield from folders.cases(bench, random.Random(seed), quick)
    yield from files.cases(bench, random.Random(seed), quick)
    yield from disks.cases(bench, random.Random(seed), quick)
    yield from kills.saving_cases(bench, random.Random(seed), quick)
    yield from kills.elastic_cases(bench, random.Random(seed), quick)
    yield from kills.cases(bench, random.Random(seed), count)


def table(results: list[Result]) -> str:
    """One line for each kind: tried, lost, seconds."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        kinds[result.kind].append(result)
    form = "{:58} {:>6} {:>6} {:>8}"
    lines = [form.format("what happens", "tried", "lost", "seconds")]
    for kind, rows in [*kinds.items(), ("all", results)]:
        lost = sum(bool(row.problems) for row in rows)
        seconds = sum(row.seconds for row in rows)
        lines.append(form.format(kind, len(rows), lost or "-", f"{seconds:.0f}"))
    return "\n".join(lines)


def main() -> int:
    """Run everything, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--kills", type=int, help="random kills; 100, or 10 with --quick")
    parser.add_argument("--quick", action="store_true", help="a few of each kind")
    parser.add_argument("--workdir", type=pathlib.Path, help="where runs are made, and kept")
    options = parser.parse_args()
    count = options.kills if options.kills is not None else 10 if options.quick else 100
    start, results = time.monotonic(), []
    with contextlib.ExitStack() as stack:
        folder = options.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        bench = Bench(pathlib.Path(folder))
        for result in all_cases(bench, options.seed, count, options.quick):
            results.append(result)
            said = "LOST: " + "; ".join(result.problems) if result.problems else "ok"
            passed = time.monotonic() - start
            print(f"{passed:6.0f} s  {result.kind}, {result.name}: {said}", flush=True)
    print(table(results))
    return 1 if any(result.problems for result in results) or not results else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
