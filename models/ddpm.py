"""The network of DDPM.  [Ho et al. 2020]"""

from torch import nn

from score_lib.options import complete

from .normalization import group_norm
from .unet import Options, UNet
from .utils import register_model


@register_model(name="ddpm")
class DDPM(UNet):
    """U-Net of DDPM: naive resampling, and the time step embedded as sines and cosines.

    Raises:
        ValueError: an option is unknown, or the image size cannot be halved often enough.
    """

    def __init__(self, config):
        super().__init__(complete(config), Options(norm=_group_norm))


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups or, for widths that are no multiple of 32, the groups of NCSN++."""
    return group_norm(channels) if channels % 32 else nn.GroupNorm(32, channels, eps=1e-6)
