"""NCSN++ with the continuous VE SDE on CelebA-HQ, 1024 px."""

from configs import data, parts


def get_config():
    config = data.celebahq_defaults("data/-r10.tfrecords", image_size=1024)
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp_1024(config)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
