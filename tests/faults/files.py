"""Files of a work directory that are damaged between two starts."""

from __future__ import annotations

import pathlib
import random
import re
import shutil
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator

from .cases import cut, flip
from .outcomes import META, kept_step, predecessors, reached_step
from .runs import Bench, Result

Damage = Callable[[pathlib.Path, random.Random], object]


def flip_data(path: pathlib.Path, draws: random.Random) -> None:
    """Flip a bit in the middle of the largest array of a zip file: headers have unread bytes."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    data = bytearray(path.read_bytes())
    start = largest.header_offset + 30  # before the name, and what may come behind it
    start += sum(struct.unpack_from("<2H", data, largest.header_offset + 26))
    data[start + largest.compress_size // 2] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def empty(path: pathlib.Path, _: random.Random) -> None:
    """Empty a file."""
    path.write_bytes(b"")


def remove(path: pathlib.Path, _: random.Random) -> None:
    """Remove a file."""
    path.unlink()


def garbage(path: pathlib.Path, draws: random.Random) -> None:
    """Replace a file by random bytes."""
    path.write_bytes(draws.randbytes(300))


def cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Result]:
    """Damage to the folders of a training run and of an evaluation that were killed."""
    for case in (*_training_cases(bench, draws, quick), *_evaluation_cases(bench, draws, quick)):
        start = time.monotonic()
        kind, name, problems = case()
        yield Result(f"damaged files: {kind}", name, problems, time.monotonic() - start)


def _training_cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Callable]:
    killed = killed_training(bench)
    first = [(cut, 1), (flip, 1), (cut, 2)]
    more = [(flip, 1)] * 4 + [(cut, 1), (empty, 1), (remove, 1), (garbage, 1), (flip, 2)]
    for damage, count in first if quick else first + more:
        yield lambda damage=damage, count=count: skipped(bench, draws, killed, damage, count)
    for damage in (cut,) if quick else (cut, empty, garbage):
        yield lambda damage=damage: all_damaged(bench, draws, killed, damage)
    yield lambda: _survived(bench, draws, killed, "metrics.jsonl cut in a line", _cut_last_line)
    yield lambda: _survived(bench, draws, killed, "config.json is garbage", _garbage_config)
    yield lambda: _survived(bench, draws, killed, "temporary files left", _leftovers)


def _evaluation_cases(bench: Bench, draws: random.Random, quick: bool) -> Iterator[Callable]:
    killed = killed_evaluation(bench)
    for damage in (cut,) if quick else (cut, cut, empty, garbage, flip_data):
        yield lambda damage=damage: refused(bench, draws, killed, damage, "eval/*bpd_1.npz")
    yield lambda: refused(bench, draws, killed, garbage, "eval/config.json")
    yield lambda: _survived(bench, draws, killed, "temporary files left", _leftovers, "eval")


def killed_training(bench: Bench) -> pathlib.Path:
    """The folder of a training run that was killed after more than half of it."""
    return _killed(bench, "train", lambda folder: reached_step(folder) >= 33)


def killed_evaluation(bench: Bench) -> pathlib.Path:
    """The folder of an evaluation that was killed when some of its rounds were made."""
    return _killed(bench, "eval", lambda folder: len(list(folder.glob("eval/*bpd*.npz"))) >= 3)


def _killed(bench: Bench, mode: str, is_there: Callable[[pathlib.Path], bool]) -> pathlib.Path:
    """The folder of a run that was killed under way."""
    workdir = bench.new()
    started = bench.start(mode, workdir)
    if not started.until(lambda: is_there(workdir)):
        raise RuntimeError(f"the run did not get going: {started.last_lines()}")
    started.send(signal.SIGKILL, [started.pid])
    started.end()
    return workdir


def _copied(bench: Bench, killed: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(killed, bench.new(), dirs_exist_ok=True)


def skipped(
    bench: Bench, draws: random.Random, killed: pathlib.Path, damage: Damage, count: int
) -> tuple[str, str, list[str]]:
    """The latest checkpoints are damaged: training resumes from a predecessor."""
    workdir, problems = _copied(bench, killed), []
    for path in predecessors(workdir)[:count]:
        damage(path, draws)
    step = kept_step(workdir)
    started = bench.start("train", workdir)
    code, output = started.end(), started.output()
    if code != 0:
        problems.append(f"it ends with {code}: {started.last_lines()}")
    if f"training from step {step} to" not in output:
        problems.append("it does not resume from the latest undamaged file")
    # A flipped bit may be one that nothing reads.
    may_be_read = damage is flip or damage is remove
    if output.count("skipped") != count and not may_be_read:
        problems.append("it does not name the skipped files")
    name = f"{damage.__name__}, {count} of {len(predecessors(killed))}: from step {step}"
    return "latest checkpoint", name, problems or bench.differences("train", workdir)


def all_damaged(
    bench: Bench, draws: random.Random, killed: pathlib.Path, damage: Damage
) -> tuple[str, str, list[str]]:
    """All checkpoints are damaged: the run refuses to start from scratch, and changes nothing."""
    workdir = _copied(bench, killed)
    for path in predecessors(workdir):
        damage(path, draws)
    before = _contents(workdir)
    started = bench.start("train", workdir)
    code, said = started.end(), started.errors()
    problems = [] if code == 1 else [f"it ends with {code}"]
    if len(said) != 1 or str(workdir / META) not in said[0] or "all damaged" not in said[0]:
        problems.append(f"it says {said}")
    problems += _changes(before, _contents(workdir))
    for path in predecessors(workdir):  # as the message says
        path.rename(f"{path}.bad")
    return "all checkpoints", damage.__name__, problems + bench.finish("train", workdir)


def refused(
    bench: Bench, draws: random.Random, killed: pathlib.Path, damage: Damage, pattern: str
) -> tuple[str, str, list[str]]:
    """A file of an evaluation is damaged: refused by name, and recomputed once it is removed."""
    workdir = _copied(bench, killed)
    path = next(workdir.glob(pattern))
    damage(path, draws)
    before = _contents(workdir)
    started = bench.start("eval", workdir)
    code, said = started.end(), started.errors()
    problems = [] if code == 1 else [f"it ends with {code}"]
    if len(said) != 1 or str(path) not in said[0]:
        problems.append(f"it says {said or started.last_lines()}")
    changed = _changes(before, _contents(workdir))
    problems += [change for change in changed if path.name in change]
    path.unlink()
    kind = "an evaluation's config.json" if path.suffix == ".json" else "a round"
    return kind, damage.__name__, problems + bench.finish("eval", workdir)


def _survived(
    bench: Bench,
    draws: random.Random,
    killed: pathlib.Path,
    name: str,
    damage: Damage,
    mode: str = "train",
) -> tuple[str, str, list[str]]:
    """Damage that does not matter."""
    workdir = _copied(bench, killed)
    damage(workdir, draws)
    return f"others of mode {mode}", name, bench.finish(mode, workdir)


def _cut_last_line(workdir: pathlib.Path, draws: random.Random) -> None:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[-1] = lines[-1][: draws.randrange(1, len(lines[-1]) - 2)]
    path.write_bytes(b"".join(lines))


def _garbage_config(workdir: pathlib.Path, draws: random.Random) -> None:
    garbage(workdir / "config.json", draws)


def _leftovers(workdir: pathlib.Path, draws: random.Random) -> None:
    """Temporary files beside all files that are written atomically."""
    for path in list(workdir.rglob("*")):
        if path.is_file() and re.fullmatch(r".*\.(pth|json|jsonl|npz|png|np)", path.name):
            garbage(path.with_name(f".{path.name}.1a2b3c4d.tmp"), draws)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Contents of the files of a folder by name, except the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def _changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [f"{name} was changed" for name in names if before.get(name) != after.get(name)]
