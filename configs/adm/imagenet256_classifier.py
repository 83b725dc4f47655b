"""The classifier that guides ADM on ImageNet at 256 px, as published: 256x256_classifier.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(256)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion_classifier(config)
    return config
