"""DDPM's network with the sub-VP SDE on CIFAR-10.  Published: 3.05 bits/dim."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.subvp_sde(config)
    parts.ddpm(config)
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
