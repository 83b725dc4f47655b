"""A small NCSN++ with the VE SDE on Fashion-MNIST, sized for two CPU cores."""

from configs import data, parts


def get_config():
    config = data.fashion_mnist_defaults()
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp(config, **parts.FASHION_UNET, embedding_type="fourier")
    parts.solver_sampling(config, method="dpmpp_sde", num_steps=40)
    return config
