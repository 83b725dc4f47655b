"""A small DDPM++ with the VP SDE on 8 px digits: minutes on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.vp_sde(config, continuous=True)
    parts.ddpmpp(config, **parts.SMALL_UNET)
    parts.pc_sampling(config, predictor="euler_maruyama")  # where sampling.method is "pc"
    config.sampling.update(method="dpmpp_sde", num_steps=40)
    # At later times the classifier of digits is hardly better than chance.
    config.control.guidance_until = 0.7
    return config
