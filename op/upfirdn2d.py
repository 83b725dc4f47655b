"""Upsample, filter, downsample: the one operation behind all resampling with an FIR filter."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upfirdn2d(
    input: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    """Insert zeros, pad, convolve with an FIR filter and keep every `down`-th pixel.

    Both axes are treated alike and every channel by itself.  Differentiable to any order in both
    tensors.

    Args:
        input: images, (B, C, H, W).
        kernel: filter, (h, w); applied as a convolution, that is, flipped.
        up: up - 1 zeros follow each pixel.
        down: step between the pixels that are kept.
        pad: zeros before the first and after the last pixel of the upsampled image; a negative
            number crops instead.
    Returns:
        (B, C, H', W') with H' = (H up + pad[0] + pad[1] - h) // down + 1, in the dtype of `input`.
    Raises:
        ValueError: a shape, a factor or the padding makes no sense, or nothing would be left.
    """
    _check(input, kernel, up, down, pad)
    if up == 1:
        return _filter_and_decimate(input, kernel.to(input.dtype), down, pad)
    return _interpolate(input, kernel.to(input.dtype), up, pad)[..., ::down, ::down]


def _check(input: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> None:
    if input.dim() != 4 or kernel.dim() != 2:
        raise ValueError(
            "upfirdn2d takes images (B, C, H, W) and a kernel (h, w), not shapes "
            f"{tuple(input.shape)} and {tuple(kernel.shape)}"
        )
    if up < 1 or down < 1 or len(pad) != 2:
        raise ValueError(
            "upfirdn2d takes factors of at least 1 and two paddings (before, after), "
            f"not up={up}, down={down}, pad={pad}"
        )
    for size, taps in zip(input.shape[2:], kernel.shape, strict=True):
        if size * up + sum(pad) < taps:
            raise ValueError(
                f"upfirdn2d: {taps} taps do not fit an axis of {size} * {up} + {sum(pad)} pixels"
            )


def _filter_and_decimate(x: Tensor, kernel: Tensor, down: int, pad: tuple[int, int]) -> Tensor:
    # The convolution pads both sides alike; what remains of an uneven padding is put on before.
    even = max(0, min(pad))
    x = _extend(x, [side - even for side in (*pad, *pad)])
    weight = _depthwise(kernel.flip(0, 1), x.shape[1])
    return F.conv2d(x, weight, stride=down, padding=even, groups=x.shape[1])


def _interpolate(x: Tensor, kernel: Tensor, up: int, pad: tuple[int, int]) -> Tensor:
    """Zero insertion and filtering as one transposed convolution.

    That yields every position where filter and image overlap; the paddings tell how many of them
    to drop on each side (or, if negative, how many zeros to add).
    """
    crop = [
        edge for taps in reversed(kernel.shape) for edge in (taps - 1 - pad[0], taps - up - pad[1])
    ]
    even = max(0, min(crop))
    weight = _depthwise(kernel, x.shape[1])
    x = F.conv_transpose2d(x, weight, stride=up, padding=even, groups=x.shape[1])
    return _extend(x, [even - edge for edge in crop])


def _extend(x: Tensor, sides: list[int]) -> Tensor:
    return F.pad(x, sides) if any(sides) else x


def _depthwise(kernel: Tensor, channels: int) -> Tensor:
    return kernel.expand(channels, 1, *kernel.shape)
