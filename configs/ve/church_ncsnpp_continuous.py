"""NCSN++ with the continuous VE SDE on LSUN churches, 256 px."""

from configs.ve import bedroom_ncsnpp_continuous


def get_config():
    config = bedroom_ncsnpp_continuous.get_config()
    config.data.category = "church_outdoor"
    config.model.sigma_max = 380.0
    return config
