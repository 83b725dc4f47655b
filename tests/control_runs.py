"""Tiny runs for `--mode control`, and one task with them."""

import json

import numpy as np
import torch
from small_runs import small_config

import run_lib

TINY = {
    "training__n_iters": 1,
    "training__snapshot_freq": 1,
    "training__snapshot_freq_for_preemption": 1,
    "training__eval_freq": 1,
    "sampling__num_samples": 1,
}
FILES = {"arrays.npz", "config.json", "grid.png", "report.json", "report.md", "stdout.txt"}
CLASSIFIER = {"model__channel_multiplier": 1}
EXPERIMENTS = {
    "score": ("vp/digits", {}),
    "other": ("vp/digits", {"seed": 1}),
    "colour": ("vp/color_digits", {}),
    "classifier": ("vp/digits_classifier", CLASSIFIER),
    "ve_classifier": ("ve/digits_classifier", CLASSIFIER),
}


def train_runs(folder, *names):
    """Train some of the experiments, each in a folder of its name; gives the folder back."""
    for name in names:
        experiment, changes = EXPERIMENTS[name]
        run_lib.train(small_config(experiment, **TINY, **changes), folder / name)
    return folder


def checkpoint(runs, name):
    return str(runs / name / "checkpoints-meta" / "checkpoint.pth")


def control(runs, task, run="score", experiment="vp/digits", weights="", **changes):
    """Carry out a task, with a run's weights or a checkpoint's: its arrays, and its report."""
    options = {"num_images": 4, "num_results": 2, "name": "out", "tolerance": 1e-3}
    options = {f"control__{key}": value for key, value in {**options, **changes}.items()}
    config = small_config(experiment, **TINY, control__task=task, **options)
    config.control.task, config.eval.checkpoint = task, weights
    folder = run_lib.control(config, runs / run)
    assert {file.name for file in folder.iterdir()} <= FILES
    with np.load(folder / "arrays.npz") as arrays:
        return dict(arrays), json.loads((folder / "report.json").read_text()), folder


def spoiled(runs, name, key, folder):
    """A copy of a run's checkpoint in which the "model" or the "ema" has other weights."""
    contents = torch.load(checkpoint(runs, name), weights_only=True)
    weights = contents[key]
    if key == "ema":
        weights["shadow_params"] = [p + 0.1 for p in weights["shadow_params"]]
    else:
        found = [k for k in weights if k.endswith(("weight", "bias"))]
        assert found
        weights.update({k: weights[k] + 0.1 for k in found})
    torch.save(contents, folder / f"{name}_{key}.pth")
    return str(folder / f"{name}_{key}.pth")
