"""NCSN++ with the continuous VE SDE on CelebA-HQ, 256 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import celebahq_defaults
from configs.parts import ncsnpp_256, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = celebahq_defaults("data/r08.tfrecords")
    ve_sde(config, continuous=True, sigma_max=348.0)
    ncsnpp_256(config)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
