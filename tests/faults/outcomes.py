"""Results of runs on disk: the step reached, and differences between finished runs."""

from __future__ import annotations

import contextlib
import json
import pathlib

import torch

from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint, read_latest
from score_lib.disk.files import with_earlier

# Steps of a training run, between its numbered checkpoints, and between resumable states.
STEPS, SNAPSHOTS, META_EVERY = 60, 20, 5
META = pathlib.Path("checkpoints-meta", "checkpoint.pth")


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
    """Differences between two finished training runs, compared bit for bit."""
    problems = []
    numbers = range(1, STEPS // SNAPSHOTS + 1)
    for name in (META, *(pathlib.Path(f"checkpoints/checkpoint_{k}.pth") for k in numbers)):
        ours, theirs = read_checkpoint(workdir / name), read_checkpoint(expected / name)
        if not same(ours, theirs):
            problems.append(f"{name} differs")
    names = ["metrics.jsonl", "config_history.jsonl"]
    names += [f"samples/iter_{k * SNAPSHOTS}/sample.np" for k in numbers]
    for name in (*names, *(f"samples/iter_{k * SNAPSHOTS}/sample.png" for k in numbers)):
        if (workdir / name).read_bytes() != (expected / name).read_bytes():
            problems.append(f"{name} differs")
    return problems + leftovers(workdir)


def evaluations_differ(folder: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """Differences between two finished evaluations, compared bit for bit."""
    ours, theirs = (
        {str(p.relative_to(f)) for p in f.rglob("*") if p.suffix in (".npz", ".json", ".md")}
        for f in (folder, expected)
    )
    problems = [f"{name} is in only one of them" for name in ours ^ theirs]
    for name in (ours & theirs) - {"config.json"}:
        if (folder / name).read_bytes() != (expected / name).read_bytes():
            problems.append(f"{name} differs")
    return problems + leftovers(folder)


def leftovers(folder: pathlib.Path) -> list[str]:
    """Messages about temporary files that were not removed."""
    return [f"{path.relative_to(folder)} was not removed" for path in folder.rglob("*.tmp")]


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
    """Rounds of an evaluation by name: time of writing and contents.

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
    """The checkpoint at which training resumes and its kept predecessors, latest first."""
    return [path for path in with_earlier(workdir / META) if path.exists()]
