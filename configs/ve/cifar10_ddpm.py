"""DDPM's network with discrete noise levels (SMLD) on CIFAR-10."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.ve_sde(config, continuous=False)
    parts.ddpm(config, ema_rate=0.999)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
