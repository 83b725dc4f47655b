"""Processes: the identities that tie drift, diffusion and marginals together."""

import copy
import functools
import math

import pytest
import torch
from oracles import Cosine, GaussianOracle, golden_sde, inverse_scaler

import checks
import sampling
from likelihood import get_elbo_fn, get_likelihood_fn, get_log_likelihood_fn, get_vlb_fn
from losses import get_ddpm_loss_fn, get_sde_loss_fn
from models.utils import get_score_fn
from sde_lib import (
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    LinearSDE,
    batch_mul,
    get_sde,
    registered_sdes,
    subVPSDE,
)

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
@pytest.mark.parametrize(("samples", "times"), ((4, 1), (1, 4)))
def test_one_time_stands_for_all_samples_and_one_sample_for_all_times(sde, samples, times):
    """As in the published code."""
    x, t = torch.rand(samples, 2, 3), torch.linspace(0.1, 0.9, times)
    for name in ("sde", "marginal_prob"):
        mapped, coefficient = getattr(sde, name)(x, t)
        whole = getattr(sde, name)(x.expand(4, -1, -1), t.expand(4))
        torch.testing.assert_close((mapped, coefficient.expand(4)), whole)


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
@pytest.mark.parametrize("shape", ((1,), (4, 2, 3)), ids=str)
def test_a_time_may_be_a_number(sde, shape):
    """Coefficients are then one number for all samples."""
    x = torch.rand(shape)
    for name in ("sde", "marginal_prob"):
        whole = getattr(sde, name)(x, torch.full(shape[:1], 0.5))
        for t in (0.5, torch.tensor(0.5)):
            mapped, coefficient = getattr(sde, name)(x, t)
            assert coefficient.shape == ()
            torch.testing.assert_close((mapped, coefficient.expand(shape[0])), whole)
    at_end = sde.marginal_prob(x, sde.T)[1]
    assert at_end == pytest.approx(sde.marginal_coeffs(torch.tensor([sde.T]))[1].item())


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
def test_data_may_be_elsewhere_than_times_where_their_noise_is_asked_for(sde):
    t = torch.tensor([0.3, 0.6])
    mean, std = sde.marginal_prob(torch.empty(2, 3, device="meta"), t)
    assert mean.shape == (2, 3)
    torch.testing.assert_close(std, sde.marginal_coeffs(t)[1])


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
    settings = sde, (2, 3), predictor, None, lambda x: x, 0.1
    with pytest.raises(ValueError, match=r"too few steps.*sampling\.num_steps"):
        sampling.get_pc_sampler(*settings, continuous=True)
    draw = sampling.get_pc_sampler(*settings, continuous=True, steps=50)
    assert draw(GaussianOracle(sde))[0].isfinite().all()


class TwiceAsLong(VPSDE):
    T = 2.0


class HalfAsLong(VPSDE):
    T = 0.5


class TwiceAsLongSubVP(subVPSDE):
    T = 2.0


class FourTimesAsLongVE(VESDE):
    T = 4.0


def test_noise_levels_of_ve_span_all_of_time():
    """As they did at T = 1 alone: elsewhere the chain and its labels were of other noise."""
    long, sde = FourTimesAsLongVE(N=100), VESDE(N=100)
    t = torch.linspace(0.02, 0.98, 8)
    torch.testing.assert_close(long.sigma(4 * t), sde.sigma(t))
    torch.testing.assert_close(2 * long.diffusion(4 * t), sde.diffusion(t))
    assert torch.equal(long.noise_label(4 * t, False), sde.noise_label(t, False))
    torch.testing.assert_close(long.level_coeffs(4 * t), sde.level_coeffs(t))
    assert all(finding.state == "ok" for finding in checks.process(long))
    x = torch.ones(8, 1)
    torch.testing.assert_close(long.posterior(x, 4 * t, 2 * t, -x), sde.posterior(x, t, t / 2, -x))


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


def test_an_own_posterior_is_that_of_a_step_of_the_chain():
    class Own(TwiceAsLongSubVP):
        def posterior(self, x, t, s, score):
            return s, t

    t = torch.tensor([0.1, 1.3, 2.0])
    s, _ = Own(N=10).ancestral_step(t, t, t)
    torch.testing.assert_close(s, torch.tensor([0.0, 1.1, 1.8]))


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


