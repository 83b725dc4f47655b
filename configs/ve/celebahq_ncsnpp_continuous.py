"""NCSN++ with the continuous VE SDE on CelebA-HQ, 1024 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import celebahq_defaults
from configs.parts import ncsnpp_1024, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = celebahq_defaults("data/-r10.tfrecords", image_size=1024)
    ve_sde(config, continuous=True)
    ncsnpp_1024(config)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
