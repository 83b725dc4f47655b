"""The options of Diffusers' UNet2DModel beside those of our U-Nets.

Its blocks are of two families: those named Skip are NCSN++ with its pyramids of images, and plain
ones are DDPM.  Options that one side alone has are refused; so are numbers of groups that
differ, which no name and no shape of a weight would tell.
"""

from collections.abc import Mapping

from torch import nn

from models.layerspp import AttnBlockpp
from models.unet import UNet
from score_lib.base.tensors import image_shape
from score_lib.exchange.errors import (
    ExchangeError,
    checked_options,
    shown,
    wrong_class,
    wrong_value,
)
from score_lib.exchange.unet_names import Leaf, leaves
from score_lib.option_kinds import Check, between, flag, number, one_of, text

CLASS = "UNet2DModel"
SQRT_2 = 2**0.5
# Larger numbers than these are of no network, and would take all time or memory.
_MOST_CHANNELS, _MOST_BLOCKS, _MOST_LEVELS, _LARGEST_SIDE = 65536, 64, 16, 65536
# Types of blocks: with the pyramids of NCSN++ or without, and with attention or without.
_BLOCKS = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (False, True),
    "SkipDownBlock2D": (True, False),
    "AttnSkipDownBlock2D": (True, True),
}


def _or_none(check: Check) -> Check:
    return Check(f"{check.allowed}, or null", lambda v: v is None or check.accepts(v))


def _list_of(check: Check, allowed: str) -> Check:
    def accepts(values: object) -> bool:
        fits = isinstance(values, list | tuple) and 1 <= len(values) <= _MOST_LEVELS
        return fits and all(map(check.accepts, values))

    return Check(f"a list of {allowed}, at most {_MOST_LEVELS}", accepts)


_CHANNELS, _SIDE = between(1, _MOST_CHANNELS), between(1, _LARGEST_SIDE)


def _is_size(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(map(_SIDE.accepts, value))
    return _SIDE.accepts(value)


# Options that are read: what they are where a file lacks them, and what they may be.
_READ: dict[str, tuple[object, Check]] = {
    "sample_size": (None, Check(f"{_SIDE.allowed}, or a list of two", _is_size)),
    "in_channels": (3, _CHANNELS),
    "out_channels": (3, _CHANNELS),
    "center_input_sample": (False, flag),
    "time_embedding_type": ("positional", one_of("positional", "fourier")),
    "freq_shift": (0, between(0.0, 1.0)),
    "flip_sin_to_cos": (True, flag),
    "down_block_types": (
        ("DownBlock2D", *("AttnDownBlock2D",) * 3),
        _list_of(text, "names"),
    ),
    "up_block_types": ((*("AttnUpBlock2D",) * 3, "UpBlock2D"), _list_of(text, "names")),
    "block_out_channels": ((224, 448, 672, 896), _list_of(_CHANNELS, "numbers of channels")),
    "layers_per_block": (2, between(1, _MOST_BLOCKS)),
    "mid_block_scale_factor": (1, number),
    "downsample_padding": (1, between(0, 1)),
    "dropout": (0.0, between(0.0, 1.0)),
    "norm_num_groups": (32, _or_none(_CHANNELS)),
    "attention_head_dim": (8, _or_none(_CHANNELS)),
    "norm_eps": (1e-5, between(1e-12, 1.0)),
    "num_class_embeds": (None, _or_none(between(2, _MOST_CHANNELS))),
}
# Options of which our networks have these values only; the first one where a file lacks them.
_FIXED: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "downsample_type": ("conv",),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default",),
    "upsample_type": ("conv",),
}
# Options that depend on others, see `_check_dependent`, and one without effect.
_DEPENDENT = ("attn_norm_num_groups", "time_embedding_dim", "num_train_timesteps")


# --- Reading -----------------------------------------------------------------------------------


