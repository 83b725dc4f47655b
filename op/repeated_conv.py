"""A convolution of images whose pixels are repeated, without making those images, on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host


def repeated_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution, of stride 1 and with zeros around, of x with every pixel twice along a side.

    Repeated pixels share products: of n^2 taps for each pixel of the result, ((n + 1) / 2)^2 are
    left, with n = 3 four of nine.

    Args:
        x: (B, C, H, W).
        weight: (C', C, n, n) with odd n.
        bias: (C',).
    Returns:
        (B, C', 2H, 2W).
    """
    if not host.is_chosen(x):
        return F.conv2d(repeated(x), weight, bias, padding=weight.shape[-1] // 2)
    if weight.shape[-1] == 1:
        return repeated(F.conv2d(x, weight, bias))
    return F.conv_transpose2d(x, shared(weight), bias, stride=2, padding=weight.shape[-1] // 2)


def repeated(x: Tensor) -> Tensor:
    """Every pixel twice along each side: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def shared(weight: Tensor) -> Tensor:
    """Weights (C, C', n + 1, n + 1) of the transposed convolution that does both steps.

    A pixel spreads over two along each side, and from each of them over n, the wrong way round.
    """
    n = weight.shape[-1]
    spread = torch.eye(n + 1, n, dtype=weight.dtype, device=weight.device)
    spread = spread + spread.roll(1, 0)  # of tap i over i and i + 1
    return torch.einsum("ai, bj, ocij -> coab", spread, spread, weight.flip(2, 3))
