"""Exact log-likelihoods and bits/dim by the probability-flow ODE, and bounds of them.

[S21, section 4.3, appendix D.2]  Behind this door: `score_lib.likelihood`, `score_lib.elbo` of the
reverse SDE, `score_lib.vlb` of discrete chains, and `score_lib.dequantization`.
"""

from score_lib.dequantization import (
    Dequantization,
    LearnedDequantization,
    UniformDequantization,
    get_dequantization_loss_fn,
)
from score_lib.elbo import Elbo, get_elbo_fn
from score_lib.likelihood import (
    LogLikelihood,
    bits_per_dim,
    get_div_fn,
    get_likelihood_fn,
    get_log_likelihood_fn,
    offsets,
    value_and_divergence,
)
from score_lib.vlb import Vlb, get_vlb_fn
