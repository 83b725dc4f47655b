"""Commands under way: `main.py` in a fork, in two processes or under torchrun.

Forks share the imports of this process, which saves most of the time.  Two processes are started
by the agent behind `torchrun`; a share of the runs is made by `python main.py` and `torchrun`
themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from small_runs import ROOT, run_program

# Timeout in seconds of work that takes a few on an idle machine.
LIMIT = 120.0

_numbers = itertools.count()


class Started:
    """A command that is under way, in a session of its own.

    Attributes:
        workers: number of processes that share the run; two have an agent above them.
        signalled: process ids known when a signal was sent.
    """

    def __init__(self, arguments: list[str], how: str, prepare: Callable[[], None]):
        launch, self.workers = LAUNCHERS[how]
        workdir = next(a for a in arguments if a.startswith("--workdir=")).partition("=")[2]
        self.path = pathlib.Path(f"{workdir}.{next(_numbers)}.stderr")
        self._file = self.path.open("w")
        self.process = launch([str(ROOT / "main.py"), *arguments], self._file, prepare)
        self.signalled: list[int] = []

    @property
    def pid(self) -> int:
        """Of the agent, or of the only process."""
        return self.process.pid

    def output(self) -> str:
        """Everything printed so far, on both streams."""
        return self.path.read_text(errors="replace")

    def errors(self) -> list[str]:
        """Logged error messages."""
        return re.findall(r"^[\d:]+ E (.*)$", self.output(), re.MULTILINE)

    def last_lines(self) -> str:
        """The last three lines of the output."""
        return " / ".join(self.output().splitlines()[-3:])

    def ended(self) -> bool:
        """Whether the agent, or the only process, has ended."""
        return _code(self.process) is not None

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Wait for a condition; False if the run ended, or time was up, before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ended() or time.monotonic() > deadline:
                return condition()
            time.sleep(0.003)
        return True

    def send(self, number: int, pids: list[int]) -> None:
        """Send a signal to processes."""
        self.signalled = family(self.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, seconds: float = 2 * LIMIT) -> int | None:
        """Wait for the end: the exit code, or None if it had to be forced."""
        self.until(self.ended, seconds)
        code = _code(self.process)
        if code is None:
            self.kill_all()
        return code

    def orphans_end(self, seconds: float) -> bool:
        """Wait for processes that outlive their agent; whether all ended in time."""
        deadline = time.monotonic() + seconds
        while any(map(_alive, self.signalled)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def kill_all(self) -> None:
        """SIGKILL to every process, as schedulers do at the end."""
        for pid in {*family(self.pid), *self.signalled}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while _code(self.process) is None or any(map(_alive, self.signalled)):
            time.sleep(0.01)


def _code(process) -> int | None:
    """Exit code of a process of either module."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def _alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _forked(argv, file, prepare):
    target = multiprocessing.get_context("fork").Process(
        target=_in_fork, args=(_main, file, prepare, argv)
    )
    target.start()
    return target


def _forked_agent(argv, file, prepare, restarts=0):
    target = multiprocessing.get_context("fork").Process(
        target=_in_fork, args=(_agent, file, lambda: None, argv, prepare, restarts)
    )
    target.start()
    return target


def _in_fork(function, file, prepare, *arguments):
    os.setsid()
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    prepare()
    function(*arguments)


def _main(argv, prepare=lambda: None):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # in place of the agent's handlers
    # Processes of `torchrun` outlive it; those of its agent in a fork would not.
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, 0, 0, 0, 0)
    prepare()
    try:
        run_program(argv)
    except SystemExit as end:
        if end.code:
            raise


def _agent(argv, prepare, restarts):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",
    )
    elastic_launch(config, _main)(argv, prepare)


def _python(argv, file, prepare):
    return _subprocess([sys.executable, *argv], file)


def _torchrun(argv, file, prepare, restarts=0):
    options = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    return _subprocess([sys.executable, "-m", "torch.distributed.run", *options, *argv], file)


def _subprocess(command, file):
    return subprocess.Popen(
        command,
        stdout=file,
        stderr=file,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# How to start a run, and in how many processes.
LAUNCHERS = {
    "fork": (_forked, 1),
    "python": (_python, 1),
    "two": (_forked_agent, 2),
    "two elastic": (lambda *args: _forked_agent(*args, restarts=3), 2),
    "torchrun": (_torchrun, 2),
    "torchrun elastic": (lambda *args: _torchrun(*args, restarts=3), 2),
}
