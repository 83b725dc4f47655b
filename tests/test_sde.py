"""Processes: the identities that tie drift, diffusion and marginals together."""

import copy
import math

import pytest
import torch
from oracles import GaussianOracle, golden_sde

import checks
import sampling
from likelihood import get_likelihood_fn
from losses import get_sde_loss_fn
from models.utils import get_score_fn
from sde_lib import SDE, VESDE, VPSDE, get_sde, registered_sdes, subVPSDE

SHAPES = ((5,), (3, 2), (1, 4, 6), (2, 3, 4, 2))


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_variance_follows_the_sde(sde):
    """d s^2 / dt = 2 a s^2 + g^2 and d m / dt = a m."""
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64) * sde.T
    ones = torch.ones_like(t)
    var, d_var = torch.func.jvp(lambda t: sde.marginal_coeffs(t)[1] ** 2, (t,), (ones,))
    torch.testing.assert_close(d_var, 2 * sde.drift_rate(t) * var + sde.diffusion(t) ** 2)
    mean, d_mean = torch.func.jvp(lambda t: sde.marginal_coeffs(t)[0], (t,), (ones,))
    torch.testing.assert_close(d_mean, sde.drift_rate(t) * mean)


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_data_shape(sde, shape):
    x, t = torch.randn(4, *shape), torch.linspace(0.1, 0.9, 4)
    for mean, coefficient in (sde.sde(x, t), sde.marginal_prob(x, t), sde.discretize(x, t)):
        assert mean.shape == x.shape and coefficient.shape == (4,)
    assert sde.prior_sampling(x.shape).shape == x.shape
    assert sde.prior_logp(x).shape == (4,)
    for row in range(4):  # an element does not depend on the others
        one = sde.marginal_prob(x[row : row + 1], t[row : row + 1])[0]
        torch.testing.assert_close(one[0], sde.marginal_prob(x, t)[0][row])


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_prior_density_is_that_of_its_samples(sde):
    torch.manual_seed(0)
    x = sde.prior_sampling((200_000, 1)).double()
    assert x.std() == pytest.approx(sde.prior_std, rel=0.01)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64) * sde.prior_std
    density = sde.prior_logp(grid[:, None]).exp()
    assert torch.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    second = torch.trapezoid(density * grid**2, grid)
    assert second == pytest.approx(sde.prior_std**2, rel=1e-4)


@pytest.mark.parametrize("sde", (VPSDE(N=10_000), VESDE(N=10_000)), ids=repr)
@pytest.mark.slow
def test_chain_has_the_process_as_its_limit(sde):
    """With many steps the chain's variance of x_1 given x_0 = 0 is that of the process."""
    variance = torch.zeros((), dtype=torch.float64)
    for i in range(sde.N):
        t = torch.tensor([i / (sde.N - 1)], dtype=torch.float64)
        f, G = sde.discretize(torch.ones(1, 1, dtype=torch.float64), t)
        variance = (1 + f[0, 0].double()) ** 2 * variance + G[0].double() ** 2
    expected = sde.marginal_coeffs(torch.ones(1, dtype=torch.float64))[1][0]
    assert variance.sqrt() == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize("make", (VPSDE, subVPSDE))
def test_chains_of_too_few_steps_are_refused(make):
    """Where their variances are needed: a process of any N can be had and followed."""
    sde, t = make(N=10), torch.tensor([0.5, 1.0])
    drift, _ = sde.increment(torch.ones(2, 1), t, t / 2)
    assert drift.isfinite().all()
    with pytest.raises(ValueError, match=r"N=10\) has too few steps.* up to 2,.*above 20,"):
        sde.langevin_alpha(t)
    sde.N = 21
    assert (sde.langevin_alpha(t) > 0).all()


@pytest.mark.parametrize("predictor", ("reverse_diffusion", "ancestral_sampling"))
def test_no_sampler_makes_steps_of_a_variance_above_1(predictor):
    sde, predictor = VPSDE(N=19), sampling.get_predictor(predictor)
    draw = [
        sampling.get_pc_sampler(
            sde, (2, 3), predictor, None, lambda x: x, 0.1, continuous=True, steps=steps
        )
        for steps in (0, 50)
    ]
    with pytest.raises(ValueError, match=r"too few steps.*sampling\.num_steps"):
        draw[0](GaussianOracle(sde))
    assert draw[1](GaussianOracle(sde))[0].isfinite().all()


class TwiceAsLong(VPSDE):
    T = 2.0


class HalfAsLong(VPSDE):
    T = 0.5


class TwiceAsLongSubVP(subVPSDE):
    T = 2.0


@pytest.mark.parametrize("make", (VPSDE, TwiceAsLong, HalfAsLong, TwiceAsLongSubVP))
def test_the_chain_spans_all_of_time(make):
    """beta_i is beta(t) times a step's length, wherever time ends; as published where it is 1."""
    sde = make(N=500)
    t = torch.linspace(0, sde.T, sde.N, dtype=torch.float64)
    torch.testing.assert_close(sde.discrete_betas.double(), sde.T / sde.N * sde.beta(t))
    alpha = 1 - sde.T / sde.N * sde.beta(t)
    torch.testing.assert_close(sde.langevin_alpha(t + 1e-9).double(), alpha)
    for finding in checks.process(sde):
        assert finding.subject != "chain" or finding.state == "ok", finding
    if isinstance(sde, VPSDE):
        levels = torch.arange(500.0)
        torch.testing.assert_close(sde.noise_label(sde.level_time(levels), False), levels)
    if sde.T == 1:
        assert torch.equal(sde.discrete_betas, torch.linspace(0.1 / 500, 20 / 500, 500))


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_reverse_drift(sde):
    """f - g^2 score for the SDE, half of it and no noise for the ODE."""
    x, t = torch.randn(3, 2), torch.full((3,), 0.4)
    (drift, g), score = sde.sde(x, t), -x
    backwards, same_g = sde.reverse(lambda x, t: -x).sde(x, t)
    torch.testing.assert_close(backwards, drift - g[:, None] ** 2 * score)
    torch.testing.assert_close(same_g, g)
    flow, no_g = sde.reverse(lambda x, t: -x, probability_flow=True).sde(x, t)
    torch.testing.assert_close(flow, drift - 0.5 * g[:, None] ** 2 * score)
    assert no_g.shape == (3,) and not no_g.any()


