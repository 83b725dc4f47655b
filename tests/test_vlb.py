"""The variational bound of discrete chains against closed forms and recorded figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import GaussianOracle, inverse_scaler
from recordings import load_tensors
from small_runs import small_config

import run_lib
from likelihood import get_vlb_fn
from sampling import SampleNoise
from score_lib.sdes.chain import Chain
from score_lib.sdes.process import SDE
from score_lib.vlb import GreyLevels, Prediction
from sde_lib import VESDE, VPSDE, LinearSDE, subVPSDE

LN2 = math.log(2)
CHAINS = {
    "vp": (VPSDE(N=40), inverse_scaler),
    "ve": (VESDE(sigma_min=0.02, sigma_max=5, N=30), lambda x: x),
}


class Respaced(LinearSDE):
    """A chain of given bar alphas; it has no continuous time."""

    drift_rate = diffusion = marginal_coeffs = None

    def __init__(self, cumprod):
        super().__init__(len(cumprod))
        self.cumprod = cumprod

    def noise_label(self, t, continuous):
        return t * (self.N - 1)

    def discrete_coeffs(self, label):
        return self.cumprod[label].sqrt(), (1 - self.cumprod[label]).sqrt()


def network(labels, learned):
    """0.3 x + 0.0005 label, and perhaps 0.5 sin(3 x) beside it."""

    def model(x, i):
        eps = 0.3 * x + 0.0005 * labels[i].reshape(-1, 1, 1, 1).to(x)
        return torch.cat([eps, 0.5 * torch.sin(3 * x)], dim=1) if learned else eps

    return model


# --- Recorded figures -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("learned_range", "learned_range_respaced", "fixed_large"))
def test_terms_are_those_of_improved_diffusion(case):
    """Of step 0 to 5e-3: the recorded code approximates the normal distribution function."""
    golden = {
        name.removeprefix(case + "/"): array
        for name, array in load_tensors("golden_vlb.npz").items()
        if name.startswith(case + "/")
    }
    sde, labels, variance = VPSDE(N=1000), torch.arange(1000), "learned"
    if case == "fixed_large":
        sde, labels, variance = VPSDE(N=100), 10 * torch.arange(100), "large"
    elif case == "learned_range_respaced":
        sde, labels = Respaced(golden["alphas_cumprod"]), golden["labels"]
    x, t, bits = golden["x0"], golden["t"], 1 / (golden["x0"][0].numel() * LN2)
    predict = Prediction(sde, network(labels, variance == "learned"), variance, None, "cpu")
    found = bits * predict.step_term(x, t, golden["noise"])
    assert t[0] == 0
    torch.testing.assert_close(found[1:].float(), golden["term"][1:], rtol=2e-4, atol=0)
    decoder = bits * predict.decoder_term(x, golden["noise"], GreyLevels(inverse_scaler, 256))
    torch.testing.assert_close(decoder[:1].float(), golden["term"][:1], rtol=5e-3, atol=0)
    # The recorded prior is a small difference of float32 numbers.
    prior = bits * predict.prior_term(x)
    torch.testing.assert_close(prior.float(), golden["prior_bpd"], rtol=1e-3, atol=1e-9)


# --- Closed forms ---------------------------------------------------------------------------------


def quadrature(count=24):
    """Nodes and weights (count,) of expectations under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def by_hand(chain, prior_std, x, mu, s0, variance, half, ends):
    """The expected bound of one number x by the exact posterior mean of N(mu, s0^2) data, in bits.

    Posteriors are made by Bayes' rule from steps, and the decoder by the trapezoidal rule.
    """
    total, (m, s) = 0.0, (float(chain[0][-1]), float(chain[1][-1]))
    ratio = s**2 / prior_std**2
    total += 0.5 * ((m * x / prior_std) ** 2 + ratio - 1 - math.log(ratio))
    posteriors = []
    for i in range(len(chain[0])):
        m, s = float(chain[0][i]), float(chain[1][i])
        m1, s1 = (float(chain[0][i - 1]), float(chain[1][i - 1])) if i else (1.0, 0.0)
        r, step = m / m1, s**2 - (m / m1 * s1) ** 2
        posterior = 1 / (1 / s1**2 + r**2 / step) if i else 0.0
        posteriors.append((m, s, m1, s1, step, posterior))
    for i, (m, s, m1, s1, step, posterior) in enumerate(posteriors):
        k = m * s0**2 / (m**2 * s0**2 + s**2)  # the posterior mean is mu + k (x_t - m mu)
        error, spread = (1 - k * m) * (x - mu), k * s
        p = step if variance == "large" and i else posterior or posteriors[1][5]
        if i:
            share = posterior * m1 / s1**2
            square = share**2 * (error**2 + spread**2)
            total += 0.5 * (math.log(p / posterior) + posterior / p - 1 + square / p)
            continue
        z = torch.linspace(-9, 9, 20002, dtype=torch.float64)
        mean = x - error + spread * z
        mirror = torch.sign(mean - x)  # the lower tail is exact where the upper one is 1
        high = mirror * ((x + half if x < ends[1] - half else math.inf) - mean) / p**0.5
        low = mirror * ((x - half if x > ends[0] + half else -math.inf) - mean) / p**0.5
        inside = (torch.erfc(-high / 2**0.5) - torch.erfc(-low / 2**0.5)).abs() / 2
        mass = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        total += -float(torch.trapezoid(mass * torch.log(inside), z))
    return total / LN2


