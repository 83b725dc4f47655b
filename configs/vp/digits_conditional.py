"""A small class-conditional DDPM++ with the VP SDE on 8 px digits, with guidance."""

from configs.vp import digits


def get_config():
    config = digits.get_config()
    config.data.num_classes = 10
    config.training.update(condition="classes", condition_dropout=0.1)
    config.sampling.guidance_scale = 1.5
    return config
