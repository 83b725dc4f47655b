"""NCSNv2 on LSUN bedrooms, 128 px."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import lsun_defaults
from configs.parts import ncsnv2, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = lsun_defaults("bedroom", image_size=128)
    config.training.batch_size = 128
    ve_sde(config, continuous=False, sigma_max=190.0, num_scales=1086)
    ncsnv2(config, depth=128, ema_rate=0.9999)
    config.optim.update(lr=1e-4, warmup=0, grad_clip=-1.0)
    pc_sampling(config, predictor="none", corrector="ald", snr=0.095, n_steps_each=3)
    return config
