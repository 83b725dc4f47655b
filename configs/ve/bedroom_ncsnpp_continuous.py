"""NCSN++ with the continuous VE SDE on LSUN bedrooms, 256 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import lsun_defaults
from configs.parts import ncsnpp_256, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = lsun_defaults("bedroom")
    ve_sde(config, continuous=True)
    ncsnpp_256(config)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