def checked(path, stored: Mapping[str, object]) -> dict[str, object]:
    """The options in a file, completed by the library's defaults, which our networks can have.

    Args:
        path: for messages.
        stored: the contents of the file.
    Raises:
        ExchangeError: an option is unknown, of a wrong kind, or cannot be expressed.
    """
    if (kind := stored.get("_class_name", CLASS)) != CLASS:
        raise wrong_class(path, kind, [CLASS])
    others, effect = (*_FIXED, *_DEPENDENT), "what the network computes"
    options = checked_options(path, stored, _READ, others, effect)
    for name, values in _FIXED.items():
        if not _same_as_one(stored.get(name, values[0]), values):
            allowed = " or ".join(map(shown, values))
            raise wrong_value(path, name, stored[name], f"{allowed}, as in all networks here")
    _check_dependent(path, stored, options)
    _check_blocks(path, options)
    return options


def _same_as_one(value: object, values: tuple) -> bool:
    return any(type(value) is type(one) and value == one for one in values)


def _check_dependent(path, stored: Mapping[str, object], options: Mapping[str, object]) -> None:
    width = 4 * options["block_out_channels"][0]
    for name, usual in (
        ("attn_norm_num_groups", options["norm_num_groups"]),
        ("time_embedding_dim", width),
    ):
        if stored.get(name) not in (None, usual):
            raise wrong_value(path, name, stored[name], f"{shown(usual)}, as in all networks here")
    if options["in_channels"] != options["out_channels"]:
        raise ExchangeError(
            f"{path} has {options['in_channels']} channels at the input and "
            f"{options['out_channels']} at the output, but a score has the shape of the data"
        )


def _check_blocks(path, options: Mapping[str, object]) -> None:
    """Refuse levels that are no mirror images, of two families, or of other widths."""
    down, up = options["down_block_types"], options["up_block_types"]
    channels = options["block_out_channels"]
    unknown = [name for name in down if name not in _BLOCKS]
    if unknown:
        raise wrong_value(path, "a block", unknown[0], f"one of {', '.join(_BLOCKS)}")
    if list(up) != _mirrored(down) or len(down) != len(channels):
        raise ExchangeError(
            f"{path} has the blocks {', '.join(down)} and {', '.join(up)} of {len(channels)} "
            "widths, but a network here has the same levels on the way down and up"
        )
    if len({_BLOCKS[name][0] for name in down}) > 1:
        raise ExchangeError(f"{path} has blocks with and without Skip, and a network here has one")
    if any(width % channels[0] for width in channels):
        raise wrong_value(path, "block_out_channels", channels, "multiples of the first of them")
    pyramids = _BLOCKS[down[0]][0]
    if pyramids and options["in_channels"] != 3:
        raise ExchangeError(
            f"{path} has {options['in_channels']} channels, and Skip blocks are for 3 only"
        )
    factor, usual = options["mid_block_scale_factor"], SQRT_2 if pyramids else 1
    if abs(factor - usual) > 1e-9:
        raise ExchangeError(
            f"{path} has mid_block_scale_factor = {factor}, but a network here divides all sums by "
            f"the same number, which is {usual:g} in blocks {down[0]}"
        )
    if not pyramids and options["norm_num_groups"] is None:
        raise ExchangeError(f"{path} has norm_num_groups = null, which blocks {down[0]} have not")


def _mirrored(down: list[str]) -> list[str]:
    return [name.replace("Down", "Up") for name in reversed(down)]


def fewest_weights(options: Mapping[str, object]) -> int:
    """Fewer weights than the network has, but not many times fewer.

    Those of the second convolution of each residual block, of the first and the last one, and of
    classes.
    """
    blocks, widths = 2 * options["layers_per_block"] + 1, options["block_out_channels"]
    ends = 2 * options["in_channels"] * widths[0]
    classes = 4 * widths[0] * (options["num_class_embeds"] or 0)
    return 9 * (ends + blocks * sum(width**2 for width in widths)) + classes


