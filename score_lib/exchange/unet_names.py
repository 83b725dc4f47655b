"""Names of weights: those of Diffusers' UNet2DModel beside those of our U-Net.

Both have the same layers.  Ours are numbered in the order of their creation; theirs are named by
the part of the network that they are in, so that the plan of a U-Net tells their names.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from models.layers import NIN
from models.layerspp import AttnBlockpp, GaussianFourierProjection
from models.unet import UNet
from models.unet_plan import DecoderLevel, EncoderLevel

# Layers inside of a block: their names there, and ours.
_ATTENTION = {
    "group_norm": "GroupNorm_0",
    "to_q": "NIN_0",
    "to_k": "NIN_1",
    "to_v": "NIN_2",
    "to_out.0": "NIN_3",
}
_RESIDUAL = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
}
_SHORTCUT = "conv_shortcut"
# Of attention, before 2023.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Layer = tuple[str, int]  # its name there, and its slot here


class Form(NamedTuple):
    """How a tensor of theirs becomes one of ours, and back."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


SAME = Form(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSED = Form(lambda tensor: tensor.mT, lambda tensor: tensor.mT)
# A convolution of 1x1, and a matrix.
POINTWISE = Form(lambda tensor: tensor[:, :, 0, 0].mT, lambda tensor: tensor.mT[:, :, None, None])


class Pair(NamedTuple):
    """One tensor: its name there, its name here, and its form."""

    theirs: str
    ours: str
    form: Form


class Leaf(NamedTuple):
    """A layer without layers inside: its name there, its name here, and itself."""

    theirs: str
    ours: str
    module: nn.Module


def pairs(model: UNet) -> list[Pair]:
    """All parameters of a network, each once; `sigmas`, a table, has no counterpart."""
    return [pair for leaf in leaves(model) for pair in _tensors(leaf)]


def leaves(model: UNet) -> Iterator[Leaf]:
    """The layers that hold parameters."""
    for theirs, slot in _layers(model):
        module = model.all_modules[slot]
        for inside, name in _inside(module):
            whole = ".".join(filter(None, [theirs, inside]))
            ours = ".".join(filter(None, [f"all_modules.{slot}", name]))
            yield Leaf(whole, ours, module.get_submodule(name))
    if model.takes.classes:
        name = "condition_layers.classes"
        yield Leaf("class_embedding", name, model.get_submodule(name))


def missing_attentions(model: UNet) -> list[tuple[str, AttnBlockpp]]:
    """Attentions on the way up that Diffusers has and the network has not.

    Published networks have one at a resolution there, Diffusers one after each block.

    Returns:
        the name there, and an attention of the same size.
    """
    found = []
    for u, level in enumerate(model.plan.decoder):
        _, last = level.blocks[-1]
        if last is not None and level.project is None:
            found += [
                (f"up_blocks.{u}.attentions.{j}", model.all_modules[last])
                for j, (_, attention) in enumerate(level.blocks)
                if attention is None
            ]
    return found


def attention_tensors(name: str, attention: AttnBlockpp) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an attention in their layout, by their names."""
    for theirs, ours in _ATTENTION.items():
        leaf = Leaf(f"{name}.{theirs}", ours, attention.get_submodule(ours))
        for pair in _tensors(leaf):
            parameter = leaf.module.get_parameter(pair.ours.rpartition(".")[2])
            yield pair.theirs, pair.form.to_theirs(parameter.detach())


def todays_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a file -> today's names, without a second copy of the Fourier frequencies.

    Several names in a file may have the same one today; a file with both is ambiguous.
    """
    known = set(names)
    renamed = {}
    for name in known:
        if name == "time_proj.W":
            if "time_proj.weight" not in known:
                renamed[name] = "time_proj.weight"
            continue
        parts = name.split(".")
        if "attentions" in parts[:-1] and parts[-2] in _OLD_NAMES:
            parts[-2] = _OLD_NAMES[parts[-2]]
        renamed[name] = ".".join(parts)
    return renamed


# --- Layers ------------------------------------------------------------------------------------


def _layers(model: UNet) -> Iterator[Layer]:
    plan = model.plan
    fourier, dense = plan.embedding
    if fourier is not None:
        yield "time_proj", fourier
    yield from zip(("time_embedding.linear_1", "time_embedding.linear_2"), dense, strict=True)
    yield "conv_in", plan.stem
    for i, level in enumerate(plan.encoder):
        for name, slot in _encoder_level(model, level):
            yield f"down_blocks.{i}.{name}", slot
    middle = ("resnets.0", "attentions.0", "resnets.1")
    yield from ((f"mid_block.{name}", slot) for name, slot in zip(middle, plan.middle, strict=True))
    for u, level in enumerate(plan.decoder):
        for name, slot in _decoder_level(model, level):
            yield f"up_blocks.{u}.{name}", slot
    head = plan.head or plan.decoder[-1].project
    yield from (("conv_norm_out", head.norm), ("conv_out", head.conv))


def _encoder_level(model: UNet, level: EncoderLevel) -> Iterator[Layer]:
    yield from _blocks(level.blocks)
    if level.down is not None:
        residual = _is_residual(model, level.down)
        yield "resnet_down" if residual else "downsamplers.0.conv", level.down
    if level.merge is not None:
        yield "skip_conv", level.merge


def _decoder_level(model: UNet, level: DecoderLevel) -> Iterator[Layer]:
    pyramid = level.project is not None
    yield from _blocks(level.blocks, only_attention=pyramid)
    if level.up is None:
        return
    if pyramid:
        yield from (("skip_norm", level.project.norm), ("skip_conv", level.project.conv))
    yield "resnet_up" if _is_residual(model, level.up) else "upsamplers.0.conv", level.up


def _blocks(blocks: list[tuple[int, int | None]], only_attention: bool = False) -> Iterator[Layer]:
    """Residual blocks, and attentions, which have the numbers of their blocks.

    Args:
        only_attention: a single one at this resolution, which has the number 0.
    """
    for j, (block, attention) in enumerate(blocks):
        yield f"resnets.{j}", block
        if attention is not None:
            yield f"attentions.{0 if only_attention else j}", attention


def _is_residual(model: UNet, slot: int | None) -> bool:
    return slot is not None and hasattr(model.all_modules[slot], "GroupNorm_0")


def _inside(module: nn.Module) -> list[tuple[str, str]]:
    """Names there and here of the layers inside of a layer; "" is the layer itself."""
    if isinstance(module, AttnBlockpp):
        return list(_ATTENTION.items())
    if hasattr(module, "GroupNorm_0"):
        shortcut = [(_SHORTCUT, module.shortcut)] if module.shortcut else []
        return [*_RESIDUAL.items(), *shortcut]
    # A convolution that resamples, or that joins a pyramid, has no name of its own there.
    return [("", "Conv_0" if hasattr(module, "Conv_0") else "")]


def _tensors(leaf: Leaf) -> list[Pair]:
    theirs, ours, module = leaf
    if isinstance(module, GaussianFourierProjection):
        return [Pair(f"{theirs}.weight", f"{ours}.W", SAME)]
    if isinstance(module, NIN):
        form = POINTWISE if theirs.endswith(_SHORTCUT) else TRANSPOSED
        return [
            Pair(f"{theirs}.weight", f"{ours}.W", form),
            Pair(f"{theirs}.bias", f"{ours}.b", SAME),
        ]
    kinds = [kind for kind, _ in module.named_parameters()]  # weight, and bias if there is one
    return [Pair(f"{theirs}.{kind}", f"{ours}.{kind}", SAME) for kind in kinds]
