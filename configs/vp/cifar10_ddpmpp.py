"""DDPM++ with discrete time (DDPM) on CIFAR-10.  Published: FID 2.78, IS 9.64."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=False)
    parts.ddpmpp(config, num_res_blocks=4)
    parts.pc_sampling(config, predictor="ancestral_sampling")
    return config
