"""DDPM on CIFAR-10 with a network that is not told the time."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=False)
    parts.ddpm(config, conditional=False)
    parts.pc_sampling(config, predictor="ancestral_sampling")
    return config
