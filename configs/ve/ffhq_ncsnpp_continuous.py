"""NCSN++ with the continuous VE SDE on FFHQ, 1024 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import ffhq_defaults
from configs.parts import ncsnpp_1024, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = ffhq_defaults("data/ffhq-r10.tfrecords", image_size=1024)
    ve_sde(config, continuous=True)
    config.training.reduce_mean = True
    ncsnpp_1024(config)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
