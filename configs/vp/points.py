"""A start for your own sets of points, (M, N, C): a transformer with the VP SDE.

    python main.py --config configs/vp/points.py --workdir RUN --mode train
        --config.data.path=FILE --config.data.shape=64,3

The order of the points has no meaning: the network does not know it, and training permutes them.
"""

from configs import data, parts


def get_config():
    config = data.arrays_defaults((64, 3), kind="points")
    config.data.standardize = "all"  # keeps shapes as they are
    parts.vp_sde(config, continuous=True)
    parts.v_prediction(config)
    parts.set_transformer(config, nf=64, num_res_blocks=3)
    parts.solver_sampling(config, method="heun", num_steps=30)
    config.training.update(batch_size=64, n_iters=3000, snapshot_freq=3000)
    config.eval.num_samples = 200
    return config
