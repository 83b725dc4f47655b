"""Bias, leaky ReLU and gain in one step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fused_leaky_relu(
    input: Tensor, bias: Tensor, negative_slope: float = 0.2, scale: float = 2**0.5
) -> Tensor:
    """scale * leaky_relu(input + bias): the default scale keeps the variance of normal input.

    Args:
        input: (B, C, *D).
        bias: one number per channel, (C,).
        negative_slope: factor below zero.
        scale: gain after the activation.
    Raises:
        ValueError: the number of channels differs.
    """
    if input.dim() < 2 or bias.shape != input.shape[1:2]:
        raise ValueError(
            f"fused_leaky_relu takes input (B, C, *D) and a bias (C,), not shapes "
            f"{tuple(input.shape)} and {tuple(bias.shape)}"
        )
    shifted = input + bias.reshape(-1, *(1,) * (input.dim() - 2))
    return F.leaky_relu(shifted, negative_slope) * scale


class FusedLeakyReLU(nn.Module):
    """`fused_leaky_relu` with a trainable bias that starts at zero."""

    def __init__(self, channel: int, negative_slope: float = 0.2, scale: float = 2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel))
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)
