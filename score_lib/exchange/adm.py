"""Files of guided diffusion and improved diffusion as our networks.

Such a file is a flat state dict, whose names are those of our networks `adm` and `adm_classifier`.
Names and shapes tell most of a network; the number of heads, the order of the weights of attention
and the groups of normalisations must be known.
"""

import math
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.adm_layers import GROUPS
from models.utils import get_model
from score_lib.base.devices import resolve_device
from score_lib.disk.fit import CheckpointError, check_weights
from score_lib.disk.weights_files import read_weights, weights_by_name
from score_lib.options import complete
from score_lib.sdes.process import SDE
from score_lib.sdes.published import create_sde

NETWORKS = ("adm", "adm_classifier")
_NEEDED = {
    "time_embed.0.weight",
    "input_blocks.0.0.weight",
    "middle_block.0.in_layers.0.weight",
    "middle_block.0.emb_layers.1.weight",
}
_OUTPUT = re.compile(r"output_blocks\.(\d+)\.")
# A block or a convolution behind the first layer of a stage; attention has other names.
_DOUBLING = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")


def load_adm(
    path: str | os.PathLike, config: object, device: torch.device | str = "auto"
) -> tuple[nn.Module, SDE, dict[str, object]]:
    """The network of a published file, and its process.

    Args:
        path: a state dict, also of halved convolutions or with the prefix of a wrapper.
        config: of the network, such as `configs.adm.imagenet256.get_config()`.
        device: of the network; "auto" is a GPU where there is one.
    Returns:
        the network, in evaluation mode and float32; the process; and facts: "config", complete;
        "dtype" of the stored weights; "notes", sentences for the user on the facts that the config
        alone tells.
    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is damaged, or of another network; the message is one sentence with the
            options that differ, where the weights tell.
    """
    config = complete(config)
    if config.model.name not in NETWORKS:
        raise CheckpointError(
            f"{path} is to be read as model.name = {config.model.name!r}: choose a config of the "
            "network adm or adm_classifier, such as configs/adm/imagenet256.py"
        )
    contents, where = read_weights(path), resolve_device(device)
    with torch.device("meta"):  # its own weights would not stay
        model = get_model(config.model.name)(config).eval()
    weights = weights_by_name(path, contents, model)
    check_description(path, weights, model)
    check_weights(path, weights, model)
    own = {name: t.to(where, torch.float32, copy=True) for name, t in weights.items()}
    model.load_state_dict(own, assign=True)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.values()})
    facts = {"config": config, "dtype": ", ".join(dtypes), "notes": [untold(config)]}
    return model, create_sde(config), facts


def untold(config) -> str:
    """The facts of a complete config's network that weights do not tell, as a sentence."""
    model = config.model
    heads = (
        f"heads of {model.num_head_channels} channels"
        if model.num_head_channels
        else f"{model.num_heads} heads"
    )
    order = "new" if model.use_new_attention_order else "legacy"
    return (
        f"the weights do not tell that attention has {heads} in the {order} order "
        f"(model.use_new_attention_order = {model.use_new_attention_order}), nor that "
        f"normalisations have {GROUPS} groups"
    )


def check_description(
    path: str | os.PathLike, weights: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Refuse weights whose names and shapes describe another network of ADM.

    Raises:
        CheckpointError: names the options.
    """
    theirs, ours = (
        described_by({name: tuple(getattr(value, "shape", ())) for name, value in table.items()})
        for table in (weights, model.state_dict())
    )
    differing = [
        f"{option} = {theirs[option]!r} there and {value!r} in the config"
        for option, value in ours.items()
        if option in theirs and theirs[option] != value
    ]
    if differing:
        raise CheckpointError(f"{path} is of another network: {'; '.join(differing)}")


def described_by(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """The options of a network that the names and shapes of its weights tell.

    Without layers that double the resolution, as in classifiers, they tell nothing of levels.

    Returns:
        values by the names of options, or of facts and the options behind them; levels are counted
        from 0, the finest.  It is empty for other networks.
    """
    # Those of numbers and of empty tensors tell nothing.
    shapes = {name: shape for name, shape in shapes.items() if shape and math.prod(shape) > 0}
    if not shapes.keys() >= _NEEDED or len(shapes["input_blocks.0.0.weight"]) < 2:
        return {}
    nf, in_channels = shapes["time_embed.0.weight"][-1], shapes["input_blocks.0.0.weight"][1]
    width = shapes["middle_block.0.in_layers.0.weight"][0]
    found = {
        "model.nf": nf,
        "channels in (data.num_channels)": in_channels,
        "model.scale_shift_norm": shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * width,
    }
    if "output_blocks.0.0.in_layers.0.weight" not in shapes:
        return found
    classes = shapes.get("label_emb.weight", (0,))[0]
    found["channels out (model.learn_sigma)"] = shapes.get("out.2.weight", (0,))[0]
    found["classes (data.num_classes, training.condition)"] = classes
    return found | _levels(shapes, nf)


def _levels(shapes: Mapping[str, tuple[int, ...]], nf: int) -> dict[str, object]:
    """The part of `described_by` that the way up and down tell."""
    blocks = {m[1] for m in map(_OUTPUT.match, shapes) if m}
    doubling = {(m[1], m[2]) for m in map(_DOUBLING.match, shapes) if m}
    levels = len(doubling) + 1
    if not doubling or len(blocks) % levels:
        return {}
    every = len(blocks) // levels  # stages of a level, on the way up and down
    firsts = [1 + i * every for i in range(levels)]
    widths = [shapes.get(f"input_blocks.{k}.0.out_layers.3.weight", (0,))[0] for k in firsts]
    attends = [f"input_blocks.{k}.1.qkv.weight" in shapes for k in firsts]
    return {
        "model.num_res_blocks": every - 1,
        "model.ch_mult": tuple(width / nf for width in widths),
        "model.resblock_type": "biggan" if "in_layers" in dict(doubling).values() else "ddpm",
        "levels with attention (model.attn_resolutions)": [i for i, a in enumerate(attends) if a],
    }
