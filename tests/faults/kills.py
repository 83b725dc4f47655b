"""Signals at random moments, in one and in two processes."""

from __future__ import annotations

import io
import os
import pathlib
import random
import re
import signal
import time
from collections.abc import Iterator
from typing import IO

import torch

from score_lib.base.preemption import EXIT_CODE
from score_lib.disk.checkpoints import read_checkpoint

from .launch import LIMIT, family
from .outcomes import META, META_EVERY, STEPS, kept_step, predecessors, reached_step, whole_rounds
from .runs import Bench, Result

SIGNALS = {signal.SIGKILL: 5, signal.SIGTERM: 4, signal.SIGUSR1: 2}
# Of those started by the commands themselves, which take seconds to import.
REAL = {"fork": "python", "two": "torchrun"}
REAL_SHARE = 0.08


def cases(bench: Bench, draws: random.Random, kills: int) -> Iterator[Result]:
    """As many kills as asked for: half of them in training, half of them in two processes."""
    kinds = [(mode, how) for mode in ("train", "eval") for how in ("fork", "two")]
    for number, (mode, how) in enumerate(kinds):
        share = kills * (number + 1) // 4 - kills * number // 4
        if share:
            yield from campaign(bench, draws, mode, how, share)


def campaign(
    bench: Bench, draws: random.Random, mode: str, how: str, kills: int
) -> Iterator[Result]:
    """Runs that are killed again and again until they get through."""
    workdir, span = bench.new(), 0.6 * bench.duration(mode)
    kind = f"kills: {mode}, {'one process' if how == 'fork' else 'two processes'}"
    done = 0
    while done < kills:
        real = kills > 10 and (done < 2 or draws.random() < REAL_SHARE)
        start = time.monotonic()
        if real:  # they need longer to get going
            attempt = Attempt(bench, mode, REAL[how], workdir)
            attempt.disturb(draws, span + 6)
        else:
            attempt = Attempt(bench, mode, how, workdir)
            attempt.disturb(draws, span)
        problems = attempt.problems()
        if attempt.disturbed:
            done += 1
            yield Result(kind, attempt.name, problems, time.monotonic() - start)
        if attempt.code == 0 and not problems:
            yield Result(f"{kind}: ends", "", bench.differences(mode, workdir, how))
            workdir = bench.new()
    yield Result(f"{kind}: ends", "", bench.finish(mode, workdir, how))


class Attempt:
    """One start of a command, and the signal that it was sent.

    Attributes:
        disturbed: whether the signal was sent before the run ended.
        code: exit code; None if the end had to be forced.
    """

    def __init__(
        self, bench: Bench, mode: str, how: str, workdir: pathlib.Path, prepare=lambda: None
    ):
        self.mode, self.how, self.workdir = mode, how, workdir
        self.before = self._state()
        self.started = bench.start(mode, workdir, how, prepare)
        self.disturbed, self.forced, self.code, self.name = False, "", None, "no signal"
        self.number, self.whom = 0, ""

    def _state(self):
        if self.mode == "train":
            return kept_step(self.workdir)
        return whole_rounds(self.workdir / "eval")

    def disturb(self, draws: random.Random, span: float) -> None:
        """Send a random signal after a random time, and wait for the end."""
        number = draws.choices(*zip(*SIGNALS.items(), strict=True))[0]
        delay = span * draws.random()
        whom = "process" if self.started.workers == 1 else draws.choice(("agent", "rank", "all"))
        self.started.until(lambda: False, delay)
        self.strike(draws, number, whom)
        self.name += f" after {delay:.2f} s"

    def strike(self, draws: random.Random, number: int, whom: str = "process") -> None:
        """Send a signal, and wait for the end; `whom`: the "agent" of several, a "rank", "all"."""
        self.number, self.whom = number, whom
        if self.started.ended():
            self.code = self.started.end()
            return
        self.disturbed = True
        self.name = f"{signal.Signals(number).name} to {whom} of {self.how}"
        self.started.send(number, self._targets(draws))
        self._wait_for_end()

    def _targets(self, draws: random.Random) -> list[int]:
        pid, *others = family(self.started.pid) or [self.started.pid]
        if self.whom == "rank" and others:
            return [draws.choice(others)]
        # Its processes first, so that they do not notice the agent's death before.
        return [*others, pid] if self.whom == "all" else [pid]

    def _wait_for_end(self) -> None:
        self.code = self.started.end(LIMIT)
        if self.code is None:
            self.forced = f"it did not end within {LIMIT:.0f} s"
        elif not self.started.orphans_end(LIMIT if self.is_told_to_all() else 0.5):
            if self.is_told_to_all():
                self.forced = f"its processes did not end within {LIMIT:.0f} s"
            self.started.kill_all()

    def is_told_to_all(self) -> bool:
        """Whether every process should have learnt that it is to stop in good order."""
        if self.number == signal.SIGUSR1 and self.whom == "agent":
            return False  # which does not pass it on
        return self.number != signal.SIGKILL

    def problems(self) -> list[str]:
        """Messages about wrong behaviour."""
        found = [self.forced] if self.forced else []
        found += self._lost_training() if self.mode == "train" else self._lost_rounds()
        if self.started.workers == 1 and self.disturbed:
            found += self._wrong_code()
        if self.code != 0 and not self.disturbed:
            found.append(f"undisturbed, it ends with {self.code}: {self.started.last_lines()}")
        if self.started.workers == 1 and "Traceback" in self.started.output():
            found.append(f"there is a traceback: {self.started.last_lines()}")
        return found

    def _wrong_code(self) -> list[str]:
        allowed = {-self.number}
        if self.number != signal.SIGKILL:
            # While it starts, it may not listen yet.
            allowed = {EXIT_CODE} if self._is_under_way() else {EXIT_CODE, -self.number}
        if self._has_ended():
            allowed |= {0, -self.number}
        return [] if self.code in allowed else [f"it ends with {self.code}, not {allowed}"]

    def _is_under_way(self) -> bool:
        """Whether it has done something, so that it must listen to signals."""
        if self.mode == "train":
            return "training from step" in self.started.output()
        return len(self._state()) > len(self.before)

    def _has_ended(self) -> bool:
        """Whether all was done, so that the signal came too late."""
        if self.mode == "train":
            return kept_step(self.workdir) == STEPS
        return (self.workdir / "eval" / "report.md").exists()

    def _lost_training(self) -> list[str]:
        after, resumed = self._state(), self._resumed()
        if resumed is None:
            return [] if after == self.before else [f"step {self.before} became {after}"]
        found = []
        if resumed != self.before:
            found.append(f"it goes on from step {resumed} where there is {self.before}")
        reached = reached_step(self.workdir)
        if self.is_told_to_all() and self.disturbed:
            if after != reached:
                found.append(f"told to stop, it stops at step {reached} and keeps {after}")
        elif after < self._due(reached):
            found.append(f"of {reached} steps it keeps {after}")
        return found

    def _resumed(self) -> int | None:
        said = re.findall(r"training from step (\d+)", self.started.output())
        return int(said[-1]) if said else None

    def _due(self, reached: int) -> int:
        """The step that must have been kept: a checkpoint that is being written does not count."""
        last = (reached - 2) // META_EVERY * META_EVERY
        chain = predecessors(self.workdir)
        linked = len(chain) > 1 and os.path.samefile(chain[0], chain[1])
        is_being_written = linked or any((self.workdir / META).parent.glob(".*.tmp"))
        return max(last - META_EVERY, 0) if is_being_written else max(last, 0)

    def _lost_rounds(self) -> list[str]:
        try:
            after = self._state()
        except ValueError as error:
            return [f"a round is damaged: {error}"]
        return [
            f"{name} was {'made again' if name in after else 'lost'}"
            for name, round_ in self.before.items()
            if after.get(name) != round_
        ]


