"""ADM that enlarges ImageNet from 128 px to 512 px, as published: 128_512_upsampler.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(512)
    parts.vp_sde(config, continuous=False)
    levels = (1, 1, 2, 2, 4, 4)
    parts.guided_diffusion(config, nf=192, ch_mult=levels, attn_resolutions=(32, 16))
    parts.told_classes(config, 1000)
    parts.told_small_image(config, factor=4)
    return config
