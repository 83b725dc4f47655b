"""A small DDPM++ with the VP SDE that enlarges digits of 4 px to 8 px."""

from configs.vp import digits


def get_config():
    config = digits.get_config()
    config.training.update(condition="image", condition_operator="super_resolution")
    config.control.update(task="restore", method="none")
    return config
