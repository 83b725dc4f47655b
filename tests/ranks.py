"""Data of every rank with as many entries: shapes, noise, exact networks and their closed forms."""

from __future__ import annotations

import pytest
import torch
from ml_collections import ConfigDict
from oracles import GaussianDataOracle

from score_lib.options import complete
from score_lib.samplers.configured import get_sampling_fn
from score_lib.sdes.snr import marginal_coeffs
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE

# By rank, channels first.  A last side that is as long as the batch would let coefficients (B,) act
# along it without an error.
SHAPES = {1: (48,), 2: (3, 16), 3: (3, 2, 8), 4: (3, 2, 2, 4), 5: (3, 2, 2, 2, 2)}
n, B = 48, 4
SDES = {
    "ve": lambda N: VESDE(sigma_max=20, N=N),
    "vp": lambda N: VPSDE(N=N),
    "subvp": lambda N: subVPSDE(N=N),
    "cosine": lambda N: CosineVPSDE(N=N),
}
# Every registered sampler of networks that know all times.
METHODS = ("adaptive", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "heun", "ode", "pc")
# Each process with another rank.
EVERY_RANK = pytest.mark.parametrize(
    ("rank", "kind"), [(1, "vp"), (2, "ve"), (3, "vp"), (4, "subvp"), (5, "cosine")]
)

DOUBLE = {"dtype": torch.float64}
MEAN = torch.sin(torch.arange(n, **DOUBLE))
ROOT = torch.randn(n, n, generator=torch.Generator().manual_seed(0), **DOUBLE)
COVARIANCE = 0.1 * torch.eye(n, **DOUBLE) + 0.2 * ROOT @ ROOT.T / n


class EntryNoise:
    """Standard normal noise that is a function of the number of the entry, whatever the shape."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, like):
        draw = torch.randn(like.numel(), generator=self.generator, **DOUBLE)
        return draw.reshape(like.shape)


def batch(shape, seed=1):
    """Numbers (B, *D) that are a function of the entry alone."""
    return EntryNoise(seed)(torch.empty(B, *shape))


def assert_as_flat(result_of):
    """`result_of(shape)` has the same entries, in their order, for data of any rank."""
    flat = result_of(SHAPES[1])
    for rank in (2, 3, 4, 5):
        result = result_of(SHAPES[rank]).reshape(flat.shape)
        error = (result - flat).abs().max() / flat.abs().max()
        assert error <= 1e-9, f"rank {rank} is off by {error:.1e} of the largest value"


def oracle(sde):
    """The network that knows the data of all entries."""
    return GaussianDataOracle(sde, MEAN, COVARIANCE)


def grey(shape):
    """Grey levels (B, *D) in [0, 1]."""
    return (batch(shape) * 40 + 128).clamp(0, 255).round() / 255


DEFAULTS = {
    "snr": 0.16,
    "n_steps_each": 1,
    "probability_flow": False,
    "noise_removal": True,
}


def configured(sde, shape, settings, **options):
    """The sampler of options of the section `sampling`, in the network's range."""
    quick = {"adaptive_rtol": 0.5} if settings.get("method") == "adaptive" else {}
    config = {"sampling": DEFAULTS | quick | settings, "training": {"continuous": True}}
    options = {"eps": sde.sampling_eps, **options}
    return get_sampling_fn(complete(ConfigDict(config)), sde, shape, lambda x: x, **options)


# The first entries, in few dimensions: moments of samples take a run for each.
FEW = {1: (8,), 2: (2, 4), 3: (2, 1, 4), 4: (2, 1, 2, 2), 5: (2, 1, 2, 1, 2)}
k = 8
FEW_MEAN, FEW_COVARIANCE = MEAN[:k], COVARIANCE[:k, :k]


def few_oracle(sde, mean=FEW_MEAN):
    """The network that knows the first entries alone."""
    return GaussianDataOracle(sde, mean, FEW_COVARIANCE)


def coeffs(sde, *times):
    """m and s at times; at 0 those of the data, also where a process has noise there."""
    m, s = marginal_coeffs(sde, torch.tensor(times, **DOUBLE))
    of_data = torch.tensor(times) == 0
    return torch.where(of_data, 1.0, m), torch.where(of_data, 0.0, s)


def flow(sde, x, start, end, mean=FEW_MEAN):
    """Where the probability flow takes x (B, k) of one time, and log |det| of that map."""
    m, s = coeffs(sde, start, end)
    spectrum, basis = torch.linalg.eigh(FEW_COVARIANCE)
    variance = m[:, None] ** 2 * spectrum + s[:, None] ** 2
    gain = (variance[1] / variance[0]).sqrt()
    moved = m[1] * mean + ((x - m[0] * mean) @ basis * gain) @ basis.T
    return moved, gain.log().sum()
