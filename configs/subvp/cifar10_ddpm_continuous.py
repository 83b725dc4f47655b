"""DDPM's network with the sub-VP SDE on CIFAR-10.  Published: 3.05 bits/dim."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ddpm, pc_sampling, subvp_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    subvp_sde(config)
    ddpm(config)
    pc_sampling(config, predictor="euler_maruyama")
    return config
