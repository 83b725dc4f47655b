"""What it costs to write checkpoints while training goes on.

    python -m benchmarks.checkpoints --config ve/cifar10_ncsnpp_continuous --batch_size 1

The file holds what one for preemption does: weights, averages, the optimiser's state.  Training
stands still until the state is copied ("stall"; the first copy takes new memory), and its steps are
slower while the file is written.  Both together are "lost to training"; the last column says what
share that is of the time that writing the file takes without a background.
"""

from __future__ import annotations

import math
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.measure import seconds, show
from benchmarks.train import training_step
from benchmarks.variants import Variant, arguments, configured
from run_lib import Run
from score_lib.disk.checkpoints import save_checkpoint
from score_lib.disk.writer import CheckpointWriter
from score_lib.runs.setup import META


class Round(NamedTuple):
    """Seconds of one round: of the file alone, the steps alone, and the file beside the steps."""

    alone: float
    quiet: float
    stall: float
    busy: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--folder", default="", help="where to write; default: a temporary folder")
    given = parser.parse_args(argv)
    config, device = configured(given, batch_on_gpu=8)
    run, step = training_step(config, Variant())
    for _ in range(2):  # the optimiser has a state then
        step()
    with (
        tempfile.TemporaryDirectory(dir=given.folder or None) as folder,
        CheckpointWriter() as writer,
    ):
        path = pathlib.Path(folder) / META
        first = seconds(lambda: writer.save(path, run.state), device)
        writer.wait()
        size = path.stat().st_size
        count = steps_during(
            seconds(lambda: save_checkpoint(path, run.state), device), step, device
        )
        rounds = [one_round(run, step, count, writer, path) for _ in range(given.rounds)]
    record = summary(rounds, first, size, count)
    name = f"checkpoints, {given.config}, batch {given.batch_size}"
    show(name, device, [record], config=given.config, settings=given.set, rounds=rounds)


def steps_during(writing: float, step: Callable, device: torch.device) -> int:
    """As many steps as take twice the time of writing, so that writing ends among them."""
    return math.ceil(2 * writing / seconds(step, device))


def one_round(
    run: Run, step: Callable, count: int, writer: CheckpointWriter, path: pathlib.Path
) -> Round:
    """The file, steps, and steps while the file is written."""

    def steps():
        for _ in range(count):
            step()

    alone = seconds(lambda: save_checkpoint(path, run.state), run.device)
    quiet = seconds(steps, run.device)
    stall = seconds(lambda: writer.save(path, run.state), run.device)
    busy = seconds(steps, run.device)
    writer.wait()
    return Round(alone, quiet, stall, busy)


def summary(rounds: list[Round], first: float, size: int, steps: int) -> dict:
    """The row of the table, of medians over the rounds."""
    alone, quiet, stall, busy = map(statistics.median, zip(*rounds, strict=True))
    lost = stall + statistics.median(r.busy - r.quiet for r in rounds)
    return {
        "file MB": size / 1e6,
        "first stall, s": first,
        "stall, s": stall,
        "steps": steps,
        "quiet, s": quiet,
        "while writing, s": busy,
        "file alone, s": alone,
        "stall / file": stall / alone,
        "lost to training / file": lost / alone,
    }


if __name__ == "__main__":
    main()
