"""NCSN with technique 5 of NCSNv2, averaged weights, on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.ve.ncsn import cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.model.ema_rate = 0.999
    return config
