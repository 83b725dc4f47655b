"""Defaults for LSUN under the name by which experiment files written elsewhere import them."""

from ml_collections import ConfigDict

from configs.data import lsun_defaults


def get_default_configs() -> ConfigDict:
    """LSUN at 256 px; the experiment names its category."""
    return lsun_defaults(category="")
