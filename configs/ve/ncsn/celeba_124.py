"""NCSN with techniques 1, 2 and 4 of NCSNv2 on CelebA, 64 px."""

from configs import data, parts


def get_config():
    config = data.celeba_defaults()
    parts.ve_sde(config, continuous=False, num_scales=500)
    parts.ncsn(config, ema_rate=0.0)
    parts.pc_sampling(config, predictor="none", corrector="ald", snr=0.128, n_steps_each=5)
    return config
