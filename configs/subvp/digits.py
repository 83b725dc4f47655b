"""A small DDPM++ with the sub-VP SDE on 8 px digits: minutes on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.subvp_sde(config)
    parts.ddpmpp(config, **parts.SMALL_UNET)
    parts.pc_sampling(config, predictor="euler_maruyama")
    # In more noise the classifier of digits knows hardly more than chance.
    config.control.guidance_until = 0.7
    return config
