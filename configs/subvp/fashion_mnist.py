"""A small DDPM++ with the sub-VP SDE on Fashion-MNIST, sized for two CPU cores."""

from configs import data, parts


def get_config():
    config = data.fashion_mnist_defaults()
    parts.subvp_sde(config)
    parts.ddpmpp(config, **parts.FASHION_UNET)
    parts.solver_sampling(config, method="dpmpp_sde", num_steps=40)
    return config
