"""ADM that enlarges ImageNet from 64 px to 256 px, as published: 64_256_upsampler.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(256)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config, nf=192, num_heads=4, num_head_channels=0)
    parts.told_classes(config, 1000)
    parts.told_small_image(config, factor=4)
    return config
