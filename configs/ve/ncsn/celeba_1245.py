"""NCSN with techniques 1, 2, 4 and 5 of NCSNv2 on CelebA, 64 px."""

from configs.ve.ncsn import celeba_124


def get_config():
    config = celeba_124.get_config()
    config.model.ema_rate = 0.999
    return config