def killed_while_saving(bench: Bench, draws: random.Random, step: int) -> list[str]:
    """A run dies while a checkpoint is half written: the one before stays whole."""
    workdir = bench.new()
    attempt = Attempt(bench, "train", "fork", workdir, _save_slowly)
    # The checkpoint of this step is under way, and takes longer than the steps after it.
    attempt.started.until(lambda: reached_step(workdir) > step)
    attempt.strike(draws, signal.SIGKILL)
    problems = attempt.problems()
    try:
        # The file itself, and not only one that was kept of it.
        if (kept := read_checkpoint(workdir / META)["step"]) != step - META_EVERY:
            problems.append(f"it keeps step {kept}, not {step - META_EVERY}")
    except ValueError as error:
        problems.append(f"the one before is damaged: {error}")
    return problems + bench.finish("train", workdir)


def _save_slowly() -> None:
    """Let checkpoints of this process stay half written for a second."""
    save = torch.save

    def slow(contents: object, file: IO[bytes]) -> None:
        whole = io.BytesIO()
        save(contents, whole)
        data = whole.getbuffer()
        file.write(data[: len(data) // 2])
        file.flush()
        time.sleep(1)
        file.write(data[len(data) // 2 :])

    torch.save = slow


def saving_cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Result]:
    """Runs that die while a checkpoint is written."""
    for step in (10,) if quick else (10, 15):
        start = time.monotonic()
        problems = killed_while_saving(bench, draws, step)
        kind = "kills: while a checkpoint is written"
        yield Result(kind, f"of step {step}", problems, time.monotonic() - start)


def elastic_cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Result]:
    """One rank is killed, and the run recovers by itself."""
    chosen = [("train", "torchrun elastic")]
    if not quick:
        chosen += [("eval", "torchrun elastic")]
        chosen += [("train", "two elastic"), ("eval", "two elastic")] * 2
    for mode, how in chosen:
        start = time.monotonic()
        name, problems = killed_rank(bench, draws, mode, how)
        kind = f"a rank of an elastic run dies: {mode}"
        yield Result(kind, name, problems, time.monotonic() - start)


def killed_rank(bench: Bench, draws: random.Random, mode: str, how: str) -> tuple[str, list[str]]:
    """Kill one process of a running elastic run: the disturbance, and messages about problems."""
    workdir = bench.new()
    started = bench.start(mode, workdir, how)
    target = draws.randrange(1, STEPS - 10) if mode == "train" else draws.randrange(1, 6)

    def is_there() -> bool:
        if mode == "train":
            return reached_step(workdir) >= target
        return len(list((workdir / "eval").rglob("*.npz"))) >= target

    if not started.until(is_there):
        return how, [f"it did not get going: {started.last_lines()}"]
    rank = draws.randrange(2)
    started.send(signal.SIGKILL, [family(started.pid)[1:][rank]])
    code = started.end(LIMIT)
    problems = [] if code == 0 else [f"it ends with {code}: {started.last_lines()}"]
    name = f"rank {rank} of {how} at {'step' if mode == 'train' else 'round'} {target}"
    return name, problems or bench.differences(mode, workdir, "two")