@pytest.mark.parametrize("variance", ("small", "large"))
@pytest.mark.parametrize("name", CHAINS)
def test_bound_of_gaussian_data_is_the_closed_form(name, variance):
    sde, inverse = CHAINS[name]
    nodes, weights = quadrature(60)
    _, m, s = sde.discrete_chain()
    ends = (-1.0, 1.0) if name == "vp" else (0.0, 1.0)
    half = (ends[1] - ends[0]) / 32
    oracle = GaussianOracle(sde, continuous=False, mu=0.2, s0=0.4)
    bound = get_vlb_fn(sde, inverse, 17, variance=variance, clip=False)
    for level in (0, 5, 16):
        x = ends[0] + 2 * half * level
        data = torch.full((len(nodes), 1), x, dtype=torch.float64)
        found = bound(oracle, data, noise=lambda like: nodes[:, None])
        expected = by_hand((m, s), sde.prior_std, x, 0.2, 0.4, variance, half, ends)
        assert float((weights * found.total).sum()) == pytest.approx(expected, rel=2e-5)
        parts = found.prior + found.steps + found.decoder
        torch.testing.assert_close(found.total, parts)
        assert found.standard_error.isnan().all()


class Exact(torch.nn.Module):
    """Exact posterior mean of N(0, std^2) data, with or without the exact variances."""

    def __init__(self, sde, std, learned):
        super().__init__()
        self.chain, self.learned = Chain(sde), learned
        self.mean = GaussianOracle(sde, continuous=False, mu=0.0, s0=std)
        given_x = 1 / (1 / std**2 + (self.chain.m / self.chain.s) ** 2)  # of x_0
        before = torch.exp(self.chain.log_posterior)
        before[0] = 0
        exact = torch.log(before + self.chain.weight**2 * given_x)
        low, high = self.chain.log_posterior, self.chain.log_step
        self.v = 2 * (exact - low) / (high - low) - 1

    def forward(self, x, labels):
        eps = self.mean(x, labels)
        v = self.v[labels][:, None].expand_as(eps)
        return torch.cat([eps, v], dim=1) if self.learned else eps


def test_mean_bound_is_just_above_the_entropy():
    """Of grey levels of a Gaussian well inside the range; least above with the exact variances."""
    levels, std, sde = 129, 0.25, VPSDE(N=100)
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64)
    mass = torch.exp(-((grey / std) ** 2) / 2)
    mass /= mass.sum()
    entropy = -float((mass * mass.log()).sum()) / LN2
    nodes, weights = quadrature()
    data = grey.repeat_interleave(len(nodes))[:, None]
    z = nodes.repeat(levels)[:, None]
    gaps = {}
    for variance in ("small", "large", "learned"):
        bound = get_vlb_fn(sde, inverse_scaler, levels, variance=variance, clip=False)
        network = Exact(sde, std, variance == "learned")
        found = bound(network, data, noise=lambda like: z).total.reshape(levels, -1) @ weights
        gaps[variance] = float(mass @ found) - entropy
    assert 0 < gaps["learned"] < 0.001 < gaps["large"] < gaps["small"]


@pytest.mark.parametrize("levels", (2, 17, 256))
@pytest.mark.parametrize("scaler", (inverse_scaler, lambda x: x), ids=("centred", "not"))
def test_probabilities_of_all_grey_levels_sum_to_one(scaler, levels):
    bins = GreyLevels(scaler, levels)
    low = -1.0 if scaler is inverse_scaler else 0.0
    grey = torch.linspace(low, 1.0, levels, dtype=torch.float64)[:, None]
    mean = torch.tensor([-3.0, low, 0.1234, 0.98, 2.5], dtype=torch.float64)
    for std in (1e-3, 0.1, 2.0):
        logs = bins.log_probability(grey, mean, torch.tensor(std, dtype=torch.float64))
        assert logs.isfinite().all()
        torch.testing.assert_close(logs.logsumexp(0), torch.zeros(5).double(), rtol=0, atol=1e-12)


