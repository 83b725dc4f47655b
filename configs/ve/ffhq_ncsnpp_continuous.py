"""NCSN++ with the continuous VE SDE on FFHQ, 1024 px."""

from configs import data, parts


def get_config():
    config = data.ffhq_defaults("data/ffhq-r10.tfrecords", image_size=1024)
    parts.ve_sde(config, continuous=True)
    config.training.reduce_mean = True
    parts.ncsnpp_1024(config)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