def test_tables_are_looked_up_on_the_device_of_the_index():
    sde = VPSDE(beta_max=5, N=10)
    index = torch.tensor([0, 9], device="meta")
    assert sde.lookup("alphas", index).device.type == "meta"
    assert sde.lookup("alphas", index.new_zeros(2, device="cpu")).device.type == "cpu"


@pytest.mark.parametrize("make", (VPSDE, subVPSDE, VESDE))
def test_tables_follow_the_number_of_steps(make):
    sde, expected = make(N=1000), make(N=20)
    t = torch.linspace(0.05, 1, 7)
    sde.discretize(torch.ones(7, 2), t)  # makes the tables of 1000 steps
    sde.N = 20
    torch.testing.assert_close(
        sde.discretize(torch.ones(7, 2), t), expected.discretize(torch.ones(7, 2), t)
    )
    torch.testing.assert_close(sde.langevin_alpha(t), expected.langevin_alpha(t))
    with pytest.raises(ValueError, match="N = 0"):
        sde.N = 0


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_steps_between_two_times_compose(sde):
    """The transition from r to t is that from r to s, then from s to t."""
    r, s, t = (torch.tensor([x], dtype=torch.float64) for x in (0.1, 0.4, 0.9))
    (first, G1), (second, G2), (whole, G) = (
        sde.transition(*pair) for pair in ((s, r), (t, s), (t, r))
    )
    torch.testing.assert_close(first * second, whole)
    torch.testing.assert_close((second * G1) ** 2 + G2**2, G**2)


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_the_last_step_leads_to_the_data(sde):
    """From time t to 0: the transition is that of p(x_t | x_0)."""
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    torch.testing.assert_close(sde.transition(t, torch.zeros_like(t)), sde.marginal_coeffs(t))


@pytest.mark.parametrize("make", (VPSDE, subVPSDE, VESDE))
def test_mistakes_are_named(make):
    with pytest.raises(ValueError, match="N = 0"):
        make(N=0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        make().marginal_prob(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="grow"):
        make(5, 1)


def test_unknown_process_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"vpsdee.*subvpsde, vesde, vpsde.*did you mean 'vpsde'"):
        get_sde("vpsdee")


def test_what_a_process_lacks_is_said():
    x, t = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(NotImplementedError, match="reverse_diffusion"):
        subVPSDE().ancestral_step(x, t, x)
    with pytest.raises(NotImplementedError, match=r"training\.continuous"):
        subVPSDE().discrete_coeffs(t)


class PlainVP(SDE):
    """VP with nothing but the abstract methods, as users of older code wrote processes."""

    def __init__(self, N):
        super().__init__(N)
        self.inner = VPSDE(N=N)

    @property
    def T(self):
        return 1

    def sde(self, x, t):
        drift = -0.5 * self.inner.beta(t)[(...,) + (None,) * (x.dim() - 1)] * x
        return drift, torch.sqrt(self.inner.beta(t))

    def marginal_prob(self, x, t):
        log_mean = -0.25 * t**2 * 19.9 - 0.05 * t
        mean = torch.exp(log_mean[(...,) + (None,) * (x.dim() - 1)]) * x
        return mean, torch.sqrt(1.0 - torch.exp(2.0 * log_mean))

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        return self.inner.prior_logp(z)


@pytest.mark.parametrize("predictor", ("euler_maruyama", "reverse_diffusion", None))
@pytest.mark.parametrize("corrector", ("langevin", "ald", None))
def test_process_with_only_abstract_methods_samples(predictor, corrector):
    """It equals the full class with the same discretisation."""
    results = []
    for sde in (PlainVP(50), VPSDE(N=50)):
        if isinstance(sde, VPSDE):
            sde.discretize = lambda x, t, sde=sde: SDE.discretize(sde, x, t)
            sde.langevin_alpha = torch.ones_like
        sampler = sampling.get_pc_sampler(
            sde,
            (16, 3),
            predictor and sampling.get_predictor(predictor),
            corrector and sampling.get_corrector(corrector),
            lambda x: x,
            0.16,
            continuous=True,
        )
        torch.manual_seed(0)
        results.append(sampler(GaussianOracle(golden_sde("vpsde")))[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_process_with_only_abstract_methods_everywhere_else():
    x, oracle = torch.randn(8, 3), GaussianOracle(golden_sde("vpsde"))
    results = []
    for sde in (PlainVP(50), VPSDE(N=50)):
        torch.manual_seed(0)
        results.append(
            (
                sampling.get_ode_sampler(sde, (4, 3), lambda x: x)(oracle)[0],
                get_likelihood_fn(sde, lambda x: x)(oracle, x)[0],
                get_sde_loss_fn(sde, train=True)(oracle, x),
                get_score_fn(sde, oracle, continuous=True)(x, torch.full((8,), 0.5)),
            )
        )
    for plain, full in zip(*results, strict=True):
        torch.testing.assert_close(plain, full, rtol=1e-3, atol=1e-3)


def test_copies_are_independent():
    sde = VPSDE(beta_max=5, N=10)
    other = copy.deepcopy(sde)
    other.alphas[:] = math.nan
    assert not sde.alphas.isnan().any()
