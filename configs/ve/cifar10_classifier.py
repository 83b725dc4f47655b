"""WRN-28-10 as classifier of noisy CIFAR-10 images for the continuous VE SDE.  Untried here."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.ve_sde(config, continuous=True)
    parts.wide_resnet(config, num_classes=10)
    config.training.n_iters = 200001
    return config
