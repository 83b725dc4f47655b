"""Folders of Diffusers with small networks, and recorded outputs of the library."""

from __future__ import annotations

import functools
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import torch
from networks import DATA, drawn_weights, load_json

from score_lib.disk.safetensors_files import write_safetensors

PIPELINES = DATA / "diffusers"
VE = {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "sigma_max": 50.0}
DDPM = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}


@functools.cache
def golden() -> SimpleNamespace:
    """Recorded networks and runs by name, and `arrays`, tensors by case/array."""
    with np.load(DATA / "golden_diffusers.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    table = load_json("golden_diffusers.json")
    return SimpleNamespace(networks=table["networks"], runs=table["runs"], arrays=arrays)


def arrays_of(case):
    """The arrays of a case by name."""
    found = golden().arrays.items()
    return {key.partition("/")[2]: a for key, a in found if key.partition("/")[0] == case}


def weights_of(case):
    """The weights of a recorded network, by their names there."""
    layout = golden().networks[case]["state_dict"]
    return {name: drawn_weights(name, tuple(shape)) for name, shape in layout}


def write_json(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def a_folder(folder, arguments, weights, scheduler=None, pipeline="", **options) -> pathlib.Path:
    """A folder in today's layout.

    Args:
        options: of the network, in place of its arguments.
    """
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DModel", **arguments, **options})
    write_safetensors(folder / "unet/diffusion_pytorch_model.safetensors", weights)
    if scheduler is not None:
        kind = scheduler["_class_name"]
        write_json(folder / "scheduler/scheduler_config.json", scheduler)
        parts = {"scheduler": ["diffusers", kind], "unet": ["diffusers", "UNet2DModel"]}
        write_json(folder / "model_index.json", {"_class_name": pipeline, **parts})
    return folder


def recorded_folder(folder, case, scheduler=None, **options):
    """A recorded network in a folder; `options` take the place of some of its own."""
    pipeline = "DDPMPipeline" if scheduler == DDPM else "ScoreSdeVePipeline"
    arguments = golden().networks[case]["arguments"]
    return a_folder(folder, arguments, weights_of(case), scheduler, pipeline, **options)


def error(value, expected):
    """Relative to the largest value."""
    return ((value - expected).abs().max() / expected.abs().max()).item()
