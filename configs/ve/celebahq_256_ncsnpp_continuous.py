"""NCSN++ with the continuous VE SDE on CelebA-HQ, 256 px."""

from configs import data, parts


def get_config():
    config = data.celebahq_defaults("data/r08.tfrecords")
    parts.ve_sde(config, continuous=True, sigma_max=348.0)
    parts.ncsnpp_256(config)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
