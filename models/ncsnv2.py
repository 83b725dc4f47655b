"""NCSN and NCSNv2: RefineNets.  [Song & Ermon 2019, 2020]

Residual blocks go from fine to coarse: first by pooling, then, to keep the resolution, by dilated
convolutions.  Refinement blocks go back, each joining one scale to the coarser ones.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_lib.base.tensors import image_shape
from score_lib.options import complete

from .layers import (
    autocast_dtype,
    check_input,
    choose,
    divided_by_sigma,
    get_act,
    in_full_precision,
    ncsn_conv1x1,
    ncsn_conv3x3,
)
from .network import Network
from .normalization import get_normalization
from .utils import get_sigmas, labels_index_sigmas, register_model

Norm = Callable[[int], nn.Module]  # from the number of channels to a layer norm(x, y)


class Stage(NamedTuple):
    """One scale of a RefineNet, reached by dilation or, where that is 1, by pooling."""

    down: str  # name of its residual blocks
    up: str  # name of its refinement block
    width: int  # channels, in units of nf
    dilation: int = 1


class RefineNet(Network):
    """Noise-conditional RefineNet: x and the index of its noise level -> the score.

    Raises:
        ValueError: an option is unknown, or the images are too small.
    """

    stages: tuple[Stage, ...]
    conditional = False  # whether normalisation depends on the noise level
    compiles = True  # False where torch.compile miscompiles it

    def __init__(self, config):
        super().__init__()
        config = complete(config)
        model = config.model
        self.channels, height, width = image_shape(config)
        self._check_size(height, width)
        self.centered = config.data.centered
        self.scale_by_sigma = model.scale_by_sigma
        # Published NCSN checkpoints hold no noise levels, those of NCSNv2 do.
        sigmas = torch.tensor(get_sigmas(config))
        self.register_buffer("sigmas", sigmas, persistent=not self.conditional)
        self.uses_sigmas = self.scale_by_sigma or labels_index_sigmas(config)
        self.act = get_act(config)
        norm = self._normalization(config)
        self.begin_conv = ncsn_conv3x3(self.channels, model.nf)
        self.normalizer = norm(model.nf)
        self.end_conv = ncsn_conv3x3(model.nf, self.channels)
        self._add_stages(model.nf, norm, _interpolation(config))

    def _check_size(self, height: int, width: int) -> None:
        halvings = sum(stage.dilation == 1 for stage in self.stages[1:])
        smallest = 2 ** (halvings + 1)
        if min(height, width) < smallest:
            raise ValueError(
                f"data.image_size is {height}x{width}, but this network, which halves images "
                f"{halvings} times, needs at least {smallest}x{smallest}"
            )

    def _normalization(self, config) -> Norm:
        norm = get_normalization(config, self.conditional)
        if norm is nn.GroupNorm:
            raise ValueError(
                "model.normalization is 'GroupNorm', but the NCSN family takes "
                "'InstanceNorm', 'InstanceNorm++' or 'VarianceNorm'"
            )
        return norm

    def _add_stages(self, nf: int, norm: Norm, resize: Callable) -> None:
        block = partial(ResidualBlock, self.act, norm)
        # Only the conditional network normalises on the way back, and it takes another pooling.
        norm = norm if self.conditional else NoNorm
        pool = nn.AvgPool2d if self.conditional else nn.MaxPool2d
        refine = partial(RefineBlock, self.act, norm, pool(5, stride=1, padding=2), resize)
        widths = [nf * stage.width for stage in self.stages]
        for i, stage in enumerate(self.stages):
            first = block(widths[max(i - 1, 0)], widths[i], stage.dilation, coarser=i > 0)
            second = block(widths[i], widths[i], stage.dilation)
            self.add_module(stage.down, nn.ModuleList([first, second]))
        refine_blocks, coarser = {}, []
        for i, stage in reversed(list(enumerate(self.stages))):
            out_ch = widths[max(i - 1, 0)]
            refine_blocks[stage.up] = refine([widths[i], *coarser], out_ch, end=i == 0)
            coarser = [out_ch]
        # Published checkpoints hold them in the order of their names, not of their use.
        for name in sorted(refine_blocks):
            self.add_module(name, refine_blocks[name])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The score of the perturbed data.

        Args:
            x: images in the network's range, (B, C, H, W).
            labels: (B,) indices of the noise levels, from the largest; whole numbers of any dtype.
        Returns:
            (B, C, H, W), in the dtype of x.
        Raises:
            ValueError: other shapes.
        """
        check_input(x, labels, self.channels)
        labels = labels.long()
        scales = self._encode(x if self.centered else 2 * x - 1, labels)
        h = self._refine(scales, labels)
        h = in_full_precision(lambda h: self._to_image(h, labels), h).to(x.dtype)
        return divided_by_sigma(h, labels, self.sigmas) if self.scale_by_sigma else h

    def _encode(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        """Images -> features at each scale, finest first."""
        h = in_full_precision(self.begin_conv, x)
        scales = [h.to(autocast_dtype(h))]
        for stage in self.stages:
            h = scales[-1]
            for block in getattr(self, stage.down):
                h = block(h, labels)
            scales.append(h)
        return scales[1:]

    def _refine(self, scales: list[Tensor], labels: Tensor) -> Tensor:
        coarser = []
        for stage, h in zip(reversed(self.stages), reversed(scales), strict=True):
            coarser = [getattr(self, stage.up)([h, *coarser], labels)]
        return coarser[0]

    def _to_image(self, h: Tensor, labels: Tensor) -> Tensor:
        return self.end_conv(self.act(self.normalizer(h, labels)))


@register_model(name="ncsn")
class NCSN(RefineNet):
    """NCSN: every normalisation is conditioned on the noise level.  [Song & Ermon 2019]"""

    stages = (
        Stage("res1", "refine4", 1),
        Stage("res2", "refine3", 2),
        Stage("res3", "refine2", 2, dilation=2),
        Stage("res4", "refine1", 2, dilation=4),
    )
    conditional = True
    # With Inductor of PyTorch 2.13, gradients below the last refinement block are zero.
    compiles = False


@register_model(name="ncsnv2_64")
class NCSNv2(RefineNet):
    """NCSNv2 for images up to 64x64: unconditional, with output / sigma.  [Song & Ermon 2020]"""

    stages = NCSN.stages


@register_model(name="ncsnv2_128")
class NCSNv2_128(RefineNet):
    """NCSNv2 for images of about 128x128."""

    stages = (
        Stage("res1", "refine5", 1),
        Stage("res2", "refine4", 2),
        Stage("res3", "refine3", 2),
        Stage("res4", "refine2", 4, dilation=2),
        Stage("res5", "refine1", 4, dilation=4),
    )


@register_model(name="ncsnv2_256")
class NCSNv2_256(RefineNet):
    """NCSNv2 for images of about 256x256."""

    stages = (
        Stage("res1", "refine5", 1),
        Stage("res2", "refine4", 2),
        Stage("res3", "refine3", 2),
        Stage("res31", "refine31", 2),
        Stage("res4", "refine2", 4, dilation=2),
        Stage("res5", "refine1", 4, dilation=4),
    )


def mean_pooled(conv: nn.Conv2d) -> nn.Module:
    """A convolution, then half the resolution by averaging."""
    return nn.Sequential(OrderedDict(conv=conv, pool=nn.AvgPool2d(2)))


class NoNorm(nn.Module):
    """No normalisation."""

    def __init__(self, num_features: int):
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, as it is."""
        return x


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalisation, added to a shortcut.

    Args:
        dilation: of the convolutions.
        coarser: go one scale down, by dilation or, where that is 1, by pooling.
    """

    def __init__(
        self,
        act: nn.Module,
        norm: Norm,
        in_ch: int,
        out_ch: int,
        dilation: int,
        coarser: bool = False,
    ):
        super().__init__()
        conv3x3 = partial(ncsn_conv3x3, dilation=dilation, padding=dilation)
        pool = coarser and dilation == 1
        self.act = act
        self.conv1 = conv3x3(in_ch, in_ch)
        self.normalize2 = norm(in_ch)
        self.conv2 = conv3x3(in_ch, out_ch)
        self.shortcut = nn.Identity()
        if pool:
            self.conv2 = mean_pooled(self.conv2)
            self.shortcut = mean_pooled(ncsn_conv1x1(in_ch, out_ch))
        elif coarser:
            self.shortcut = conv3x3(in_ch, out_ch)
        self.normalize1 = norm(in_ch)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C', H', W')."""
        h = self.conv1(self.act(self.normalize1(x, y)))
        h = self.conv2(self.act(self.normalize2(h, y)))
        return self.shortcut(x) + h


class ResidualConvUnits(nn.Module):
    """A row of residual blocks, each of two convolutions that keep the number of channels."""

    def __init__(self, act: nn.Module, norm: Norm, ch: int, blocks: int):
        super().__init__()
        self.act = act
        # Names of (normalisation, convolution), by block.
        self.plan = [
            [(f"{i}_{j}_norm", f"{i}_{j}_conv") for j in (1, 2)] for i in range(1, blocks + 1)
        ]
        for names in self.plan:
            for norm_name, conv_name in names:
                self.add_module(norm_name, norm(ch))
                self.add_module(conv_name, ncsn_conv3x3(ch, ch, bias=False))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C, H, W)."""
        for names in self.plan:
            h = x
            for norm_name, conv_name in names:
                h = self.act(getattr(self, norm_name)(h, y))
                h = getattr(self, conv_name)(h)
            x = x + h
        return x


class ChainedPooling(nn.Module):
    """Pools and convolves repeatedly, and adds every result to the features."""

    def __init__(self, act: nn.Module, norm: Norm, ch: int, pool: nn.Module):
        super().__init__()
        self.act = act
        self.pool = pool
        self.convs = nn.ModuleList(ncsn_conv3x3(ch, ch, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(norm(ch) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), y (B,) noise indices -> (B, C, H, W)."""
        x = path = self.act(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self.pool(norm(path, y)))
            x = x + path
        return x


