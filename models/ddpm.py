"""The network of DDPM.  [Ho et al. 2020]"""

from score_lib.options import complete

from .normalization import group_norm_32
from .unet import UNet
from .unet_plan import Options
from .utils import register_model


@register_model(name="ddpm")
class DDPM(UNet):
    """U-Net of DDPM: naive resampling, and the time step embedded as sines and cosines.

    Raises:
        ValueError: an option is unknown, or the image size cannot be halved often enough.
    """

    def __init__(self, config):
        super().__init__(complete(config), Options(norm=group_norm_32))
