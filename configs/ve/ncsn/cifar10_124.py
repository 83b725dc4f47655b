"""NCSN with techniques 1, 2 and 4 of NCSNv2 on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ncsn, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    ve_sde(config, continuous=False, num_scales=232)
    ncsn(config, ema_rate=0.0)
    config.optim.update(lr=1e-3, warmup=0, grad_clip=-1.0)
    pc_sampling(config, predictor="none", corrector="ald", snr=0.176, n_steps_each=5)
    return config
