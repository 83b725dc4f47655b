"""DDPM on CIFAR-10 with a network that is not told the time."""

from configs.vp.ddpm import cifar10


def get_config():
    config = cifar10.get_config()
    config.model.conditional = False
    return config
