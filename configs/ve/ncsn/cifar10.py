"""NCSN on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ncsn, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    ve_sde(config, continuous=False, sigma_max=1.0, num_scales=10)
    ncsn(config, ema_rate=0.0)
    config.optim.update(lr=1e-3, warmup=0, grad_clip=-1.0)
    pc_sampling(config, predictor="none", corrector="ald", snr=0.316, n_steps_each=100)
    return config