# --- Subclasses that override one form of two -----------------------------------------------------


class PublishedCosine(VPSDE):
    """Another schedule by the methods of the published code."""

    T = 0.99

    def sde(self, x, t):
        beta = math.pi * torch.tan(math.pi / 2 * t)
        return batch_mul(-0.5 * beta, x), torch.sqrt(beta)

    def marginal_prob(self, x, t):
        return batch_mul(torch.cos(math.pi / 2 * t), x), torch.sin(math.pi / 2 * t)

    def discretize(self, x, t):
        return SDE.discretize(self, x, t)


class OfImages(PublishedCosine):
    """For images alone, of which it takes the sides, as much published code."""

    def marginal_prob(self, x, t):
        B, _, _, _ = x.shape
        scale = torch.cos(math.pi / 2 * t).reshape(B, 1, 1, 1)
        return scale * x, torch.sin(math.pi / 2 * t)


class Mixin:
    """Published methods to be put before a process."""

    T = 0.99
    sde, marginal_prob = PublishedCosine.sde, PublishedCosine.marginal_prob
    discretize = PublishedCosine.discretize


class Mixed(Mixin, subVPSDE):
    pass


class OnlyPublished(LinearSDE):
    """Of `LinearSDE` no function of time."""

    T = 0.99
    sde, marginal_prob = PublishedCosine.sde, PublishedCosine.marginal_prob


def cosine_network(x, label):
    """The published convention, score = -output / std, for data of deviation 0.5."""
    m, s = Cosine().marginal_coeffs(label / 999)
    return batch_mul(s / ((0.5 * m) ** 2 + s**2), x)


@pytest.mark.parametrize("kind", (PublishedCosine, OfImages, Mixed, OnlyPublished))
def test_published_methods_give_functions_of_time(kind):
    sde, expected = kind(N=200), Cosine(N=200)
    t, s = torch.linspace(0.2, 0.9, 8), torch.linspace(0, 0.7, 8)
    for name in ("drift_rate", "diffusion", "marginal_coeffs"):
        torch.testing.assert_close(getattr(sde, name)(t), getattr(expected, name)(t))
    torch.testing.assert_close(sde.transition(t, s), expected.transition(t, s))
    x, time = torch.randn(5, 3, 2, 2), torch.full((5,), 0.3)
    score = get_score_fn(sde, cosine_network, continuous=True)(x, time)
    m, s = (float(c) for c in expected.marginal_coeffs(torch.tensor(0.3)))
    torch.testing.assert_close(score, -x / ((0.5 * m) ** 2 + s**2))


def test_a_process_by_published_methods_samples_and_has_likelihoods():
    """Data of deviation 0.5: the chain, other steps, log p at a point and its bound."""
    sde, shape = PublishedCosine(N=200), (4000, 1)
    for steps in (0, 100):
        torch.manual_seed(0)
        x, _ = sampling.get_pc_sampler(
            sde,
            shape,
            sampling.ReverseDiffusionPredictor,
            None,
            lambda x: x,
            0.0,
            continuous=True,
            steps=steps,
        )(cosine_network)
        assert x.std() == pytest.approx(0.5, rel=0.03)
    data = torch.full((2, 1), 0.5)
    log_p = -0.5 * math.log(2 * math.pi * 0.25) - 0.5
    found = get_log_likelihood_fn(sde, hutchinson_type="exact")(cosine_network, data).total
    torch.testing.assert_close(found, torch.full_like(found, log_p), rtol=0, atol=1e-4)
    bounds = []
    for process in (sde, Cosine(N=200)):
        torch.manual_seed(0)
        bounds.append(get_elbo_fn(process)(cosine_network, data).total)
    torch.testing.assert_close(*bounds)


class ShortVE(VESDE):
    """sigma(t) = 0.01 + 10 t, whatever sigma_max is."""

    def sigma(self, t):
        return 0.01 + 10 * t

    def diffusion(self, t):
        return torch.sqrt(20 * self.sigma(t))


