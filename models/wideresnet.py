"""The classifier of noisy images that guides class-conditional sampling.  [S21, appendix I.1]

A wide ResNet [Zagoruyko & Komodakis 2016] conditioned on the noise level, with swish and group
normalisation.  Batch normalisation would mix images of different noise levels.
"""

import torch
from torch import Tensor, nn

from score_lib.base.tensors import image_shape
from score_lib.options import complete

from .layers import (
    autocast_dtype,
    check_classes,
    check_input,
    ddpm_conv1x1,
    ddpm_conv3x3,
    dense,
    get_act,
    in_full_precision,
)
from .layerspp import GaussianFourierProjection
from .network import Network
from .normalization import activated, group_norm
from .utils import register_model

# Width, in units of nf * channel_multiplier, and stride of each group of blocks.
GROUPS = ((1, 1), (2, 2), (4, 2))


@register_model(name="wideresnet_noise_conditional")
class WideResNet(Network):
    """Logits of p(y | x_t), for images x_t = m(t) x_0 + s(t) z of any process.

    It has 6 blocks_per_group + 4 layers: WRN-28-10 is blocks_per_group = 4, channel_multiplier = 10
    and nf = 16, the channels of the stem.  The noise level is embedded as 8 nf random Fourier
    features of log s(t).

    Raises:
        ValueError: an option is unknown or too small, or the data are no images.
    """

    def __init__(self, config):
        super().__init__()
        config = complete(config)
        _check_options(config)
        model = config.model
        # Images may have any size, and a config none.
        self.channels = image_shape(config)[0] if config.data.shape else config.data.num_channels
        self.act = get_act(config)
        temb_dim = 8 * model.nf
        self.fourier = GaussianFourierProjection(temb_dim // 2, model.fourier_scale)
        self.embed_0 = dense(temb_dim, temb_dim)
        self.embed_1 = dense(temb_dim, temb_dim)
        self.stem = ddpm_conv3x3(self.channels, model.nf, bias=False)
        self.blocks, ch = nn.ModuleList(), model.nf
        for width, first_stride in GROUPS:
            out_ch = width * model.nf * model.channel_multiplier
            for i in range(model.blocks_per_group):
                stride = first_stride if i == 0 else 1
                block = WideBlock(self.act, ch, out_ch, temb_dim, stride, model.dropout)
                self.blocks.append(block)
                ch = out_ch
        self.norm = group_norm(ch)
        self.head = dense(ch, config.data.num_classes)

    def forward(self, x: Tensor, noise_std: Tensor) -> Tensor:
        """Logits of the classes.

        Args:
            x: images x_t in the network's range, (B, C, H, W), of any size.
            noise_std: s(t) > 0, the standard deviation of x_t given x_0, (B,).
        Returns:
            (B, data.num_classes), in the dtype of x.
        Raises:
            ValueError: other shapes, or whole numbers as noise_std.
        """
        check_input(x, noise_std, self.channels)
        if not noise_std.is_floating_point():
            raise ValueError(
                "the classifier takes the standard deviation of the noise, such as 0.5, but was "
                f"given labels of dtype {noise_std.dtype}: pass s(t), not the index of a step"
            )
        temb = self.fourier(torch.log(noise_std)).to(x.dtype)
        temb = in_full_precision(self._embed, temb)
        h = in_full_precision(self.stem, x)
        h = h.to(autocast_dtype(h))
        for block in self.blocks:
            h = block(h, temb)
        return in_full_precision(self._classify, h).to(x.dtype)

    def _embed(self, features: Tensor) -> Tensor:
        return self.act(self.embed_1(self.act(self.embed_0(features))))

    def _classify(self, h: Tensor) -> Tensor:
        return self.head(activated(self.act, self.norm, h).mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Two 3x3 convolutions, with the noise level added in between, and a shortcut.

    Normalisation and activation come before each convolution; where the shape changes, the shortcut
    is a 1x1 convolution of the first activation.  As in the score networks, the second convolution
    starts near 0, so a block starts as its shortcut and a deep network trains like a shallow one.
    Convolutions have no bias: the normalisation after them has one.

    Args:
        act: activation.
        in_ch, out_ch: channels.
        temb_dim: size of the embedded noise level.
        stride: of the first convolution.
        dropout: probability, before the second convolution.
    """

    def __init__(
        self, act: nn.Module, in_ch: int, out_ch: int, temb_dim: int, stride: int, dropout: float
    ):
        super().__init__()
        self.act = act
        self.GroupNorm_0 = group_norm(in_ch)
        self.Conv_0 = ddpm_conv3x3(in_ch, out_ch, stride, bias=False)
        self.Dense_0 = dense(temb_dim, out_ch)
        self.GroupNorm_1 = group_norm(out_ch)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = ddpm_conv3x3(out_ch, out_ch, bias=False, init_scale=0.0)
        self.stride = stride
        self.changes_shape = in_ch != out_ch or stride != 1
        if self.changes_shape:
            self.Conv_2 = ddpm_conv1x1(in_ch, out_ch, bias=False)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, in_ch, H, W) and temb (B, temb_dim), activated -> (B, out_ch, H', W'), where H' and
        W' are H and W divided by the stride and rounded up.
        """
        h = activated(self.act, self.GroupNorm_0, x)
        # The stride is a slice: oneDNN's own strided 1x1 convolution, with channels last in memory
        # as compiled networks have them, writes out of bounds for fewer than 16 channels.
        shortcut = self.Conv_2(h[:, :, :: self.stride, :: self.stride]) if self.changes_shape else x
        h = activated(self.act, self.GroupNorm_1, self.Conv_0(h), self.Dense_0(temb))
        h = self.Conv_1(self.Dropout_0(h))
        return shortcut + h


def _check_options(config) -> None:
    model = config.model
    check_classes(config.data.num_classes)
    if min(model.blocks_per_group, model.channel_multiplier) < 1:
        raise ValueError(
            f"model.blocks_per_group = {model.blocks_per_group} and model.channel_multiplier = "
            f"{model.channel_multiplier} should both be at least 1"
        )
