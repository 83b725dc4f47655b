"""The lower bound of the log-likelihood against closed forms."""

import math

import pytest
import torch
from oracles import GaussianOracle

from likelihood import get_elbo_fn, get_log_likelihood_fn
from score_lib.base.tensors import SampleNoise, stratified_mean
from score_lib.elbo import log_prior
from score_lib.parametrization import Coefficients, Parametrization
from score_lib.sdes.times import TimeDensity
from sde_lib import SDE, VESDE, VPSDE, subVPSDE


class ScoreItself(Parametrization):
    """The network gives the score, and is told the time."""

    def coefficients(self, m, s):
        return Coefficients(torch.zeros_like(m), torch.ones_like(m), torch.ones_like(m))

    def label(self, sde, t, m, s):
        return t


SDES = {"ve": VESDE, "vp": VPSDE, "subvp": subVPSDE}
EPS = 1e-3


def gaussian_log_p(sde, x, std=0.5, eps=EPS):
    m, s = (c.double() for c in sde.marginal_coeffs(torch.tensor(eps)))
    variance = (m * std) ** 2 + s**2
    size = x[0].numel()
    return -0.5 * (x.flatten(1).double().square().sum(1) / variance) - 0.5 * size * torch.log(
        2 * math.pi * variance
    )


@pytest.mark.parametrize("name", SDES)
def test_bound_is_the_log_density_of_a_gaussian_with_its_exact_score(name):
    """Within four standard errors of the mean over 200 samples, and close for each."""
    sde = SDES[name]()
    torch.manual_seed(0)
    x = 0.5 * torch.randn(200, 2, 3)
    found = get_elbo_fn(sde, num_times=200, eps=EPS)(GaussianOracle(sde, mu=0.0, s0=0.5), x)
    difference = found.total - gaussian_log_p(sde, x)
    error = difference.std() / math.sqrt(len(x))
    assert difference.mean().abs() < 4 * error and error < 0.2


