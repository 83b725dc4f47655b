"""NCSN++ and DDPM++.  [S21, section 4.1 and appendix H]"""

from score_lib.options import complete

from .layers import choose
from .unet import UNet
from .unet_plan import Options
from .utils import register_model


@register_model(name="ncsnpp")
class NCSNpp(UNet):
    """U-Net with the improvements of NCSN++ on DDPM, each an option of `model`.

    - `embedding_type`: of the noise level, "fourier" (random features at scale `fourier_scale`, of
      log sigma, or of the label as it is without `fourier_log`) or "positional" (sines and cosines
      of the time step);
    - `resblock_type`: "ddpm", with resampling layers in between (`resamp_with_conv`: with a
      convolution), or "biggan", whose blocks resample;
    - `fir`, `fir_kernel`: resample with an FIR filter;
    - `skip_rescale`: divide residual sums by sqrt(2);
    - `progressive_input`: "none"; "input_skip" brings the halved image into the features at every
      resolution, by `progressive_combine` "sum" or "cat"; "residual" adds a convolved pyramid;
    - `progressive`: "none"; "output_skip" sums an image from every resolution; "residual" adds a
      convolved pyramid to the features;
    - `init_scale`: initial scale of the last layer of every branch;
    - `conditional`: give the noise level to the network;
    - `scale_by_sigma`: divide the output by it.

    `conv_size` and `attention_type` have one value each, 3 and "ddpm".

    Raises:
        ValueError: an option is unknown, or the image size cannot be halved often enough.
    """

    def __init__(self, config):
        config = complete(config)
        model = config.model
        choose("model.conv_size", model.conv_size, {3: None})
        choose("model.attention_type", model.attention_type, {"ddpm": None})
        options = {name: getattr(model, name) for name in Options._fields if name != "norm"}
        super().__init__(config, Options(**options))