def to_ours(options: Mapping[str, object]) -> dict[str, dict]:
    """Options of theirs, see `checked`, as sections of a config of ours."""
    pyramids = _BLOCKS[options["down_block_types"][0]][0]
    fourier = options["time_embedding_type"] == "fourier"
    size, widths = options["sample_size"], options["block_out_channels"]
    size = tuple(size) if isinstance(size, list | tuple) else size
    height = size if isinstance(size, int) else size[0]
    attends = [_BLOCKS[name][1] for name in options["down_block_types"]]
    model = {
        "name": "ncsnpp" if pyramids or fourier else "ddpm",
        "nf": widths[0],
        "ch_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": options["layers_per_block"],
        "attn_resolutions": tuple(height >> i for i, attention in enumerate(attends) if attention),
        "attn_every_block": any(attends) and not pyramids,
        "num_head_channels": options["attention_head_dim"] or 0,
        "dropout": float(options["dropout"]),
        "norm_eps": float(options["norm_eps"]),
        "norm_groups": 0 if pyramids else options["norm_num_groups"],
        "freq_shift": float(options["freq_shift"]),
        "symmetric_padding": not pyramids and options["downsample_padding"] == 1,
        "scale_by_sigma": fourier,
        **_COMMON,
    }
    if model["name"] == "ddpm" and model["norm_groups"] == 32:
        model["norm_groups"] = 0  # as published
    if model["name"] == "ncsnpp":
        model |= {"embedding_type": options["time_embedding_type"], "fourier_scale": 16.0}
        model |= _PYRAMIDS if pyramids else _PLAIN
    data = {
        "image_size": size,
        "num_channels": options["in_channels"],
        "centered": not options["center_input_sample"],
    }
    if (classes := options["num_class_embeds"]) is None:
        return {"data": data, "model": model}
    data["num_classes"] = classes
    return {"data": data, "model": model, "training": {"condition": "classes"}}


# All of their networks in our terms, and those of each family.
_COMMON = {
    "conditional": True,
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "resamp_with_conv": True,
    "conv_size": 3,
}
_SHARED = {"attention_type": "ddpm", "init_scale": 0.0, "fir_kernel": (1, 3, 3, 1)}
_PYRAMIDS = {
    **_SHARED,
    "resblock_type": "biggan",
    "fir": True,
    "skip_rescale": True,
    "progressive": "output_skip",
    "progressive_input": "input_skip",
    "progressive_combine": "sum",
}
_PLAIN = {
    **_SHARED,
    "resblock_type": "ddpm",
    "fir": False,
    "skip_rescale": False,
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
}


# --- Writing -----------------------------------------------------------------------------------


def to_theirs(config, model: UNet) -> dict[str, object]:
    """The options of theirs for a network of ours.

    Args:
        config: complete, of the network.
    Raises:
        ExchangeError: their network cannot be the same function; says why.
    """
    ours = config.model
    pyramids = ours.name == "ncsnpp" and {ours.progressive, ours.progressive_input} != {"none"}
    _check_ours(config, pyramids)
    channels, height, width = image_shape(config)
    fourier = _is_fourier(ours)
    widths = [ours.nf * factor for factor in ours.ch_mult]
    sides = [height >> i for i in range(len(widths))]
    kinds = {key: name for name, key in _BLOCKS.items()}
    down = [kinds[pyramids, side in ours.attn_resolutions] for side in sides]
    shift = ours.freq_shift
    options = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "center_input_sample": not config.data.centered,
        "time_embedding_type": "fourier" if fourier else "positional",
        "freq_shift": int(shift) if shift == int(shift) else shift,
        "flip_sin_to_cos": fourier,  # without effect on Fourier features, where this is usual
        "down_block_types": down,
        "up_block_types": _mirrored(down),
        "block_out_channels": widths,
        "layers_per_block": ours.num_res_blocks,
        "mid_block_scale_factor": SQRT_2 if pyramids else 1,
        "downsample_padding": int(pyramids or ours.symmetric_padding),
        "dropout": ours.dropout,
        "norm_num_groups": None if pyramids else _head_groups(model),
        "attention_head_dim": _head_width(model),
        "norm_eps": ours.norm_eps,
        "num_class_embeds": _rows(model),
        **{name: values[0] for name, values in _FIXED.items()},
    }
    check_groups("the network", model, options)
    return {"_class_name": CLASS, **dict.fromkeys(_DEPENDENT), **options}


def _is_fourier(ours) -> bool:
    return ours.name == "ncsnpp" and ours.embedding_type == "fourier"


