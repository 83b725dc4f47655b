"""ADM on ImageNet at 256 px, without classes, as published: 256x256_diffusion_uncond.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(256)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config)
    return config
