"""The classifier that guides ADM on ImageNet at 512 px, as published: 512x512_classifier.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(512)
    parts.vp_sde(config, continuous=False)
    parts.guided_diffusion_classifier(config)
    return config
