"""Small layers and choices that all networks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


def choose(key: str, name: str, options: Mapping[str, T]) -> T:
    """What a name in the config stands for.

    Raises:
        ValueError: no such option; the message lists the known ones.
    """
    if name not in options:
        raise ValueError(f"{key} is {name!r}, but it must be one of {sorted(options)}")
    return options[name]


def get_act(config) -> nn.Module:
    """The activation that `model.nonlinearity` names: elu, relu, lrelu (slope 0.2) or swish.

    Raises:
        ValueError: no such activation.
    """
    options = {
        "elu": nn.ELU,
        "relu": nn.ReLU,
        "lrelu": lambda: nn.LeakyReLU(negative_slope=0.2),
        "swish": nn.SiLU,
    }
    return choose("model.nonlinearity", config.model.nonlinearity.lower(), options)()


def default_init(scale: float = 1.0) -> Callable[[Sequence[int]], Tensor]:
    """Initial weights of the U-Nets: uniform, with variance scale / average of fan-in and fan-out.

    Args:
        scale: 0 stands for 1e-10, so that a residual branch starts as almost nothing but still
            receives a gradient.
    Returns:
        Function of a shape (out, in, *kernel) that draws a tensor.
    """
    scale = scale or 1e-10

    def init(shape: Sequence[int], dtype: torch.dtype | None = None, device=None) -> Tensor:
        fan = (shape[0] + shape[1]) / 2 * math.prod(shape[2:])
        bound = math.sqrt(3 * scale / fan)
        return torch.empty(tuple(shape), dtype=dtype, device=device).uniform_(-bound, bound)

    return init


def _initialize(layer: nn.Linear | nn.Conv2d, init_scale: float) -> nn.Linear | nn.Conv2d:
    layer.weight.data = default_init(init_scale)(layer.weight.shape)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def dense(in_dim: int, out_dim: int) -> nn.Linear:
    """Affine map with the initial weights of the U-Nets."""
    return _initialize(nn.Linear(in_dim, out_dim), init_scale=1.0)


def ddpm_conv1x1(
    in_planes: int,
    out_planes: int,
    stride: int = 1,
    bias: bool = True,
    init_scale: float = 1.0,
    padding: int = 0,
) -> nn.Conv2d:
    """1x1 convolution with the initial weights of the U-Nets."""
    conv = nn.Conv2d(in_planes, out_planes, 1, stride=stride, padding=padding, bias=bias)
    return _initialize(conv, init_scale)


def ddpm_conv3x3(
    in_planes: int,
    out_planes: int,
    stride: int = 1,
    bias: bool = True,
    dilation: int = 1,
    init_scale: float = 1.0,
    padding: int = 1,
) -> nn.Conv2d:
    """3x3 convolution with the initial weights of the U-Nets."""
    conv = nn.Conv2d(
        in_planes, out_planes, 3, stride=stride, padding=padding, dilation=dilation, bias=bias
    )
    return _initialize(conv, init_scale)


def ncsn_conv1x1(
    in_planes: int,
    out_planes: int,
    stride: int = 1,
    bias: bool = True,
    dilation: int = 1,
    init_scale: float = 1.0,
    padding: int = 0,
) -> nn.Conv2d:
    """1x1 convolution with PyTorch's initial weights and bias, times `init_scale`."""
    return _ncsn_conv(1, in_planes, out_planes, stride, bias, dilation, init_scale, padding)


def ncsn_conv3x3(
    in_planes: int,
    out_planes: int,
    stride: int = 1,
    bias: bool = True,
    dilation: int = 1,
    init_scale: float = 1.0,
    padding: int = 1,
) -> nn.Conv2d:
    """3x3 convolution with PyTorch's initial weights and bias, times `init_scale`."""
    return _ncsn_conv(3, in_planes, out_planes, stride, bias, dilation, init_scale, padding)


def _ncsn_conv(kernel, in_planes, out_planes, stride, bias, dilation, init_scale, padding):
    conv = nn.Conv2d(
        in_planes, out_planes, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias
    )
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(init_scale or 1e-10)
    return conv


class NIN(nn.Module):
    """Network in network: the same affine map at every pixel, `W` (in, out) and `b` (out,)."""

    def __init__(self, in_dim: int, num_units: int, init_scale: float = 0.1):
        super().__init__()
        self.W = nn.Parameter(default_init(init_scale)((in_dim, num_units)))
        self.b = nn.Parameter(torch.zeros(num_units))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)

    def on_tokens(self, tokens: Tensor) -> Tensor:
        """(..., in) -> (..., out): the same map where channels come last."""
        return F.linear(tokens, self.W.t(), self.b)


def get_timestep_embedding(
    timesteps: Tensor, embedding_dim: int, max_positions: int = 10000
) -> Tensor:
    """Sines and cosines of t at frequencies from 1 down to 1 / max_positions.  [Ho et al. 2020]

    Args:
        timesteps: (B,), whole or fractional steps.
        embedding_dim: an odd one is filled up with a zero.
    Returns:
        (B, embedding_dim), at least float32.
    Raises:
        ValueError: timesteps are not (B,).
    """
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps must be (B,), not of shape {tuple(timesteps.shape)}")
    timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
    half = embedding_dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(steps * -(math.log(max_positions) / max(half - 1, 1)))
    angles = timesteps[:, None] * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if embedding_dim % 2 else embedding


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What layers compute in on the device of x: autocast's dtype, or that of x where it is off."""
    return torch.get_autocast_dtype(x.device.type) if _autocast_is_on(x) else x.dtype


def in_full_precision(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fn(x), computed outside of autocast and then at least in float32.

    For what is cheap but must be exact: bfloat16 has 8 bits, so that an image in [-1, 1] rounded to
    it is off by up to a tenth of the smallest noise that a network has to see.
    """
    if not _autocast_is_on(x):
        return fn(x)
    with torch.autocast(x.device.type, enabled=False):
        return fn(x.to(torch.promote_types(x.dtype, torch.float32)))


def _autocast_is_on(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_input(x: Tensor, labels: Tensor, channels: int) -> None:
    """Refuse what a network cannot take.

    Raises:
        ValueError: x is not (B, channels, H, W) or labels are not (B,).
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"the network takes images (B, {channels}, H, W), as data.num_channels = {channels} "
            f"says, but was given shape {tuple(x.shape)}"
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"the network takes one label per image, ({x.shape[0]},), "
            f"but was given labels of shape {tuple(labels.shape)}"
        )
