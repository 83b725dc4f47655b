"""Likelihoods against closed forms."""

import math

import pytest
import torch
from oracles import GaussianOracle, ScoreOracle

from likelihood import (
    bits_per_dim,
    get_div_fn,
    get_elbo_fn,
    get_likelihood_fn,
    get_log_likelihood_fn,
    offsets,
)
from score_lib.base.tensors import SampleNoise
from sde_lib import SDE, VESDE, VPSDE, subVPSDE

SDES = (VESDE(sigma_min=0.01, sigma_max=50), VPSDE(), subVPSDE())
SCALERS = {"centred": lambda x: (x + 1) / 2, "not centred": lambda x: x}


def gaussian_log_p(x, mu, std):
    return torch.distributions.Normal(mu, std).log_prob(x.double()).flatten(1).sum(1)


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize("levels", (256, 32, 17))
@pytest.mark.parametrize("scaler", SCALERS)
def test_gaussian_bits_per_dim(sde, levels, scaler):
    """Data ~ N(mu, s0^2 I) with its exact score.

    On the average: that p_T is not quite the prior, and p_eps not quite p_0, moves single
    samples in the first order, and their mean in the second.
    """
    mu, s0 = 0.3, 0.2
    torch.manual_seed(0)
    x = mu + s0 * torch.randn(500, 1, 4, 3)
    bpd, z, _ = get_likelihood_fn(sde, SCALERS[scaler], levels=levels)(
        GaussianOracle(sde, mu=mu, s0=s0), x
    )
    assert z.shape == x.shape
    # Per dimension: the density of a pixel on the scale of 0 ... levels, in bits.
    width = {"centred": 2, "not centred": 1}[scaler] / levels
    expected = -(gaussian_log_p(x, mu, s0) / 12 + math.log(width)) / math.log(2)
    assert bpd.mean() == pytest.approx(float(expected.mean()), abs=1e-3)
    torch.testing.assert_close(bpd, expected, rtol=0, atol=0.05)


