"""The blocks of the published `models.layers`, by its names and signatures; reached through it.

They are the blocks of the networks here, with the same names of weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from . import layerspp, ncsnv2
from .normalization import ConditionalInstanceNorm2dPlus, group_norm_32


class AttnBlock(layerspp.AttnBlockpp):
    """Self-attention of DDPM."""

    def __init__(self, channels: int):
        super().__init__(channels, norm=group_norm_32)


class ResnetBlockDDPM(layerspp.ResnetBlockDDPMpp):
    """Residual block of DDPM."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        in_ch: int,
        out_ch: int | None = None,
        temb_dim: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__(act, in_ch, out_ch, temb_dim, conv_shortcut, dropout, norm=group_norm_32)


class Upsample(layerspp.Upsample):
    """Doubles the resolution."""

    def __init__(self, channels: int, with_conv: bool = False):
        super().__init__(channels, with_conv=with_conv)


class Downsample(layerspp.Downsample):
    """Halves the resolution."""

    def __init__(self, channels: int, with_conv: bool = False):
        super().__init__(channels, with_conv=with_conv)


class ConditionalResidualBlock(ncsnv2.ResidualBlock):
    """Residual block of NCSN, whose normalisation depends on the noise index: `block(x, y)`.

    Args:
        resample: "down" for the next scale, by dilation or, where that is None, by pooling.
        normalization: function of the numbers of channels and of noise indices.
    Raises:
        ValueError: a block that none of the networks has.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_classes: int,
        resample: str | None = None,
        act: nn.Module = nn.ELU(),  # noqa: B008  (without a state)
        normalization: Callable[..., nn.Module] = ConditionalInstanceNorm2dPlus,
        adjust_padding: bool = False,
        dilation: int | None = None,
    ):
        coarser = _goes_down(input_dim, output_dim, resample, adjust_padding)
        norm = partial(normalization, num_classes=num_classes)
        super().__init__(act, norm, input_dim, output_dim, dilation or 1, coarser)


class ResidualBlock(ncsnv2.ResidualBlock):
    """Residual block of NCSNv2: `block(x)`.

    Args:
        normalization: function of the number of channels.
        others: see `ConditionalResidualBlock`.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        resample: str | None = None,
        act: nn.Module = nn.ELU(),  # noqa: B008  (without a state)
        normalization: Callable[[int], nn.Module] = nn.InstanceNorm2d,
        adjust_padding: bool = False,
        dilation: int | None = 1,
    ):
        coarser = _goes_down(input_dim, output_dim, resample, adjust_padding)
        super().__init__(act, normalization, input_dim, output_dim, dilation or 1, coarser)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        h = self.conv1(self.act(self.normalize1(x)))
        return self.shortcut(x) + self.conv2(self.act(self.normalize2(h)))


def _goes_down(input_dim: int, output_dim: int, resample: object, adjust_padding: bool) -> bool:
    """Whether a block leads to the next scale.

    Raises:
        ValueError: a block that none of the networks has.
    """
    if resample not in (None, "down") or adjust_padding:
        raise ValueError(
            f"resample = {resample!r} and adjust_padding = {adjust_padding} should be None or "
            "'down', and False"
        )
    if resample is None and input_dim != output_dim:
        raise ValueError(
            f"a block from {input_dim} to {output_dim} channels needs resample = 'down'; without "
            "it, their numbers are equal"
        )
    return resample == "down"


class CondRefineBlock(ncsnv2.RefineBlock):
    """Refinement block of NCSN: `block(xs, y, output_shape)`.

    Args:
        in_planes: channels of the features, finest first.
        features: channels of the result.
        normalizer: function of the numbers of channels and of noise indices.
        start, end: the block of the coarsest, and of the finest features.
    Raises:
        ValueError: `start` with more than one scale, or one scale without it.
    """

    def __init__(
        self,
        in_planes: Sequence[int],
        features: int,
        num_classes: int,
        normalizer: Callable[..., nn.Module],
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
        start: bool = False,
        end: bool = False,
    ):
        _check_start(in_planes, start)
        norm = partial(normalizer, num_classes=num_classes)
        super().__init__(act, norm, _pool(nn.AvgPool2d), _resize, in_planes, features, end)

    def forward(self, xs: Sequence[Tensor], y: Tensor, output_shape: Sequence[int]) -> Tensor:
        """xs [(B, C, H, W), coarser ...], y (B,) noise indices -> (B, C', *output_shape)."""
        _check_shape(xs, output_shape)
        return super().forward(xs, y)