def test_bound_of_a_negative_is_that_of_the_image():
    """By an inverse scaler that falls."""
    sde, x = VPSDE(N=30), torch.linspace(-1, 1, 17)[:, None]
    oracle = GaussianOracle(sde, continuous=False)
    rising, falling = (
        get_vlb_fn(sde, scaler, 17)(oracle, x, noise=torch.ones_like)
        for scaler in (inverse_scaler, lambda x: inverse_scaler(-x))
    )
    assert torch.equal(rising.total, falling.total)


# --- Estimates ------------------------------------------------------------------------------------


def test_estimate_over_some_steps_is_unbiased():
    """The mean over all shifts of the strata is the sum over all steps, for any network."""
    sde, count = CHAINS["vp"][0], 40_000
    data = torch.full((count, 1), 0.25, dtype=torch.float64)

    def model(x, labels):
        return 0.3 * x + torch.sin(labels.to(x))[:, None]

    def noise(like):  # evenly spread shifts, and no noise in x
        shifts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return torch.special.ndtri(shifts) if like.dim() == 1 else torch.zeros_like(like)

    whole = get_vlb_fn(sde, inverse_scaler, 17)(model, data[:1], noise=torch.zeros_like)
    for num_times in (2, 5, 38):
        bound = get_vlb_fn(sde, inverse_scaler, 17, num_times=num_times)
        found = bound(model, data, noise=noise)
        assert float(found.steps.mean()) == pytest.approx(float(whole.steps), rel=1e-4)
        assert found.steps.std() > 0 and torch.equal(found.decoder[:1], whole.decoder)
    same = get_vlb_fn(sde, inverse_scaler, 17, num_times=39)(model, data[:1], noise=noise)
    assert torch.equal(same.steps, whole.steps) and same.standard_error.isnan()


def test_standard_error_is_that_of_repeated_estimates():
    sde = VPSDE()
    torch.manual_seed(0)
    data = torch.zeros(600, 4)
    oracle = GaussianOracle(sde, continuous=False, mu=0.0, s0=0.5)
    found = get_vlb_fn(sde, inverse_scaler, 17, num_times=20)(oracle, data)
    expected = float(found.standard_error.square().mean().sqrt())
    assert float(found.steps.std()) == pytest.approx(expected, rel=0.15)


def test_bound_of_a_sample_is_a_function_of_its_noise():
    sde, x = VPSDE(N=30), torch.linspace(-1, 1, 15).reshape(5, 3)
    oracle, bound = GaussianOracle(sde, continuous=False), get_vlb_fn(sde, inverse_scaler, 15)
    whole = bound(oracle, x, noise=SampleNoise(1, range(5))).total
    part = bound(oracle, x[3:], noise=SampleNoise(1, range(3, 5))).total
    torch.testing.assert_close(whole[3:], part, rtol=1e-6, atol=1e-6)


def test_data_in_half_precision_have_the_bound_of_their_values():
    sde, x = VPSDE(N=30), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 0.5]).reshape(2, 3)
    oracle, bound = GaussianOracle(sde, continuous=False), get_vlb_fn(sde, inverse_scaler, 5)
    found, expected = (bound(oracle, d, noise=SampleNoise(0, range(2))) for d in (x.bfloat16(), x))
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=0)


@pytest.mark.parametrize("num_times", (0, 2))
def test_no_data_have_no_bounds(num_times):
    sde = VPSDE(N=30)
    bound = get_vlb_fn(sde, inverse_scaler, 17, num_times=num_times)
    found = bound(GaussianOracle(sde, continuous=False), torch.zeros(0, 3))
    assert found.total.shape == found.standard_error.shape == (0,)


# --- Settings -------------------------------------------------------------------------------------


def test_learned_variances_are_between_the_fixed_ones():
    """v = -1 gives small ones at all steps; v = 1 those of a step, large ones but at step 0."""
    sde, z = VPSDE(N=30), torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
    x = torch.linspace(-1, 1, 13)[:12].repeat(2).reshape(2, 3, 2, 2)

    def terms(variance, v=None):
        def model(x, labels):
            return 0.5 * x if v is None else torch.cat([0.5 * x, torch.full_like(x, v)], dim=1)

        return get_vlb_fn(sde, inverse_scaler, 13, variance=variance)(
            model, x, noise=lambda like: z
        )

    small, low = terms("small"), terms("learned", -1.0)
    torch.testing.assert_close(low.steps, small.steps)
    torch.testing.assert_close(low.decoder, small.decoder)
    large, high = terms("large"), terms("learned", 1.0)
    torch.testing.assert_close(high.steps, large.steps)
    assert (high.decoder - large.decoder).abs().min() > 0.01
    assert (large.steps - small.steps).abs().min() > 0.01


