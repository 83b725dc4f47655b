"""A small classifier of noisy Fashion-MNIST for the VP SDE."""

from configs import data, parts


def get_config():
    config = data.fashion_mnist_classifier_defaults()
    parts.vp_sde(config, continuous=True)
    parts.wide_resnet(config, num_classes=10, **parts.FASHION_RESNET)
    return config
