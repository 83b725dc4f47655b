"""The layers of the U-Net in the order of checkpoints, and the plan of a forward pass through them.

Published checkpoints number all layers in one list, in the order of their creation.  So one flat
list owns the layers, and a plan, made once, gives each slot of the list its role.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from score_lib.base.tensors import image_shape

from .layers import choose, ddpm_conv3x3, dense, in_full_precision
from .layerspp import (
    AttnBlockpp,
    Combine,
    Downsample,
    ResnetBlockBigGANpp,
    ResnetBlockDDPMpp,
    Upsample,
    fourier_projection,
    residual_sum,
)
from .normalization import group_norm, group_norm_of
from .up_or_down_sampling import Taps

Make = Callable[..., nn.Module]  # from numbers of channels to a layer


class Options(NamedTuple):
    """The options of NCSN++ for the U-Net; defaults are those of DDPM.  [S21, appendix H]"""

    embedding_type: str = "positional"
    resblock_type: str = "ddpm"
    fir: bool = False
    fir_kernel: Sequence[float] = (1, 3, 3, 1)
    skip_rescale: bool = False
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    init_scale: float = 0.0
    norm: Callable[[int], nn.Module] = group_norm


class Slots(nn.ModuleList):
    """Owns every layer in checkpoint order; `add` returns the slot it filled."""

    def add(self, layer: nn.Module) -> int:
        """Put a layer into the next slot, and give its number."""
        self.append(layer)
        return len(self) - 1


class Projection(NamedTuple):
    """Slots that turn features into an image: normalise, (activate,) convolve."""

    norm: int
    conv: int


class Embedding(NamedTuple):
    """Slots that embed the noise level; None where there is no such layer."""

    fourier: int | None
    dense: tuple[int, int] | None  # None for an unconditional network


class EncoderLevel(NamedTuple):
    """Slots of one resolution on the way down; None where there is no such layer."""

    blocks: list[tuple[int, int | None]]  # (residual block, attention)
    down: int | None  # None at the coarsest resolution
    merge: int | None  # joins the input pyramid


class DecoderLevel(NamedTuple):
    """Slots of one resolution on the way up; None where there is no such layer."""

    blocks: list[tuple[int, int | None]]  # (residual block, attention)
    merge: int | None  # joins the output pyramid
    project: Projection | None  # from the features to the output pyramid
    up: int | None  # None at the finest resolution


class Plan(NamedTuple):
    """The slots of each part, in the order of a forward pass."""

    embedding: Embedding
    stem: int
    encoder: list[EncoderLevel]
    middle: tuple[int, int, int]
    decoder: list[DecoderLevel]
    head: Projection | None  # None where the output pyramid is the output


class Builder:
    """Creates the layers of a U-Net, in the order of the published checkpoints, and its plan."""

    def __init__(self, config, options: Options, act: nn.Module):
        model = self.model = config.model
        self.options = options
        self.image_ch, height, _ = image_shape(config)
        self.nf, self.num_res_blocks = model.nf, model.num_res_blocks
        self.temb_dim = 4 * model.nf
        heights = [height >> i for i in range(len(model.ch_mult))]
        tell_unmatched(model.attn_resolutions, heights)
        # Channels of each resolution, finest first, and whether there is attention.
        self.levels = [
            (model.nf * mult, side in model.attn_resolutions)
            for mult, side in zip(map(int, model.ch_mult), heights, strict=True)
        ]
        self.slots = Slots()
        choose("model.normalization", model.normalization, {"GroupNorm": None})
        groups = model.norm_groups
        norm = partial(group_norm_of, groups=groups) if groups else options.norm
        self.norm = partial(norm, eps=model.norm_eps)
        self.fir = {"fir": options.fir, "fir_kernel": options.fir_kernel}
        residual = {
            "skip_rescale": options.skip_rescale,
            "init_scale": options.init_scale,
            "norm": self.norm,
        }
        heads = {
            "num_heads": model.num_heads,
            "num_head_channels": model.num_head_channels or -1,
        }
        self.attention = partial(AttnBlockpp, **residual, **heads)
        block = {"temb_dim": self.temb_dim, "dropout": model.dropout, **residual}
        self.block, self.down, self.up = self._blocks(act, block)
        self.join_input = self._input_joint()
        self.image_only, self.join_output = self._output_joint()

    def _blocks(self, act: nn.Module, block: dict) -> tuple[Make, Make, Make]:
        """Makers of a residual block, and of layers that halve and double the resolution."""
        ddpm = partial(ResnetBlockDDPMpp, act, **block)
        biggan = partial(ResnetBlockBigGANpp, act, **block, **self.fir)
        resample = {"with_conv": self.model.resamp_with_conv, **self.fir}
        down = partial(Downsample, **resample, symmetric=self.model.symmetric_padding)
        kinds = {
            "ddpm": (ddpm, down, partial(Upsample, **resample)),
            "biggan": (biggan, partial(biggan, down=True), partial(biggan, up=True)),
        }
        return choose("model.resblock_type", self.options.resblock_type, kinds)

    def _input_joint(self) -> Make | None:
        """Maker of layers that join the input pyramid to the features."""
        options = self.options
        kinds = {
            "none": None,
            "input_skip": partial(InputSkip, method=options.progressive_combine, **self.fir),
            "residual": partial(InputResidual, skip_rescale=options.skip_rescale, **self.fir),
        }
        return choose("model.progressive_input", options.progressive_input, kinds)

    def _output_joint(self) -> tuple[bool, Make | None]:
        """Whether the output pyramid consists of images, and the maker of its joints otherwise."""
        options = self.options
        residual = partial(OutputResidual, skip_rescale=options.skip_rescale, **self.fir)
        kinds = {"none": (False, None), "output_skip": (True, None), "residual": (False, residual)}
        return choose("model.progressive", options.progressive, kinds)

    def build(self) -> Plan:
        """The plan; its layers are in the slots afterwards."""
        add = self.slots.add
        embedding = self._embedding()
        stem = add(ddpm_conv3x3(self.image_ch, self.nf))
        encoder, skips = self._encoder()
        ch = skips[-1]
        middle = add(self.block(ch, ch)), add(self.attention(ch)), add(self.block(ch, ch))
        decoder = self._decoder(skips)
        head = None if self.image_only else self._image(self.levels[0][0])
        return Plan(embedding, stem, encoder, middle, decoder, head)

    def _embedding(self) -> Embedding:
        add = self.slots.add
        layer = fourier_projection(self.options.embedding_type, self.model)
        fourier = None if layer is None else add(layer)
        if not self.model.conditional:
            return Embedding(fourier, None)
        features = self.nf if fourier is None else 2 * self.nf
        first = add(dense(features, self.temb_dim))
        return Embedding(fourier, (first, add(dense(self.temb_dim, self.temb_dim))))

    def _encoder(self) -> tuple[list[EncoderLevel], list[int]]:
        """The way down, and the channels of each skip."""
        add, plan, skips, pyramid_ch = self.slots.add, [], [self.nf], self.image_ch
        for i, (width, attends) in enumerate(self.levels):
            blocks, down, merge = [], None, None
            for _ in range(self.num_res_blocks):
                block = add(self.block(skips[-1], width))
                blocks.append((block, add(self.attention(width)) if attends else None))
                skips.append(width)
            if i + 1 < len(self.levels):
                down = add(self.down(skips[-1]))
                skips.append(skips[-1])
                if self.join_input is not None:
                    joint = self.join_input(pyramid_ch, skips[-1])
                    merge, pyramid_ch, skips[-1] = add(joint), joint.pyramid_ch, joint.out_ch
            plan.append(EncoderLevel(blocks, down, merge))
        return plan, skips

    def _decoder(self, skips: list[int]) -> list[DecoderLevel]:
        """The way up, given the channels of each skip."""
        add, plan, ch = self.slots.add, [], skips[-1]
        for i, (width, attends) in reversed(list(enumerate(self.levels))):
            blocks = []
            for k in range(self.num_res_blocks + 1):
                block, ch = add(self.block(ch + skips.pop(), width)), width
                attention = attends and (k == self.num_res_blocks or self.model.attn_every_block)
                blocks.append((block, add(self.attention(ch)) if attention else None))
            merge, project = self._output_pyramid(i)
            up = add(self.up(ch)) if i > 0 else None
            plan.append(DecoderLevel(blocks, merge, project, up))
        return plan

    def _output_pyramid(self, i: int) -> tuple[int | None, Projection | None]:
        """The joint of the output pyramid at resolution i, and the projection into it."""
        ch, _ = self.levels[i]
        if self.image_only:
            return None, self._image(ch)
        if self.join_output is None:
            return None, None
        if i + 1 == len(self.levels):  # the pyramid starts here
            return None, self._projection(ch, ch)
        coarser_ch, _ = self.levels[i + 1]
        return self.slots.add(self.join_output(coarser_ch, ch)), None

    def _image(self, ch: int) -> Projection:
        return self._projection(ch, self.image_ch, self.options.init_scale)

    def _projection(self, in_ch: int, out_ch: int, init_scale: float = 1.0) -> Projection:
        norm = self.slots.add(self.norm(in_ch))
        return Projection(norm, self.slots.add(ddpm_conv3x3(in_ch, out_ch, init_scale=init_scale)))


# Joints of a pyramid and the features.  joint(h, pyramid) takes the pyramid at the neighbouring
# resolution and returns both at that of the features h.


class InputSkip(Combine):
    """Halves an image and combines it with the features."""

    def __init__(self, pyramid_ch: int, h_ch: int, *, method: str, fir: bool, fir_kernel: Taps):
        super().__init__(pyramid_ch, h_ch, method)
        self.pyramid_ch = pyramid_ch
        self.halve = Downsample(fir=fir, fir_kernel=fir_kernel)

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, H, W) and a pyramid twice their size -> both, of one size."""
        pyramid = in_full_precision(self.halve, pyramid)
        return super().forward(pyramid, h), pyramid


