"""DDPM on CIFAR-10."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=False)
    parts.ddpm(config)
    parts.pc_sampling(config, predictor="ancestral_sampling")
    return config
