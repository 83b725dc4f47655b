"""The blocks of DDPM and NCSN++.

A block on the trunk of a U-Net is called as `block(x, temb)`, with features x (B, C, H, W) and the
embedded noise level temb (B, E) or None; blocks that ignore temb can be called as `block(x)`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from op import rescaled_sum

from .attention import attention, heads_of
from .layers import (
    NIN,
    choose,
    ddpm_conv1x1,
    ddpm_conv3x3,
    dense,
    get_timestep_embedding,
    repeated_conv1x1,
    repeated_conv3x3,
)
from .normalization import activated, group_norm
from .up_or_down_sampling import Conv2d, Taps, resampler

Norm = Callable[[int], nn.Module]
conv1x1, conv3x3 = ddpm_conv1x1, ddpm_conv3x3  # published names


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of the noise level: sin and cos of 2 pi W x, W ~ N(0, scale^2).

    W is drawn once, kept in the state dict and not trained.
    """

    def __init__(self, embedding_size: int = 256, scale: float = 1.0):
        super().__init__()
        self.W = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,) -> (B, 2 embedding_size)."""
        angles = x[:, None] * self.W * (2 * math.pi)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def fourier_projection(embedding_type: str, model) -> GaussianFourierProjection | None:
    """The Fourier features of `model.embedding_type`; None for sines and cosines of time steps.

    Raises:
        ValueError: no such embedding, or no room for a sine and a cosine.
    """
    kinds = {
        "fourier": lambda: GaussianFourierProjection(model.nf, model.fourier_scale),
        "positional": lambda: None,
    }
    layer = choose("model.embedding_type", embedding_type, kinds)()
    if layer is None and model.get("conditional", True) and model.nf < 2:
        raise ValueError(
            f"model.nf = {model.nf} leaves no room for a sine and a cosine of the time step, so "
            "that the network would not be told the time: choose at least 2"
        )
    return layer


def level_features(
    labels: Tensor,
    fourier: GaussianFourierProjection | None,
    nf: int,
    log: bool,
    shift: float = 1,
) -> Tensor:
    """Features of the noise level, before the layers that embed it.

    Args:
        labels: (B,); noise levels, or any numbers without `log`, for Fourier features, otherwise
            time steps.
        fourier: random Fourier features; None: sines and cosines of the time step.
        nf: number of sines and cosines.
        log: whether Fourier features are of the label's logarithm.
        shift: of the frequencies of sines and cosines, see `get_timestep_embedding`.
    Returns:
        (B, 2 nf) with Fourier features, otherwise (B, nf).
    """
    if fourier is None:
        return get_timestep_embedding(labels, nf, shift=shift)
    return fourier(torch.log(labels) if log else labels)


class Combine(nn.Module):
    """Maps x to the channels of y with a 1x1 convolution, then adds or concatenates both.

    Args:
        method: "sum" keeps dim2 channels, "cat" makes 2 dim2.
    Raises:
        ValueError: no such method.
    """

    def __init__(self, dim1: int, dim2: int, method: str = "cat"):
        super().__init__()
        self.Conv_0 = ddpm_conv1x1(dim1, dim2)
        self.cat = choose("model.progressive_combine", method, {"sum": False, "cat": True})
        self.out_ch = 2 * dim2 if self.cat else dim2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, dim1, H, W), y (B, dim2, H, W) -> (B, out_ch, H, W)."""
        x = self.Conv_0(x)
        return torch.cat([x, y], dim=1) if self.cat else x + y


