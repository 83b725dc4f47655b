"""The layers of ADM, for signals of one to three sides, and their order.  [Dhariwal & Nichol 2021]

Features are (B, C, *S), with S one to three sides; names inside a layer are those of published
checkpoints.  Weights start as PyTorch draws them, and the last layer of a branch at 0.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from op.dispatch import is_transformed

from .attention import attention, heads_of
from .layers import RepeatedConv2d, choose, get_timestep_embedding

GROUPS = 32
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Cosines, then sines of t at frequencies from 1 down to almost 1 / max_period.

    DDPM's embedding has the sines first, and reaches 1 / max_period.

    Args:
        timesteps: (B,), whole or fractional steps.
        dim: an odd one is filled up with a zero.
    Returns:
        (B, dim), at least float32.
    """
    embedding = get_timestep_embedding(timesteps, dim, max_period, shift=0)
    sines, cosines, rest = embedding.split((dim // 2, dim // 2, dim % 2), dim=1)
    return torch.cat([cosines, sines, rest], dim=1)


def conv(
    dims: int, in_ch: int, out_ch: int, kernel: int = 3, stride=1, repeated: bool = False
) -> nn.Module:
    """Convolution over `dims` sides, which it keeps but for the stride.

    Args:
        repeated: of an image, whose pixels are repeated along both sides.
    Raises:
        ValueError: dims is not 1, 2 or 3.
    """
    layer = RepeatedConv2d if repeated else choose("dims", dims, _CONVOLUTIONS)
    return layer(in_ch, out_ch, kernel, stride, padding=kernel // 2)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def qkv_attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Attention with several heads, from queries, keys and values in one tensor.

    Args:
        qkv: (B, 3C, N).
        new_order: whether the 3C rows are (query | key | value, head, C / heads), rather than
            (head, query | key | value, C / heads).
    Returns:
        (B, C, N).
    """
    if _is_small(qkv, heads):
        return _small_attention(qkv, heads, new_order)
    # Fast kernels want the channels of a token side by side.  One copy, of all three: Inductor of
    # PyTorch 2.13 gives another output where the copy of each is recomputed.
    tokens = qkv.mT.contiguous()
    if new_order:
        parts = tokens.unflatten(2, (3, heads, -1)).unbind(2)
    else:
        parts = tokens.unflatten(2, (heads, 3, -1)).unbind(3)
    query, key, value = (part.transpose(1, 2) for part in parts)  # (B, heads, N, C / heads)
    return attention(query, key, value).transpose(1, 2).flatten(2).mT


def _is_small(qkv: Tensor, heads: int) -> bool:
    """Whether the weights are so few that, on a CPU, two products are faster than a fused kernel.

    Its backward pass is slow in bfloat16, and both want a copy of the transposed tensor.
    """
    _, rows, tokens = qkv.shape
    return qkv.device.type == "cpu" and tokens < max(256, 4 * rows // (3 * heads))


def _small_attention(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """See `qkv_attention`; weights are computed at least in float32."""
    if new_order:
        parts = (part.flatten(0, 1) for part in qkv.unflatten(1, (3, heads, -1)).unbind(1))
    else:
        parts = qkv.unflatten(1, (heads, -1)).flatten(0, 1).chunk(3, dim=1)
    query, key, value = parts  # (B heads, C / heads, N)
    scores = (query * query.shape[1] ** -0.5).mT @ key
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype)
    return (value @ weights.mT).unflatten(0, (-1, heads)).flatten(1, 2)


class GroupNorm32(nn.GroupNorm):
    """Normalisation of 32 groups, computed at least in float32; the output has the input's dtype.

    Raises:
        ValueError: the channels are no multiple of 32.
    """

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S), in the dtype of x."""
        if not torch.compiler.is_compiling() and is_transformed():
            x = x.contiguous()  # the kernel has such derivatives in one order of memory
        wide = torch.promote_types(x.dtype, torch.float32)
        if wide == x.dtype == self.weight.dtype:
            return super().forward(x)
        affine = self.weight.to(wide), self.bias.to(wide)
        # Autocast leaves wide arguments as they are.
        return F.group_norm(x.to(wide), self.num_groups, *affine, self.eps).to(x.dtype)


def _factors(dims: int) -> tuple[int, ...]:
    # A sequence of images keeps its length.
    return (1, 2, 2) if dims == 3 else (2,) * dims


class Downsample(nn.Module):
    """Halves the resolution: by a convolution of stride 2, or the mean of neighbours."""

    def __init__(self, channels: int, dims: int, with_conv: bool):
        super().__init__()
        factors = _factors(dims)
        self.op = (
            conv(dims, channels, channels, stride=factors) if with_conv else _POOLS[dims](factors)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S/2); a sequence of images keeps its length."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution by repetition, before a convolution if asked for."""

    def __init__(self, channels: int, dims: int, with_conv: bool):
        super().__init__()
        repeated = with_conv and dims == 2  # in the convolution
        self.repeats_images = dims == 2 and not with_conv
        factors = tuple(map(float, _factors(dims)))
        self.repeat = nn.Identity() if repeated else nn.Upsample(scale_factor=factors)
        self.conv = (
            conv(dims, channels, channels, repeated=repeated) if with_conv else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *2S); a sequence of images keeps its length."""
        return self.conv(self.repeat(x))


# New tensors are changed in place where no derivative needs them: memory takes the time.


def _activated(new: Tensor) -> Tensor:
    return F.silu(new, inplace=not torch.is_grad_enabled())


def _sum(new: Tensor, x: Tensor) -> Tensor:
    return new.add_(x) if new.dtype == x.dtype else new + x


class ResBlock(nn.Module):
    """Residual block that is told the time, and may change the resolution.

    Args:
        in_ch, out_ch: channels.
        temb_dim: size of the embedded time.
        dropout: probability, before the second convolution.
        dims: sides of a signal.
        scale_shift: the time scales and shifts normalised features, rather than being added.
        resample: applied to the input of both branches.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        temb_dim: int,
        *,
        dropout: float,
        dims: int,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        # In the convolutions, too.
        repeated = isinstance(resample, Upsample) and resample.repeats_images
        self.resample = nn.Identity() if repeated or resample is None else resample
        first = conv(dims, in_ch, out_ch, repeated=repeated)
        self.in_layers = nn.Sequential(GroupNorm32(in_ch), nn.SiLU(), first)
        of_time = nn.Linear(temb_dim, 2 * out_ch if scale_shift else out_ch)
        self.emb_layers = nn.Sequential(nn.SiLU(), of_time)
        last = zeroed(conv(dims, out_ch, out_ch))
        self.out_layers = nn.Sequential(GroupNorm32(out_ch), nn.SiLU(), nn.Dropout(dropout), last)
        if in_ch != out_ch:
            self.skip_connection = conv(dims, in_ch, out_ch, kernel=1, repeated=repeated)
        else:
            self.skip_connection = resample if repeated else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, in_ch, *S), temb (B, temb_dim) -> (B, out_ch, *S'), resampled."""
        norm, _, convolve = self.in_layers
        h = convolve(self.resample(_activated(norm(x))))
        of_time = self.emb_layers(temb).to(h.dtype)
        of_time = of_time.reshape(*of_time.shape, *(1,) * (h.dim() - 2))
        norm, _, drop, convolve = self.out_layers
        if self.scale_shift:
            scale, shift = of_time.chunk(2, dim=1)
            h = (norm(h) * (1 + scale)).add_(shift)
        else:
            h = norm(h + of_time)
        h = convolve(drop(_activated(h)))
        return _sum(h, self.skip_connection(self.resample(x)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, added to its input; see `qkv_attention`."""

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        tokens = self.norm(x.flatten(2))
        h = self.proj_out(qkv_attention(self.qkv(tokens), self.heads, self.new_order))
        return _sum(h.reshape(x.shape), x)


class AttentionPool(nn.Module):
    """Attention of the mean of a feature map to all of it, in place of the mean.  [CLIP's pooling]

    Args:
        side: of the square feature map, or (height, width); every position has an embedding of its
            own.
        channels, out_ch: channels.
        heads: of the attention.
    """

    def __init__(self, side: int | tuple[int, int], channels: int, heads: int, out_ch: int):
        super().__init__()
        self.heads = heads
        count = side**2 if isinstance(side, int) else math.prod(side)
        positions = torch.randn(channels, count + 1) / math.sqrt(channels)
        self.positional_embedding = nn.Parameter(positions)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, out_ch).

        Raises:
            ValueError: another number of positions.
        """
        tokens, expected = x.flatten(2), self.positional_embedding.shape[1] - 1
        if tokens.shape[2] != expected:
            raise ValueError(
                f"the pool attends to {expected} positions, but the images give feature maps of "
                f"{tuple(x.shape[2:])}: pass images of the network's image_size"
            )
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)
        qkv = self.qkv_proj(tokens + self.positional_embedding)
        return self.c_proj(qkv_attention(qkv, self.heads, new_order=True)[:, :, :1])[:, :, 0]


class Stage(nn.Sequential):
    """Layers in a row, of which residual blocks are told the time."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, C, *S), temb (B, E) -> (B, C', *S')."""
        for layer in self:
            x = layer(x, temb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Architecture(NamedTuple):
    """Keywords that the U-Net and the classifier share."""

    model_channels: int
    num_res_blocks: int
    attention_resolutions: Collection[int]
    dropout: float
    channel_mult: Sequence[float]
    conv_resample: bool
    dims: int
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool

    @classmethod
    def of(cls, given: Mapping[str, object]) -> "Architecture":
        """These of the keywords of a network."""
        return cls(**{name: given[name] for name in cls._fields})


class Builder:
    """Creates the layers of a network, in the order of the published checkpoints."""

    def __init__(self, architecture: Architecture):
        self.a = a = architecture
        self.temb_dim = 4 * a.model_channels
        widths = [int(mult * a.model_channels) for mult in a.channel_mult]
        if not widths or any(width < 1 or width % GROUPS for width in widths):
            raise ValueError(
                f"model_channels (model.nf) = {a.model_channels} and channel_mult (model.ch_mult) "
                f"= {tuple(a.channel_mult)} give the widths {tuple(widths)}, but each must be a "
                f"multiple of {GROUPS}, the number of groups of the normalisation"
            )
        # Channels of each resolution, finest first, and whether there is attention.
        self.levels = [(w, 2**i in a.attention_resolutions) for i, w in enumerate(widths)]
        self.block = partial(
            ResBlock,
            temb_dim=self.temb_dim,
            dropout=a.dropout,
            dims=a.dims,
            scale_shift=a.use_scale_shift_norm,
        )

    def embedding(self) -> nn.Sequential:
        """Of the sines and cosines of a time: (B, model_channels) -> (B, temb_dim)."""
        width = self.temb_dim
        first = nn.Linear(self.a.model_channels, width)
        return nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    def attention(self, ch: int, num_heads: int) -> AttentionBlock:
        """Attention over the pixels of features."""
        heads = heads_of(ch, num_heads, self.a.num_head_channels)
        return AttentionBlock(ch, heads, self.a.use_new_attention_order)

    def resample(self, kind: type[Downsample] | type[Upsample], ch: int) -> nn.Module:
        """A layer or a block that changes the resolution."""
        if self.a.resblock_updown:
            return self.block(ch, ch, resample=kind(ch, self.a.dims, with_conv=False))
        return kind(ch, self.a.dims, self.a.conv_resample)

    def encoder(self, in_ch: int) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the channels of each skip."""
        ch = self.levels[0][0]
        stages, skips = nn.ModuleList([Stage(conv(self.a.dims, in_ch, ch))]), [ch]
        for i, (width, attends) in enumerate(self.levels):
            for _ in range(self.a.num_res_blocks):
                layers = [self.block(ch, width)]
                if attends:
                    layers.append(self.attention(width, self.a.num_heads))
                stages.append(Stage(*layers))
                ch = width
                skips.append(ch)
            if i + 1 < len(self.levels):
                stages.append(Stage(self.resample(Downsample, ch)))
                skips.append(ch)
        return stages, skips

    def middle(self, ch: int) -> Stage:
        """Two blocks, and attention between them, at the lowest resolution."""
        attention = partial(self.attention, ch, self.a.num_heads)
        return Stage(self.block(ch, ch), attention(), self.block(ch, ch))

    def decoder(self, skips: Sequence[int]) -> nn.ModuleList:
        """The way up, given the channels of each skip."""
        a, skips, stages = self.a, list(skips), nn.ModuleList()
        num_heads = a.num_heads if a.num_heads_upsample == -1 else a.num_heads_upsample
        ch = skips[-1]
        for i, (width, attends) in reversed(list(enumerate(self.levels))):
            for j in range(a.num_res_blocks + 1):
                layers = [self.block(ch + skips.pop(), width)]
                ch = width
                if attends:
                    layers.append(self.attention(ch, num_heads))
                if i > 0 and j == a.num_res_blocks:
                    layers.append(self.resample(Upsample, ch))
                stages.append(Stage(*layers))
        return stages
