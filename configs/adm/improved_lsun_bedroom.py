"""Improved diffusion on LSUN bedrooms at 256 px, as published."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("bedroom")
    parts.vp_sde(config, continuous=False)
    options = {"num_res_blocks": 2, "num_heads": 1, "scale_shift_norm": False}
    options |= {"ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16,)}
    parts.improved_diffusion(config, **options)
    config.model.num_scales = 1000
    return config
