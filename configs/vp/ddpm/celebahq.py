"""DDPM on CelebA-HQ, 256 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import celebahq_defaults
from configs.parts import ddpm, pc_sampling, vp_sde


def get_config() -> ConfigDict:
    config = celebahq_defaults("data/-r10.tfrecords")
    vp_sde(config, continuous=False)
    ddpm(config, ch_mult=(1, 1, 2, 2, 4, 4))
    config.optim.lr = 2e-5
    pc_sampling(config, predictor="ancestral_sampling")
    return config
