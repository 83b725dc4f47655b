"""A small classifier of noisy 8 px digits for the VP SDE: a minute on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.data import digits_classifier_defaults
from configs.parts import vp_sde, wide_resnet


def get_config() -> ConfigDict:
    config = digits_classifier_defaults()
    vp_sde(config, continuous=True)
    wide_resnet(
        config, num_classes=10, nf=8, blocks_per_group=1, channel_multiplier=2, ema_rate=0.998
    )
    return config
