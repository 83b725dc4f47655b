"""Log-likelihoods against their closed form."""

import math

import torch

from score_lib.checks.exact import gaussian, told_by_time
from score_lib.checks.finding import Finding, graded
from score_lib.checks.process import DATA_STD
from score_lib.likelihood import get_log_likelihood_fn
from score_lib.sdes.process import SDE


def log_likelihood(sde: SDE, shape: tuple[int, ...] = (1, 2, 2), **options) -> list[Finding]:
    """Log-likelihood of Gaussian data with the exact score, against N(0, m^2 std^2 + s^2) at eps.

    Args:
        shape: D of data that the process can take.
        options: of `get_log_likelihood_fn`.
    """
    options = {"hutchinson_type": "exact", "eps": 1e-5, **options}
    x = DATA_STD * torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    exact = told_by_time(sde)
    found = get_log_likelihood_fn(exact, **options)(gaussian(sde, 0.0, DATA_STD), x).total
    m, s = map(float, exact.scale_and_std(torch.tensor([options["eps"]]), len(shape)))
    variance = (m * DATA_STD) ** 2 + s**2
    size = x[0].numel()
    expected = -0.5 * (x.flatten(1).double().square().sum(1) / variance)
    expected = expected - 0.5 * size * math.log(2 * math.pi * variance)
    error = (found - expected).abs().max().item() / size / math.log(2)
    text = f"off by at most {error:.1e} bits/dim from the closed form on a Gaussian"
    return [graded("likelihood", error, 0.005, 0.05, text)]
