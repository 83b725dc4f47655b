"""Several runs in one folder, processes that die and leave others, and clocks that jump."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator

from .launch import LIMIT, Started, family
from .outcomes import reached_step
from .runs import Bench, Result

DAY = 86400.0


def cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Result]:
    """All of them, or a few."""

    def beside(mode: str, how: str, other: str) -> Callable[[], list[str]]:
        return lambda: second(bench, mode, how, other)

    chosen = [
        ("a second run", "train", beside("train", "fork", "fork")),
        ("the lock of a dead owner", "train", lambda: dead_owner(bench, draws)),
        ("clocks: jumps and times of files", "train", lambda: clocks(bench, draws, "train")),
    ]
    if not quick:
        chosen += [
            ("a second run", "eval", beside("eval", "fork", "fork")),
            ("a second run", "train, two beside one", beside("train", "fork", "two")),
            ("a second run", "train, one beside two", beside("train", "two", "fork")),
            ("a second run", "eval, two beside two", beside("eval", "two", "two")),
            ("processes outlive torchrun", "train", lambda: _orphans(bench)),
            ("clocks: jumps and times of files", "eval", lambda: clocks(bench, draws, "eval")),
            ("clocks: waiting for a checkpoint", "eval", lambda: _waiting(bench)),
            *(
                ("a dead rank", f"eval, round {k}", lambda k=k: _dead_rank(bench, draws, k))
                for k in (1, 2, 4, 6)
            ),
        ]
    for kind, name, function in chosen:
        start = time.monotonic()
        yield Result(kind, name, function(), time.monotonic() - start)


def _under_way(bench: Bench, mode: str, started: Started, workdir: pathlib.Path) -> list[str]:
    """Wait until a run has done something; messages if it never does."""

    def is_there() -> bool:
        if mode == "train":
            return reached_step(workdir) >= 7
        return any((workdir / "eval").rglob("*.npz"))

    return [] if started.until(is_there) else [f"it did not get going: {started.last_lines()}"]


def second(bench: Bench, mode: str, how: str, other: str) -> list[str]:
    """A run is started in the folder of another: refused, and the other goes on undisturbed."""
    workdir = bench.new()
    first = bench.start(mode, workdir, how)
    if problems := _under_way(bench, mode, first, workdir):
        return problems
    problems = _refused_while_paused(bench, mode, workdir, other, family(first.pid))
    if (code := first.end()) != 0:
        problems.append(f"the first ends with {code}: {first.last_lines()}")
    return problems + bench.differences(mode, workdir, how)


def _refused_while_paused(
    bench: Bench, mode: str, workdir: pathlib.Path, how: str, pids: list[int]
) -> list[str]:
    """Start another run while the processes that hold the folder are paused."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    second = bench.start(mode, workdir, how)
    code, said = second.end(LIMIT), second.errors()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    problems = [] if code == 1 else [f"the second ends with {code}: {second.last_lines()}"]
    if len(said) != 1 or "another run is at work in" not in said[0]:
        problems.append(f"the second says {said or second.last_lines()}")
    return problems


def _orphans(bench: Bench) -> list[str]:
    """The agent is killed and its processes are not: they stop, and hold the folder until then."""
    workdir = bench.new()
    started = bench.start("train", workdir, "torchrun")
    if problems := _under_way(bench, "train", started, workdir):
        return problems
    _, *ranks = family(started.pid)
    started.send(signal.SIGSTOP, ranks)
    started.send(signal.SIGKILL, [started.pid])
    problems = _refused_while_paused(bench, "train", workdir, "fork", ranks)
    if not started.orphans_end(LIMIT):
        problems.append("its processes do not end")
        started.kill_all()
    return problems + bench.finish("train", workdir, "two")


def dead_owner(bench: Bench, draws: random.Random) -> list[str]:
    """A run with data workers is killed without them, and its lock file stays."""
    workdir = bench.new()
    started = bench.start("train", workdir, data__num_workers=2)
    if problems := _under_way(bench, "train", started, workdir):
        return problems
    started.send(signal.SIGKILL, [started.pid])
    if not (workdir / ".lock").exists():
        return ["there is no lock file"]
    (workdir / ".lock").write_bytes(draws.randbytes(200))
    started.end()
    problems = bench.finish("train", workdir)
    if not started.orphans_end(LIMIT):
        problems.append("data workers live on")
        started.kill_all()
    return problems


def _dead_rank(bench: Bench, draws: random.Random, rounds: int) -> list[str]:
    """One of two processes dies in an evaluation: the other ends, and a new start goes on."""
    workdir = bench.new()
    started = bench.start("eval", workdir, "two")
    folder = workdir / "eval"
    if not started.until(lambda: len(list(folder.rglob("*.npz"))) >= rounds):
        return [f"it did not get going: {started.last_lines()}"]
    started.send(signal.SIGKILL, [draws.choice(family(started.pid)[1:])])
    code = started.end(LIMIT)
    problems = [] if code not in (0, None) else [f"it ends with {code}"]
    if not started.orphans_end(LIMIT):
        problems.append("the other process lives on")
        started.kill_all()
    return problems + bench.finish("eval", workdir, "two")


def _jumping_clock() -> None:
    """Let the wall clock of this process jump by a day, back and forth."""
    draws, now = random.Random(0), time.time

    def jumping() -> float:
        return now() + DAY * draws.choice((-1, 0, 1))

    time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)


def clocks(bench: Bench, draws: random.Random, mode: str) -> list[str]:
    """Clocks jump in a run that is killed, while it is down, and in the one that goes on."""
    workdir = bench.new()
    started = bench.start(mode, workdir, prepare=_jumping_clock)
    if problems := _under_way(bench, mode, started, workdir):
        return problems
    started.send(signal.SIGKILL, [started.pid])
    started.end()
    for path in [workdir, *workdir.rglob("*")]:
        moment = time.time() + DAY * draws.uniform(-400, 400)
        os.utime(path, (moment, moment))
    started = bench.start(mode, workdir, prepare=_jumping_clock)
    if (code := started.end()) != 0:
        return [f"it ends with {code}: {started.last_lines()}"]
    return bench.differences(mode, workdir)


def _waiting(bench: Bench) -> list[str]:
    """An evaluation waits for a checkpoint, by a clock that does not jump."""
    workdir = bench.new()
    late = workdir / "checkpoints" / "checkpoint_1.pth"
    options = {"eval__checkpoint": late, "eval__wait_minutes": LIMIT / 60}
    started = bench.start("eval", workdir, prepare=_jumping_clock, **options)
    if not started.until(lambda: "waiting for" in started.output()):
        return [f"it does not wait: {started.last_lines()}"]
    late.parent.mkdir()
    shutil.copyfile(bench.trained() / "checkpoints" / "checkpoint_1.pth", late)
    if (code := started.end()) != 0:
        return [f"it ends with {code}: {started.last_lines()}"]
    return bench.differences("eval", workdir)
