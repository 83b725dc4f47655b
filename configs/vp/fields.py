"""A start for your own fields, float images (N, C, H, W) of any number of channels.

    python main.py --config configs/vp/fields.py --workdir RUN --mode train
        --config.data.path=FILE --config.data.shape=2,16,16

Values are not rounded, and their density is that of your own units.
"""

from configs import data, parts


def get_config():
    config = data.arrays_defaults((2, 16, 16))
    parts.vp_sde(config, continuous=True)
    parts.v_prediction(config)
    parts.adm(config, **parts.SMALL_ADM)
    config.model.attn_resolutions = (8,)
    parts.solver_sampling(config, method="heun", num_steps=30)
    config.training.update(batch_size=64, n_iters=3000, snapshot_freq=3000)
    return config
