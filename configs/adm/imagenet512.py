"""ADM on ImageNet at 512 px, by class, as published: 512x512_diffusion.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(512)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config)
    parts.told_classes(config, 1000)
    return config
