"""The blocks of DDPM and NCSN++.

Every block that sits on the trunk of a U-Net is called as `block(x, temb)`, with features x
(B, C, H, W) and the embedded noise level temb (B, E) or None; those that do not look at temb may be
called as `block(x)`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import NIN, choose, ddpm_conv1x1, ddpm_conv3x3, dense
from .normalization import group_norm
from .up_or_down_sampling import Conv2d, Taps, resampler

Norm = Callable[[int], nn.Module]


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


class Combine(nn.Module):
    """Brings `dim1` channels to `dim2` with a 1x1 convolution and joins them to others.

    Args:
        method: "sum" keeps dim2 channels, "cat" makes 2 dim2.
    Raises:
        ValueError: no such method.
    """

    def __init__(self, dim1: int, dim2: int, method: str = "cat"):
        super().__init__()
        self.Conv_0 = ddpm_conv1x1(dim1, dim2)
        self.out_ch = dim2 * choose("model.progressive_combine", method, {"sum": 1, "cat": 2})
        self.cat = method == "cat"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, dim1, H, W), y (B, dim2, H, W) -> (B, out_ch, H, W)."""
        x = self.Conv_0(x)
        return torch.cat([x, y], dim=1) if self.cat else x + y


def residual_sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, divided by sqrt(2) to keep the variance if `rescale`."""
    return (x + h) / math.sqrt(2.0) if rescale else x + h


class AttnBlockpp(nn.Module):
    """Self-attention with one head over all pixels, added to its input.

    Runs through `torch.nn.functional.scaled_dot_product_attention`.  Its fast kernels have a first
    derivative in reverse mode only: for higher ones, or forward mode, choose the plain kernel with
    `torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`.

    Args:
        skip_rescale: divide the sum by sqrt(2).
        init_scale: initial scale of the output layer.
        norm: makes the normalisation for a number of channels.
    """

    def __init__(
        self,
        channels: int,
        skip_rescale: bool = False,
        init_scale: float = 0.0,
        *,
        norm: Norm = group_norm,
    ):
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.NIN_0 = NIN(channels, channels)
        self.NIN_1 = NIN(channels, channels)
        self.NIN_2 = NIN(channels, channels)
        self.NIN_3 = NIN(channels, channels, init_scale=init_scale)
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        tokens = self.GroupNorm_0(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H W, C)
        query, key, value = (nin.on_tokens(tokens) for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = self.NIN_3.on_tokens(F.scaled_dot_product_attention(query, key, value))
        return residual_sum(x, h[:, 0].transpose(1, 2).reshape(x.shape), self.skip_rescale)


class Upsample(nn.Sequential):
    """Twice the resolution, naive or filtered, and a 3x3 convolution if asked for.

    Args:
        in_ch, out_ch: channels; needed (out_ch: equal to in_ch by default) with a convolution.
        with_conv: convolve; fused with the filter where there is one.
        fir: use the filter with taps `fir_kernel`.
    Raises:
        ValueError: a convolution without its number of channels.
    """

    def __init__(
        self,
        in_ch: int | None = None,
        out_ch: int | None = None,
        with_conv: bool = False,
        fir: bool = False,
        fir_kernel: Taps = (1, 3, 3, 1),
    ):
        out_ch = _conv_channels(in_ch, out_ch, with_conv)
        if with_conv and fir:
            conv = Conv2d(in_ch, out_ch, 3, up=True, resample_kernel=fir_kernel)
            layers = OrderedDict(Conv2d_0=conv)
        else:
            layers = OrderedDict(resample=resampler(up=True, k=fir_kernel if fir else None))
            if with_conv:
                layers["Conv_0"] = ddpm_conv3x3(in_ch, out_ch)
        super().__init__(layers)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Downsample(nn.Sequential):
    """Half the resolution, naive or filtered, and a 3x3 convolution if asked for.

    Arguments as for `Upsample`; the naive way with a convolution is one of stride 2.
    """

    def __init__(
        self,
        in_ch: int | None = None,
        out_ch: int | None = None,
        with_conv: bool = False,
        fir: bool = False,
        fir_kernel: Taps = (1, 3, 3, 1),
    ):
        out_ch = _conv_channels(in_ch, out_ch, with_conv)
        if not with_conv:
            layers = OrderedDict(resample=resampler(up=False, k=fir_kernel if fir else None))
        elif fir:
            conv = Conv2d(in_ch, out_ch, 3, down=True, resample_kernel=fir_kernel)
            layers = OrderedDict(Conv2d_0=conv)
        else:
            conv = ddpm_conv3x3(in_ch, out_ch, stride=2, padding=0)
            layers = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), Conv_0=conv)
        super().__init__(layers)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return super().forward(x)


def _conv_channels(in_ch: int | None, out_ch: int | None, with_conv: bool) -> int | None:
    if with_conv and in_ch is None:
        raise ValueError("resampling with a convolution needs in_ch, the number of channels")
    return out_ch or in_ch


class _ResnetBlock(nn.Module):
    """Two convolutions, the first of which is told the noise level, added to a shortcut.

    Layers are made in the order of the published checkpoints; a subclass adds that of the shortcut
    last and puts its name in `shortcut`.  A name rather than a reference: copying the block, or
    replacing the layer, then leaves nothing stale.
    """

    shortcut: str | None = None

    def __init__(self, act, in_ch, out_ch, temb_dim, dropout, skip_rescale, init_scale, norm):
        super().__init__()
        self.act = act
        self.skip_rescale = skip_rescale
        self.resample = nn.Identity()
        self.GroupNorm_0 = norm(in_ch)
        self.Conv_0 = ddpm_conv3x3(in_ch, out_ch)
        self.Dense_0 = None if temb_dim is None else dense(temb_dim, out_ch)
        self.GroupNorm_1 = norm(out_ch)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = ddpm_conv3x3(out_ch, out_ch, init_scale=init_scale)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.Conv_0(self.resample(self.act(self.GroupNorm_0(x))))
        if self.Dense_0 is not None and temb is not None:
            h = h + self.Dense_0(self.act(temb))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(self.act(self.GroupNorm_1(h))))
        x = self.resample(x)
        if self.shortcut is not None:
            x = getattr(self, self.shortcut)(x)
        return residual_sum(x, h, self.skip_rescale)


class ResnetBlockDDPMpp(_ResnetBlock):
    """Residual block of DDPM.

    Args:
        act: activation.
        in_ch, out_ch: channels; out_ch is in_ch by default.
        temb_dim: size of the embedded noise level; None for a block that is not told it.
        conv_shortcut: 3x3 rather than 1x1 convolution where the number of channels changes.
        dropout: probability.
        skip_rescale: divide the sum by sqrt(2).
        init_scale: initial scale of the last convolution.
        norm: makes the normalisation for a number of channels.
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
    """Residual block of BigGAN, which may change the resolution by 2 on the way.

    Args:
        up, down: change of resolution, if any.
        fir: change it with the filter `fir_kernel`, otherwise in the naive way.
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
        super().__init__(act, in_ch, out_ch, temb_dim, dropout, skip_rescale, init_scale, norm)
        if up or down:
            self.resample = resampler(up=up, k=fir_kernel if fir else None)
        if in_ch != out_ch or up or down:
            self.shortcut, self.Conv_2 = "Conv_2", ddpm_conv1x1(in_ch, out_ch)
