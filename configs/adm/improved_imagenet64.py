"""Improved diffusion on ImageNet at 64 px, with the hybrid loss, as published."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(64)
    parts.cosine_vp_sde(config, continuous=False)
    parts.improved_diffusion(config, ch_mult=(1, 2, 3, 4), rescale_timesteps=True)
    return config
