"""The classifier that guides ADM on ImageNet at 128 px, as published: 128x128_classifier.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(128)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion_classifier(config)
    return config