def test_the_prior_of_ve_has_the_noise_at_T():
    """It was sigma_max also of a subclass that does not get there: samples spread too far."""
    assert VESDE(sigma_max=7).prior_std == 7 and FourTimesAsLongVE(sigma_max=7).prior_std == 7
    sde = ShortVE()
    assert sde.prior_std == pytest.approx(10.01)
    findings = {finding.subject: finding.state for finding in checks.process(sde)}
    assert findings["prior"] == findings["variance of x_t"] == "ok"


class PaperVE(VESDE):
    """With the variance of the paper, sigma(t)^2 - sigma(0)^2."""

    def marginal_prob(self, x, t):
        return x, torch.sqrt(self.sigma(t) ** 2 - self.sigma_min**2)


def test_posteriors_are_those_of_the_own_marginals():
    """VE: x_s given x_t = x and x_0 = 0 is N(x s_s^2 / s_t^2, (s_s G / s_t)^2)."""
    sde, x = PaperVE(0.5, 5.0), torch.tensor([[2.0], [2.0]])
    t, s = torch.tensor([0.9, 0.4]), torch.tensor([0.7, 0.1])
    (_, std), (_, std_s) = (sde.marginal_prob(x, u) for u in (t, s))
    mean, noise = sde.posterior(x, t, s, batch_mul(-1 / std**2, x))
    torch.testing.assert_close(mean, batch_mul((std_s / std) ** 2, x))
    torch.testing.assert_close(noise, std_s * torch.sqrt(std**2 - std_s**2) / std)


def unchanged(kind, names):
    """A subclass whose methods call those that they override."""

    def of(name):
        def method(self, *given):
            return getattr(super(sub, self), name)(*given)

        return method

    sub = type(kind)("Unchanged", (kind,), {name: of(name) for name in names})
    return sub


PUBLISHED_FORM = ("sde", "marginal_prob")
OF_TIME = ("drift_rate", "diffusion", "marginal_coeffs")


@pytest.mark.parametrize("sde", registered_sdes(), ids=repr)
@pytest.mark.parametrize("names", (PUBLISHED_FORM, OF_TIME, PUBLISHED_FORM + OF_TIME), ids=len)
def test_overrides_that_change_nothing_change_no_bit(sde, names):
    """Nor do those of a subclass that overrides the other form."""
    x, t, s = torch.randn(4, 3), torch.linspace(0.1, 0.9, 4), torch.linspace(0, 0.7, 4)
    # The general formula takes the place of the cosine process's own for steps.
    tolerance = 1e-5 if isinstance(sde, CosineVPSDE) else 0.0
    other = unchanged(unchanged(type(sde), names), OF_TIME)
    for changed in (unchanged(type(sde), names)(), other()):
        for name in PUBLISHED_FORM:
            assert_same(getattr(changed, name)(x, t), getattr(sde, name)(x, t))
        for name in OF_TIME:
            assert_same(getattr(changed, name)(t), getattr(sde, name)(t))
        assert_same(changed.transition(t, s), sde.transition(t, s), tolerance)
        assert_same(changed.discretize(x, t), sde.discretize(x, t), tolerance)


def assert_same(found, expected, tolerance=0.0):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Louder(VPSDE):
    def marginal_prob(self, x, t):
        mean, std = super().marginal_prob(x, t)
        return mean, 2 * std


class LouderStill(Louder):
    def marginal_coeffs(self, t):
        scale, std = super().marginal_coeffs(t)
        return scale, 3 * std


def test_each_subclass_changes_what_it_inherits():
    """In whichever form; both forms have the change of each class once."""
    x, t = torch.ones(3, 2), torch.tensor([0.1, 0.4, 0.8])
    expected = VPSDE().marginal_coeffs(t)[1]
    for kind, factor in ((Louder, 2), (LouderStill, 6)):
        torch.testing.assert_close(kind().marginal_prob(x, t)[1], factor * expected)
        torch.testing.assert_close(kind().marginal_coeffs(t)[1], factor * expected)
        torch.testing.assert_close(kind().noise_std(t, True), factor * expected)


class SineBeta(VPSDE):
    def beta(self, t):
        return 20 * torch.sin(math.pi / 2 * t)


class OwnIntegral(VPSDE):
    def beta_integral(self, t):
        return 5 * t**2


