"""NCSN with technique 5 of NCSNv2, averaged weights, on CIFAR-10."""

from configs.ve.ncsn import cifar10


def get_config():
    config = cifar10.get_config()
    config.model.ema_rate = 0.999
    return config
