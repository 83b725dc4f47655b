"""NCSN++ with discrete noise levels (SMLD) on CelebA, 64 px."""

from configs import data, parts


def get_config():
    config = data.celeba_defaults()
    parts.ve_sde(config, continuous=False)
    parts.ncsnpp(config, num_res_blocks=4, ema_rate=0.999)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
