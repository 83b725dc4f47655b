"""A small classifier of noisy 8 px digits for the VE SDE: a minute on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.digits_classifier_defaults()
    parts.ve_sde(config, continuous=True)
    parts.wide_resnet(config, num_classes=10, **parts.SMALL_RESNET)
    return config
