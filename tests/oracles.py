"""Networks whose answer is known: the exact score of Gaussian data, and recorded figures."""

from __future__ import annotations

import functools
import math

import torch
from recordings import load_json, load_tensors

import sampling
from score_lib.base.tensors import batch_mul
from sde_lib import VESDE, VPSDE, LinearSDE, subVPSDE

MU, S0 = 0.3, 0.5
# Seeds of the recorded figures.
SEEDS = {"pc": 7, "ode": 8, "likelihood": 9, "loss": 10, "control": 11}


def goldens() -> dict[str, torch.Tensor]:
    """Recorded inputs and outputs, by name."""
    return load_tensors("golden_processes.npz")


@functools.cache
def golden_facts() -> dict:
    """Recorded numbers and settings."""
    return load_json("golden_processes.json")


def golden_sde(name: str) -> LinearSDE:
    """The processes of the recorded figures."""
    N = golden_facts()["pc"]["N"]
    makers = {
        "vesde": lambda: VESDE(sigma_min=0.01, sigma_max=10, N=N),
        "vpsde": lambda: VPSDE(N=N),
        "subvpsde": lambda: subVPSDE(N=N),
    }
    return makers[name]()


def inverse_scaler(x):
    """From [-1, 1] to [0, 1]."""
    return (x + 1) / 2


def apart(tensors, others):
    """Relative distance of two lists of tensors."""
    one, other = (torch.cat([t.flatten().double() for t in part]) for part in (tensors, others))
    return float((one - other).norm() / other.norm())


class GaussianOracle(torch.nn.Module):
    """The network that has learned data ~ N(mu, s0^2 I) exactly.

    Its output follows each process's convention, so that it is read as the exact score.
    """

    def __init__(self, sde: LinearSDE, continuous: bool = True, mu: float = MU, s0: float = S0):
        super().__init__()
        self.sde, self.continuous, self.mu, self.s0 = sde, continuous, mu, s0

    def forward(self, x, labels):
        if isinstance(self.sde, VESDE):
            sigma = labels if self.continuous else self.sde.discrete_coeffs(labels)[1]
            return -batch_mul(1 / (self.s0**2 + sigma**2).to(x), x - self.mu)
        if self.continuous:
            scale, std = self.sde.marginal_coeffs(labels / 999)
        else:
            scale, std = self.sde.discrete_coeffs(labels.long())
        variance = (scale * self.s0) ** 2 + std**2
        centred = x - batch_mul(scale, torch.full_like(x, self.mu))
        return batch_mul(std / variance, centred)


class ScoreOracle(torch.nn.Module):
    """A network that knows a score, in the conventions of VE and of VP for all times.

    A subclass defines score(x, scale, std), of x = scale x_0 + std z with scale and std (B,).
    """

    def __init__(self, sde: LinearSDE):
        super().__init__()
        self.sde = sde

    def forward(self, x, labels, **condition):
        explosive = isinstance(self.sde, VESDE)
        if explosive:
            scale, std = torch.ones_like(labels), labels
        else:
            scale, std = self.sde.marginal_coeffs(labels / 999)
        score = self.score(x, scale, std, **condition)
        return score if explosive else batch_mul(-std, score)


class GaussianDataOracle(ScoreOracle):
    """The network that has learned data ~ N(mean, covariance) exactly.

    For data (B, *D), mean (n,) and covariance (n, n) are those of `x.flatten(1)`.
    """

    def __init__(self, sde: LinearSDE, mean: torch.Tensor, covariance: torch.Tensor):
        super().__init__(sde)
        self.mean = mean
        spectrum, basis = torch.linalg.eigh(covariance.double())
        self.spectrum, self.basis = spectrum.to(mean), basis.to(mean)

    def score(self, x, scale, std):
        flat = x.flatten(1)
        centred = (flat - batch_mul(scale, self.mean.expand_as(flat))) @ self.basis
        variance = scale[:, None] ** 2 * self.spectrum + std[:, None] ** 2
        return (-(centred / variance) @ self.basis.T).reshape(x.shape)


class UnitNoise:
    """Noise of which row 0 has none, and each other row a single 1 in one entry of one draw.

    Attributes:
        draws: how often it was asked for.
    """

    def __init__(self):
        self.draws = 0

    def __call__(self, like):
        noise = torch.zeros_like(like).flatten(1)
        dimensions = noise.shape[1]
        rows = noise[1 + self.draws * dimensions :][:dimensions]
        rows += torch.eye(dimensions)[: len(rows)]
        self.draws += 1
        return noise.reshape(like.shape)


def exact_moments(draw, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (n,) and covariance (n, n) of the samples of a sampler that is linear in its noise.

    Such a sampler maps noise 0 to the mean, and unit noises to the columns of a matrix whose
    product with its transpose is the covariance.  `draw(count, noise)` draws samples (count, *D) of
    n entries.
    """
    noise = UnitNoise()
    draw(1, noise)
    mean, *responses = draw(1 + noise.draws * dimensions, UnitNoise()).flatten(1).double()
    responses = torch.stack(responses) - mean
    return mean, responses.T @ responses


def assert_close_to_largest(actual, expected, tolerance=2e-4):
    """Agreement relative to the largest recorded value, and on where there is no number."""
    if not expected.isfinite().all():
        assert torch.equal(actual.isnan(), expected.isnan())
        return
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


def exact_pc(sde, shape, predictor, corrector=None, **options):
    """Predictor-corrector sampling in the network's range, for networks that know all times."""
    options = {"continuous": True, "eps": sde.sampling_eps, **options}
    return sampling.get_pc_sampler(sde, shape, predictor, corrector, lambda x: x, 0.16, **options)


class Cosine(LinearSDE):
    """m(t) = cos(pi t / 2) and s(t) = sin(pi t / 2), by functions of time."""

    T = 0.99

    def drift_rate(self, t):
        return -math.pi / 2 * torch.tan(math.pi / 2 * t)

    def diffusion(self, t):
        return torch.sqrt(math.pi * torch.tan(math.pi / 2 * t))

    def marginal_coeffs(self, t):
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
