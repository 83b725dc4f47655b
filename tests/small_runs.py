"""Small runs for tests: a config that trains in seconds, and runs in processes of their own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from configs.defaults import load

ROOT = pathlib.Path(__file__).parents[1]

SMALL = {
    "model.nf": 8,
    "model.num_scales": 5,
    "data.num_workers": 0,
    "training.batch_size": 16,
    "training.n_iters": 12,
    "training.log_freq": 1,
    "training.eval_freq": 4,
    "training.snapshot_freq": 6,
    "training.snapshot_freq_for_preemption": 3,
    "sampling.num_samples": 4,
}


def small_config(name="vp/digits", **changes):
    """A digits config with everything small; changes are dotted names with __ for the dot."""
    config = load(name)
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({**SMALL, **dotted})
    return config


def command(config="configs/vp/digits.py", workdir="", mode="train", **changes):
    """The command line of a small run."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    options = [f"--config.{key}={value}" for key, value in {**SMALL, **dotted}.items()]
    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / config}",
        f"--workdir={workdir}",
        f"--mode={mode}",
        *options,
    ]


def run(arguments, **options):
    """Run a command to its end and return it with its output as text."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment, timeout=300, **options
    )
