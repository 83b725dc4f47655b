"""DDPM on LSUN churches, 256 px."""

from configs.vp.ddpm import bedroom


def get_config():
    config = bedroom.get_config()
    config.data.category = "church_outdoor"
    return config
