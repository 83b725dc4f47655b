"""WRN-28-10 as classifier of noisy CIFAR-10 images for the continuous VE SDE.  Untried here."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import cifar10_defaults
from configs.parts import ve_sde, wide_resnet


def get_config() -> ConfigDict:
    config = cifar10_defaults()
    ve_sde(config, continuous=True)
    wide_resnet(config, num_classes=10)
    config.training.n_iters = 200001
    return config
