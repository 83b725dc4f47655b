"""Exact log-likelihoods and bits/dim by the probability-flow ODE.  [S21, section 4.3, D.2]

Behind this door: `score_lib.likelihood`.
"""

from score_lib.likelihood import (
    LogLikelihood,
    bits_per_dim,
    get_div_fn,
    get_likelihood_fn,
    get_log_likelihood_fn,
    offsets,
    value_and_divergence,
)
