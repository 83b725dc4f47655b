"""Trainings that take turns, and the rates at which they go."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime

import numpy as np

from benchmarks.measure import median_ratio

TICK = 0.02  # seconds between two looks at a process
GRACE = 120.0  # seconds for the last step and for saving
Entry = tuple[float, int]


@dataclasses.dataclass
class Contestant:
    """A training in a process of its own.

    Attributes:
        command: gives the command line, from the time at which it starts.
        folder: of its files.
        stops_itself: at the end of a window; others are sent SIGSTOP, and SIGTERM in the end.
        windows: beginnings and ends of its turns.
        peak_mb: most memory that was resident.
        cpu_s: time that its threads were busy.
    """

    name: str
    command: Callable[[float], list[str]]
    folder: pathlib.Path
    stops_itself: bool
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    windows: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    peak_mb: float = 0.0
    cpu_s: float = 0.0

    def turn(self, seconds: float, last: bool) -> None:
        """One window.

        Raises:
            RuntimeError: it ended too early, or with an error.
        """
        begin = time.time()
        if self.process is None:
            self._start(begin)
        else:
            self.process.send_signal(signal.SIGCONT)
            time.sleep(TICK)  # it is no longer stopped
        limit = begin + seconds + (GRACE if self.stops_itself else 0)
        state = self._wait(limit, stopped=self.stops_itself and not last)
        self.windows.append((begin, min(time.time(), begin + seconds)))
        if not self.stops_itself and state == "running":
            self.process.send_signal(signal.SIGTERM if last else signal.SIGSTOP)
            if last:
                state = self._wait(time.time() + GRACE)
        self._check(state, last)

    def end(self) -> None:
        """End the process, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _start(self, begin: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "said.txt", "w") as said:
            self.process = subprocess.Popen(
                self.command(begin), stdout=said, stderr=said, env=self.environment
            )

    def _wait(self, limit: float, stopped: bool = False) -> str:
        """ "ended", "stopped" (if that is waited for), or "running" at the limit."""
        while time.time() < limit:
            if self.process.poll() is not None:
                return "ended"
            if self._look() == "T" and stopped:
                return "stopped"
            time.sleep(TICK)
        return "running"

    def _look(self) -> str:
        """Note memory and time; the process's state in one letter."""
        place = pathlib.Path("/proc") / str(self.process.pid)
        try:
            numbers = (place / "stat").read_text().rpartition(")")[2].split()
            peak = re.search(r"VmHWM:\s*(\d+) kB", (place / "status").read_text())
        except (FileNotFoundError, ProcessLookupError):
            return ""
        if peak:  # a process that has ended has none
            self.peak_mb = int(peak[1]) / 1024
            self.cpu_s = (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
        return numbers[0]

    def _check(self, state: str, last: bool) -> None:
        code = self.process.poll()
        fine = code in (0, 75) if last else code is None
        if not fine or (last and state != "ended"):
            said = (self.folder / "said.txt").read_text().strip()[-2000:]
            raise RuntimeError(f"{self.name} is {state} with exit code {code}:\n{said}")


def compete(contestants: list[Contestant], minutes: float, rounds: int) -> None:
    """Let all train in turns."""
    window = 60 * minutes / rounds
    try:
        for number in range(rounds):
            for contestant in contestants:
                contestant.turn(window, last=number + 1 == rounds)
            print(f"round {number + 1} of {rounds} is over", flush=True)
    finally:
        for contestant in contestants:
            contestant.end()


def entries_of_journal(path: pathlib.Path) -> list[Entry]:
    """Times and steps of a `shared.Journal`."""
    records = map(json.loads, path.read_text().splitlines())
    return [(record["time"], record["step"]) for record in records]


def entries_of_run(path: pathlib.Path) -> list[Entry]:
    """Times and steps of a run's `stdout.txt`."""
    found = re.findall(r"^(\S+ \S+) I step (\d+): training loss", path.read_text(), re.MULTILINE)
    form = "%Y-%m-%d %H:%M:%S,%f"
    return [(datetime.strptime(at, form).timestamp(), int(step)) for at, step in found]


def rates(
    entries: list[Entry], windows: list[tuple[float, float]], batch_size: int
) -> list[np.ndarray]:
    """Images a second between neighbouring entries inside a window, for each window."""
    found = []
    for begin, end in windows:
        inside = np.array([entry for entry in entries if begin <= entry[0] <= end])
        inside = inside.reshape(-1, 2)
        found.append(batch_size * np.diff(inside[:, 1]) / np.diff(inside[:, 0]))
    return found


def summary(found: list[np.ndarray]) -> dict[str, float]:
    """Median and quartiles of all rates; nothing if there are none."""
    together = np.concatenate(found)
    if not len(together):
        return {}
    low, middle, high = np.quantile(together, (0.25, 0.5, 0.75))
    return {"images/s": float(middle), "quarter": float(low), "three quarters": float(high)}


def times_as_fast(ours: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """The median over rounds of the ratio of their median rates, with its error."""
    pairs = [(a, b) for a, b in zip(ours, other, strict=True) if len(a) and len(b)]
    if not pairs:
        return {}
    found = median_ratio([float(np.median(a) / np.median(b)) for a, b in pairs])
    error = {"ours / it_standard_error": found.standard_error} if len(pairs) > 1 else {}
    return {"ours / it": found.value} | error
