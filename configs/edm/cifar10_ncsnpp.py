"""NCSN++ trained as in EDM (Karras et al. 2022) on CIFAR-10.  Reference: FID 1.98."""

from configs import data, parts


def get_config():
    config = data.cifar10_defaults()
    parts.edm(config)
    embedding = {"embedding_type": "fourier", "fourier_log": False}
    parts.ncsnpp(config, num_res_blocks=4, ch_mult=(2, 2, 2), **embedding)
    parts.edm_training(config, dropout=0.13, augment=0.12)
    # 17 steps between the published 18 noise levels, and the last one to 0: 35 evaluations.
    parts.solver_sampling(config, method="heun", num_steps=17)
    return config
