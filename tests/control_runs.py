"""Tasks of `--mode control` on checkpoints that are made without training."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
from oracles import MU, S0
from small_runs import small_config
from torch import nn

import run_lib
from models.utils import register_model
from score_lib.base.tensors import batch_mul
from sde_lib import VPSDE
from utils import save_checkpoint

FILES = {"arrays.npz", "config.json", "grid.png", "report.json", "report.md", "stdout.txt"}

# Experiment and options of each checkpoint.
NETWORKS = {
    "gaussian": ("vp/digits", {"model__name": "gaussian"}),
    "other_gaussian": ("vp/digits", {"model__name": "gaussian", "seed": 1}),
    "unet": ("vp/digits", {}),
    "colour": ("vp/color_digits", {}),
    "told": ("vp/digits_superres", {}),
    "classifier": ("vp/digits_classifier", {"model__channel_multiplier": 1}),
    "ve_classifier": ("ve/digits_classifier", {"model__channel_multiplier": 1}),
}


@register_model(name="gaussian")
class GaussianNetwork(nn.Module):
    """Exact for images ~ N(mu, S0^2 I), in the network's range, and the VP process."""

    def __init__(self, config):
        super().__init__()
        shape = config.data.num_channels, config.data.image_size, config.data.image_size
        self.mu = nn.Parameter(MU + 0.2 * torch.randn(shape))
        self.sde = VPSDE(config.model.beta_min, config.model.beta_max)

    def forward(self, x, labels):
        scale, std = self.sde.marginal_coeffs(labels / 999)
        centred = x - batch_mul(scale, self.mu.expand_as(x))
        return batch_mul(std / ((scale * S0) ** 2 + std**2), centred)


class Runs:
    """Checkpoints by the names of `NETWORKS`, each made when it is first used."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def config(self, name, **changes):
        experiment, own = NETWORKS[name]
        return small_config(experiment, **{**own, **changes})

    def checkpoint(self, name) -> str:
        path = self.folder / name / "checkpoints-meta" / "checkpoint.pth"
        if not path.exists():
            save(_moved(run_lib.setup(self.config(name))), path)
        return str(path)

    def control(self, task, network="gaussian", /, **changes):
        """Carry out a task: its arrays, the rows of its report, and its folder.

        Changes are options of `control`, or of other sections as `section__option`.
        """
        options = {"num_images": 4, "num_results": 2, "name": "out", "tolerance": 1e-3, **changes}
        options = {k if "__" in k else f"control__{k}": v for k, v in options.items()}
        config = self.config(network, control__task=task, **options)
        self.checkpoint(network)
        return read(run_lib.control(config, self.folder / network))


def read(folder):
    """The arrays and the report in the folder of a task, and the folder."""
    assert {file.name for file in folder.iterdir()} <= FILES
    with np.load(folder / "arrays.npz") as arrays:
        return dict(arrays), json.loads((folder / "report.json").read_text()), folder


def save(run, path) -> str:
    """Write the checkpoint of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {**run.state, "config": run.config.to_json_best_effort()})
    return str(path)


@torch.no_grad()
def _moved(run):
    """The run a little away from its initial weights, of which many are 0."""
    model, ema = run.state["model"], run.state["ema"]
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    run.state["step"] = 7
    ema.shadow_params = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    return run