def residual_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, divided by sqrt(2) to keep the variance if `rescale`."""
    return rescaled_sum(x, h, math.sqrt(2.0)) if rescale else x + h


class AttnBlockpp(nn.Module):
    """Self-attention over all pixels, added to its input.

    Args:
        skip_rescale: divide the sum by sqrt(2).
        init_scale: initial scale of the output layer.
        norm: function of the number of channels that returns a normalisation.
        num_heads: attention heads.
        num_head_channels: how wide a head is, in place of their number; -1: see `num_heads`.
    Raises:
        ValueError: the channels cannot be split so.
    """

    def __init__(
        self,
        channels: int,
        skip_rescale: bool = False,
        init_scale: float = 0.0,
        *,
        norm: Norm = group_norm,
        num_heads: int = 1,
        num_head_channels: int = -1,
    ):
        super().__init__()
        self.heads = heads_of(channels, num_heads, num_head_channels)
        self.GroupNorm_0 = norm(channels)
        self.NIN_0 = NIN(channels, channels)
        self.NIN_1 = NIN(channels, channels)
        self.NIN_2 = NIN(channels, channels)
        self.NIN_3 = NIN(channels, channels, init_scale=init_scale)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); temb is ignored."""
        tokens = self.GroupNorm_0(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        query, key, value = (
            nin.on_tokens(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for nin in (self.NIN_0, self.NIN_1, self.NIN_2)
        )
        h = attention(query, key, value)  # (B, heads, H W, C / heads)
        h = self.NIN_3.on_tokens(h.transpose(1, 2).flatten(2))
        return residual_sum(x, h.transpose(1, 2).reshape(x.shape), self.skip_rescale)


class _Resample(nn.Sequential):
    """Changes the resolution by 2, naively or filtered, with a 3x3 convolution if asked for.

    Args:
        in_ch, out_ch: channels; needed (out_ch: equal to in_ch by default) with a convolution.
        with_conv: convolve.
        fir: use the filter `fir_kernel`; the convolution is then fused with it.
        symmetric: an unfiltered convolution that halves pads all four sides, rather than the right
            and the bottom, with zeros.
    Raises:
        ValueError: a convolution without in_ch.
    """

    up: bool

    def __init__(
        self,
        in_ch: int | None = None,
        out_ch: int | None = None,
        with_conv: bool = False,
        fir: bool = False,
        fir_kernel: Taps = (1, 3, 3, 1),
        symmetric: bool = False,
    ):
        if with_conv and in_ch is None:
            raise ValueError("resampling with a convolution needs in_ch, the number of channels")
        out_ch, up = out_ch or in_ch, self.up
        if not with_conv:
            layers = {"resample": resampler(up=up, k=fir_kernel if fir else None)}
        elif fir:
            conv = Conv2d(in_ch, out_ch, 3, up=up, down=not up, resample_kernel=fir_kernel)
            layers = {"Conv2d_0": conv}
        elif up:
            layers = {"Conv_0": repeated_conv3x3(in_ch, out_ch)}
        else:
            pad = (1, 1, 1, 1) if symmetric else (0, 1, 0, 1)
            conv = ddpm_conv3x3(in_ch, out_ch, stride=2, padding=0)
            layers = {"pad": nn.ZeroPad2d(pad), "Conv_0": conv}
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'); temb is ignored."""
        return super().forward(x)


class Upsample(_Resample):
    """Doubles the resolution."""

    up = True


class Downsample(_Resample):
    """Halves the resolution; unfiltered with a convolution, by a stride of 2."""

    up = False


class _ResnetBlock(nn.Module):
    """Two convolutions, with the noise level added in between, and a shortcut.

    Layers are created in the order of the published checkpoints, the shortcut's last, by the
    subclass.  `shortcut` is its name rather than a reference, which would be stale in copies or
    after a layer is replaced.
    """

    shortcut: str | None = None

    def __init__(
        self,
        act,
        in_ch,
        out_ch,
        temb_dim,
        dropout,
        skip_rescale,
        init_scale,
        norm,
        conv=ddpm_conv3x3,
    ):
        super().__init__()
        self.act = act
        self.skip_rescale = skip_rescale
        self.resample = nn.Identity()
        self.GroupNorm_0 = norm(in_ch)
        self.Conv_0 = conv(in_ch, out_ch)
        self.Dense_0 = None if temb_dim is None else dense(temb_dim, out_ch)
        self.GroupNorm_1 = norm(out_ch)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = ddpm_conv3x3(out_ch, out_ch, init_scale=init_scale)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), temb (B, E) -> (B, C', H', W'), resampled."""
        h = self.Conv_0(self.resample(activated(self.act, self.GroupNorm_0, x)))
        told = self.Dense_0 is not None and temb is not None
        level = self.Dense_0(self.act(temb)) if told else None
        h = self.Conv_1(self.Dropout_0(activated(self.act, self.GroupNorm_1, h, level)))
        x = self.resample(x)
        if self.shortcut is not None:
            x = getattr(self, self.shortcut)(x)
        return residual_sum(x, h, self.skip_rescale)


class ResnetBlockDDPMpp(_ResnetBlock):
    """Residual block of DDPM.

    Args:
        act: activation.
        in_ch, out_ch: channels; out_ch is in_ch by default.
        temb_dim: size of the embedded noise level; None for a block without.
        conv_shortcut: 3x3 rather than 1x1 convolution where the number of channels changes.
        dropout: probability.
        skip_rescale: divide the sum by sqrt(2).
        init_scale: initial scale of the last convolution.
        norm: function of the number of channels that returns a normalisation.
    """

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        in_ch: int,
        out_ch: int | None = None,
        temb_dim: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.1,
        skip_rescale: bool = False,
        init_scale: float = 0.0,
        *,
        norm: Norm = group_norm,
    ):
        out_ch = out_ch or in_ch
        super().__init__(act, in_ch, out_ch, temb_dim, dropout, skip_rescale, init_scale, norm)
        if in_ch == out_ch:
            return
        if conv_shortcut:
            self.shortcut, self.Conv_2 = "Conv_2", ddpm_conv3x3(in_ch, out_ch)
        else:
            self.shortcut, self.NIN_0 = "NIN_0", NIN(in_ch, out_ch)


class ResnetBlockBigGANpp(_ResnetBlock):
    """Residual block of BigGAN, which may change the resolution by 2.

    Args:
        up, down: change of resolution, if any.
        fir: change it with the filter `fir_kernel`, otherwise naively.
        skip_rescale: divide the sum by sqrt(2).
        others: see `ResnetBlockDDPMpp`.
    Raises:
        ValueError: both up and down.
    """

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        in_ch: int,
        out_ch: int | None = None,
        temb_dim: int | None = None,
        up: bool = False,
        down: bool = False,
        dropout: float = 0.1,
        fir: bool = False,
        fir_kernel: Taps = (1, 3, 3, 1),
        skip_rescale: bool = True,
        init_scale: float = 0.0,
        *,
        norm: Norm = group_norm,
    ):
        if up and down:
            raise ValueError("a block goes up or down, not both")
        out_ch = out_ch or in_ch
        repeats = up and not fir  # in the convolutions
        conv = repeated_conv3x3 if repeats else ddpm_conv3x3
        shared = act, in_ch, out_ch, temb_dim, dropout, skip_rescale, init_scale, norm
        super().__init__(*shared, conv)
        if (up or down) and not repeats:
            self.resample = resampler(up=up, k=fir_kernel if fir else None)
        if in_ch != out_ch or up or down:
            conv = repeated_conv1x1 if repeats else ddpm_conv1x1
            self.shortcut, self.Conv_2 = "Conv_2", conv(in_ch, out_ch)
