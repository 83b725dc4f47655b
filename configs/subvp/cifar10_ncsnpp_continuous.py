"""NCSN++ with the sub-VP SDE on CIFAR-10."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.subvp_sde(config)
    parts.ncsnpp(config, num_res_blocks=4)
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