def test_predictions_are_clamped_to_the_range_of_the_data():
    """A network that predicts far too large an x_0 predicts 1, or its own value unclamped."""
    sde, x = VPSDE(N=30), torch.ones(1, 4)

    def model(y, labels):  # x_0 = (y - s eps) / m = 3
        m, s = sde.discrete_coeffs(labels)
        return (y - 3 * m[:, None]) / s[:, None]

    settings = {"noise": torch.zeros_like}
    clamped = get_vlb_fn(sde, inverse_scaler, 17)(model, x, **settings)
    assert float(clamped.steps) == 0
    free = get_vlb_fn(sde, inverse_scaler, 17, clip=False)(model, x, **settings)
    snr = sde.alphas_cumprod.double() / (1 - sde.alphas_cumprod.double())
    expected = 0.5 * (snr[0] - snr[-1]) * 2**2 / LN2
    assert float(free.steps) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("sde", (VPSDE(N=50), VESDE(N=50)), ids=("vp", "ve"))
def test_chain_is_that_of_the_process(sde):
    """Its labels, levels and steps agree with `discrete_coeffs` and `discretize`."""
    chain, general = Chain(sde), SDE.discrete_chain(sde)
    for found, expected in zip((chain.labels, chain.m, chain.s), general, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)[1:] + 1e-9
    step = sde.discretize(torch.ones(49, 1), t)[1].double()
    torch.testing.assert_close(chain.log_step[1:].exp().sqrt(), step, rtol=1e-5, atol=0)
    assert chain.importance().sum() == pytest.approx(1)


def test_mistakes_are_refused():
    sde = VPSDE(N=30)
    for settings, message in (
        ({"variance": "medium"}, "unknown variance"),
        ({"num_times": 1}, "two or more times"),
        ({"levels": 1}, "two or more grey levels"),
    ):
        with pytest.raises(ValueError, match=message):
            get_vlb_fn(sde, inverse_scaler, **settings)
    with pytest.raises(ValueError, match="alike for all entries"):
        get_vlb_fn(sde, lambda x: x * torch.tensor([1.0, 2.0]))
    with pytest.raises(NotImplementedError, match="no discrete noise levels"):
        get_vlb_fn(subVPSDE(), inverse_scaler)
    with pytest.raises(ValueError, match="larger N"):
        get_vlb_fn(VPSDE(N=20), inverse_scaler)
    with pytest.raises(ValueError, match="LinearSDE"):
        get_vlb_fn(object(), inverse_scaler)
    bound = get_vlb_fn(sde, inverse_scaler, 17)
    with pytest.raises(ValueError, match="17 grey levels, but are"):
        bound(lambda x, t: x, torch.full((2, 3), 0.3))
    with pytest.raises(ValueError, match="twice the channels"):
        bound(lambda x, t: torch.cat([x, x], dim=1), torch.ones(2, 3))


@pytest.mark.slow
def test_learned_variances_by_config(tmp_path):
    """The second half of the channels of ADM arrives in the bound; without it, it is refused."""
    options = {"model__learn_sigma": True, "model__nf": 32, "model__ch_mult": (1, 2)}
    options |= {"training__snapshot_sampling": False, "training__continuous": False}
    options |= {"model__num_scales": 25, "eval__enable_vlb": True, "eval__enable_bpd": False}
    options |= {"training__n_iters": 6, "eval__vlb_num_times": 2}
    options |= {"eval__begin_ckpt": 1, "eval__end_ckpt": 1, "eval__enable_sampling": False}
    config = small_config("vp/digits_adm", **options, eval__enable_loss=False)
    run_lib.train(config, tmp_path)
    found = {}
    for variance in ("small", "large", "learned"):
        config.eval.vlb_variance = variance
        (record,) = run_lib.evaluate(config, tmp_path, f"eval_{variance}")
        found[variance] = record["vlb_bpd"]
    # The untrained v is 0: the geometric mean of both.
    assert min(found["small"], found["large"]) != found["learned"]
    assert np.isfinite(list(found.values())).all() and len(set(found.values())) == 3
    with pytest.raises(ValueError, match=r"'learned' needs a network with model.learn_sigma"):
        run_lib.setup(small_config("vp/digits", eval__vlb_variance="learned"))
