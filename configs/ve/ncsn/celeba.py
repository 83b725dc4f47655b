"""NCSN on CelebA, 64 px."""

from configs import data, parts


def get_config():
    config = data.celeba_defaults()
    parts.ve_sde(config, continuous=False, sigma_max=1.0, num_scales=10)
    parts.ncsn(config, ema_rate=0.0)
    parts.pc_sampling(config, predictor="none", corrector="ald", snr=0.316, n_steps_each=100)
    return config