class _ResidualJoint:
    """Convolves the pyramid and adds it to the features; both become the sum."""

    def __init__(self, pyramid_ch: int, h_ch: int, *, skip_rescale: bool, **fir):
        super().__init__(pyramid_ch, h_ch, with_conv=True, **fir)
        self.pyramid_ch = self.out_ch = h_ch
        self.skip_rescale = skip_rescale

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, H, W) and a pyramid -> both, the same."""
        h = residual_sum(super().forward(pyramid), h, self.skip_rescale)
        return h, h


class InputResidual(_ResidualJoint, Downsample):
    """Halves the input pyramid."""


class OutputResidual(_ResidualJoint, Upsample):
    """Doubles the output pyramid."""


def total_stride(sides: Sequence[int], ch_mult: Sequence[int]) -> int:
    """The factor between the finest and the coarsest resolution of data with some sides.

    Raises:
        ValueError: the sides cannot be divided so.
    """
    halvings = len(ch_mult) - 1
    stride = 2**halvings
    if any(side % stride for side in sides):
        raise ValueError(
            f"the data's size is {'x'.join(map(str, sides))}, which cannot be halved {halvings} "
            f"times as model.ch_mult = {tuple(ch_mult)} asks: all sides must be multiples of "
            f"{stride}, see data.image_size or data.shape"
        )
    return stride


def tell_unmatched(wanted: Sequence[int], heights: Sequence[int]) -> None:
    """Warn of resolutions for attention that the network does not have."""
    if unmatched := [side for side in wanted if side not in heights]:
        logging.warning(
            "no attention at %s: model.attn_resolutions = %s, but the features have the heights "
            "%s. Attention at the coarsest of them, in the middle, is always there",
            ", ".join(map(str, unmatched)), tuple(wanted), ", ".join(map(str, heights)),
        )  # fmt: skip
