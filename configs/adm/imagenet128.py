"""ADM on ImageNet at 128 px, by class, as published: 128x128_diffusion.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(128)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config, num_heads=4, num_head_channels=0)
    parts.told_classes(config, 1000)
    return config
