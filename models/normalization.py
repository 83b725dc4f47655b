"""Normalisation layers by name; those of NCSN can depend on the noise level.

All are called as `norm(x, y)` with x (B, C, H, W) and noise indices y (B,); unconditional ones
ignore y.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from op import group_norm_silu
from op.group_norm_silu import has_kernel

from .group_normalization import group_normalized
from .layers import choose

EPS = 1e-5


def get_normalization(config, conditional: bool = False) -> Callable[..., nn.Module]:
    """The layer that `model.normalization` names.

    Args:
        conditional: scales and shifts depend on the noise index, below `model.num_scales`.
    Returns:
        Function of the number of channels; for "GroupNorm", `torch.nn.GroupNorm`, a function of
        the numbers of groups and channels.
    Raises:
        ValueError: no such layer.
    """
    name = config.model.normalization
    if not conditional:
        plain = {
            "InstanceNorm": InstanceNorm2d,
            "InstanceNorm++": InstanceNorm2dPlus,
            "VarianceNorm": VarianceNorm2d,
            "GroupNorm": nn.GroupNorm,
        }
        return choose("model.normalization", name, plain)
    conditioned = {
        "InstanceNorm": ConditionalInstanceNorm2d,
        "InstanceNorm++": ConditionalInstanceNorm2dPlus,
        "VarianceNorm": ConditionalVarianceNorm2d,
    }
    layer = choose("model.normalization (conditional)", name, conditioned)
    return functools.partial(layer, num_classes=config.model.num_scales)


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose output has the dtype of its input, also under autocast.

    Statistics are float32.  Autocast would also make the output float32, which takes twice the
    memory up to the next convolution.  On a CPU it is fast where channels come last, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S), in the dtype of x."""
        return group_normalized(x, self.num_groups, self.weight, self.bias, self.eps)


def activated(
    act: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor, shift: Tensor | None = None
) -> Tensor:
    """act(norm(x + shift)), in one step where `op` has a kernel for it and no hook sees the layers.

    Args:
        x: (B, C, H, W).
        shift: (B, C), the same for all pixels.
    """
    are_known = type(act) is nn.SiLU and type(norm) is GroupNorm
    if are_known and has_kernel(x, norm.weight, norm.bias) and not has_hooks(act, norm):
        return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift)
    return act(norm(x if shift is None else x + shift[:, :, None, None]))


def has_hooks(*layers: nn.Module) -> bool:
    """Whether a hook waits for a call of one of the layers, or of all layers."""
    kinds = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    own = any(getattr(layer, kind) for layer in layers for kind in kinds)
    return own or nn.modules.module._has_any_global_hook()


def group_norm(channels: int, eps: float = 1e-6) -> GroupNorm:
    """Group normalisation of NCSN++: min(C // 4, 32) groups, or the next fewer that divide C."""
    groups = max(1, min(channels // 4, 32))
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps)


def group_norm_32(channels: int, eps: float = 1e-6) -> GroupNorm:
    """Group normalisation of DDPM: 32 groups or, where they do not divide C, those of NCSN++."""
    return group_norm(channels, eps) if channels % 32 else GroupNorm(32, channels, eps)


def group_norm_of(channels: int, groups: int, eps: float = 1e-6) -> GroupNorm:
    """Group normalisation with some number of groups.

    Raises:
        ValueError: they do not divide the channels.
    """
    if channels % groups:
        raise ValueError(
            f"model.norm_groups = {groups} should divide the number of channels of each layer, "
            f"but one has {channels}: choose another number, or 0 for as many as published"
        )
    return GroupNorm(groups, channels, eps)


class InstanceNorm2d(nn.Module):
    """Each channel of each image with mean 0 and variance 1."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); y is ignored."""
        return _instance_norm(x)


class InstanceNorm2dPlus(nn.Module):
    """InstanceNorm++: instance normalisation, shifted by the normalised means of the channels.

    Instance normalisation alone removes those means, and with them the overall intensity.
    """

    def __init__(self, num_features: int):
        super().__init__()
        _need_two_channels(num_features)
        self.alpha = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); y is ignored."""
        return _instance_norm_plus(x, self.gamma, self.alpha, self.beta)


class VarianceNorm2d(nn.Module):
    """Each channel of each image divided by its standard deviation; the mean stays."""

    def __init__(self, num_features: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); y is ignored."""
        return _variance_norm(x, self.alpha)


class _Conditional(nn.Module):
    """Scales around 1 and a shift that starts at 0, for each channel and noise level."""

    scales: int
    has_shift: bool

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.parts = self.scales + self.has_shift
        self.embed = nn.Embedding(num_classes, self.parts * num_features)
        with torch.no_grad():
            self.embed.weight[:, : self.scales * num_features].normal_(1, 0.02)
            self.embed.weight[:, self.scales * num_features :].zero_()

    def coefficients(self, y: Tensor) -> tuple[Tensor, ...]:
        """Noise indices (B,) -> each part (B, C)."""
        return self.embed(y.long()).chunk(self.parts, dim=1)


class ConditionalInstanceNorm2d(_Conditional):
    """Instance normalisation, scaled and shifted according to the noise level."""

    scales, has_shift = 1, True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C, H, W)."""
        gamma, beta = self.coefficients(y)
        return _affine(_instance_norm(x), gamma, beta)


class ConditionalInstanceNorm2dPlus(_Conditional):
    """InstanceNorm++ with gamma, alpha and beta (in this order) of the noise level."""

    scales, has_shift = 2, True

    def __init__(self, num_features: int, num_classes: int):
        _need_two_channels(num_features)
        super().__init__(num_features, num_classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C, H, W)."""
        return _instance_norm_plus(x, *self.coefficients(y))


class ConditionalVarianceNorm2d(_Conditional):
    """Variance normalisation with a scale for each noise level."""

    scales, has_shift = 1, False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C, H, W)."""
        return _variance_norm(x, *self.coefficients(y))


# Coefficients are (C,), or (B, C) where they depend on the noise level.  Statistics are at least
# float32, whatever the dtype of the features.


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale[..., None, None] * x + shift[..., None, None]


def _instance_norm(x: Tensor) -> Tensor:
    return F.instance_norm(x.to(_statistics_dtype(x)), eps=EPS).to(x.dtype)


def _instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    means = x.mean(dim=(2, 3), dtype=_statistics_dtype(x))
    variance, mean = torch.var_mean(means, dim=1, keepdim=True)
    means = ((means - mean) / torch.sqrt(variance + EPS)).to(x.dtype)
    h = _instance_norm(x) + (alpha * means)[..., None, None]
    return _affine(h, gamma, beta)


def _variance_norm(x: Tensor, scale: Tensor) -> Tensor:
    variance = x.to(_statistics_dtype(x)).var(dim=(2, 3), keepdim=True)
    return scale[..., None, None] * x / torch.sqrt(variance + EPS).to(x.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _need_two_channels(num_features: int) -> None:
    if num_features < 2:
        raise ValueError(
            f"model.nf is {num_features}, but InstanceNorm++ compares channels and needs at least 2"
        )
