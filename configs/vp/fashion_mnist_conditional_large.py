"""A class-conditional DDPM++ with the VP SDE on Fashion-MNIST, with guidance, for a GPU.

The objective of `vp/fashion_mnist_conditional`, and a network five times as costly.
"""

from configs import parts
from configs.vp import fashion_mnist_conditional


def get_config():
    config = fashion_mnist_conditional.get_config()
    parts.ddpmpp(config, **{**parts.FASHION_LARGE, "nf": 64})
    config.model.update(dropout=0.1, ema_rate=0.999)
    config.optim.update(lr=4e-4, warmup=400, cooldown=4000)
    config.training.update(batch_size=256, n_iters=8000, snapshot_freq=8000)
    config.eval.batch_size = 500
    return config
