"""Folders of Diffusers with small networks, and recorded outputs of the library."""

from __future__ import annotations

import functools
import json
import pathlib
from types import SimpleNamespace

from networks import drawn_weights, tiny_config
from recordings import DATA, load_json, load_tensors
from small_runs import dotted

from models.utils import create_model
from score_lib.disk.safetensors_files import write_safetensors
from score_lib.exchange import unet_configs, unet_names
from score_lib.options import complete

PIPELINES = DATA / "diffusers"
VE = {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "sigma_max": 50.0}
DDPM = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}


@functools.cache
def golden() -> SimpleNamespace:
    """Recorded networks, runs of VE and of chains by name; `arrays`, tensors by case/array."""
    table = load_json("golden_diffusers.json")
    return SimpleNamespace(**table, arrays=load_tensors("golden_diffusers.npz"))


def arrays_of(case):
    """The arrays of a case by name."""
    found = golden().arrays.items()
    return {key.partition("/")[2]: a for key, a in found if key.partition("/")[0] == case}


def weights_of(case):
    """The weights of a recorded network, by their names there."""
    layout = golden().networks[case]["state_dict"]
    return {name: drawn_weights(name, tuple(shape)) for name, shape in layout}


def drawn_for(arguments):
    """Weights for a network of theirs, drawn by their names."""
    network = create_model(
        complete(unet_configs.to_ours(unet_configs.checked("", arguments))), "cpu"
    )
    own = network.state_dict()
    shapes = {p.theirs: p.form.to_theirs(own[p.ours]).shape for p in unet_names.pairs(network)}
    return {name: drawn_weights(name, tuple(shape)) for name, shape in shapes.items()}


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


# --- Networks of ours --------------------------------------------------------------------------


def ddpm_config(**changes):
    """DDPM with attention at one of two resolutions."""
    options = {"nf": 32, "ch_mult": (1, 2), "centered": True, "attn_resolutions": (4,), **changes}
    return complete(tiny_config("ddpm", **options))


def ncsnpp_config(**changes):
    """NCSN++ with both pyramids."""
    pyramids = {"progressive": "output_skip", "progressive_input": "input_skip", "fir": True}
    embedding = {"embedding_type": "fourier", "scale_by_sigma": True, "nf": 16}
    options = {**pyramids, **embedding, "attn_resolutions": (), **changes}
    return complete(tiny_config("ncsnpp", **options))


def as_trained(config, **options):
    """A config with options of other sections, by names with __ for the dot."""
    config.update_from_flattened_dict(dotted(options))
    return config


def plain_ncsnpp():
    """NCSN++ with the blocks of DDPM, several attention heads and Fourier features."""
    plain = {"progressive": "none", "progressive_input": "none", "fir": False}
    plain |= {"skip_rescale": False, "resblock_type": "ddpm", "norm_groups": 4}
    return ncsnpp_config(**plain, attn_resolutions=(4,), num_heads=2, ch_mult=(1, 1))


def positional_ncsnpp():
    """NCSN++ with its pyramids, told of time steps."""
    time = {"embedding_type": "positional", "scale_by_sigma": False, "freq_shift": 0.0}
    return ncsnpp_config(**time, centered=True, norm_eps=1e-3)


def classes_ddpm():
    """DDPM that is told one of five classes, or none."""
    options = {"data__num_classes": 5, "training__condition_dropout": 0.1}
    return as_trained(ddpm_config(), training__condition="classes", **options)


OURS = {
    "classes": classes_ddpm,
    "published ddpm": ddpm_config,
    "plain ncsnpp": plain_ncsnpp,
    "positional ncsnpp": positional_ncsnpp,
    "half a shift": lambda: ddpm_config(freq_shift=0.5),
    "rectangle": lambda: ncsnpp_config(image_size=(8, 12)),
}

# --- Networks of the Hub -----------------------------------------------------------------------

_WIDTHS = {
    "ncsnpp-church-256": [128, 128, 256, 256, 256, 256, 256],
    "ncsnpp-ffhq-1024": [16, 32, 64, 128, 256, 512, 512, 512],
    "ddpm-cifar10-32": [128, 256, 256, 256],
    "ddpm-celebahq-256": [128, 128, 256, 256, 512, 512],
}
_NCSNPP = {"center_input_sample": True, "time_embedding_type": "fourier", "freq_shift": 0}
_NCSNPP |= {"mid_block_scale_factor": 2**0.5, "norm_num_groups": None, "downsample_padding": 1}
_NCSNPP |= {"flip_sin_to_cos": True, "attention_head_dim": None, "norm_eps": 1e-6}
_DDPM = {"center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 1}
_DDPM |= {"mid_block_scale_factor": 1, "norm_num_groups": 32, "downsample_padding": 0}
_DDPM |= {"flip_sin_to_cos": False, "attention_head_dim": None, "norm_eps": 1e-6}


def google(name):
    """The options of a public network: attention is at 16 px."""
    skips, size = name.startswith("ncsnpp"), int(name.rpartition("-")[2])
    kind = "SkipDownBlock2D" if skips else "DownBlock2D"
    sides = [size >> i for i in range(len(_WIDTHS[name]))]
    down = [f"Attn{kind}" if side == 16 else kind for side in sides]
    return {
        **(_NCSNPP if skips else _DDPM),
        "sample_size": size,
        "block_out_channels": _WIDTHS[name],
        "layers_per_block": 1 if size == 1024 else 2,
        "down_block_types": down,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(down)],
    }
