"""A start for your own vectors, (N, D) in an .npy, .npz or .h5: a residual MLP with the VP SDE.

    python main.py --config configs/vp/vectors.py --workdir RUN --mode train
        --config.data.path=FILE --config.data.shape=2

Log-likelihoods, `--mode eval`, are exact: the divergence is a sum over the D dimensions.  Above
some hundred of them, `--config.eval.hutchinson_type=Rademacher` estimates it.
"""

from configs import data, parts


def get_config():
    config = data.arrays_defaults((2,))
    parts.vp_sde(config, continuous=True)
    parts.v_prediction(config)
    parts.mlp(config)
    parts.solver_sampling(config, method="heun", num_steps=50)
    config.eval.hutchinson_type = "exact"
    return config
