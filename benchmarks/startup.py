"""Time from the command line to the end of imports, and to the first training step.

    python -m benchmarks.startup

Every command is a process of its own, with files in the system's cache.  "first training step" is
`main.py` on the digits, until it reports that step.
"""

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
OPTIONS = ("n_iters=1", "log_freq=1", "snapshot_sampling=False")
TRAINING = ["main.py", "--config=configs/vp/digits.py", "--mode=train"]
TRAINING += [f"--config.training.{option}" for option in OPTIONS]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    works = {name: functools.partial(finish, command) for name, command in COMMANDS.items()}
    times = alternating(works, torch.device("cpu"), rounds)
    times["first training step"] = min(first_step(TRAINING) for _ in range(rounds))
    records = [
        {"work": name, "seconds": time, "more than torch": time - times["import torch"]}
        for name, time in times.items()
    ]
    show("start-up", torch.device("cpu"), records)


def finish(command: list[str]) -> None:
    """Run Python to its end."""
    check = "--helpfull" not in command  # whose exit status is 1
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=check)


def first_step(command: list[str]) -> float:
    """Seconds from the start of a command to its report of the first training step.

    Raises:
        RuntimeError: there was no step; with the last line of the command.
    """
    with tempfile.TemporaryDirectory() as workdir:
        start, taken, line = time.perf_counter(), None, ""
        command = [sys.executable, *command, f"--workdir={workdir}"]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stderr:
                if taken is None and "step 1:" in line:
                    taken = time.perf_counter() - start
    if taken is None:
        raise RuntimeError(f"main.py made no training step: {line.strip()}")
    return taken


if __name__ == "__main__":
    main()