class LinearSigma(VESDE):
    def sigma(self, t):
        return 0.01 + 49.99 * t


class OwnSteps(VPSDE):
    def transition(self, t, s):
        return torch.exp((s - t) / 2), torch.sqrt(-torch.expm1(s - t))


class HalfDiffusion(subVPSDE):
    def diffusion(self, t):
        return super().diffusion(t) / 2


class OtherMarginals(subVPSDE):
    def marginal_prob(self, x, t):
        mean, std = super().marginal_prob(x, t)
        return mean, std.sqrt()


@pytest.mark.parametrize(
    "kind", (SineBeta, OwnIntegral, LinearSigma, OwnSteps, HalfDiffusion, OtherMarginals)
)
def test_a_subclass_that_overrides_too_little_is_refused(kind):
    """Its other methods were those of its parent: samples, losses and likelihoods were wrong."""
    sde, x = kind(), torch.zeros(2, 3)

    def network(x, label):
        return x

    uses = (
        lambda: get_sde_loss_fn(sde, False)(network, x),
        lambda: get_likelihood_fn(sde, lambda x: x)(network, x),
        lambda: get_elbo_fn(sde)(network, x),
        lambda: sampling.get_ode_sampler(sde, x.shape, lambda x: x),
    )
    for use in uses:
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}.* lead to other marginals .* by \d"
        ):
            use()


class Sine(SineBeta):
    """The same with its integral, but on the chain of a linear beta(t)."""

    def beta_integral(self, t):
        return 40 / math.pi * (1 - torch.cos(math.pi / 2 * t))


class SineChain(Sine):
    @property
    def discrete_betas(self):
        return self.beta(torch.linspace(0, self.T, self.N)) * self.T / self.N


@pytest.mark.parametrize(
    ("sde", "predictor"),
    (
        (Sine(), sampling.ReverseDiffusionPredictor),
        (Sine(), sampling.AncestralSamplingPredictor),
        (PublishedCosine(), sampling.AncestralSamplingPredictor),
    ),
)
def test_the_chain_of_another_process_is_refused(sde, predictor):
    """Samples had a deviation of 0.57, or 0.40, in place of 0.5."""
    settings = (2, 3), predictor, None, lambda x: x, 0.1
    with pytest.raises(ValueError, match=rf"chain of N = 1000 whose var.* {type(sde).__name__}"):
        sampling.get_pc_sampler(sde, *settings, continuous=True)
    sampling.get_pc_sampler(sde, *settings, continuous=True, steps=900)
    for N in (100, 1000):
        for fitting in (SineChain(N=N), VPSDE(0.1, 50, N), VESDE(1e-3, 1e4, N), CosineVPSDE(N)):
            sampling.get_pc_sampler(fitting, *settings, continuous=True)


class ReadsScores(VPSDE):
    def to_score(self, output, t, continuous):
        return output


class OwnCumprod(VPSDE):
    def __init__(self, N=1000):
        super().__init__(N=N)
        self.alphas_cumprod = torch.linspace(0.999, 0.01, N)


def test_conventions_of_a_part_of_the_levels_are_refused():
    """A network was trained by one convention, or at one chain, and read by the other."""
    x, network = torch.ones(2, 3), lambda x, label: x
    assert get_ddpm_loss_fn(VPSDE(), False)(network, x).isfinite()
    with pytest.raises(ValueError, match=r"to_score of ReadsScores.* score_from_output"):
        get_ddpm_loss_fn(ReadsScores(), False)(network, x)
    assert get_score_fn(ReadsScores(), network, continuous=True)(x, torch.ones(2)).equal(x)
    with pytest.raises(ValueError, match=r"discrete_chain\(\) of OwnCumprod.* discrete_betas"):
        get_vlb_fn(OwnCumprod(), inverse_scaler)
    settings = (2, 3), sampling.AncestralSamplingPredictor, None, lambda x: x, 0.1
    with pytest.raises(ValueError, match=r"discrete_chain\(\) of OwnCumprod.* discrete_betas"):
        sampling.get_pc_sampler(OwnCumprod(), *settings)
    sampling.get_pc_sampler(OwnLevels(), *settings)


