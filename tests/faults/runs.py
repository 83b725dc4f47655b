"""Runs to be disturbed: small ones, in one or two processes, and what must come of them.

Processes are forked from this one, which has the imports done, so that most of the time goes into
what is tested.  Two processes are started by the agent behind `torchrun`; a share of the runs is
made by `python main.py` and `torchrun` themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from small_runs import ROOT, SMALL, small_config

from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint, read_latest
from score_lib.disk.files import with_earlier

# For what should take seconds, on a machine that may be busy.
LIMIT = 120.0

STEPS, SNAPSHOTS, META_EVERY = 60, 20, 5
META = pathlib.Path("checkpoints-meta", "checkpoint.pth")
OPTIONS = {
    **SMALL,
    "model.ch_mult": "(1,)",
    "optim.lr": 1e-3,  # after few large steps a network is hard to integrate
    "training.n_iters": STEPS,
    "training.snapshot_freq": SNAPSHOTS,
    "training.snapshot_freq_for_preemption": META_EVERY,
    "training.eval_freq": 10,
    "sampling.num_samples": 32,
    "data.dataset": "IMAGES",
    "eval.extractor": "digits",
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1,
    "eval.batch_size": 8,
    "eval.num_samples": 32,
    "eval.bpd_num_repeats": 1,
    "eval.enable_sampling": True,
}


class Result(NamedTuple):
    """What came of one disturbance.

    Attributes:
        kind: row of the table of results.
        name: which of its kind.
        problems: what was lost or said wrongly, in words.
        seconds: how long it took.
    """

    kind: str
    name: str
    problems: list[str]
    seconds: float = 0.0


class Bench:
    """A folder for runs, with their data, and undisturbed runs made once, when first asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made: dict[str, tuple[pathlib.Path, float]] = {}
        self._count = 0
        _import_everything(self.folder)
        self._make_data()

    def _make_data(self) -> None:
        from datasets import get_dataset

        _, _, info = get_dataset(small_config(), evaluation=True)
        images = info.sources["train"].read(np.arange(320))[0]
        np.save(self.folder / "digits.npy", images.numpy())
        self.options = {
            **OPTIONS,
            "data.path": self.folder / "digits.npy",
            "eval.stats": self.folder / "stats.npz",
        }
        assert self.start("fid_stats", self.new()).end() == 0

    def new(self) -> pathlib.Path:
        """A folder that nobody has used."""
        self._count += 1
        folder = self.folder / f"run_{self._count}"
        folder.mkdir()
        return folder

    def arguments(self, mode: str, workdir: pathlib.Path, **changes) -> list[str]:
        """Of `main.py`; an evaluation has its checkpoints from the undisturbed run."""
        options = self.options | {key.replace("__", "."): v for key, v in changes.items()}
        if mode == "eval" and "eval.checkpoint" not in options:
            options["eval.checkpoint"] = self.trained() / "checkpoints" / "checkpoint_1.pth"
        return [
            f"--config={ROOT / 'configs/vp/digits.py'}",
            f"--workdir={workdir}",
            f"--mode={mode}",
            *(f"--config.{key}={value}" for key, value in options.items()),
        ]

    def start(
        self, mode: str, workdir: pathlib.Path, how: str = "fork", prepare=lambda: None, **changes
    ) -> Started:
        """Start `main.py`; `how` is a key of `LAUNCHERS`, `prepare` is called in a fork first."""
        return Started(self.arguments(mode, workdir, **changes), how, prepare)

    def trained(self, how: str = "fork") -> pathlib.Path:
        """The folder of an undisturbed training run."""
        return self._undisturbed("train", how)[0]

    def evaluated(self) -> pathlib.Path:
        """The folder of an undisturbed evaluation, in one process."""
        return self._undisturbed("eval", "fork")[0]

    def duration(self, mode: str) -> float:
        """Seconds that an undisturbed run takes in one process."""
        return self._undisturbed(mode, "fork")[1]

    def _undisturbed(self, mode: str, how: str) -> tuple[pathlib.Path, float]:
        key = f"{mode} {how}"
        if key not in self._made:
            folder, start = self.new(), time.monotonic()
            started = self.start(mode, folder, how)
            if started.end() != 0:
                raise RuntimeError(f"an undisturbed run failed: {started.output()}")
            self._made[key] = folder, time.monotonic() - start
        return self._made[key]

    def differences(self, mode: str, workdir: pathlib.Path, how: str = "fork") -> list[str]:
        """How a finished run differs from an undisturbed one, in words."""
        if mode == "train":
            return trainings_differ(workdir, self.trained(how))
        # Evaluation gives the same figures in any number of processes.
        return evaluations_differ(workdir / "eval", self.evaluated() / "eval")

    def finish(self, mode: str, workdir: pathlib.Path, how: str = "fork") -> list[str]:
        """Start a run again, undisturbed, and say what is wrong with its end."""
        started = self.start(mode, workdir, how)
        if (code := started.end()) != 0:
            return [f"started again, it ends with {code}: {started.last_words()}"]
        return self.differences(mode, workdir, how)