def _check_ours(config, pyramids: bool) -> None:
    """Refuse options that no blocks of theirs have."""
    ours = config.model
    if ours.name not in ("ddpm", "ncsnpp"):
        raise ExchangeError(f"model.name is {ours.name!r}, and only ddpm and ncsnpp can be written")
    if config.training.condition not in ("", "classes"):
        raise ExchangeError(
            f"training.condition = {config.training.condition!r} cannot be written: their networks "
            "are told of the time and of classes only"
        )
    wanted = {**_COMMON, "ch_mult[0]": 1, "scale_by_sigma": _is_fourier(ours)}
    if ours.name == "ncsnpp":
        family = _PYRAMIDS if pyramids else _PLAIN
        wanted |= {key: value for key, value in family.items() if key not in ("init_scale",)}
    if pyramids:
        wanted |= {"norm_groups": 0, "attn_every_block": False, "num_channels": 3}
    if _is_fourier(ours):
        wanted["fourier_log"] = True
    found = {**ours, "ch_mult[0]": ours.ch_mult[0], "num_channels": image_shape(config)[0]}
    for name, value in wanted.items():
        if name in found and _plain(found[name]) != _plain(value):
            section = "data" if name == "num_channels" else "model"
            raise ExchangeError(
                f"{section}.{name} = {found[name]!r} cannot be written: their blocks "
                f"{'with' if pyramids else 'without'} Skip compute as with {value!r} only"
            )
    if ours.num_res_blocks < 1:
        raise ExchangeError("model.num_res_blocks = 0 cannot be written: their levels have blocks")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _rows(model: UNet) -> int | None:
    """Classes that a network is told, with the null, which is the last one; None: none."""
    return model.condition_layers.classes.num_embeddings if model.takes.kinds else None


def _head_groups(model: UNet) -> int:
    """Groups of the last normalisation."""
    return next(leaf for leaf in leaves(model) if leaf.theirs == "conv_norm_out").module.num_groups


def _head_width(model: UNet) -> int | None:
    """Features of an attention head; None: all of them.

    Raises:
        ExchangeError: heads are of several widths.
    """
    blocks = [layer for layer in model.all_modules if isinstance(layer, AttnBlockpp)]
    if all(block.heads == 1 for block in blocks):
        return None
    widths = {block.GroupNorm_0.num_channels // block.heads for block in blocks}
    if len(widths) > 1:
        raise ExchangeError(
            f"attention heads have {' or '.join(map(str, sorted(widths)))} features, and all of "
            "theirs are equally wide: train with model.num_head_channels"
        )
    return widths.pop()


# --- Groups ------------------------------------------------------------------------------------


def check_groups(part: object, model: UNet, options: Mapping[str, object]) -> None:
    """Refuse a network in which a normalisation has other groups than theirs has.

    Args:
        part: that has them, for messages.
        options: of theirs, see `checked`.
    Raises:
        ExchangeError: names the first one.
    """
    for leaf in leaves(model):
        if isinstance(leaf.module, nn.GroupNorm):
            theirs, ours = _their_groups(leaf, options), leaf.module.num_groups
            if theirs != ours:
                raise ExchangeError(
                    f"{part} has {leaf.module.num_channels} channels at {leaf.theirs}, which their "
                    f"network normalises in {theirs} groups and the one here in {ours}: the same "
                    "weights would be another function"
                )


def _their_groups(leaf: Leaf, options: Mapping[str, object]) -> int:
    """The groups of a normalisation of theirs."""
    channels, number = leaf.module.num_channels, options["norm_num_groups"]
    part, *inside = leaf.theirs.split(".")
    if not _BLOCKS[options["down_block_types"][0]][0]:
        return number
    if part in ("mid_block", "conv_norm_out"):
        return min(channels // 4, 32) if number is None else number
    if "attentions" in inside:
        return 32
    # Beside attention on the way up theirs has min(R + S // 4, 32) groups of R + S channels, which
    # differs from a fourth of all only where attention has fewer than 128 channels, and so differs.
    return min(channels // 4, 32)
