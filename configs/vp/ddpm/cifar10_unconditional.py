"""DDPM on CIFAR-10 with a network that is not told the time."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ddpm, pc_sampling, vp_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    vp_sde(config, continuous=False)
    ddpm(config, conditional=False)
    pc_sampling(config, predictor="ancestral_sampling")
    return config
