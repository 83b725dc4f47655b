"""Averages of power-function profiles and of a half-life, against closed forms and plain sums."""

import itertools
import math

import numpy as np
import pytest
import torch

from models.ema import ExponentialMovingAverage
from score_lib.base.decays import HalfLife, PowerDecay
from score_lib.base.profiles import (
    WIDEST,
    Profile,
    gamma_of,
    inner_product,
    weights_of,
)
from score_lib.disk import snapshots

WIDTHS = (0.001, 0.02, 0.05, 0.1, 0.15, 0.25, WIDEST)
STEPS = 400


def density(profile, tau):
    inside = (profile.gamma + 1) * (tau / profile.step) ** profile.gamma / profile.step
    return np.where(tau <= profile.step, inside, 0.0)


def integral(values, step):
    """By Gauss-Legendre on [0, step], with `values` a function of the step."""
    nodes, weights = np.polynomial.legendre.leggauss(600)
    return float(step / 2 * weights @ values((nodes + 1) * step / 2))


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_exponent_of_a_relative_standard_deviation(sigma_rel):
    gamma = gamma_of(sigma_rel)
    closed_form = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
    assert closed_form == pytest.approx(sigma_rel, rel=1e-12)
    profile = Profile(50, gamma)
    assert integral(lambda tau: density(profile, tau), 50) == pytest.approx(1, rel=1e-9)
    mean = integral(lambda tau: tau * density(profile, tau), 50)
    variance = integral(lambda tau: (tau - mean) ** 2 * density(profile, tau), 50)
    assert math.sqrt(variance) / 50 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", (0.0, -0.1, 0.3))
def test_impossible_standard_deviations_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel = .* above 0 and at most 0\.2887"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize("steps", ((30, 50), (50, 30), (50, 50)))
@pytest.mark.parametrize("widths", ((0.05, 0.1), (0.1, 0.05), (0.2, 0.2), (0.25, 0.03)))
def test_inner_products_against_quadrature(steps, widths):
    one, other = (Profile(s, gamma_of(w)) for s, w in zip(steps, widths, strict=True))
    expected = integral(lambda tau: density(one, tau) * density(other, tau), min(steps))
    assert inner_product(one, other) == pytest.approx(expected, rel=1e-8)


def test_a_stored_profile_is_its_own_sum():
    stored = [Profile(s, gamma_of(w)) for s in range(100, STEPS + 1, 100) for w in (0.05, 0.1)]
    for k in (3, 6, 7):
        weights, error = weights_of(stored, stored[k])
        np.testing.assert_allclose(weights, np.eye(8)[k], atol=1e-9)
        assert error < 1e-7


def test_the_sum_and_its_error_against_quadrature():
    """No other sum of weight 1 is nearer; the error is the distance in the norm of L2."""
    stored = [Profile(s, gamma_of(w)) for s in (200, 300, STEPS) for w in (0.05, 0.1)]
    wanted = Profile(STEPS, gamma_of(0.15))

    def distance(weights):
        def square(tau):
            total = sum(w * density(p, tau) for w, p in zip(weights, stored, strict=True))
            return (total - density(wanted, tau)) ** 2

        # Piecewise smooth: densities end at their steps.
        ends = [0, 200, 300, STEPS]
        pieces = (
            integral(lambda tau, low=low: square(low + tau), high - low)
            for low, high in itertools.pairwise(ends)
        )
        return math.sqrt(sum(pieces) / inner_product(wanted, wanted))

    weights, error = weights_of(stored, wanted)
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert error == pytest.approx(distance(weights), rel=1e-4) and error > 1e-3
    rng = np.random.default_rng(0)
    for _ in range(5):
        change = rng.normal(size=6) * 1e-3
        assert distance(weights + change - change.mean()) > error


# --- Averages while training ---------------------------------------------------------------------


