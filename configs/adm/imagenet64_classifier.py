"""The classifier that guides ADM on ImageNet at 64 px, as published: 64x64_classifier.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(64)
    parts.cosine_vp_sde(config, continuous=False)
    parts.guided_diffusion_classifier(config, num_res_blocks=4)
    return config
