"""The network of DDPM.  [Ho et al. 2020]"""

from __future__ import annotations

from torch import nn

from .normalization import group_norm
from .unet import Options, UNet
from .utils import register_model


@register_model(name="ddpm")
class DDPM(UNet):
    """U-Net of DDPM: with naive resampling, and told the time step by sines and cosines.

    Args:
        config: of `data`, `num_channels`, `image_size` and `centered`; of `model`, `nf`, `ch_mult`,
            `num_res_blocks`, `attn_resolutions`, `resamp_with_conv`, `dropout`, `conditional`,
            `nonlinearity`, `normalization` and `scale_by_sigma`, with the noise levels.
    Raises:
        ValueError: an option is unknown, or the image size cannot be halved often enough.
    """

    def __init__(self, config):
        super().__init__(config, Options(norm=_group_norm))


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups; widths that 32 does not divide are grouped as in NCSN++."""
    return group_norm(channels) if channels % 32 else nn.GroupNorm(32, channels, eps=1e-6)
