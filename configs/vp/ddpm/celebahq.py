"""DDPM on CelebA-HQ, 256 px."""

from configs import data, parts


def get_config():
    config = data.celebahq_defaults("data/-r10.tfrecords")
    parts.vp_sde(config, continuous=False)
    parts.ddpm(config, ch_mult=(1, 1, 2, 2, 4, 4))
    config.optim.lr = 2e-5
    parts.pc_sampling(config, predictor="ancestral_sampling")
    return config