def walk():
    """Weights after each of STEPS updates, (STEPS, 3), float64: a random walk and a drift."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(STEPS, 3, generator=generator, dtype=torch.float64)
    return steps.cumsum(0) / STEPS**0.5 + torch.linspace(0, 3, STEPS, dtype=torch.float64)[:, None]


def tracked(schedule, at=(STEPS,)):
    """The average of the walk after some updates."""
    parameter = torch.nn.Parameter(torch.full((3,), 7.0, dtype=torch.float64))
    average = ExponentialMovingAverage([parameter], 1.0, schedule=schedule)
    found = {}
    for number, weights in enumerate(walk(), start=1):
        parameter.data.copy_(weights)
        average.update([parameter])
        if number in at:
            found[number] = average.shadow_params[0].clone()
    return found


@pytest.mark.parametrize("sigma_rel", (0.02, 0.1, WIDEST))
def test_a_tracked_profile_is_the_discrete_sum(sigma_rel):
    """The profile's integral over (i - 1, i] is the weight of step i."""
    gamma = gamma_of(sigma_rel)
    ends = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS) ** (gamma + 1)
    expected = (ends.diff()[:, None] * walk()).sum(0)
    torch.testing.assert_close(tracked(PowerDecay(gamma))[STEPS], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("sigma_rel", "bound"), ((0.03, 2.4e-3), (0.07, 2.3e-4), (0.15, 3.3e-4), (0.25, 0.04))
)
def test_synthesised_profiles_are_near_to_tracked_ones(sigma_rel, bound):
    """Bounds are twice what was measured, relative to the spread of the walk."""
    at, gammas = range(20, STEPS + 1, 20), [gamma_of(w) for w in (0.05, 0.1)]
    averages = [tracked(PowerDecay(gamma), at) for gamma in gammas]
    stored = [Profile(step, gamma) for step in at for gamma in gammas]
    wanted = Profile(STEPS, gamma_of(sigma_rel))
    weights, _ = weights_of(stored, wanted)
    values = [averages[gammas.index(p.gamma)][p.step] for p in stored]
    total = sum(w * value for w, value in zip(weights.tolist(), values, strict=True))
    error = (total - tracked(PowerDecay(wanted.gamma))[STEPS]).abs().max() / walk().std()
    assert error < bound


@pytest.mark.parametrize("sigma_rel", (0.01, 0.03, 0.15))
def test_rounding_of_snapshots_grows_with_the_weights_of_their_sum(sigma_rel):
    """Float16 against float64, for many parameters of one size."""
    stored = [Profile(s, gamma_of(w)) for s in range(4, STEPS + 1, 4) for w in (0.05, 0.1)]
    weights, _ = weights_of(stored, Profile(STEPS, gamma_of(sigma_rel)))
    values = np.random.default_rng(0).lognormal(size=(len(stored), 500))
    rounded = values.astype(np.float16).astype(np.float64)
    size = np.sqrt((values**2).mean())
    error = np.sqrt(((weights @ (rounded - values)) ** 2).mean()) / size
    assert snapshots.rounding(weights) == pytest.approx(error, rel=0.15)
    assert (snapshots.rounding(weights) > snapshots.COARSE) == (sigma_rel == 0.01)


def test_half_life_of_an_average():
    """A weight halves every 40 images, here every 5 steps, after the ramp-up."""
    schedule = HalfLife(images=40, rampup=0.05, batch_size=8)
    decays = [schedule(update) for update in range(1, STEPS + 1)]
    assert decays[0] == 0 and decays[1] == 0.5 ** (8 / (0.05 * 8))
    assert decays[50] == 0.5 ** (8 / (0.05 * 400)) and decays[99] < schedule.decay
    # From 800 images on, 5 % of those seen are 40.
    assert decays[100] == decays[-1] == schedule.decay == 0.5 ** (1 / 5)
    assert math.prod(decays[200:205]) == pytest.approx(0.5)
    expected = torch.zeros(3, dtype=torch.float64)
    for weights, decay in zip(walk(), decays, strict=True):
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(tracked(schedule)[STEPS], expected)
    assert HalfLife(images=40, rampup=0, batch_size=8)(1) == schedule.decay
