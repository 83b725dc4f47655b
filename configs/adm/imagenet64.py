"""ADM on ImageNet at 64 px, by class, as published: 64x64_diffusion.pt."""

from configs import data, parts


def get_config():
    config = data.imagenet_defaults(64)
    parts.cosine_vp_sde(config, continuous=False)
    options = {"num_res_blocks": 3, "dropout": 0.1, "use_new_attention_order": True}
    parts.guided_diffusion(config, nf=192, **options)
    parts.told_classes(config, 1000)
    return config
