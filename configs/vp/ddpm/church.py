"""DDPM on LSUN churches, 256 px."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("church_outdoor")
    parts.vp_sde(config, continuous=False)
    parts.ddpm(config, ch_mult=(1, 1, 2, 2, 4, 4))
    config.optim.lr = 2e-5
    parts.pc_sampling(config, predictor="ancestral_sampling")
    return config
