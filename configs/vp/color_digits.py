"""A small DDPM++ with the VP SDE on 8 px digits in colour: minutes on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.color_digits_defaults()
    parts.vp_sde(config, continuous=True)
    parts.ddpmpp(config, **parts.SMALL_UNET)
    config.model.nf = 24
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
