"""A start for your own series, (N, C, L) in an .npy, .npz or .h5: a U-Net with the VP SDE.

    python main.py --config configs/vp/series.py --workdir RUN --mode train
        --config.data.path=FILE --config.data.shape=1,64

- The length must be divisible by 2 for every level of `model.ch_mult` but the first.
- `--config.data.split=last` holds out the last tenth, as suits windows of one long series.
"""

from configs import data, parts


def get_config():
    config = data.arrays_defaults((1, 64))
    parts.vp_sde(config, continuous=True)
    parts.v_prediction(config)
    parts.adm(config, **parts.SMALL_ADM)
    config.model.attn_resolutions = (32,)
    parts.solver_sampling(config, method="heun", num_steps=30)
    config.training.update(batch_size=64, n_iters=3000, snapshot_freq=3000)
    return config
