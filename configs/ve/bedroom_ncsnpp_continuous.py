"""NCSN++ with the continuous VE SDE on LSUN bedrooms, 256 px."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("bedroom")
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp_256(config)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
