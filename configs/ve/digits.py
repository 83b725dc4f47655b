"""A small NCSN++ with the VE SDE on 8 px digits: minutes on two CPU cores."""

from configs import data, parts


def get_config():
    config = data.digits_defaults()
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp(config, **parts.SMALL_UNET, embedding_type="fourier")
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
