"""DDPM's network with discrete noise levels (SMLD) on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ddpm, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    ve_sde(config, continuous=False)
    ddpm(config, ema_rate=0.999)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
