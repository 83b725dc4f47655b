"""A mixture of classes in one dimension, exact for each class, and its guided samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import scipy.integrate
import scipy.linalg
import torch
from oracles import ScoreOracle

from models.conditioning import Takes
from score_lib.base.tensors import batch_mul

# The classes of a mixture in one dimension.
MEANS, STD = torch.tensor([-1.0, 0.5, 1.2], dtype=torch.float64), 0.4


class MixtureOracle(ScoreOracle):
    """Exact for classes ~ N(MEANS[c], STD^2 I); the class 3, the null, is their even mixture."""

    takes = Takes(classes=3, droppable=True)

    def __init__(self, sde):
        super().__init__(sde)
        self.calls = []
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def score(self, x, scale, std, *, classes):
        self.calls.append(len(x))
        return mixture_score(x, scale, std, classes)


def log_joint(x, scale, std):
    """log p_t(x, c) of each class, (B, 3), for x (B, D)."""
    variance = ((scale * STD) ** 2 + std**2)[:, None]
    distance = (x[:, None] - (scale[:, None] * MEANS.to(x))[..., None]).square().sum(2)
    return -0.5 * (distance / variance + x.shape[1] * variance.log()) - math.log(3)


def mixture_score(x, scale, std, classes):
    variance = (scale * STD) ** 2 + std**2
    weights = torch.softmax(log_joint(x, scale, std), dim=1)
    of_class = torch.nn.functional.one_hot(classes.clamp(max=2), 3).to(x)
    weights = torch.where((classes == 3)[:, None], weights, of_class)
    mean = batch_mul(scale, (weights @ MEANS.to(x))[:, None])
    return batch_mul(1 / variance, mean - x)


def posterior(x, c):
    """E[p(c | x)] over samples (B, 1)."""
    still = torch.ones(len(x), dtype=x.dtype)
    joint = log_joint(x, still, torch.zeros_like(still))
    return torch.softmax(joint, dim=1)[:, c].mean().item()


# --- The reference: guided samples by other means -------------------------------------------------


def guided_posterior(sde, c: int, w: float, stochastic: bool) -> float:
    """E[p(c | x)] of samples of class c with the guidance scale w, of the SDE or the ODE."""
    x, weights = (by_density if stochastic else by_flow)(sde, c, w)
    still = torch.ones(len(x), dtype=torch.float64)
    joint = log_joint(torch.from_numpy(x)[:, None], still, torch.zeros_like(still))
    return float(torch.softmax(joint, dim=1)[:, c].numpy() @ weights)


def prior_quantiles(sde, count: int) -> torch.Tensor:
    """Equally likely points of the prior, (count, 1)."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sde.prior_std * torch.special.ndtri(u)[:, None]


def by_flow(sde, c, w, count=400):
    """Quantiles of the prior along the probability flow, by SciPy, and their weights."""

    def slope(t, x):
        return guided_drift(sde, torch.from_numpy(x), torch.tensor(t), c, w, 0.5).numpy()

    start = prior_quantiles(sde, count)[:, 0].numpy()
    span = (float(sde.T), float(sde.sampling_eps))
    found = scipy.integrate.solve_ivp(slope, span, start, rtol=1e-8, atol=1e-8, method="LSODA")
    return found.y[:, -1], np.full(count, 1 / count)


def by_density(sde, c, w, cells=400, steps=400):
    """Points, and the probability of each, by the Fokker-Planck equation of the reverse SDE.

    A finite volume scheme with exponential fitting, implicit in time, in z = x / r(t) with
    r^2 = (m STD)^2 + s^2 + m^2.
    """
    times = torch.linspace(sde.T, sde.sampling_eps, steps + 1, dtype=torch.float64)
    edges = torch.linspace(-7, 7, cells + 1, dtype=torch.float64)
    centres, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    p = torch.exp(-0.5 * (centres * spread(sde, times[0]) / sde.prior_std) ** 2)
    p = (p / p.sum()).numpy()
    for t, s in itertools.pairwise(times):
        middle, dt = (t + s) / 2, float(t - s)
        r = spread(sde, middle)
        growth = torch.log(spread(sde, s) / spread(sde, t)) / dt
        speed = -guided_drift(sde, edges * r, middle, c, w, 1.0) / r - growth * edges
        diffusion = 0.5 * float(sde.diffusion(middle[None]) / r) ** 2
        p = implicit_step(p, speed.numpy(), diffusion, width, dt)
    return (centres * spread(sde, times[-1])).numpy(), p


def spread(sde, t):
    scale, std = sde.marginal_coeffs(t[None])
    return torch.sqrt((scale * STD) ** 2 + std**2 + scale**2)[0]


def guided_drift(sde, x, t, c, w, factor):
    """a x - factor g^2 (s_null + w (s_c - s_null)) at points (n,)."""
    t = t.expand(len(x))
    scale, std = sde.marginal_coeffs(t)
    given, null = (
        mixture_score(x[:, None], scale, std, torch.full((len(x),), k))[:, 0] for k in (c, 3)
    )
    return sde.drift_rate(t) * x - factor * sde.diffusion(t) ** 2 * (null + w * (given - null))


def implicit_step(p, speed, diffusion, width, dt):
    """One implicit step of dp/dt = -d(speed p)/dz + diffusion d2p/dz2, closed at both ends."""
    peclet = speed[1:-1] * width / diffusion
    fitted = np.where(np.abs(peclet) < 1e-8, 1.0, peclet / np.expm1(peclet + 1e-300))
    rate = dt * diffusion / width**2
    up, down = rate * (fitted + peclet), rate * fitted
    bands = np.zeros((3, len(p)))
    bands[1] = 1 + np.append(up, 0) + np.append(0, down)
    bands[0, 1:], bands[2, :-1] = -down, -up
    return scipy.linalg.solve_banded((1, 1), bands, p)
