"""DDPM's network with the continuous VP SDE on CIFAR-10.  Published: 3.21 bits/dim."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=True)
    parts.ddpm(config)
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
