"""Threads on a busy machine: images/s of training beside another program, by how threads wait.

    python -m benchmarks.threads --rounds 9
    python -m benchmarks.threads --others none training --batch_size 16

Each row is a process of its own, bound to the same cores, as the other program is: "loop" computes
on one core, "training" trains the same network with PyTorch's defaults.  Rows take turns, while the
others are stopped.  "of default" is the ratio to the row of PyTorch's defaults beside the same
program, "of idle" to the same row alone: medians over pairs of the same round.
"""

import argparse
import functools
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.measure import show
from benchmarks.train import training
from benchmarks.variants import arguments, configured
from score_lib.base.memory import keep_freed_memory
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.threads import COUNTS, SPINS_BUSY, SPINS_IDLE, WAITING

DEFAULT, OURS = "defaults", "ours"
SETTINGS = {
    DEFAULT: {"KMP_BLOCKTIME": "200"},  # Intel's own default, so that nothing else is set
    OURS: {"GOMP_SPINCOUNT": str(SPINS_IDLE), "KMP_BLOCKTIME": "1"},
    "ours, busy": {"GOMP_SPINCOUNT": str(SPINS_BUSY), "KMP_BLOCKTIME": "0"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "active": {"OMP_WAIT_POLICY": "active"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OTHERS = ("none", "loop", "training")
LOOP = "while True: pass"


class Process:
    """A program that is stopped but for its turns.

    Args:
        command: of Python.
        environment: variables that say how threads wait, and how many there are.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None):
        clean = {k: v for k, v in os.environ.items() if k not in (*WAITING, *COUNTS)}
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=clean | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> float:
        """The next number that it prints.

        Raises:
            RuntimeError: it has ended.
        """
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended with code {self._process.wait()}")
        return float(line)

    def ask(self, seconds: float) -> None:
        """Let it go on, and work for a time."""
        self.go_on()
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def go_on(self) -> None:
        """End a stop."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop it, with the threads that wait."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(config="vp/digits")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--cores", type=int, nargs="*", default=_first_cores())
    parser.add_argument("--settings", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    given.batch_size = given.batch_size or 128
    if given.worker:
        work(given)
        return
    os.sched_setaffinity(0, given.cores)
    load = os.getloadavg()[0]
    rates = measured(given)
    device = torch.device("cpu")
    title = f"threads, {given.config}, batch {given.batch_size}, {len(given.cores)} cores"
    show(title, device, rows(rates), load_before=load, rounds=given.rounds, rates=_named(rates))


def _first_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:2]


def _named(rates: dict) -> dict[str, list[float]]:
    return {f"{name}, {other}": found for (name, other), found in rates.items()}


def work(given: argparse.Namespace) -> None:
    """Train for as many seconds as each line of the input says; print images/s."""
    keep_freed_memory()
    config = configured(given, batch_on_gpu=128)[0]
    config.device = "cpu"
    step = training(config).call
    for _ in range(3):
        step()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        start, steps = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < float(line):
            float(step())
            steps += 1
        print(steps * given.batch_size / taken, flush=True)


def measured(given: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Images/s of each round, by setting and other program."""
    worker = ["-m", "benchmarks.threads", "--worker", "--config", given.config]
    worker += ["--batch_size", str(given.batch_size), *(f"--set={text}" for text in given.set)]
    make = functools.partial(Process, worker)
    processes: dict[str, Process] = {}
    rates: dict[tuple[str, str], list[float]] = {}
    try:
        for name in given.settings:
            processes[name] = make(SETTINGS[name])
            processes[name].read()
            processes[name].stop()
        for other in set(given.others) - {"none"}:
            processes[other] = make() if other == "training" else Process(["-c", LOOP])
            if other == "training":
                processes[other].read()
                processes[other].ask(math.inf)
            processes[other].stop()
        for number in range(given.rounds):
            for name in given.settings[:: -1 if number % 2 else 1]:
                for other in given.others:
                    rate = beside(processes[name], processes.get(other), given.seconds)
                    rates.setdefault((name, other), []).append(rate)
    finally:
        for process in processes.values():
            process.end()
    return rates


def beside(process: Process, other: Process | None, seconds: float) -> float:
    """Images/s of a process while another one runs, if there is one."""
    if other is not None:
        other.go_on()
    process.ask(seconds)
    rate = process.read()
    for each in (process, other):
        if each is not None:
            each.stop()
    return rate


def rows(rates: dict[tuple[str, str], list[float]]) -> list[dict]:
    """A row for each setting and other program."""

    def ratio(found: list[float], to: list[float] | None) -> float | None:
        return statistics.median(map(lambda a, b: a / b, found, to)) if to else None

    return [
        {
            "waiting": name,
            "beside": other,
            "images/s": statistics.median(found),
            "of default": ratio(found, rates.get((DEFAULT, other))),
            "of idle": ratio(found, rates.get((name, "none"))),
        }
        for (name, other), found in rates.items()
    ]


if __name__ == "__main__":
    with brief_mistakes(RuntimeError):
        main()
