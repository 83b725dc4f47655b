"""ADM on LSUN horses at 256 px, as published: lsun_horse.pt."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("horse")
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion(config, dropout=0.1)
    return config
