"""NCSN++ with the VE SDE on Fashion-MNIST, for a GPU."""

from configs import data, parts


def get_config():
    config = data.large_fashion_mnist_defaults()
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp(config, **parts.FASHION_LARGE, embedding_type="fourier")
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
