"""Small layers, and functions that all networks share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from op import repeated_conv
from score_lib.base.tensors import batch_mul

T = TypeVar("T")

# Of kinds of devices.  Asked here: not every version of `torch.compile` can trace the question.
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


def choose(option: str, name: object, choices: Mapping[object, T]) -> T:
    """The choice that an option names: as written or, failing that, in any case.

    Raises:
        ValueError: no such choice; the message lists the known ones.
    """
    if name not in choices:
        same = [key for key in choices if str(key).lower() == str(name).lower()]
        if not same:
            raise ValueError(f"{option} is {name!r}, but it must be one of {sorted(choices)}")
        name = same[0]
    return choices[name]


def get_act(config) -> nn.Module:
    """The activation that `model.nonlinearity` names: elu, relu, lrelu (slope 0.2) or swish.

    Raises:
        ValueError: no such activation.
    """
    choices = {
        "elu": nn.ELU,
        "relu": nn.ReLU,
        "lrelu": lambda: nn.LeakyReLU(negative_slope=0.2),
        "swish": nn.SiLU,
    }
    return choose("model.nonlinearity", config.model.nonlinearity, choices)()


def variance_scaling(
    scale: float,
    mode: str,
    distribution: str,
    in_axis: int = 1,
    out_axis: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Callable[..., Tensor]:
    """Initial weights of variance scale / fan.

    Args:
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "normal" or "uniform".
        in_axis, out_axis: axes of the channels.
    Returns:
        `init(shape, dtype=dtype, device=device)`.
    Raises:
        ValueError: an unknown mode or distribution.
    """
    fan = choose(
        "mode", mode, {"fan_in": lambda i, o: i, "fan_out": lambda i, o: o, "fan_avg": _mean}
    )
    draw = choose("distribution", distribution, {"normal": _normal, "uniform": _uniform})

    def init(shape: Sequence[int], dtype=dtype, device=device) -> Tensor:
        channels_in, channels_out = shape[in_axis], shape[out_axis]
        pixels = math.prod(shape) // (channels_in * channels_out)
        weights = torch.empty(tuple(shape), dtype=dtype, device=device)
        return draw(weights, scale, fan(channels_in, channels_out) * pixels)

    return init


def _mean(a: float, b: float) -> float:
    return (a + b) / 2


def _normal(weights: Tensor, scale: float, fan: float) -> Tensor:
    return weights.normal_(std=math.sqrt(scale / fan))


def _uniform(weights: Tensor, scale: float, fan: float) -> Tensor:
    bound = math.sqrt(3 * scale / fan)
    return weights.uniform_(-bound, bound)


def default_init(scale: float = 1.0) -> Callable[[Sequence[int]], Tensor]:
    """Initial weights of the U-Nets: uniform, with variance scale / average of fan-in and fan-out.

    Args:
        scale: 0 stands for 1e-10, so that a residual branch starts near 0 but has a gradient.
    Returns:
        Function of a shape (out, in, *kernel) that draws a tensor.
    """
    return variance_scaling(scale or 1e-10, "fan_avg", "uniform")


def _initialize(layer: nn.Linear | nn.Conv2d, init_scale: float) -> nn.Linear | nn.Conv2d:
    layer.weight.data = default_init(init_scale)(layer.weight.shape)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def dense(in_dim: int, out_dim: int) -> nn.Linear:
    """Affine map with the initial weights of the U-Nets."""
    return _initialize(nn.Linear(in_dim, out_dim), init_scale=1.0)


def _scale(layer: nn.Conv2d, init_scale: float) -> nn.Conv2d:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(init_scale or 1e-10)
    return layer


class RepeatedConv2d(nn.Conv2d):
    """Convolution of an image whose pixels are repeated, with zeros that keep its sides.

    Raises:
        ValueError: a stride, a dilation, groups, or another padding or kernel than that.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        given = (*self.stride, *self.dilation, self.groups, self.padding, self.padding_mode)
        side, width = self.kernel_size
        if given != (1, 1, 1, 1, 1, (side // 2,) * 2, "zeros") or side != width or side % 2 == 0:
            raise ValueError(
                "a convolution of repeated pixels has an odd square kernel, stride, dilation and "
                f"groups of 1, and zeros around that keep the sides, unlike {self}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        return repeated_conv(x, self.weight, self.bias)


def _conv_factory(
    kernel: int,
    initialize: Callable[[nn.Conv2d, float], nn.Conv2d],
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> Callable[..., nn.Conv2d]:
    def conv(
        in_planes: int,
        out_planes: int,
        stride: int = 1,
        bias: bool = True,
        dilation: int = 1,
        init_scale: float = 1.0,
        padding: int = kernel // 2,
    ) -> nn.Conv2d:
        layer = kind(in_planes, out_planes, kernel, stride, padding, dilation, bias=bias)
        return initialize(layer, init_scale)

    return conv


# Convolutions with the initial weights of the U-Nets, and with PyTorch's times `init_scale`.
ddpm_conv3x3 = _conv_factory(3, _initialize)
repeated_conv1x1 = _conv_factory(1, _initialize, RepeatedConv2d)
repeated_conv3x3 = _conv_factory(3, _initialize, RepeatedConv2d)
ncsn_conv1x1 = _conv_factory(1, _scale)
ncsn_conv3x3 = _conv_factory(3, _scale)


def ddpm_conv1x1(in_planes, out_planes, stride=1, bias=True, init_scale=1.0, padding=0):
    """1x1 convolution with the initial weights of the U-Nets."""
    return _conv_factory(1, _initialize)(
        in_planes, out_planes, stride, bias, 1, init_scale, padding
    )


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
    timesteps: Tensor, embedding_dim: int, max_positions: float = 10000, *, shift: float = 1
) -> Tensor:
    """Sines and cosines of t at frequencies from 1 down to 1 / max_positions.  [Ho et al. 2020]

    Args:
        timesteps: (B,), whole or fractional steps.
        embedding_dim: an odd one is filled up with a zero.
        shift: frequency k of n is max_positions^(-k / (n - shift)); with 0 the last of them is
            above 1 / max_positions.
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
    frequencies = torch.exp(steps * -(math.log(max_positions) / max(half - shift, 1)))
    angles = timesteps[:, None] * frequencies
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return F.pad(embedding, (0, 1)) if embedding_dim % 2 else embedding


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of features: autocast's on the device of x, or that of x where it is off."""
    return torch.get_autocast_dtype(x.device.type) if _autocast_is_on(x) else x.dtype


def in_full_precision(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fn(x), computed without autocast and, under autocast, at least in float32.

    For cheap layers that must be exact: rounding an image in [-1, 1] to the 8 bits of bfloat16
    changes it by up to a tenth of the smallest noise level.
    """
    if not _autocast_is_on(x):
        return fn(x)
    with torch.autocast(x.device.type, enabled=False):
        return fn(x.to(torch.promote_types(x.dtype, torch.float32)))


def _autocast_is_on(x: Tensor) -> bool:
    device = x.device.type
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


def check_input(x: Tensor, labels: Tensor, channels: int) -> None:
    """Check the shapes of a network's arguments.

    Raises:
        ValueError: x is not (B, channels, H, W) or labels are not (B,).
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"the network takes images (B, {channels}, H, W), as data.num_channels = {channels} "
            f"says, but was given shape {tuple(x.shape)}"
        )
    check_labels(x, labels, "image")


def check_labels(x: Tensor, labels: Tensor, datum: str = "datum") -> None:
    """Check that there is one label per datum, which messages may name.

    Raises:
        ValueError: labels are not (B,).
    """
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"the network takes one label per {datum}, ({x.shape[0]},), "
            f"but was given labels of shape {tuple(labels.shape)}"
        )


def check_fixed(model: Mapping[str, object], values: Mapping[str, object], hint: str = "") -> None:
    """Refuse options of which a network has only one value, if another one is set.

    Args:
        model: the section of a config.
        values: the only values by name.
        hint: end of the message.
    Raises:
        ValueError: another value is set.
    """
    for name, value in values.items():
        if name in model and model[name] != value:
            raise ValueError(
                f"model.{name} = {model[name]!r} should be {value!r}, the only value for the "
                f"network {model['name']!r}{hint}"
            )


def divided_by_sigma(h: Tensor, labels: Tensor, sigmas: Tensor | None) -> Tensor:
    """A network's output (B, *D) divided by the noise level.

    Args:
        labels: (B,), noise levels, or steps, whose whole parts index `sigmas` if those are given.
        sigmas: (num_scales,).
    Raises:
        ValueError: a step that `sigmas` does not have; on a GPU PyTorch's own error.
    """
    return batch_mul((1 / _levels(labels, sigmas)).to(h.dtype), h)


def _levels(labels: Tensor, sigmas: Tensor | None) -> Tensor:
    if sigmas is None:
        return labels
    try:  # unlike brackets, `index_select` does not count steps below 0 from the end
        return sigmas.index_select(0, labels.long())
    except IndexError as error:
        raise ValueError(
            f"the network's output is divided by one of {len(sigmas)} noise levels, which labels "
            f"from 0 to {len(sigmas) - 1} name, but the labels given go from {labels.min():g} to "
            f"{labels.max():g}"
        ) from error


def check_classes(count: int) -> int:
    """The number of a classifier's classes, `data.num_classes`.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(
            f"data.num_classes is {count}, but a classifier needs at least two classes: "
            "set it to the number of classes in the data"
        )
    return count


def __getattr__(name: str) -> object:
    """The blocks that the published module of this name has; they are made of the layers above."""
    if name.startswith("_"):
        raise AttributeError(name)
    from . import published_layers

    found = vars(published_layers).get(name)
    if getattr(found, "__module__", None) != published_layers.__name__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def channels_last(x: Tensor) -> Tensor:
    """A copy of x (B, C, H, W) whose channels are neighbours in memory, also where there is one."""
    count, channels, height, width = x.shape
    strides = (channels * height * width, 1, channels * width, channels)
    like = {"dtype": x.dtype, "device": x.device}
    return torch.empty_strided((count, channels, height, width), strides, **like).copy_(x)


def are_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, H, W) are neighbours in memory, as by `channels_last`."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1]
