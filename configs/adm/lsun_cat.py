"""ADM on LSUN cats at 256 px, as published: lsun_cat.pt."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("cat")
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config, dropout=0.1)
    return config