class MultiScaleFusion(nn.Module):
    """Convolves features of several scales and adds them at the finest scale."""

    def __init__(self, norm: Norm, in_chs: Sequence[int], out_ch: int, resize: Callable):
        super().__init__()
        self.resize = resize
        self.convs = nn.ModuleList(ncsn_conv3x3(ch, out_ch) for ch in in_chs)
        self.norms = nn.ModuleList(norm(ch) for ch in in_chs)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        """xs [(B, C, H, W), coarser ...], y (B,) noise indices -> (B, C', H, W)."""
        size = xs[0].shape[2:]
        layers = zip(xs, self.norms, self.convs, strict=True)
        return sum(self.resize(conv(norm(x, y)), size) for x, norm, conv in layers)


class RefineBlock(nn.Module):
    """Joins the features of one scale with those of the coarser ones, and pools.

    Args:
        resize: function of features and a size.
        in_chs: channels of the features, finest first.
        end: the last block, with more layers.
    """

    def __init__(
        self,
        act: nn.Module,
        norm: Norm,
        pool: nn.Module,
        resize: Callable,
        in_chs: Sequence[int],
        out_ch: int,
        end: bool = False,
    ):
        super().__init__()
        units = partial(ResidualConvUnits, act, norm)
        self.adapt_convs = nn.ModuleList(units(ch, blocks=2) for ch in in_chs)
        self.output_convs = units(out_ch, blocks=3 if end else 1)
        self.msf = MultiScaleFusion(norm, in_chs, out_ch, resize) if len(in_chs) > 1 else None
        self.crp = ChainedPooling(act, norm, out_ch, pool)

    def forward(self, xs: Sequence[Tensor], y: Tensor) -> Tensor:
        """xs [(B, C, H, W), coarser ...], y (B,) noise indices -> (B, out_ch, H, W)."""
        hs = [units(x, y) for units, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if self.msf is None else self.msf(hs, y)
        return self.output_convs(self.crp(h, y), y)


def _interpolation(config) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """How features are enlarged: "bilinear" or "bicubic", corners on corners, or "nearest"."""
    smooth = partial(F.interpolate, align_corners=True)
    options = {
        "bilinear": partial(smooth, mode="bilinear"),
        "bicubic": partial(smooth, mode="bicubic"),
        "nearest": partial(F.interpolate, mode="nearest"),
    }
    return choose("model.interpolation", config.model.interpolation, options)
