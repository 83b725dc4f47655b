"""Sets of points on random ellipses, boxes and crosses, told from data by their nearest neighbour.

    python -m examples.point_cloud --workdir runs/point_cloud

Trains `configs/vp/points.py`, draws sets, and prints how often the nearest other set, by the
Chamfer distance, tells samples from held-out sets: half of the time if they cannot be told.
Training sets are measured beside them, and sets of the right points in wrong company.  Started
again, it resumes.
"""

import dataclasses
import math
import pathlib

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from configs.vp.points import get_config
from datasets import get_streams
from examples.common import present, save_data
from examples.short_runs import set_short_run
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.reports import new_figure, save_figure
from score_lib.metrics.point_sets import point_set_metrics

_POINTS = 24
_NOISE = 0.05
# Sets in a row of the picture, and the distance of their origins.
_SHOWN, _APART = 12, 6.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: sets of points, steps of training, samples, and their steps."""

    examples: int = 40_000
    steps: int = 3000
    samples: int = 300
    sampling_steps: int = 20


def main() -> None:
    """Learn sets of points, then print and draw the comparison."""
    present(__doc__, demonstrate)


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list[dict], pathlib.Path]:
    """Learn the sets in a folder.

    Returns:
        a row of figures for each kind of sets, and the picture's file.
    """
    config = settings(workdir, sizes)
    run_lib.train(config, workdir)
    run = run_lib.restored(config, workdir)
    samples = run.draw(range(sizes.samples), progress=True).cpu()
    sources = get_streams(config, evaluation=True)[2].sources
    train, held_out = (sources[part].images(np.arange(sizes.samples)) for part in ("train", "test"))
    sets = {"samples": samples, "train": train, "mixed": mixed(train)}
    records = [{"sets": name} | point_set_metrics(x, held_out) for name, x in sets.items()]
    picture = workdir / "point_cloud.png"
    draw(picture, {"samples": samples, "held-out": held_out})
    return records, picture


def settings(workdir: pathlib.Path, sizes: Sizes) -> ConfigDict:
    """Write the data, and return the config that trains with them."""
    config, path = get_config(), workdir / "examples.npy"
    save_data(path, outlines(sizes.examples, np.random.default_rng(0)))
    config.data.update(path=str(path), shape=(_POINTS, 2))
    set_short_run(config, steps=sizes.steps, sampling_steps=sizes.sampling_steps)
    # Also large noise levels, at which all points together still tell where their outline is.
    config.training.update(lognormal_mean=0.0, lognormal_std=1.5)
    config.model.nf = 48
    return config


def mixed(sets: Tensor) -> Tensor:
    """Sets (n, N, 2) of the same points, each with company from other sets."""
    order = torch.randperm(sets.shape[:2].numel(), generator=torch.Generator().manual_seed(0))
    return sets.flatten(0, 1)[order].view_as(sets)


def outlines(count: int, generator: np.random.Generator) -> np.ndarray:
    """Points on outlines of random shape, size, direction and place, with noise: (count, N, 2).

    Shapes are ellipses, boxes and crosses, with half-axes uniform on [0.4, 1.6].
    """
    t = generator.uniform(0, 1, (count, _POINTS))
    shapes = np.stack([ellipse(t), box(t), cross(t)])
    chosen = shapes[generator.integers(len(shapes), size=count), np.arange(count)]
    points = chosen * generator.uniform(0.4, 1.6, (count, 1, 2))
    angle = generator.uniform(0, math.pi, (count, 1))
    turned = (points[..., 0] + 1j * points[..., 1]) * np.exp(1j * angle)
    points = np.stack([turned.real, turned.imag], axis=2)
    points += 0.5 * generator.standard_normal((count, 1, 2))
    return (points + _NOISE * generator.standard_normal(points.shape)).astype(np.float32)


def ellipse(t: np.ndarray) -> np.ndarray:
    """The unit circle at t in [0, 1]: (*t.shape, 2)."""
    return np.stack([np.cos(2 * math.pi * t), np.sin(2 * math.pi * t)], axis=-1)


def box(t: np.ndarray) -> np.ndarray:
    """The outline of the square of side 2 at t in [0, 1]: (*t.shape, 2)."""
    # The height of a trapezoid wave, and the same a quarter later.
    return np.stack([np.clip(4 * np.abs((t + s) % 1 * 2 - 1) - 2, -1, 1) for s in (0, 0.25)], -1)


def cross(t: np.ndarray) -> np.ndarray:
    """Two perpendicular lines of length 2 at t in [0, 1]: (*t.shape, 2)."""
    along = (4 * t) % 2 - 1
    return np.where(t[..., None] < 0.5, np.stack([along, 0 * t], -1), np.stack([0 * t, along], -1))


def draw(path: pathlib.Path, sets: dict[str, Tensor]) -> None:
    """A row of the first sets of each kind."""
    figure = new_figure(12, 1.2 * len(sets))
    panels = figure.subplots(len(sets), squeeze=False)
    for axes, (name, points) in zip(panels.flat, sets.items(), strict=True):
        shown = points[:_SHOWN]
        shown = shown + torch.tensor([_APART, 0]) * torch.arange(len(shown))[:, None, None]
        axes.scatter(*shown.flatten(0, 1).T.numpy(), s=3, linewidths=0)
        axes.set(ylabel=name, xticks=[], yticks=[], aspect="equal", ylim=(-_APART / 2, _APART / 2))
    save_figure(path, figure)


if __name__ == "__main__":
    with brief_mistakes():
        main()
