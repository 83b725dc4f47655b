"""Log-likelihoods against their closed form."""

import math

import torch

from score_lib.checks.exact import gaussian, told_by_time
from score_lib.checks.finding import Finding, graded
from score_lib.checks.process import DATA_STD
from score_lib.likelihood import get_log_likelihood_fn
from score_lib.sdes.process import SDE


def log_likelihood(sde: SDE, shape: tuple[int, ...] = (1, 2, 2), **options) -> list[Finding]:
    """Log-likelihood of Gaussian data with the exact score, against its closed form.

    The flow of a Gaussian multiplies x by the ratio of deviations at T and eps.  So a prior that is
    not p_T counts in both; `process` checks it.

    Args:
        shape: D of data that the process can take.
        options: of `get_log_likelihood_fn`.
    """
    options = {"hutchinson_type": "exact", "eps": 1e-5, **options}
    x = DATA_STD * torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    exact = told_by_time(sde)
    found = get_log_likelihood_fn(exact, **options)(gaussian(sde, 0.0, DATA_STD), x).total
    times = torch.tensor([options["eps"], exact.T])
    m, s = (c.double() for c in exact.scale_and_std(times, len(shape)))
    first, last = torch.sqrt((m * DATA_STD) ** 2 + s**2)
    size = x[0].numel()
    expected = exact.prior_logp(x.double() * (last / first)) + size * torch.log(last / first)
    error = (found - expected).abs().max().item() / size / math.log(2)
    text = f"off by at most {error:.1e} bits/dim from the closed form on a Gaussian"
    return [graded("likelihood", error, 0.005, 0.05, text)]
