"""NCSN++ with the continuous VE SDE on CIFAR-10.  Published: FID 2.38, IS 9.83."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.ve_sde(config, continuous=True)
    parts.ncsnpp(config, num_res_blocks=4, embedding_type="fourier", ema_rate=0.999)
    parts.pc_sampling(config, predictor="reverse_diffusion", corrector="langevin")
    return config
