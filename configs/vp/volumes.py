"""A start for your own volumes, (N, C, D, H, W) in an .npy, .npz or .h5: a U-Net with the VP SDE.

    python main.py --config configs/vp/volumes.py --workdir RUN --mode train
        --config.data.path=FILE --config.data.shape=1,8,8,8

- H and W must be divisible by 2 for every level of `model.ch_mult` but the first.
- `--config.data.levels=256` where the array holds bytes, for bits/dim in place of nats.
"""

from configs import data, parts


def get_config():
    config = data.arrays_defaults((1, 8, 8, 8))
    parts.vp_sde(config, continuous=True)
    parts.v_prediction(config)
    parts.adm(config, **parts.SMALL_ADM)
    parts.solver_sampling(config, method="heun", num_steps=30)
    config.training.update(batch_size=32, n_iters=2000, snapshot_freq=2000)
    config.eval.num_samples = 500
    return config
