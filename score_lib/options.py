"""Interim."""

from configs.checks import check_values
from configs.defaults import check_keys, complete, flatten

__all__ = ["check_keys", "check_values", "checked", "complete", "flatten"]


def checked(config):
    """The completed config and unknown keys."""
    config = complete(config)
    unknown = check_keys(config)
    check_values(config)
    return config, unknown