class Wide(VPSDE):
    """A prior of its own, N(0, 4 I), by the published methods."""

    def prior_sampling(self, shape):
        return 2 * super().prior_sampling(shape)

    def prior_logp(self, z):
        z = z.flatten(1)
        constant = z.shape[1] * math.log(2 * math.sqrt(2 * math.pi))
        return -0.5 * (z / 2).square().sum(1) - constant


class WideByNoise(Wide):
    """The same, made from the noise that is given."""

    prior_std = 2.0

    def prior_from_normal(self, z):
        return 2 * z


@pytest.mark.parametrize("kind", (Wide, WideByNoise))
@pytest.mark.parametrize(
    "noise", (None, sampling.SampleNoise(0, range(20_000))), ids=("drawn", "of samples")
)
def test_samplers_start_at_the_own_prior(kind, noise):
    torch.manual_seed(0)
    start = sampling.get_pc_sampler(kind(N=1), (20_000, 2), None, None, lambda x: x, 0.0)
    x, _ = start(lambda x, label: torch.zeros_like(x), noise=noise)
    assert x.std() == pytest.approx(2, rel=0.02)


def test_draws_of_an_own_prior_follow_the_noise_that_is_given():
    """They followed the global seed: a run that went on, or came again, had other samples."""
    found = []
    for seed, number in ((0, 0), (1, 0), (1, 5)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(
            Wide().prior_from_normal(
                sampling.SampleNoise(3, range(number, number + 4))(torch.empty(4, 2))
            )
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_prior_from_noise_gives_its_samples():
    sde, z = WideByNoise(), torch.randn(3, 2)
    torch.testing.assert_close(sde.prior_from_normal(z), 2 * z)
    torch.manual_seed(0)
    samples = sde.prior_sampling((3, 2))
    torch.manual_seed(0)
    torch.testing.assert_close(samples, 2 * torch.randn(3, 2))


class SameDensity(VPSDE):
    """The density of the prior as published code restates it."""

    def prior_logp(self, z):
        _, size = z.shape
        return -size / 2 * math.log(2 * math.pi) - z.square().sum(1) / 2


@pytest.mark.parametrize("kind", ("elbo", "vlb"))
def test_bounds_are_for_priors_that_they_know(kind):
    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])

    def bound(sde):
        torch.manual_seed(0)
        if kind == "elbo":
            return get_elbo_fn(sde, num_times=4)(GaussianOracle(VPSDE()), x).total
        network = GaussianOracle(VPSDE(N=40), continuous=False)
        return get_vlb_fn(sde, inverse_scaler)(network, x).total

    with pytest.raises(ValueError, match=r"prior_logp of Wide.*prior_std = 1.*set prior_std"):
        bound(Wide(N=40))
    assert torch.equal(bound(SameDensity(N=40)), bound(VPSDE(N=40)))
    none = get_elbo_fn(SameDensity(N=40))(GaussianOracle(VPSDE()), x[:0])
    assert none.total.shape == (0,)
    assert (bound(WideByNoise(N=40)) - bound(VPSDE(N=40))).abs().min() > 0.1


class OwnBetas(VPSDE):
    """Its own table, as published classes set it."""

    def __init__(self, N=20):
        self.discrete_betas = torch.full((N,), 0.05)
        super().__init__(N=N)


class OwnBetasAfterwards(VPSDE):
    def __init__(self, N=20):
        super().__init__(N=N)
        self.alphas  # noqa: B018  (made, and to be replaced)
        self.discrete_betas = torch.full((N,), 0.05)
        self.alphas = 1 - self.discrete_betas


@pytest.mark.parametrize("kind", (OwnBetas, OwnBetasAfterwards))
def test_own_tables_are_kept(kind):
    """And those that are made of them follow; another number of steps is refused."""
    sde, t = kind(), torch.tensor([0.5])
    assert sde.alphas_cumprod[3] == pytest.approx(0.95**4)
    sde.N = 20
    for process in (sde, sde.with_steps(20)):
        torch.testing.assert_close(process.discretize(t[:, None], t)[1], torch.tensor([0.05**0.5]))
    for change in (sde.with_steps, lambda N: setattr(sde, "N", N)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}.*its own discrete_betas.* N = 10:"):
            change(10)
    assert sde.N == 20 and kind(N=30).alphas.shape == (30,)


