"""Improved diffusion on CIFAR-10, with the hybrid loss, as published."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.cosine_vp_sde(config, continuous=False)
    parts.improved_diffusion(config, dropout=0.3, rescale_timesteps=True)
    return config
