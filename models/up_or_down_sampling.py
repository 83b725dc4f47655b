"""Resampling of images by a whole factor, also fused with a convolution.

A filter `k` is a list of taps (the same for both axes) or a square table of them; None is a box of
`factor` taps.  It is normalised to the sum `gain`.  Padding makes the sides exactly `factor` times
as long, or as short; a filter of even length does not move the image.  Weights `w` of a convolution
are (C', C, n, n) with odd n.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from op import upfirdn2d

from .layers import default_init

Taps = Sequence[float] | Tensor

# A sum of taps of both signs is 0 up to this share of them, or was meant to be.
_ROUNDING = 1e-9


def upsample_2d(x: Tensor, k: Taps | None = None, factor: int = 2, gain: float = 1) -> Tensor:
    """Upsample with a filter: (B, C, H, W) -> (B, C, H factor, W factor)."""
    return _upsample(x, _upsampling_kernel(k, factor, gain).to(x), factor)


def downsample_2d(x: Tensor, k: Taps | None = None, factor: int = 2, gain: float = 1) -> Tensor:
    """Downsample with a filter: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    return _downsample(x, _kernel(k, factor, gain).to(x), factor)


def upsample_conv_2d(
    x: Tensor, w: Tensor, k: Taps | None = None, factor: int = 2, gain: float = 1
) -> Tensor:
    """Insert zeros, convolve, then filter: (B, C, H, W) -> (B, C', H factor, W factor)."""
    return _upsample_conv(x, w, _upsampling_kernel(k, factor, gain).to(x), factor)


def conv_downsample_2d(
    x: Tensor, w: Tensor, k: Taps | None = None, factor: int = 2, gain: float = 1
) -> Tensor:
    """Filter, then convolve in strides: (B, C, H, W) -> (B, C', H / factor, W / factor)."""
    return _conv_downsample(x, w, _kernel(k, factor, gain).to(x), factor)


def naive_upsample_2d(x: Tensor, factor: int = 2) -> Tensor:
    """Repeat every pixel: (B, C, H, W) -> (B, C, H factor, W factor)."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def naive_downsample_2d(x: Tensor, factor: int = 2) -> Tensor:
    """Average over squares of pixels: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    return F.avg_pool2d(x, factor)


