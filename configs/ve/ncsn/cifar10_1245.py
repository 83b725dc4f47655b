"""NCSN with techniques 1, 2, 4 and 5 of NCSNv2 on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.ve.ncsn import cifar10_124


def get_config() -> ConfigDict:
    config = cifar10_124.get_config()
    config.model.ema_rate = 0.999
    return config
