"""A small DDPM++ with the VP SDE on 8 px digits: minutes on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import digits_defaults
from configs.parts import ddpmpp, pc_sampling, vp_sde


def get_config() -> ConfigDict:
    config = digits_defaults()
    vp_sde(config, continuous=True)
    ddpmpp(config, nf=16, num_res_blocks=1, ch_mult=(1, 2), attn_resolutions=(4,), ema_rate=0.998)
    config.optim.update(lr=4e-3, warmup=100)
    pc_sampling(config, predictor="euler_maruyama")
    # At later times the classifier of digits is hardly better than chance.
    config.control.guidance_until = 0.7
    return config
