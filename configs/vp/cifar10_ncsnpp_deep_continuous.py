"""NCSN++, twice as deep, with the continuous VP SDE on CIFAR-10."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.vp import cifar10_ncsnpp_continuous


def get_config() -> ConfigDict:
    config = cifar10_ncsnpp_continuous.get_config()
    config.model.num_res_blocks = 8
    config.training.n_iters = 950001
    return config