class Resample2d(nn.Module):
    """Doubles (`up`) or halves the resolution with a filter."""

    def __init__(self, k: Taps, *, up: bool):
        super().__init__()
        self.up = up
        _register_kernel(self, k, up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'), of twice or half the sides."""
        return _upsample(x, self.kernel) if self.up else _downsample(x, self.kernel)


def resampler(*, up: bool, k: Taps | None) -> nn.Module:
    """Layer that doubles or halves the resolution: filtered, or naively where `k` is None."""
    if k is not None:
        return Resample2d(k, up=up)
    return nn.Upsample(scale_factor=2, mode="nearest") if up else nn.AvgPool2d(2)


class Conv2d(nn.Module):
    """Convolution that can be fused with filtered up- or downsampling by 2.

    Args:
        kernel: size of the convolution, odd.
        up, down: resampling that it is fused with.
        resample_kernel: taps of the filter.
        kernel_init: function from the shape of the weights to initial ones.
    Raises:
        ValueError: an even kernel, or both up and down.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        resample_kernel: Taps = (1, 3, 3, 1),
        use_bias: bool = True,
        kernel_init: Callable[[Sequence[int]], Tensor] | None = None,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0 or (up and down):
            raise ValueError(
                "Conv2d takes an odd kernel and goes up or down, not both: "
                f"given kernel={kernel}, up={up}, down={down}"
            )
        self.up, self.down = up, down
        init = kernel_init or default_init()
        self.weight = nn.Parameter(init((out_ch, in_ch, kernel, kernel)))
        self.bias = nn.Parameter(torch.zeros(out_ch)) if use_bias else None
        if up or down:
            _register_kernel(self, resample_kernel, up)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'), of the same, twice or half the sides."""
        if self.up:
            x = _upsample_conv(x, self.weight, self.kernel)
        elif self.down:
            x = _conv_downsample(x, self.weight, self.kernel)
        else:
            x = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        return x if self.bias is None else x + self.bias[:, None, None]


# Below, kernels are (n, n) tensors that include the gain.


def _kernel(k: Taps | None, factor: int = 2, gain: float = 1) -> Tensor:
    # On the CPU, so that looking at the taps waits for no device.
    taps = torch.as_tensor([1.0] * factor if k is None else k, dtype=torch.float64, device="cpu")
    if taps.dim() == 1:
        taps = torch.outer(taps, taps)
    if taps.dim() != 2 or taps.shape[0] != taps.shape[1] or not taps.numel():
        raise ValueError(
            f"a filter is a list of taps or a square table, not of shape {tuple(taps.shape)}"
        )
    total = taps.sum()
    if not (total.isfinite() and total.abs() > _ROUNDING * taps.abs().sum()):
        raise ValueError(
            "a filter is normalised to its sum: its taps should be finite and not sum to 0, unlike "
            f"{torch.as_tensor(k, device='cpu').tolist()}"
        )
    return taps * (gain / total)


def _upsampling_kernel(k: Taps | None, factor: int = 2, gain: float = 1) -> Tensor:
    # All but one pixel in factor^2 are inserted zeros: the gain makes up for them.
    return _kernel(k, factor, gain * factor**2)


def _upsample(x: Tensor, kernel: Tensor, factor: int = 2) -> Tensor:
    return upfirdn2d(x, kernel, up=factor, pad=_upsampling_pad(kernel, factor))


def _downsample(x: Tensor, kernel: Tensor, factor: int = 2) -> Tensor:
    return upfirdn2d(x, kernel, down=factor, pad=_downsampling_pad(kernel, factor))


def _upsample_conv(x: Tensor, w: Tensor, kernel: Tensor, factor: int = 2) -> Tensor:
    pad = _upsampling_pad(kernel, factor, _side(w))
    # Zero insertion and convolution together are a transposed convolution with the flipped weights.
    flipped = w.flip(2, 3).transpose(0, 1)
    x = F.conv_transpose2d(x, flipped, stride=factor, output_padding=factor - 1)
    return upfirdn2d(x, kernel, pad=pad)


def _conv_downsample(x: Tensor, w: Tensor, kernel: Tensor, factor: int = 2) -> Tensor:
    x = upfirdn2d(x, kernel, pad=_downsampling_pad(kernel, factor, _side(w)))
    return F.conv2d(x, w, stride=factor)


def _register_kernel(layer: nn.Module, k: Taps, up: bool) -> None:
    # A buffer, to move and be copied with the layer; not in the state dict, as the config fixes it.
    kernel = _upsampling_kernel(k) if up else _kernel(k)
    kernel = kernel.to(torch.get_default_device(), torch.get_default_dtype())
    layer.register_buffer("kernel", kernel, persistent=False)


# p zeros in total give the right size.  Of convolutions with n taps, a transposed one adds n - 1
# pixels and a strided one loses n - 1, which the padding corrects.


def _side(w: Tensor) -> int:
    if w.dim() != 4 or w.shape[2] != w.shape[3]:
        raise ValueError(
            f"the weights of a convolution that resamples are (C', C, n, n), not {tuple(w.shape)}"
        )
    return w.shape[3]


def _upsampling_pad(kernel: Tensor, factor: int, taps: int = 1) -> tuple[int, int]:
    p = kernel.shape[0] - factor - (taps - 1)
    return (p + 1) // 2 + factor - 1, p // 2


def _downsampling_pad(kernel: Tensor, factor: int, taps: int = 1) -> tuple[int, int]:
    p = kernel.shape[0] - factor + (taps - 1)
    return (p + 1) // 2, p // 2
