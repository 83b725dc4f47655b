"""Time that checkpoints cost: training while they are written, and a resume that verifies them.

    python -m benchmarks.checkpoints --config ve/cifar10_ncsnpp_continuous --batch_size 1
    python -m benchmarks.checkpoints --set model.nf=64 --resume_only

The file is a checkpoint for preemption: weights, averages, the optimiser's state; with
`model.nf=64`, 256 MB.  Training stops until the state is copied ("stall"; the first copy allocates
memory), and its steps are slower while the file is written.  The sum is "lost to training", also as
a share of the time to write the file in the foreground.

A resume is `restore_latest`: checksums, comparison with the network, copy into the state.  It is
compared with a plain `torch.load(weights_only=True)` of the same file, in turns, in the page cache.
"""

import functools
import math
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.measure import in_turns, seconds, show
from benchmarks.train import training
from benchmarks.variants import Work, arguments, configured
from run_lib import Run
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.checkpoints import restore_latest, save_checkpoint
from score_lib.disk.writer import CheckpointWriter
from score_lib.runs.start import META


class Round(NamedTuple):
    """Seconds of one round: the file alone, the steps alone, both at once."""

    alone: float
    quiet: float
    stall: float
    busy: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--resume_only", action="store_true", help="leave the training part out")
    given = parser.parse_args(argv)
    config, device = configured(given, batch_on_gpu=8)
    work, rounds = training(config), []
    for _ in range(2):  # the optimiser has a state then
        work.call()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / META
        record = resuming(work.run, path, given.rounds)
        if not given.resume_only:
            cost, rounds = while_training(work, path, given.rounds)
            record |= cost
    name = f"checkpoints, {given.config}, batch {given.batch_size}"
    show(name, device, [record], config=given.config, settings=given.set, rounds=rounds)


def resuming(run: Run, path: pathlib.Path, rounds: int) -> dict:
    """The row of a resume, of best times."""
    save_checkpoint(path, run.state)
    works = {
        "torch.load": lambda: torch.load(path, map_location=run.device, weights_only=True),
        "resume": lambda: restore_latest(path, run.state, run.device),
    }
    best = {name: timing.best for name, timing in in_turns(works, run.device, rounds).items()}
    row = {"file MB": path.stat().st_size / 1e6}
    row |= {f"{name}, s": time for name, time in best.items()}
    return row | {"resume / load": best["resume"] / best["torch.load"]}


def while_training(work: Work, path: pathlib.Path, count: int) -> tuple[dict, list[Round]]:
    """The row of writing in the background, and its rounds."""
    taken = functools.partial(seconds, device=work.run.device)
    with CheckpointWriter() as writer:
        background = functools.partial(writer.save, path, work.run.state)
        foreground = functools.partial(save_checkpoint, path, work.run.state)
        first = taken(background)
        writer.wait()
        # They take twice the time of writing.
        number = math.ceil(2 * taken(foreground) / taken(work.call))

        def steps():
            for _ in range(number):
                work.call()

        rounds = []
        for _ in range(count):
            rounds.append(Round(*map(taken, (foreground, steps, background, steps))))
            writer.wait()
    return summary(rounds, first, path.stat().st_size, number), rounds


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
    with brief_mistakes():
        main()
