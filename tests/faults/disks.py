"""A disk that fills up: one message, nothing lost, and the run resumes once there is space."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import pathlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from score_lib.disk.checkpoints import read_checkpoint
from score_lib.disk.logs import MetricsLog

from .launch import Started
from .outcomes import META, META_EVERY, kept_step, reached_step, whole_rounds
from .runs import Bench, Result

PAGE = 4096
# Bytes that lines of a log have at most.
LINE = 120


def cases(
    bench: Bench,
    draws: random.Random,
    quick: bool = False,
    only: Sequence[tuple[str, str]] = (),
) -> Iterator[Result]:
    """Disks that fill up at each moment, or at `only` some, and disks that are too small."""
    try:
        with small_disk(bench.new(), 1):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        yield Result("full disk: skipped, mounting a small one needs root", str(error), [])
        return
    for mode, moment in only or (QUICK if quick else MOMENTS):
        yield _filled(bench, mode, moment, MOMENTS[mode, moment])
    if not (only or quick):
        yield _filled(bench, "train", "a checkpoint", MOMENTS["train", "a checkpoint"], "two")
        for mode in ("train", "eval") * 6:
            yield _too_small(bench, draws, mode)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, mebibytes: int) -> Iterator[pathlib.Path]:
    """Context in which a folder is a disk of its own.

    Raises:
        OSError, CalledProcessError: this user cannot mount.
    """
    size = f"size={mebibytes}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: pathlib.Path, spare: int = 0) -> None:
    """Fill a disk up to some bytes."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (64 * PAGE, PAGE):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(size))
        filler.truncate(max(filler.tell() - spare, 0))


def _fill_before_file(pattern: str, number: int, disk: pathlib.Path) -> None:
    """Let the disk be full when a temporary file of that name is about to be made.

    Args:
        pattern: of the final path, for `fnmatch`.
        number: which of the files that match.
        disk: folder of the disk.
    """
    made = []

    def is_due(suffix: str = "", prefix: str = "", dir: object = None, **_) -> bool:
        path = pathlib.Path(str(dir), prefix.strip("."))
        if fnmatch.fnmatch(str(path), f"*/{pattern}"):
            made.append(path)
        return len(made) == number

    _fill_when(is_due, tempfile, "mkstemp", disk)


def _fill_before_metrics(disk: pathlib.Path) -> None:
    _fill_when(lambda log, *_, **__: _is_near_its_end(log.path), MetricsLog, "write", disk)


def _fill_before_picture(disk: pathlib.Path) -> None:
    _fill_when(lambda *_: True, MetricsLog, "image", disk)


def _fill_before_message(disk: pathlib.Path) -> None:
    def is_due(handler: logging.FileHandler, _) -> bool:
        return _is_near_its_end(pathlib.Path(handler.baseFilename))

    _fill_when(is_due, logging.FileHandler, "emit", disk)


def _is_near_its_end(path: pathlib.Path) -> bool:
    """Whether the next line of a file needs a new page of the disk."""
    return PAGE - path.stat().st_size % PAGE < LINE


def _fill_when(is_due: Callable[..., bool], owner: object, name: str, disk: pathlib.Path) -> None:
    """Fill the disk before a call of a function, the first for which `is_due(*arguments)`."""
    original = getattr(owner, name)

    def filling(*arguments, **options):
        if is_due(*arguments, **options):
            fill(disk)
        return original(*arguments, **options)

    setattr(owner, name, filling)


# Moments at which a disk fills up: before a file, or the n-th of its name, is written.
MOMENTS: dict[tuple[str, str], Callable[[pathlib.Path], None]] = {
    (mode, file): functools.partial(_fill_before_file, pattern, number)
    for mode, file, pattern, number in (
        ("train", "config.json", "config.json", 1),
        ("train", "a checkpoint", "checkpoints-meta/checkpoint.pth", 3),
        ("train", "a snapshot", "checkpoints/checkpoint_1.pth", 1),
        ("train", "samples", "sample.np", 1),
        ("train", "a picture of samples", "sample.png", 2),
        ("eval", "config.json", "config.json", 1),
        ("eval", "the first round", "*.npz", 1),
        ("eval", "a later round", "*.npz", 6),
        ("eval", "a histogram", "*bpd*.png", 1),
        ("eval", "a picture of samples", "*samples*.png", 1),
        ("eval", "the report", "report.json", 1),
    )
}
MOMENTS["train", "TensorBoard's pictures"] = _fill_before_picture
MOMENTS["train", "metrics.jsonl"] = _fill_before_metrics
MOMENTS["train", "stdout.txt"] = _fill_before_message
QUICK = [("train", "a checkpoint"), ("train", "samples"), ("eval", "the report")]


def _filled(
    bench: Bench,
    mode: str,
    moment: str,
    prepare: Callable[[pathlib.Path], None],
    how: str = "fork",
) -> Result:
    start, workdir = time.monotonic(), bench.new()
    with small_disk(workdir, 64):
        started = bench.start(mode, workdir, how, functools.partial(prepare, workdir))
        problems = _ends_well(bench, mode, workdir, how, started)
    name = f"during {moment}{' of two processes' if how == 'two' else ''}"
    return Result(f"full disk: {mode}", name, problems, time.monotonic() - start)


def _too_small(bench: Bench, draws: random.Random, mode: str) -> Result:
    """A disk with less space than the run takes."""
    undisturbed = bench.trained() if mode == "train" else bench.evaluated()
    files = [path for path in undisturbed.rglob("*") if path.is_file()]
    needed = sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)
    space = int(needed * draws.uniform(0, 0.9))
    start, workdir = time.monotonic(), bench.new()
    with small_disk(workdir, 64):
        fill(workdir, space)
        started = bench.start(mode, workdir)
        problems = _ends_well(bench, mode, workdir, "fork", started)
    name = f"{space >> 10} KiB where {needed >> 10} KiB are needed"
    return Result(f"full disk: {mode}", name, problems, time.monotonic() - start)


def _ends_well(
    bench: Bench, mode: str, workdir: pathlib.Path, how: str, started: Started
) -> list[str]:
    """Problems of the end on a full disk, and of the next start, when there is space."""
    code, said = started.end(), started.errors()
    # Of two processes, the other one may report the loss of this one.
    said = [line for line in said if "another process of this run is gone" not in line]
    problems = [] if code == 1 else [f"it ends with {code}"]
    # Two errors only where two files were being written, one by a thread.
    named = [line for line in said if "No space left" in line and str(workdir) in line]
    if not 1 <= len(said) <= 2 or named != said:
        problems.append(f"it says {said or started.last_lines()}")
    if how == "fork":
        problems += [f"it says {w!r}" for w in _TRACEBACKS if w in started.output()]
    problems += _kept(mode, workdir)
    (workdir / "filler").unlink(missing_ok=True)
    return problems + bench.finish(mode, workdir, how)


_TRACEBACKS = ("Traceback", "--- Logging error ---")


def _kept(mode: str, workdir: pathlib.Path) -> list[str]:
    """Damage to earlier files, in words."""
    try:
        if mode == "eval":
            whole_rounds(workdir / "eval")
            return []
        if not (workdir / META).exists():
            due = 0
        else:
            read_checkpoint(workdir / META)  # itself, and not only a predecessor
            due = (reached_step(workdir) - 1) // META_EVERY * META_EVERY - META_EVERY
    except ValueError as error:
        return [f"an earlier file is damaged: {error}"]
    kept = kept_step(workdir)
    return [] if kept >= due else [f"it keeps step {kept} where {due} is due"]