class CachedBetas(VPSDE):
    """A table that is a cached property of a user's."""

    @functools.cached_property
    def discrete_betas(self):
        return torch.full((self.N,), 0.05)


class OwnLevels(VPSDE):
    """The table of latent diffusion."""

    def __init__(self, N=1000):
        self.discrete_betas = torch.linspace(0.00085**0.5, 0.012**0.5, N) ** 2
        super().__init__(N=N)


def test_levels_of_another_process_than_the_marginals_are_refused_where_both_count():
    """Samples of a network of such levels had a deviation of 0.27 in place of 0.5."""
    shape, scaler, mode = (2, 3), lambda x: x, {"continuous": False}
    euler, chain = sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor
    uses = (
        lambda sde: sampling.get_ode_sampler(sde, shape, scaler, **mode),
        lambda sde: sampling.get_adaptive_sampler(sde, shape, scaler, **mode),
        lambda sde: sampling.get_solver_sampler(sde, shape, sampling.DDIM, scaler, 9, **mode),
        lambda sde: sampling.get_pc_sampler(sde, shape, euler, None, scaler, 0.1, **mode),
        lambda sde: get_log_likelihood_fn(sde, **mode),
        lambda sde: get_elbo_fn(sde, **mode),
    )
    for use in uses:
        for N in (100, 1000):
            for sde in (VPSDE(0.1, 50, N), VESDE(N=N), CosineVPSDE(N, continuous=False)):
                use(sde)
        with pytest.raises(ValueError, match=r"levels of the chain of OwnLevels.*'chain', which"):
            use(OwnLevels())
    sampling.get_pc_sampler(OwnLevels(), shape, chain, None, scaler, 0.1, **mode)


def test_a_cached_property_follows_the_number_of_steps():
    sde = CachedBetas(N=20)
    assert sde.alphas.shape == (20,)
    sde.N = 30
    assert sde.alphas.shape == (30,) and sde.with_steps(10).discrete_betas.shape == (10,)


def test_a_table_that_is_set_anew_counts_on_every_device():
    sde = VESDE(N=20)
    other = copy.copy(sde)
    for process, N in ((sde, 20), (other, 7), (sde, 20), (other, 5)):
        if N < 20:
            process.discrete_sigmas = torch.ones(N)
        assert process.table_on("discrete_sigmas", torch.device("meta")).shape == (N,)


def test_copies_with_other_steps_make_their_own_tables():
    sde = VPSDE(N=20)
    shared = copy.copy(sde)
    made, other = sde.alphas, sde.with_steps(30)
    assert other.alphas.shape == (30,) and sde.alphas is made
    shared.N = 40
    assert shared.alphas.shape == (40,) and sde.alphas is made


class NotLinear(VPSDE):
    def sde(self, x, t):
        return -(x**3), torch.ones_like(t)


def test_a_drift_that_is_not_linear_has_no_rate():
    for ask in (lambda: NotLinear().drift_rate(torch.ones(1)), lambda: get_elbo_fn(NotLinear())):
        with pytest.raises(ValueError, match=r"sde\(x, t\) of NotLinear.* not linear.*likelihood"):
            ask()


def test_a_method_that_fails_for_data_of_every_rank_is_named():
    class Broken(VPSDE):
        def marginal_prob(self, x, t):
            raise RuntimeError("no mean")

    with pytest.raises(ValueError, match=r"marginal_prob\(x, t\) of Broken.* a mean"):
        Broken().noise_std(torch.ones(2), True)


@pytest.mark.parametrize("make", (VPSDE, VESDE, subVPSDE, CosineVPSDE))
def test_a_number_of_steps_is_whole(make):
    sde = make(N=1e2)
    assert repr(sde) == repr(make(N=100)) and torch.isfinite(sde.discretize(*torch.ones(2, 1))[1])
    for wrong in (99.5, math.inf):
        with pytest.raises(ValueError, match=rf"a whole number of .* steps, not N = {wrong}"):
            make(N=wrong)


def test_copies_are_independent():
    sde = VPSDE(beta_max=5, N=10)
    other = copy.deepcopy(sde)
    other.alphas[:] = math.nan
    assert not sde.alphas.isnan().any()
