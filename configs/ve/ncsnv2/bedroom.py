"""NCSNv2 on LSUN bedrooms, 128 px."""

from configs import data, parts


def get_config():
    config = data.lsun_defaults("bedroom", image_size=128)
    config.training.batch_size = 128
    parts.ve_sde(config, continuous=False, sigma_max=190.0, num_scales=1086)
    parts.ncsnv2(config, depth=128, ema_rate=0.9999)
    parts.pc_sampling(config, predictor="none", corrector="ald", snr=0.095, n_steps_each=3)
    return config
