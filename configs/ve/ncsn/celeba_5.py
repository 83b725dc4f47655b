"""NCSN with technique 5 of NCSNv2, averaged weights, on CelebA, 64 px."""

from configs.ve.ncsn import celeba


def get_config():
    config = celeba.get_config()
    config.model.ema_rate = 0.999
    return config
