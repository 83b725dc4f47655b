"""Defaults for CelebA under the name by which experiment files written elsewhere import them."""

from configs.data import celeba_defaults as get_default_configs
