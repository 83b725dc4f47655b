"""How long the command line takes to start, beside `import torch`, and to its first step.

    python -m benchmarks.startup

Every command is a process of its own, so that nothing is imported yet; files may still be in the
system's cache.  "first training step" is `main.py` on the digits, until it reports that step.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from benchmarks.measure import alternating, show

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import run_lib": ["-c", "import run_lib"],
    "main.py --helpfull": ["main.py", "--helpfull"],
}
TRAINING = [
    "main.py",
    "--config=configs/vp/digits.py",
    "--mode=train",
    "--config.training.n_iters=1",
    "--config.training.log_freq=1",
    "--config.training.snapshot_sampling=False",
]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    works = {name: functools.partial(run_to_the_end, command) for name, command in COMMANDS.items()}
    device = torch.device("cpu")
    times = alternating(works, device, given.rounds)
    times["first training step"] = min(first_step() for _ in range(given.rounds))
    records = [
        {"work": name, "seconds": time, "more than torch": time - times["import torch"]}
        for name, time in times.items()
    ]
    show("start-up", device, records)


def run_to_the_end(command: list[str]) -> None:
    """Run Python on something that must not fail."""
    # To have shown help counts as a failure.
    check = "--helpfull" not in command
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=check)


def first_step() -> float:
    """Seconds from the command to the first training step's report.

    Raises:
        RuntimeError: there was no step; says what the command said last.
    """
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *TRAINING, f"--workdir={workdir}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        taken, line = None, ""
        with process.stderr as lines:
            for line in lines:
                if taken is None and "step 1:" in line:
                    taken = time.perf_counter() - start
        process.wait()
    if taken is None:
        raise RuntimeError(f"main.py made no training step: {line.strip()}")
    return taken


if __name__ == "__main__":
    main()
