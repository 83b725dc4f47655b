"""NCSNv2 on CelebA, 64 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import celeba_defaults
from configs.parts import ncsnv2, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = celeba_defaults()
    ve_sde(config, continuous=False, num_scales=500)
    ncsnv2(config, depth=64, ema_rate=0.999)
    config.optim.update(lr=1e-4, warmup=0, grad_clip=-1.0)
    pc_sampling(config, predictor="none", corrector="ald", snr=0.128, n_steps_each=5)
    return config
