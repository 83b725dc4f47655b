"""A small DDPM++ trained as in EDM (Karras et al. 2022) on 8 px digits: minutes on two cores."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.edm(config, sigma_data=0.75)
    parts.ddpmpp(config, **parts.SMALL_UNET)
    parts.solver_sampling(config, method="heun", num_steps=18)
    return config
