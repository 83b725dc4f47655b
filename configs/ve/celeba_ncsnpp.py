"""NCSN++ with discrete noise levels (SMLD) on CelebA, 64 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import celeba_defaults
from configs.parts import ncsnpp, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = celeba_defaults()
    ve_sde(config, continuous=False)
    ncsnpp(config, num_res_blocks=4, ema_rate=0.999)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
