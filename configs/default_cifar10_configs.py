"""Defaults for CIFAR-10 under the name by which experiment files written elsewhere import them."""

from configs.data import cifar10_defaults as get_default_configs
