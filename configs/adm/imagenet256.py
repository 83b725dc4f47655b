"""ADM on ImageNet at 256 px, by class, as published: 256x256_diffusion.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(256)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config)
    parts.told_classes(config, 1000)
    return config