BOUNDS = {
    "adaptive": lambda sde: get_log_likelihood_fn(sde, hutchinson_type="exact"),
    "steps": lambda sde: get_log_likelihood_fn(sde, hutchinson_type="exact", steps=20),
    "elbo": lambda sde: get_elbo_fn(sde, num_times=5),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_data_in_half_precision_have_the_density_of_their_values(kind):
    sde, x = VPSDE(), torch.linspace(-1, 1, 12).reshape(4, 3).bfloat16()
    found, expected = (
        BOUNDS[kind](sde)(GaussianOracle(sde), data, noise=SampleNoise(0, range(4))).total
        for data in (x, x.float())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_offsets_of_eight_bit_data():
    """7 bits for data in [-1, 1], 8 for data in [0, 1]."""
    zero = torch.zeros(1)
    assert bits_per_dim(zero, 5, SCALERS["centred"]) == 7
    assert bits_per_dim(zero, 5, SCALERS["not centred"]) == 8


@pytest.mark.parametrize("shape", ((2,), (3,), (2, 2, 3)))
@pytest.mark.parametrize("sign", (1, -1))
def test_every_dimension_may_have_a_scale_of_its_own(shape, sign):
    """The density of x in [0, 1] is that of the network's range over the scales' product."""
    scale = sign * torch.tensor([2.0, 3.0, 0.25])[: shape[0]].reshape(-1, *(1,) * (len(shape) - 1))
    shift = torch.linspace(0, 5, len(scale)).reshape(scale.shape)
    sde, x = VPSDE(), torch.zeros(2, *shape)
    data = GaussianOracle(sde, mu=0.0, s0=1.0)
    bpd, _, _ = get_likelihood_fn(sde, lambda x: scale * x + shift, "exact")(data, x)
    # The mean of log2 of 2 and 3, and of 2, 3 and 1 / 4.
    bits = (1 + math.log2(3)) / 2 if shape[0] == 2 else (math.log2(3) - 1) / 3
    expected = math.log2(2 * math.pi) / 2 + 8 + bits
    torch.testing.assert_close(bpd, torch.full_like(bpd, expected), rtol=0, atol=1e-4)


def test_offsets_of_scales_that_differ():
    a = torch.tensor([2.0, 0.125])
    assert offsets(lambda x: a * x + torch.tensor([0.0, 5.0])) == (8, -1)
    assert offsets(lambda x: a[:, None, None] * x, 4, shape=(2, 3, 3)) == (2, -1)
    assert offsets(lambda x: x + torch.tensor([0.0, 3.0]), shape=(2,)) == (8, 0)
    assert offsets(lambda x: 0.5 - 0.5 * x) == (8, -1)
    assert offsets(lambda x: ((x + 1) / 2).clamp(0, 1)) == (8, -1)


@pytest.mark.parametrize(
    "curve", (torch.sigmoid, torch.ones_like, lambda x: x.flip(1), lambda x: x[:, :1])
)
def test_inverse_scalers_that_are_not_affine_are_refused(curve):
    with pytest.raises(ValueError, match="should map each entry x of a datum"):
        offsets(curve, shape=(2,))


class Mixture(ScoreOracle):
    """Exact score of a mixture of two Gaussians in the plane, with mean 0."""

    def __init__(self, sde):
        super().__init__(sde)
        self.means = torch.tensor([[0.7, 0.35], [-0.3, -0.15]], dtype=torch.float64)
        self.stds = torch.tensor([0.15, 0.3], dtype=torch.float64)
        self.weights = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def sample(self, count):
        """Data, (count, 2)."""
        which = torch.multinomial(self.weights, count, replacement=True)
        z = torch.randn(count, 2, dtype=torch.float64)
        return self.means[which] + self.stds[which, None] * z

    def log_p(self, x, scale, std):
        """Log density of x_t, (B,), for m and s, (B,)."""
        variance = (scale[:, None] * self.stds) ** 2 + std[:, None] ** 2
        offset = x[:, None] - scale[:, None, None] * self.means
        square = offset.square().sum(-1) / variance
        return torch.logsumexp(
            self.weights.log() - square / 2 - torch.log(2 * math.pi * variance), dim=1
        )

    def score(self, x, scale, std):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            total = self.log_p(x, scale, std).sum()
            return torch.autograd.grad(total, x, create_graph=True)[0]


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.quick_cases(1)
def test_mixture_log_likelihood_with_exact_trace(sde):
    model = Mixture(sde)
    torch.manual_seed(0)
    x = model.sample(30)
    result = get_log_likelihood_fn(sde, hutchinson_type="exact", rtol=1e-6, atol=1e-6)(model, x)
    zero = torch.full((30,), 1e-5, dtype=torch.float64)
    expected = model.log_p(x, *sde.marginal_coeffs(zero))
    torch.testing.assert_close(result.total, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.total, result.prior + result.divergence)
    assert not result.standard_error.any()


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_given_steps_converge_with_the_fifth_power(sde):
    """To what the adaptive solver finds with a small tolerance."""
    model = Mixture(sde)
    torch.manual_seed(0)
    x = model.sample(20)
    exact = get_log_likelihood_fn(sde, hutchinson_type="exact", rtol=1e-9, atol=1e-9)(model, x)
    off = []
    for steps in (100, 200):
        found = get_log_likelihood_fn(sde, hutchinson_type="exact", steps=steps)(model, x)
        off.append(float((found.total - exact.total).square().mean().sqrt()))
        assert found.nfe == steps + 3
    assert off[1] < 1e-6 and off[0] / off[1] > 20


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_given_steps_give_the_bits_of_a_gaussian(sde):
    mu, s0 = 0.3, 0.2
    torch.manual_seed(0)
    x = mu + s0 * torch.randn(500, 1, 4, 3)
    bpd, _, _ = get_likelihood_fn(sde, SCALERS["centred"], steps=40)(
        GaussianOracle(sde, mu=mu, s0=s0), x
    )
    expected = -(gaussian_log_p(x, mu, s0) / 12 + math.log(2 / 256)) / math.log(2)
    assert bpd.mean() == pytest.approx(float(expected.mean()), abs=2e-3)


@pytest.mark.slow
def test_standard_error_covers_the_truth():
    """Exact and estimated log-likelihood differ by less than 2 errors about 95% of the time."""
    sde, model = VPSDE(), Mixture(VPSDE())
    torch.manual_seed(0)
    x = model.sample(400)
    exact = get_log_likelihood_fn(sde, hutchinson_type="exact")(model, x).total
    for kind in ("Gaussian", "Rademacher"):
        fn = get_log_likelihood_fn(sde, hutchinson_type=kind, num_probes=80)
        estimate = fn(model, x)
        assert (estimate.standard_error > 0).all()
        within = ((estimate.total - exact).abs() < 2 * estimate.standard_error).double().mean()
        assert within == pytest.approx(0.95, abs=0.03), kind


def test_one_probe_says_nothing_about_its_error():
    x = torch.randn(2, 3)
    result = get_log_likelihood_fn(VPSDE())(GaussianOracle(VPSDE()), x)
    assert result.standard_error.isnan().all()


def test_one_forward_pass_an_evaluation():
    sde = VPSDE()

    class Counting(GaussianOracle):
        calls = 0

        def forward(self, x, labels):
            self.calls += 1
            return super().forward(x, labels)

    model = Counting(sde)
    assert get_log_likelihood_fn(sde, num_probes=3)(model, torch.randn(2, 3)).nfe == model.calls


def test_results_do_not_depend_on_the_batch():
    """With per-sample error control and noise of its own, a sample's figures are its own."""
    sde, model = VPSDE(), Mixture(VPSDE())
    x = torch.randn(5, 2, dtype=torch.float64)
    fn = get_log_likelihood_fn(sde, per_sample=True)

    def run(rows):
        return fn(model, x[rows], noise=SampleNoise(1, rows)).total

    torch.testing.assert_close(
        run(range(5)), torch.cat([run(range(2)), run(range(2, 5))]), rtol=0, atol=1e-9
    )


def test_divergence_of_a_linear_map():
    A = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    div_fn = get_div_fn(lambda x, t: x @ A.T)
    x, t = torch.randn(4, 2), torch.zeros(4)
    eps = torch.tensor([1.0, -1.0]).expand(4, 2)
    expected = torch.full((4,), float(eps[0] @ A @ eps[0]))
    torch.testing.assert_close(div_fn(x, t, eps), expected)


def test_divergence_of_a_constant_is_0():
    x, t = torch.randn(4, 2), torch.zeros(4)
    weight = torch.ones(2, requires_grad=True)
    for fn in (lambda x, t: torch.ones_like(x), lambda x, t: weight.expand(4, 2)):
        assert torch.equal(get_div_fn(fn)(x, t, x), torch.zeros(4))
    with pytest.raises(ValueError, match="the function gives no gradient"):
        get_div_fn(lambda x, t: 2 * x.detach())(x, t, x)


class Exploding(SDE):
    """A user's own process without a drift; a network that says 0 leaves x where it is."""

    def sde(self, x, t):
        return torch.zeros_like(x), torch.ones_like(t)

    def marginal_prob(self, x, t):
        return x, t.sqrt()

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def test_a_flow_that_stands_still_has_the_density_of_the_prior():
    x = torch.randn(3, 2)
    result = get_log_likelihood_fn(Exploding())(lambda x, labels: torch.zeros_like(x), x)
    assert torch.equal(result.z, x) and not result.divergence.any()
    torch.testing.assert_close(result.total, gaussian_log_p(x, 0.0, 1.0))


class Detaching(torch.nn.Module):
    """Reads x without its graph; its own weight has a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, labels):
        return self.weight * x.detach()


WITHOUT_GRADIENT = {
    "no_grad": torch.no_grad()(lambda x, labels: 2 * x),
    "detached": Detaching(),
    "numpy": lambda x, labels: torch.from_numpy(x.detach().numpy().copy()),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@pytest.mark.parametrize("parametrization", ("", "v", "x0"))
def test_networks_without_a_gradient_are_refused(name, parametrization):
    model, x = WITHOUT_GRADIENT[name], torch.zeros(2, 3)
    for fn in (
        get_log_likelihood_fn(VPSDE(), parametrization=parametrization),
        get_log_likelihood_fn(VPSDE(), parametrization=parametrization, steps=5),
        get_elbo_fn(VPSDE(), parametrization=parametrization, num_times=2),
    ):
        with pytest.raises(ValueError, match="the network gives no gradient"):
            fn(model, x)


def test_a_constant_network_needs_no_gradient():
    """Its flow is that of the drift alone, whose divergence is known."""
    x, sde = torch.randn(3, 2), VPSDE()
    for constant in (torch.zeros_like, torch.no_grad()(torch.ones_like)):
        result = get_log_likelihood_fn(sde)(lambda x, labels, fn=constant: fn(x), x)
        (m, _), (m0, _) = (sde.marginal_coeffs(torch.tensor([t])) for t in (1.0, 1e-5))
        expected = (2 * torch.log(m / m0)).double().expand(3)
        torch.testing.assert_close(result.divergence, expected, rtol=1e-5, atol=0)
    assert get_elbo_fn(sde)(lambda x, labels: torch.zeros_like(x), x).total.isfinite().all()


@pytest.mark.parametrize("kind", ("adaptive", "steps", "exact", "elbo"))
def test_likelihoods_inside_inference_mode(kind):
    """They differentiate all the same, and give what they give outside."""
    sde, x = VPSDE(), torch.linspace(-1, 1, 6).reshape(2, 3)
    fn = {
        "adaptive": get_log_likelihood_fn(sde),
        "steps": get_log_likelihood_fn(sde, steps=10),
        "exact": get_log_likelihood_fn(sde, hutchinson_type="exact"),
        "elbo": get_elbo_fn(sde, num_times=3),
    }[kind]
    outside = fn(GaussianOracle(sde), x, noise=SampleNoise(0, range(2))).total
    with torch.inference_mode():
        x = x.clone()
        inside = fn(GaussianOracle(sde), x, noise=SampleNoise(0, range(2))).total
    assert torch.equal(inside, outside)
    after = fn(GaussianOracle(sde), x, noise=SampleNoise(0, range(2))).total
    assert torch.equal(after, outside)


@pytest.mark.parametrize("options", ({}, {"steps": 5}, {"per_sample": True}, {"num_probes": 2}))
@pytest.mark.parametrize("kind", ("Rademacher", "exact"))
def test_no_data_have_no_likelihoods(kind, options):
    sde, x = VPSDE(), torch.zeros(0, 2)
    bpd, z, _ = get_likelihood_fn(sde, SCALERS["centred"], kind, **options)(GaussianOracle(sde), x)
    assert bpd.shape == (0,) and z.shape == (0, 2)
    assert get_elbo_fn(sde)(GaussianOracle(sde), x).total.shape == (0,)


def test_mistakes_are_named():
    for kind in ("rademaker", None):
        with pytest.raises(ValueError, match="'Rademacher', 'Gaussian' and 'exact'"):
            get_likelihood_fn(VPSDE(), lambda x: x, hutchinson_type=kind)
    with pytest.raises(ValueError, match="at least one probe"):
        get_likelihood_fn(VPSDE(), lambda x: x, num_probes=0)
    with pytest.raises(ValueError, match="at least 3 steps, not 2"):
        get_log_likelihood_fn(VPSDE(), steps=2)(GaussianOracle(VPSDE()), torch.randn(2, 3))


class Detached(VPSDE):
    """A process without derivatives."""

    def marginal_coeffs(self, t):
        return tuple(value.detach() for value in super().marginal_coeffs(t))


class Still(VESDE):
    """A process whose noise does not grow."""

    def diffusion(self, t):
        return torch.zeros_like(t)

    def marginal_coeffs(self, t):
        return torch.ones_like(t), 2 + 0 * t


@pytest.mark.parametrize(
    ("sde", "message"), ((Detached(), "should be differentiable"), (Still(), "should grow"))
)
def test_steps_need_noise_that_grows_smoothly(sde, message):
    with pytest.raises(ValueError, match=message):
        get_log_likelihood_fn(sde, steps=10)(GaussianOracle(VPSDE()), torch.randn(2, 3))