@pytest.mark.parametrize("name", SDES)
def test_standard_error_is_that_of_repeated_estimates(name):
    sde = SDES[name]()
    torch.manual_seed(0)
    x = (0.5 * torch.randn(1, 4)).expand(500, -1)
    found = get_elbo_fn(sde, num_times=50, eps=EPS)(GaussianOracle(sde, mu=0.0, s0=0.5), x)
    expected = float(found.standard_error.square().mean().sqrt())
    assert float(found.total.std()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("count", (2, 3, 50))
def test_error_of_a_mean_over_strata_is_exact_where_draws_rise_evenly(count):
    """A line of slope 6, at one uniform place in all strata: the mean varies by 6 / K of it."""
    place = torch.rand(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = 6 * (torch.arange(count)[:, None] + place) / count
    mean, error = stratified_mean(values)
    torch.testing.assert_close(mean, values.mean(0))
    # Of two strata, nothing tells a rise from noise.
    more = 1 if count > 2 else math.sqrt(1 + 12 / 4)
    torch.testing.assert_close(error, torch.full_like(error, more * 6 / count / math.sqrt(12)))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ("ve", "vp"))
def test_standard_error_counts_the_place_of_the_times(name):
    """Of data of the size of images the terms have little noise, and rise from one to the next."""
    sde = SDES[name]()
    torch.manual_seed(0)
    scales = torch.logspace(-1.5, 0, 2000)
    x = (scales * torch.randn(1, 2000)).expand(300, -1)

    def network(x, labels):  # exact for N(0, scales^2)
        m, s = sde.marginal_coeffs(labels)
        return -x / (m[:, None] ** 2 * scales**2 + s[:, None] ** 2)

    found = get_elbo_fn(sde, num_times=100, parametrization=ScoreItself())(network, x)
    expected = float(found.standard_error.square().mean().sqrt())
    assert float(found.total.std()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("factor", (0.7, 1.3))
@pytest.mark.parametrize("name", SDES)
def test_bound_of_a_wrong_score_is_below_the_entropy(name, factor):
    """Its mean over the data is at most minus their entropy at eps, whatever the network is."""
    sde = SDES[name]()
    torch.manual_seed(0)
    m, s = (float(c) for c in sde.marginal_coeffs(torch.tensor(EPS)))
    x = math.hypot(0.5 * m, s) * torch.randn(400, 4)
    oracle = GaussianOracle(sde, mu=0.0, s0=0.5)
    found = get_elbo_fn(sde, num_times=50, eps=EPS)(lambda x, t: factor * oracle(x, t), x)
    expected = gaussian_log_p(sde, x)
    assert found.total.mean() < expected.mean() - 0.1


@pytest.mark.parametrize("name", SDES)
def test_times_follow_the_weight_of_the_integrand(name):
    """E[1 / p] is the length of the range, and E[weight / p] the integral of the weight."""
    sde = SDES[name]()
    density = TimeDensity(sde, 1e-5)
    quantile = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, p = density.at(quantile)
    assert (t.diff() > 0).all() and t.min() >= 1e-5 and t.max() <= sde.T
    assert (1 / p).mean() == pytest.approx(sde.T - 1e-5, rel=1e-3)
    weight = sde.diffusion(t) ** 2 / sde.marginal_coeffs(t)[1] ** 2
    assert (weight / p).std() / (weight / p).mean() < 0.01
    # Rounding may put a time at the end of a cell into the next one.
    assert (density.of(t) == p).double().mean() > 0.99


def test_bound_of_a_sample_is_a_function_of_its_noise():
    sde = VPSDE()
    x, oracle = torch.randn(5, 3), GaussianOracle(VPSDE())
    bound = get_elbo_fn(sde, num_times=5)
    whole = bound(oracle, x, noise=SampleNoise(1, range(5))).total
    part = bound(oracle, x[3:], noise=SampleNoise(1, range(3, 5))).total
    torch.testing.assert_close(whole[3:], part, rtol=1e-5, atol=1e-5)


def test_bound_reads_the_network_as_it_is_parametrised():
    sde, noise = VPSDE(), SampleNoise(0, range(4))
    x, oracle = 0.5 * torch.randn(4, 3), GaussianOracle(VPSDE(), mu=0.0, s0=0.5)
    expected = get_elbo_fn(sde, num_times=4)(oracle, x, noise=noise).total

    def as_score(x, label):  # told 999 t, as the oracle is
        s = sde.marginal_coeffs(label / 999)[1]
        return -oracle(x, label) / s[:, None]

    bound = get_elbo_fn(sde, num_times=4, parametrization="score")
    found = bound(as_score, x, noise=SampleNoise(0, range(4))).total
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_bound_agrees_with_the_flow_on_a_gaussian():
    sde = VPSDE()
    torch.manual_seed(0)
    x, oracle = 0.5 * torch.randn(100, 3), GaussianOracle(sde, mu=0.0, s0=0.5)
    flow = get_log_likelihood_fn(sde, eps=EPS, hutchinson_type="exact")(oracle, x).total
    found = get_elbo_fn(sde, num_times=200, eps=EPS)(oracle, x)
    assert (found.total - flow).mean().abs() < 4 * (found.total - flow).std() / 10


@pytest.mark.parametrize("settings", ({"num_times": 1}, {"eps": 0.0}, {"eps": 1.5}))
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="at least two times and eps"):
        get_elbo_fn(VPSDE(), **settings)


def test_a_process_without_a_linear_drift_is_refused():
    class Mine(SDE):
        sde = marginal_prob = prior_sampling = prior_logp = None

    with pytest.raises(ValueError, match="LinearSDE"):
        get_elbo_fn(Mine())


def test_the_prior_is_expected_over_the_noise_of_the_end():
    """A square has the same mean over signs as over N(0, 1)."""
    sde, x = VESDE(sigma_max=2.0), torch.tensor([[1.0, -3.0]])
    r, G = torch.tensor([0.5]), torch.tensor([1.5])
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2)
    expected = sde.prior_logp(r * x + G * signs).mean().double()
    torch.testing.assert_close(log_prior(sde, x, r, G)[0], expected, rtol=1e-5, atol=0)
