"""Improved diffusion on ImageNet at 64 px, by class, as published."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(64)
    parts.cosine_vp_sde(config, continuous=False)
    parts.improved_diffusion(config, nf=192, ch_mult=(1, 2, 3, 4))
    parts.told_classes(config, 1000)
    return config
