"""Estimates of `--mode check` beside what a run takes: seconds a step, time of training, memory.

    python -m benchmarks.estimates
    python -m benchmarks.estimates --cases vp/digits vp/points --rounds 5

Each training stands between two estimates, in processes of their own.  Ratios are of the mean of
the two to the measurement, medians over rounds.  "training" is the time of the loop with its
losses, checkpoints and samples; memory is the peak resident size of the process, or on a GPU that
of its tensors.  With `--evaluate` each run is evaluated, too.  With `--busy`, times are
those in which the process computed: with OMP_NUM_THREADS=1 and other programs on the machine, they
are near those of the clock on an idle one.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict

import run_lib
from benchmarks.measure import show
from configs.defaults import load
from score_lib.base.devices import resolve_device
from score_lib.base.memory import keep_freed_memory, peak_memory
from score_lib.base.mistakes import brief_mistakes
from score_lib.options import complete
from score_lib.runs import train
from score_lib.runs.check import cost_of, data_of
from score_lib.runs.estimates import estimate


class Case(NamedTuple):
    """A small experiment.

    Attributes:
        config: name of the experiment that it is made of.
        data: shape of an array of random data; (): those of the config.
        changes: of options, by dotted name.
        steps: of training.
    """

    config: str
    data: tuple[int, ...] = ()
    changes: dict = {}
    steps: int = 60


_IMAGES = {"data.dataset": "IMAGES", "data.num_workers": 0, "model.nf": 32}
_GRAY = {"data.image_size": 28, "data.num_channels": 1, "training.batch_size": 64}
CASES = {
    "vp/digits": Case("vp/digits", steps=200),
    "ve/digits": Case("ve/digits", steps=200),
    "vp/vectors": Case("vp/vectors", (20_000, 2), steps=1000),
    "vp/points": Case("vp/points", (2_000, 64, 3), steps=100),
    "DDPM++, 28 px": Case(
        "vp/images",
        (60_000, 28, 28),
        {**_IMAGES, **_GRAY, "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2)},
    ),
    "DDPM, 32 px": Case(
        "vp/ddpm/cifar10_continuous", (10_000, 32, 32, 3), {**_IMAGES, "training.batch_size": 64}
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, help="of training; default: those of the case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="do not count times of waiting")
    parser.add_argument("--evaluate", action="store_true", help="evaluate each run, too")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=pathlib.Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part:
        keep_freed_memory()
        if given.busy:
            time.perf_counter = time.process_time  # of this process alone, for all that it times
        case = CASES[given.cases[0]]
        config = configured(case, given.steps or case.steps, given.workdir)
        print(json.dumps(PARTS[given.part](config, given.workdir)))
        return
    rows, load = [row(name, given) for name in given.cases], os.getloadavg()
    show("estimates", torch.device("cpu"), rows, load=load, rounds=given.rounds)


def configured(case: Case, steps: int, workdir: pathlib.Path) -> ConfigDict:
    """A case's config, with a short training and evaluation; writes its data."""
    config = complete(load(case.config))
    config.update_from_flattened_dict(case.changes)
    config.training.update(n_iters=steps, log_freq=50, eval_freq=50, snapshot_freq=steps)
    config.training.snapshot_freq_for_preemption = max(1, steps // 2)
    config.sampling.update(num_samples=16, num_steps=50 if config.training.continuous else 0)
    config.eval.update(enable_sampling=False, bpd_num_repeats=1, batch_size=128)
    if case.data:
        config.data.path = str(workdir / "data.npy")
        random = np.random.default_rng(0)
        if config.data.dataset == "IMAGES":
            np.save(config.data.path, random.integers(0, 256, case.data, dtype=np.uint8))
        else:
            np.save(config.data.path, random.standard_normal(case.data, dtype=np.float32))
    return config


def row(name: str, given: argparse.Namespace) -> dict:
    """The row of a case."""
    rounds = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            parts = ["check", "train", *(["evaluate"] if given.evaluate else []), "check"]
            before, *measured, after = (_child(p, name, given, folder) for p in parts)
            rounds.append(compared(before, after, dict(collections.ChainMap(*measured))))
    return {"case": name} | {
        key: statistics.median(each[key] for each in rounds) for key in rounds[0]
    }


def compared(before: dict, after: dict, measured: dict) -> dict[str, float]:
    """Estimated and measured figures, and their ratios."""
    found = {}
    for key, value in measured.items():
        expected = (before[key] + after[key]) / 2
        found |= {f"{key}, estimated": expected, f"{key}, measured": value}
        found[f"{key}, ratio"] = expected / value
    return found


def _child(part: str, name: str, given: argparse.Namespace, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.estimates", "--part", part, "--cases", name]
    command += ["--busy"] if given.busy else []
    command += ["--workdir", folder, *(["--steps", str(given.steps)] if given.steps else [])]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def checked(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """The estimates."""
    run = run_lib.setup(config)
    data = data_of(run)
    found = estimate(run, cost_of(run), data.stream, data.sizes)
    return {
        "step s": found.trial.step,
        "training s": sum(found.training.values()),
        "evaluation s": sum(found.evaluation.values()),
        "MB": found.trial.memory / 1e6,
    }


def trained(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """The same of a training."""
    steps, loop = [], []
    train.Training._steps = _timed(train.Training._steps, steps)
    train.Training.run_to_the_end = _timed(train.Training.run_to_the_end, loop)
    run_lib.train(config, workdir / "run")
    return {
        "step s": statistics.median(steps),
        "training s": loop[0],
        "MB": peak_memory(resolve_device(config.device)) / 1e6,
    }


def _timed(method, taken: list[float]):
    def timed(self):
        start = time.perf_counter()
        result = method(self)
        taken.append(time.perf_counter() - start)
        return result

    return timed


def evaluated(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """The time of an evaluation."""
    config.eval.checkpoint = str(workdir / "run/checkpoints/checkpoint_1.pth")
    start = time.perf_counter()
    run_lib.evaluate(config, workdir / "run")
    return {"evaluation s": time.perf_counter() - start}


PARTS = {"check": checked, "train": trained, "evaluate": evaluated}


if __name__ == "__main__":
    with brief_mistakes(subprocess.CalledProcessError):
        main()
