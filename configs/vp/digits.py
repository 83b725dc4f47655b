"""A small DDPM++ with the VP SDE on 8 px digits: minutes on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.vp_sde(config, continuous=True)
    parts.ddpmpp(config, **parts.SMALL_UNET)
    parts.pc_sampling(config, predictor="euler_maruyama")  # where sampling.method is "pc"
    config.sampling.update(method="dpmpp_sde", num_steps=40)
    # The adaptive solver takes 400 evaluations, which change the mean by less than 0.001 bits/dim.
    config.eval.bpd_steps = 64
    # At later times the classifier of digits is hardly better than chance.
    config.control.guidance_until = 0.7
    return config
