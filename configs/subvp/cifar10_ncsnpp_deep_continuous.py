"""NCSN++, twice as deep, with the sub-VP SDE on CIFAR-10."""

from configs.subvp import cifar10_ncsnpp_continuous


def get_config():
    config = cifar10_ncsnpp_continuous.get_config()
    config.model.num_res_blocks = 8
    config.training.n_iters = 950001
    return config