class RefineBlock(ncsnv2.RefineBlock):
    """Refinement block of NCSNv2: `block(xs, output_shape)`.

    Args:
        maxpool: pool by maxima, else by averages.
        others: see `CondRefineBlock`.
    """

    def __init__(
        self,
        in_planes: Sequence[int],
        features: int,
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
        start: bool = False,
        end: bool = False,
        maxpool: bool = True,
    ):
        _check_start(in_planes, start)
        pool = _pool(nn.MaxPool2d if maxpool else nn.AvgPool2d)
        super().__init__(act, ncsnv2.NoNorm, pool, _resize, in_planes, features, end)

    def forward(self, xs: Sequence[Tensor], output_shape: Sequence[int]) -> Tensor:
        """xs [(B, C, H, W), coarser ...] -> (B, C', *output_shape)."""
        _check_shape(xs, output_shape)
        return super().forward(xs, None)


class CondCRPBlock(ncsnv2.ChainedPooling):
    """Chained pooling of NCSN: `block(x, y)`; others: see `CondRCUBlock`."""

    def __init__(
        self,
        features: int,
        n_stages: int,
        num_classes: int,
        normalizer: Callable[..., nn.Module],
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
    ):
        _check_stages(n_stages)
        norm = partial(normalizer, num_classes=num_classes)
        super().__init__(act, norm, features, _pool(nn.AvgPool2d))


class CRPBlock(ncsnv2.ChainedPooling):
    """Chained pooling of NCSNv2: `block(x)`; others: see `RefineBlock` and `CondRCUBlock`."""

    def __init__(
        self,
        features: int,
        n_stages: int,
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
        maxpool: bool = True,
    ):
        _check_stages(n_stages)
        pool = _pool(nn.MaxPool2d if maxpool else nn.AvgPool2d)
        super().__init__(act, ncsnv2.NoNorm, features, pool)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x, None)


class CondRCUBlock(ncsnv2.ResidualConvUnits):
    """A row of residual blocks of NCSN: `block(x, y)`.

    Args:
        n_stages: convolutions of each of them, 2; others: see `CondRefineBlock`.
    Raises:
        ValueError: another number of them.
    """

    def __init__(
        self,
        features: int,
        n_blocks: int,
        n_stages: int,
        num_classes: int,
        normalizer: Callable[..., nn.Module],
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
    ):
        _check_stages(n_stages)
        super().__init__(act, partial(normalizer, num_classes=num_classes), features, n_blocks)


class RCUBlock(ncsnv2.ResidualConvUnits):
    """A row of residual blocks of NCSNv2: `block(x)`; others: see `CondRCUBlock`."""

    def __init__(
        self,
        features: int,
        n_blocks: int,
        n_stages: int,
        act: nn.Module = nn.ReLU(),  # noqa: B008  (without a state)
    ):
        _check_stages(n_stages)
        super().__init__(act, ncsnv2.NoNorm, features, n_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x, None)


class CondMSFBlock(ncsnv2.MultiScaleFusion):
    """Fusion of several scales of NCSN: `block(xs, y, shape)`; others: see `CondRefineBlock`."""

    def __init__(
        self,
        in_planes: Sequence[int],
        features: int,
        num_classes: int,
        normalizer: Callable[..., nn.Module],
    ):
        norm = partial(normalizer, num_classes=num_classes)
        super().__init__(norm, in_planes, features, _resize)

    def forward(self, xs: Sequence[Tensor], y: Tensor, shape: Sequence[int]) -> Tensor:
        """xs [(B, C, H, W), coarser ...], y (B,) noise indices -> (B, C', *shape)."""
        _check_shape(xs, shape)
        return super().forward(xs, y)


class MSFBlock(ncsnv2.MultiScaleFusion):
    """Fusion of several scales of NCSNv2: `block(xs, shape)`; others: see `CondRefineBlock`."""

    def __init__(self, in_planes: Sequence[int], features: int):
        super().__init__(ncsnv2.NoNorm, in_planes, features, _resize)

    def forward(self, xs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """xs [(B, C, H, W), coarser ...] -> (B, C', *shape)."""
        _check_shape(xs, shape)
        return super().forward(xs, None)


def _pool(kind: Callable[..., nn.Module]) -> nn.Module:
    return kind(5, stride=1, padding=2)


_resize = partial(F.interpolate, mode="bilinear", align_corners=True)


def _check_stages(n_stages: int) -> None:
    if n_stages != 2:
        raise ValueError(f"n_stages = {n_stages} should be 2, as in the networks")


def _check_start(in_planes: Sequence[int], start: bool) -> None:
    if start != (len(in_planes) == 1):
        raise ValueError(
            f"start = {start} with in_planes = {tuple(in_planes)}: the first refinement block has "
            "one scale, and the others have more"
        )


def _check_shape(xs: Sequence[Tensor], output_shape: Sequence[int]) -> None:
    if tuple(output_shape) != tuple(xs[0].shape[2:]):
        raise ValueError(
            f"output_shape = {tuple(output_shape)} should be that of the finest features, "
            f"{tuple(xs[0].shape[2:])}"
        )
