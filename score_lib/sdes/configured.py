"""From a config, or a name, to a process."""

from score_lib.sdes import published  # noqa: F401  (registers its processes)
from score_lib.sdes.process import SDE, SDES

get_sde = SDES.get


def registered_sdes() -> list[SDE]:
    """One process of each registered class, with its default parameters."""
    return [SDES.get(name)() for name in SDES]


def create_sde(config) -> SDE:
    """The configured process, `training.sde`, with the parameters in the config."""
    return SDES.build(config.training.sde, config)
