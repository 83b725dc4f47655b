"""DDPM++ with the VP SDE on Fashion-MNIST, for a GPU."""

from configs import data, parts


def get_config():
    config = data.large_fashion_mnist_defaults()
    parts.vp_sde(config, continuous=True)
    parts.ddpmpp(config, **parts.FASHION_LARGE)
    parts.pc_sampling(config, predictor="euler_maruyama")
    return config
