"""NCSN++ with the sub-VP SDE on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ncsnpp, pc_sampling, subvp_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    subvp_sde(config)
    ncsnpp(config, num_res_blocks=4)
    pc_sampling(config, predictor="euler_maruyama")
    return config
