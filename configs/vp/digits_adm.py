"""A small ADM with the discrete cosine schedule on 8 px digits."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.cosine_vp_sde(config, continuous=False)
    parts.adm(config, **parts.SMALL_ADM)
    parts.pc_sampling(config, predictor="ancestral_sampling")
    config.sampling.num_steps = 0  # the whole chain
    return config
