"""Snapshots of averages with power-function profiles, in half precision, beside the checkpoints.

A file `posthoc/step_{step}_{sigma_rel}_{sigma_rel}.pth` holds {"step", "run", "averages"}: a digest
of the run's beginning, which older files lack, and lists of tensors by `profile_name`.  Its name
says which profiles are in it, so that a sum of many files reads each of them once.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.profiles import POSTHOC, Profile, gamma_of, profile_name
from score_lib.disk.checkpoints import read_plain
from score_lib.disk.fit import CheckpointError, check_snapshot

FOLDER = "posthoc"
# Its rounding is 8 times finer than bfloat16's, and weights need none of the latter's range.
PRECISION = torch.float16
# Root mean square of its relative rounding, 2^-11 / sqrt(3) of the power of 2 below a number.
_ROUNDING = 2e-4
# That of bfloat16, which has 3 bits fewer.
COARSE = 8 * _ROUNDING


class Stored(NamedTuple):
    """An average that was stored while training.

    Attributes:
        step: after which it was stored.
        name: see `profile_name`.
        path: of its file.
    """

    step: int
    name: str
    path: pathlib.Path

    @property
    def profile(self) -> Profile:
        """Its profile."""
        return Profile(self.step, gamma_of(float(self.name.removeprefix(POSTHOC))))


def path_of(workdir: str | os.PathLike, step: int, names: list[str]) -> pathlib.Path:
    """File of a snapshot of the profiles of these names."""
    parts = [name.removeprefix(POSTHOC) for name in names]
    return pathlib.Path(workdir) / FOLDER / f"step_{'_'.join([str(step), *parts])}.pth"


def contents_of(step: int, averages: Mapping[str, list[Tensor]], run: str) -> dict:
    """Contents of a snapshot, in half precision.

    Args:
        run: tells runs apart; "" if that is not known.
    """
    halves = {name: [t.detach().to(PRECISION) for t in ts] for name, ts in averages.items()}
    return {"step": step, "run": run, "averages": halves}


def rounding(weights: Iterable[float]) -> float:
    """Relative error of a sum of stored averages with these weights by their half precision.

    Roundings are independent of each other, and grow with the weights where these cancel out.
    """
    return _ROUNDING * math.hypot(*weights)


def find(workdir: str | os.PathLike) -> list[Stored]:
    """The stored averages of a run, in the order of steps."""
    found = []
    for path in (pathlib.Path(workdir) / FOLDER).glob("step_*.pth"):
        if parts := re.fullmatch(r"step_(\d+)((?:_\d[\d.e-]*)+)", path.stem):
            names = [profile_name(float(text)) for text in parts[2][1:].split("_")]
            found += [Stored(int(parts[1]), name, path) for name in names]
    return sorted(found)


def add_to(
    total: list[Tensor], path: pathlib.Path, weights: Mapping[str, float], ema, run: str = ""
) -> None:
    """Add the averages in a file, times their weights, to a sum.

    Args:
        total: changed in place, in its own precision.
        weights: of the averages, by name.
        ema: an average of the network, whose shapes are expected.
        run: that of which the file should be, if it tells; "": any.
    Raises:
        CheckpointError: the file is damaged, or of another network or run.
    """
    contents = read_plain(path, mapped=True)
    averages = contents.get("averages") if isinstance(contents, dict) else None
    check_snapshot(path, averages, list(weights), ema)
    if run and contents.get("run", "") not in ("", run):
        raise CheckpointError(
            f"{path} is of another run than the one that {path.parent.parent} records: move the "
            "snapshots that are not of this run away"
        )
    for name, weight in weights.items():
        for sum_, tensor in zip(total, averages[name], strict=True):
            sum_.add_(tensor.to(sum_), alpha=weight)
