"""Defaults for LSUN under the name by which experiment files written elsewhere import them."""

from configs.data import lsun_defaults as get_default_configs
