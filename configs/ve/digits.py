"""A small NCSN++ with the VE SDE on 8 px digits: minutes on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import digits_defaults
from configs.parts import ncsnpp, pc_sampling, ve_sde


def get_config() -> ConfigDict:
    config = digits_defaults()
    ve_sde(config, continuous=True)
    ncsnpp(
        config,
        nf=16,
        num_res_blocks=1,
        embedding_type="fourier",
        ch_mult=(1, 2),
        attn_resolutions=(4,),
        ema_rate=0.998,
    )
    config.optim.update(lr=4e-3, warmup=100)
    pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