_IMPORTED_LATE = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.Image",
    "run_lib",
    "sklearn.datasets",
    "torch.distributed.launcher.api",
    "tqdm.contrib.logging",
)


def _import_everything(folder: pathlib.Path) -> None:
    """What runs import as they go, so that their forks have it."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    from score_lib.disk.logs import MetricsLog

    torch.set_num_threads(1)
    # In forks, the program sets its own handlers; here, what is passed over is not the subject.
    logging.getLogger().addHandler(logging.NullHandler())
    (folder / "warm").mkdir(exist_ok=True)
    MetricsLog(folder / "warm").close()


_numbers = itertools.count()


class Started:
    """A command that is under way, in a session of its own.

    Attributes:
        workers: how many processes share the work; more than one have an agent above them.
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
        """What it has said so far, on both streams."""
        return self.path.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The messages of errors that it has given."""
        return re.findall(r"^[\d:]+ E (.*)$", self.output(), re.MULTILINE)

    def last_words(self) -> str:
        """The last lines that it said."""
        return " / ".join(self.output().splitlines()[-3:])

    def ended(self) -> bool:
        """Whether the agent, or the only process, is no more."""
        return _code(self.process) is not None

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Wait for a condition; whether it came true before the end of the run and the limit."""
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
        """What a scheduler does in the end."""
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
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
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


def kept_step(workdir: pathlib.Path) -> int:
    """The step at which training would go on; 0 where there is no checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    latest = read_latest(workdir / META)
    return 0 if latest is None else latest[1]["step"]


def reached_step(workdir: pathlib.Path) -> int:
    """The last step of the log."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that is being written
            steps.append(json.loads(line)["step"])
    return max(steps, default=0)


def trainings_differ(workdir: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """What differs between two finished training runs, bit for bit."""
    problems = []
    numbers = range(1, STEPS // SNAPSHOTS + 1)
    for name in (META, *(pathlib.Path(f"checkpoints/checkpoint_{k}.pth") for k in numbers)):
        ours, theirs = read_checkpoint(workdir / name), read_checkpoint(expected / name)
        if not same(ours, theirs):
            problems.append(f"{name} differs")
    names = ["metrics.jsonl", *(f"samples/iter_{k * SNAPSHOTS}/sample.np" for k in numbers)]
    for name in (*names, *(f"samples/iter_{k * SNAPSHOTS}/sample.png" for k in numbers)):
        if (workdir / name).read_bytes() != (expected / name).read_bytes():
            problems.append(f"{name} differs")
    return problems + leftovers(workdir)


def evaluations_differ(folder: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """What differs between two finished evaluations, bit for bit."""
    ours, theirs = (
        {str(p.relative_to(f)) for p in f.rglob("*") if p.suffix in (".npz", ".json", ".md")}
        for f in (folder, expected)
    )
    problems = [f"{name} is in one of them only" for name in ours ^ theirs]
    for name in (ours & theirs) - {"config.json"}:
        if (folder / name).read_bytes() != (expected / name).read_bytes():
            problems.append(f"{name} differs")
    return problems + leftovers(folder)


def leftovers(folder: pathlib.Path) -> list[str]:
    """Temporary files that stayed, in words."""
    return [f"{path.relative_to(folder)} stayed" for path in folder.rglob("*.tmp")]


def same(one: object, other: object) -> bool:
    """Whether nested values are equal, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def whole_rounds(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Rounds of an evaluation by name: when each was written, and what it holds.

    Raises:
        ValueError: one is damaged.
    """
    found = {}
    for path in folder.rglob("*.npz"):
        if not path.name.startswith("report"):
            load_arrays(path)
            found[str(path.relative_to(folder))] = path.stat().st_mtime_ns, path.read_bytes()
    return found


def predecessors(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoint where training goes on and what is kept of earlier ones, latest first."""
    return [path for path in with_earlier(workdir / META) if path.exists()]
