"""A small ADM classifier of noisy 8 px digits, told the steps of the discrete cosine schedule."""

from configs import data, parts


def get_config():
    config = data.digits_classifier_defaults()
    parts.cosine_vp_sde(config, continuous=False)
    parts.adm_classifier(config, num_classes=10, **parts.SMALL_ADM)
    return config
