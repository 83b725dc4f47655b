"""NCSN++ with discrete time (DDPM) on CIFAR-10."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=False)
    parts.ncsnpp(config, num_res_blocks=4)
    parts.pc_sampling(config, predictor="reverse_diffusion")
    return config
