"""Data of every rank: samplers, likelihoods, bounds, losses and inverse problems.

All shapes have as many entries.  With the same noise, entry by entry, the results for data of any
rank are those for the flattened data, to rounding, and these are compared with closed forms:
Gaussian data whose entries all have different means and are all correlated.
"""

from __future__ import annotations

import math

import pytest
import torch
from ml_collections import ConfigDict
from operator_cases import dense
from oracles import GaussianDataOracle, exact_moments

import controllable_generation as control
import likelihood
import losses
import sampling
from models.conditioning import Given, Guided, Takes, taken_by
from score_lib.base.tensors import batch_mul
from score_lib.elbo import get_elbo_fn
from score_lib.inverse.measurements import build_operator
from score_lib.inverse.operators import OPERATORS
from score_lib.inverse.restoration import RESTORATIONS
from score_lib.options import complete
from score_lib.runs.conditions import Conditions
from score_lib.samplers.configured import _SAMPLERS, get_sampling_fn
from score_lib.samplers.grids import time_grid
from score_lib.samplers.steps import _CORRECTORS, _PREDICTORS
from score_lib.sdes.snr import marginal_coeffs
from score_lib.vlb import get_vlb_fn
from sde_lib import SDE, VESDE, VPSDE, CosineVPSDE, LinearSDE, subVPSDE

# By rank: channels first, no two sides of one length where that can be.
SHAPES = {1: (48,), 2: (3, 16), 3: (3, 2, 8), 4: (3, 2, 4, 2), 5: (3, 2, 2, 2, 2)}
n, B = 48, 4
RANKS = pytest.mark.parametrize("rank", (2, 3, 4, 5))
SDES = {
    "ve": lambda N: VESDE(sigma_max=20, N=N),
    "vp": lambda N: VPSDE(N=N),
    "subvp": lambda N: subVPSDE(N=N),
    "cosine": lambda N: CosineVPSDE(N=N),
}
# Each process with another rank.
EVERY_RANK = pytest.mark.parametrize(
    ("rank", "kind"), [(1, "vp"), (2, "ve"), (3, "vp"), (4, "subvp"), (5, "cosine")]
)

DOUBLE = {"dtype": torch.float64}
MEAN = torch.sin(torch.arange(n, **DOUBLE))
_ROOT = torch.randn(n, n, generator=torch.Generator().manual_seed(0), **DOUBLE)
COVARIANCE = 0.1 * torch.eye(n, **DOUBLE) + 0.2 * _ROOT @ _ROOT.T / n


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


def assert_as_flat(result_of, rank, tolerance=1e-9):
    """`result_of(shape)` has the same entries, in their order, as for vectors."""
    result, flat = result_of(SHAPES[rank]), result_of((n,))
    error = (result.reshape(flat.shape) - flat).abs().max() / flat.abs().max()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"


def oracle(sde):
    return GaussianDataOracle(sde, MEAN, COVARIANCE)


# --- Samplers ---------------------------------------------------------------------------------


def _names():
    """Every registered sampler, and predictor and corrector of predictor-corrector sampling."""
    others = [{"method": name, "num_steps": 4} for name in _SAMPLERS if name != "pc"]
    churned = [{"method": "heun", "num_steps": 4, "churn": 10.0}]
    pc = [{"predictor": name, "corrector": "none"} for name in _PREDICTORS if name != "none"]
    flow = [{"predictor": "reverse_diffusion", "corrector": "none", "probability_flow": True}]
    correctors = [{"predictor": "none", "corrector": name} for name in _CORRECTORS]
    found = others + churned + [{"method": "pc", **c} for c in pc + flow + correctors]
    return {"-".join(map(str, case.values())): case for case in found}


SAMPLERS = _names()
DEFAULTS = {
    "snr": 0.16,
    "n_steps_each": 1,
    "probability_flow": False,
    "noise_removal": True,
    "adaptive_rtol": 0.5,
}


def configured(sde, shape, settings, **options):
    config = {"sampling": DEFAULTS | settings, "training": {"continuous": True}}
    options = {"eps": sde.sampling_eps, **options}
    return get_sampling_fn(complete(ConfigDict(config)), sde, shape, lambda x: x, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_any_rank_are_those_of_vectors(name):
    # Sub-VP has no ancestral sampling.
    kinds = [kind for kind in SDES if (kind, "ancestral" in name) != ("subvp", True)]
    # Every process with every rank, over all samplers.
    first = list(SAMPLERS).index(name)
    for rank in (2, 3, 4, 5):
        sde = SDES[kinds[(first + rank) % len(kinds)]](21)

        def samples(shape, sde=sde):
            sample = configured(sde, (B, *shape), SAMPLERS[name])
            return sample(oracle(sde), noise=EntryNoise())[0]

        assert_as_flat(samples, rank)


# --- Closed forms -------------------------------------------------------------------------------

# The first entries, in few dimensions: moments of samples take a run for each.
FEW = {1: (8,), 2: (2, 4), 3: (2, 1, 4), 4: (2, 1, 2, 2), 5: (2, 1, 2, 1, 2)}
k = 8
FEW_MEAN, FEW_COVARIANCE = MEAN[:k], COVARIANCE[:k, :k]


def few_oracle(sde, mean=FEW_MEAN):
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


def flow_error(sde, settings, end):
    """Of a deterministic sampler, for data of rank 5."""
    z = sde.prior_std * EntryNoise()(torch.empty(B, *FEW[5]))
    x, _ = configured(sde, z.shape, settings)(few_oracle(sde), z)
    return float((x.flatten(1) - flow(sde, z.flatten(1), sde.T, end)[0]).abs().max())


def moments_error(sde, settings, end):
    """Of a sampler that is linear in its noise, without Monte-Carlo error, for data of rank 5."""

    def draw(count, noise):
        return configured(sde, (count, *FEW[5]), settings)(few_oracle(sde), noise=noise)[0]

    mean, covariance = exact_moments(draw, k)
    (m,), (s,) = coeffs(sde, end)
    expected = m**2 * FEW_COVARIANCE + s**2 * torch.eye(k)
    assert (mean - m * FEW_MEAN).abs().max() < 0.02
    return float(torch.linalg.norm(covariance - expected) / torch.linalg.norm(expected))


_PC, _FLOW = {"method": "pc", "corrector": "none"}, {"probability_flow": True}
# By sampler: the options, whether it is deterministic, a process, the order of convergence, and the
# error of 50 steps.
ERRORS = {
    "ddim": ({"method": "ddim"}, True, "vp", 1, 0.06),
    "dpmpp_2m": ({"method": "dpmpp_2m"}, True, "subvp", 2, 0.007),
    "dpmpp_3m": ({"method": "dpmpp_3m"}, True, "ve", 3, 3e-5),
    "heun": ({"method": "heun"}, True, "cosine", 2, 0.008),
    "dpmpp_sde": ({"method": "dpmpp_sde"}, False, "ve", 2, 0.008),
    "churn": ({"method": "heun", "churn": 10.0}, False, "vp", 2, 0.04),
    "euler_maruyama": (_PC | {"predictor": "euler_maruyama"}, False, "subvp", 1, 0.05),
    "reverse_diffusion": (_PC | {"predictor": "reverse_diffusion"}, False, "ve", 1, 0.2),
    "ancestral_sampling": (_PC | {"predictor": "ancestral_sampling"}, False, "cosine", 1, 0.05),
    "flow": (_PC | {"predictor": "reverse_diffusion"} | _FLOW, True, "subvp", 1, 0.01),
    "ald": (_PC | {"predictor": "euler_maruyama", "corrector": "ald"}, False, "vp", 1, 0.03),
}


@pytest.mark.parametrize("name", ERRORS)
def test_samples_of_rank_5_converge_to_the_closed_form(name):
    settings, deterministic, kind, order, most = ERRORS[name]
    error_of = flow_error if deterministic else moments_error
    errors = []
    for N in (25, 50):
        sde = SDES[kind](N)
        if settings["method"] == "pc":  # its last step leads to the data
            errors.append(error_of(sde, settings, 0.0))
        else:
            few = settings | {"num_steps": N, "noise_removal": False}
            errors.append(error_of(sde, few, sde.sampling_eps))
    assert errors[1] < most and errors[0] / errors[1] > 0.8 * 2**order


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("vp", {"method": "adaptive", "adaptive_rtol": 0.05}),
        ("ve", _PC | {"predictor": "euler_maruyama", "corrector": "langevin"}),
    ],
    ids=("adaptive", "langevin"),
)
def test_random_steps_give_the_distribution(kind, settings):
    """Of rank 5, within 4.5 standard errors of 2000 samples, to which all entries count alike."""
    sde = SDES[kind](50)
    x, _ = configured(sde, (2000, *FEW[5]), settings)(few_oracle(sde), noise=EntryNoise())
    root = torch.linalg.cholesky(FEW_COVARIANCE)
    white = torch.linalg.solve_triangular(root, (x.flatten(1) - FEW_MEAN).T, upper=False)
    assert white.mean(1).abs().max() < 4.5 / math.sqrt(2000)
    assert (white @ white.T / 2000 - torch.eye(k)).abs().max() < 4.5 * math.sqrt(2 / 2000)


@EVERY_RANK
def test_exact_traces_are_the_closed_form(rank, kind):
    """log p = log prior of the latent code and log |det| of the flow, which are both known."""
    sde = SDES[kind](10)
    x = EntryNoise()(torch.empty(B, *FEW[rank]))
    solver = {"rtol": 1e-6, "atol": 1e-6, "eps": 0.01}
    found = likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", **solver)(
        few_oracle(sde), x
    )
    z, volume = flow(sde, x.flatten(1), 0.01, sde.T)
    torch.testing.assert_close(found.z.flatten(1), z, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.total, sde.prior_logp(z) + volume, rtol=1e-5, atol=1e-4)


def test_probes_of_each_entry_sum_to_the_exact_trace():
    """Of rank 5, with sqrt(k) times each unit vector in place of a Gaussian probe."""
    x, sde, rows = EntryNoise()(torch.empty(B, *FEW[5])), VPSDE(), iter(torch.eye(k, **DOUBLE))

    def unit(like):
        return math.sqrt(k) * next(rows).expand(B, k).reshape(like.shape)

    options = {"eps": 0.01, "rtol": 1e-5, "atol": 1e-5}
    probed = likelihood.get_log_likelihood_fn(
        sde, hutchinson_type="Gaussian", num_probes=k, **options
    )(few_oracle(sde), x, noise=unit)
    exact = likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", **options)
    torch.testing.assert_close(probed.total, exact(few_oracle(sde), x).total, rtol=1e-5, atol=0)


def test_nats_of_a_series_are_those_of_its_innovations():
    """An AR(1) process x_i = a x_{i-1} + e_i, (B, 1, L): log p is that of x_1 and the e_i."""
    a, length = 0.7, 12
    lags = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    covariance = a ** lags.double()  # of variance 1
    root = torch.linalg.cholesky(covariance)
    x = EntryNoise()(torch.empty(B, length)) @ root.T
    innovations = (x[:, 1:] - a * x[:, :-1]) / math.sqrt(1 - a**2)
    square = x[:, 0] ** 2 + innovations.square().sum(1)
    log_scale = (length - 1) / 2 * math.log(1 - a**2)
    nats = -0.5 * (square + length * math.log(2 * math.pi)) - log_scale
    sde = VPSDE()
    log_likelihood = likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", rtol=1e-6)
    network = GaussianDataOracle(sde, torch.zeros(length, **DOUBLE), covariance)
    found = log_likelihood(network, x[:, None])
    torch.testing.assert_close(found.total, nats, rtol=1e-4, atol=0)


# --- Likelihoods, bounds and losses ---------------------------------------------------------------


def linear(shape):
    """A network of (x, labels) that mixes all entries, for bounds whose labels are indices."""

    def network(x, labels):
        flat = x.flatten(1) @ _ROOT / math.sqrt(n)
        return batch_mul(torch.sin(labels.double()), flat.reshape(x.shape))

    return network


def grey(shape):
    return (batch(shape) * 40 + 128).clamp(0, 255).round() / 255


def per_sample(loss_fn, network):
    """The loss of each sample, for data of any shape, with fixed draws."""

    def values(shape):
        x = batch(shape)
        labels = torch.arange(B)
        return loss_fn.per_sample(network(shape), x, loss_fn.draw(x, EntryNoise()), labels)

    return values


def classifier(shape):
    """Logits (B, 5) of all entries."""
    return lambda x, label: batch_mul(1 / (1 + label), x.flatten(1) @ _ROOT[:, :5])


_VE, _VP = SDES["ve"](21), SDES["vp"](21)
VALUES = {
    "probes": lambda shape: (
        likelihood.get_log_likelihood_fn(_VP, num_probes=2, rtol=0.1, atol=0.1)(
            oracle(_VP), batch(shape), noise=EntryNoise()
        ).total
    ),
    "bits": lambda shape: likelihood.get_likelihood_fn(
        _VE, lambda x: x / 2, "Gaussian", rtol=0.1, atol=0.1
    )(oracle(_VE), batch(shape), noise=EntryNoise())[0],
    "elbo": lambda shape: (
        get_elbo_fn(_VP, num_times=4)(oracle(_VP), batch(shape), noise=EntryNoise()).total
    ),
    "vlb": lambda shape: (
        get_vlb_fn(_VP, lambda x: x)(linear(shape), grey(shape), noise=EntryNoise()).total
    ),
    "vlb-estimated": lambda shape: (
        get_vlb_fn(_VE, lambda x: x, variance="large", num_times=3)(
            linear(shape), grey(shape), noise=EntryNoise()
        ).total
    ),
    "loss": per_sample(losses.get_sde_loss_fn(_VP, train=False), lambda shape: oracle(_VP)),
    "loss-edm": per_sample(
        losses.get_sde_loss_fn(
            _VE,
            train=False,
            likelihood_weighting=False,
            parametrization="edm",
            noise_levels="lognormal",
            weighting="output",
        ),
        linear,
    ),
    "loss-min_snr": per_sample(
        losses.get_sde_loss_fn(
            _VP, False, False, likelihood_weighting=False, parametrization="v", weighting="min_snr"
        ),
        linear,
    ),
    "loss-smld": per_sample(losses.get_smld_loss_fn(_VE, train=False), linear),
    "loss-ddpm": per_sample(
        losses.get_ddpm_loss_fn(_VP, train=False, parametrization="x0"), linear
    ),
    "loss-classifier": per_sample(losses.get_classifier_loss_fn(_VE, train=False), classifier),
    "encoded": lambda shape: control.get_encoder(_VE, lambda x: x, rtol=0.1, atol=0.1)(
        oracle(_VE), batch(shape)
    )[0],
    "interpolated": lambda shape: control.interpolate(batch(shape), batch(shape, 2), [0.3])[0],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_for_any_rank_are_those_of_vectors(name):
    for rank in (2, 3, 4, 5):
        assert_as_flat(VALUES[name], rank)


@EVERY_RANK
def test_the_elbo_is_the_exact_density(rank, kind):
    """With the exact score, at eps: within four standard errors, which are a hundredth of a nat."""
    sde, eps = SDES[kind](10), 1e-2
    x = EntryNoise()(torch.empty(B, *FEW[rank]))
    found = get_elbo_fn(sde, num_times=100, eps=eps)(few_oracle(sde), x, noise=EntryNoise(2))
    (m,), (s,) = coeffs(sde, eps)
    law = torch.distributions.MultivariateNormal(
        m * FEW_MEAN, m**2 * FEW_COVARIANCE + s**2 * torch.eye(k)
    )
    exact = law.log_prob(x.flatten(1))
    assert ((found.total - exact).abs() < 4 * found.standard_error).all()


# --- Inverse problems and guidance ----------------------------------------------------------------

OPTIONS = complete(ConfigDict({}))


def restored(method, operator, y, shape, **settings):
    """A few steps of predictor-corrector sampling with a measurement, denoised."""
    sde = VPSDE(beta_max=2.0, N=3)
    restore = control.get_pc_restorer(
        sde,
        sampling.ReverseDiffusionPredictor,
        sampling.AnnealedLangevinDynamics,
        lambda x: x,
        0.16,
        continuous=True,
        eps=1e-3,
    )
    found = restore(oracle(sde), operator, y, 0.1, method=method, noise=EntryNoise(), **settings)
    assert found.shape == (B, *shape)
    return found


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_restored_data_of_any_rank_are_those_of_a_matrix(name):
    """Each operator of the rank against its matrix, for vectors: each method with each rank."""
    first, methods = sorted(OPERATORS).index(name), [m for m in RESTORATIONS if m != "none"]
    for rank in (2, 3, 4, 5):
        operator = build_operator(name, OPTIONS, SHAPES[rank])
        matrix = control.MatrixOperator((n,), dense(operator))
        y = operator.apply(batch(SHAPES[rank], seed=3))
        method = methods[(first + rank) % len(methods)]
        x = restored(method, operator, y, SHAPES[rank]).flatten(1)
        flat = restored(method, matrix, y.flatten(1), (n,))
        torch.testing.assert_close(x, flat, rtol=0, atol=1e-7)


@EVERY_RANK
def test_the_guided_ode_ends_at_the_posterior(rank, kind):
    """Mean and covariance of x_t at t = 0.05 given y = A x_0 + noise of deviation 0.1."""
    sde = VESDE(sigma_max=100) if kind == "ve" else SDES[kind](10)
    operator = control.RandomProjection(FEW[rank], 3)
    truth = EntryNoise()(torch.empty(1, *FEW[rank]))
    y, A = operator.apply(truth), dense(operator)

    def draw(count, noise):
        guided = control.get_restoration("tweedie")(
            operator, y.expand(count, -1), 0.1, iterations=3
        )
        options = {"eps": 0.05, "constraints": [guided], "rtol": 1e-4, "atol": 1e-4}
        sample = sampling.get_ode_sampler(sde, (count, *FEW[rank]), lambda x: x, **options)
        return sample(few_oracle(sde), noise=noise)[0]

    mean, covariance = exact_moments(draw, k)
    gain = FEW_COVARIANCE @ A.T @ torch.linalg.inv(A @ FEW_COVARIANCE @ A.T + 0.01 * torch.eye(3))
    (m,), (s,) = coeffs(sde, 0.05)
    expected = FEW_MEAN + gain @ (y[0] - A @ FEW_MEAN)
    torch.testing.assert_close(mean, m * expected, rtol=0, atol=0.01)
    expected = m**2 * (FEW_COVARIANCE - gain @ A @ FEW_COVARIANCE) + s**2 * torch.eye(k)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.002)


class Classes(torch.nn.Module):
    """Gaussian data of two classes, of one covariance and of means of their own."""

    takes = Takes(classes=2, droppable=True)

    def __init__(self, sde, means):
        super().__init__()
        self.networks = [few_oracle(sde, mean) for mean in means]

    def forward(self, x, labels, *, classes):
        values = torch.stack([network(x, labels) for network in self.networks])
        return values[classes, torch.arange(len(x))]


def guided_samples(sde, network, rank, **options):
    sample = configured(sde, (B, *FEW[rank]), SAMPLERS["dpmpp_sde-4"], **options)
    return sample(network, noise=EntryNoise())[0]


@EVERY_RANK
def test_guidance_without_a_classifier_moves_the_mean(rank, kind):
    """Scores of Gaussians of one covariance are linear in the means."""
    sde, null = SDES[kind](10), -FEW_MEAN
    means = torch.stack([FEW_MEAN, FEW_MEAN.flip(0), null])
    classes = torch.tensor([0, 1, 1, 0])
    network = Guided(Classes(sde, means), {"classes": classes}, {"classes": 2}, 2.5)
    found = guided_samples(sde, network, rank)
    for c in (0, 1):
        alone = few_oracle(sde, null + 2.5 * (means[c] - null))
        expected = guided_samples(sde, alone, rank)
        torch.testing.assert_close(found[classes == c], expected[classes == c], rtol=0, atol=1e-9)


@EVERY_RANK
def test_guidance_by_the_exact_classifier_gives_the_class(rank, kind):
    """Bayes: score of the mixture + grad log p(c | x_t) = score of the class."""
    sde, means = SDES[kind](10), torch.stack([FEW_MEAN, -FEW_MEAN])

    def log_p(x, m, s):
        covariance = m[:, None, None] ** 2 * FEW_COVARIANCE + (s**2)[:, None, None] * torch.eye(k)
        laws = [torch.distributions.MultivariateNormal(m[:, None] * c, covariance) for c in means]
        return torch.stack([law.log_prob(x.flatten(1)) for law in laws], dim=1)

    def logits(x, std):
        scale = {"ve": std**0, "subvp": (1 - std).sqrt()}.get(kind, (1 - std**2).sqrt())
        return log_p(x, scale, std)

    networks = [few_oracle(sde, mean) for mean in means]

    def mixture(x, labels):
        t = labels / 999
        if kind == "ve":
            t = (labels / sde.sigma_min).log() / math.log(sde.sigma_max / sde.sigma_min)
        weights = log_p(x, *sde.marginal_coeffs(t)).softmax(1)
        return sum(batch_mul(w, f(x, labels)) for w, f in zip(weights.T, networks, strict=True))

    classes = torch.tensor([0, 1, 1, 0])
    guided = control.ClassGuidance(logits, classes)
    found = guided_samples(sde, mixture, rank, constraints=[guided])
    for c in (0, 1):
        expected = guided_samples(sde, networks[c], rank)
        torch.testing.assert_close(found[classes == c], expected[classes == c], rtol=0, atol=1e-7)


class Shown(torch.nn.Module):
    """Gaussian data whose mean is the image that the network is shown."""

    def __init__(self, sde, channels):
        super().__init__()
        self.sde, self.takes = sde, Takes(image=channels)

    def forward(self, x, labels, *, image):
        self.takes.check({"image": image}, x)
        return GaussianDataOracle(self.sde, image.flatten(1), FEW_COVARIANCE)(x, labels)


@EVERY_RANK
def test_a_measurement_is_a_condition(rank, kind):
    """Samples are those of the mean A x, or of A^+ A x where the channels are not those of x."""
    operator = ("gray", "projection", "half")[rank % 3]
    shape, sde = FEW[rank], SDES[kind](10)
    data = {"shape": shape, "centered": True, "uniform_dequantization": False}
    config = complete(ConfigDict({"data": data}))
    config.training.condition, config.training.condition_operator = "image", operator
    conditions = Conditions(config, shape, lambda x: 2 * x - 1, "cpu")
    x = grey(shape)
    image = conditions.of_data(x, None)["image"]
    A = dense(conditions.operator)
    expected = (2 * x - 1).flatten(1) @ A.T
    if operator != "half":
        expected = expected @ torch.linalg.pinv(A).T
    torch.testing.assert_close(image.flatten(1), expected, rtol=0, atol=1e-12)
    network = Given(Shown(sde, taken_by(config).image), image=image)
    z = sde.prior_std * batch(shape)
    options = {"rtol": 1e-6, "atol": 1e-6, "eps": 0.01}
    found, _ = sampling.get_ode_sampler(sde, z.shape, lambda x: x, **options)(network, z)
    moved = flow(sde, z.flatten(1), sde.T, 0.01, mean=expected)[0]
    torch.testing.assert_close(found.flatten(1), moved, rtol=0, atol=1e-4)


# --- Processes of one rank ------------------------------------------------------------------------


def users_process(rank):
    """A process that takes data of one rank only, as most that are written down do."""
    axes = (..., *[None] * rank)

    class Mine(SDE):
        def sde(self, x, t):
            return -x / 2, torch.ones_like(t)

        def marginal_prob(self, x, t):
            return torch.exp(-t / 2)[axes] * x, torch.sqrt(1 - torch.exp(-t))

        def prior_sampling(self, shape):
            return torch.randn(*shape)

        def prior_logp(self, z):
            return -(z.flatten(1).square().sum(1) + n * math.log(2 * math.pi)) / 2

    return Mine(N=21)


class Same(LinearSDE):
    """The same for data of any rank."""

    def drift_rate(self, t):
        return torch.full_like(t, -0.5)

    def diffusion(self, t):
        return torch.ones_like(t)

    def marginal_coeffs(self, t):
        return torch.exp(-t / 2), torch.sqrt(1 - torch.exp(-t))


@pytest.mark.parametrize("method", sorted(_SAMPLERS))
def test_a_process_of_one_rank_has_every_sampler(method):
    rank = 1 + sorted(_SAMPLERS).index(method) % 5
    pc = {"predictor": "euler_maruyama", "corrector": "ald"}
    z, network = batch(SHAPES[rank]), oracle(Same())
    found, expected = (
        configured(sde, z.shape, pc | {"method": method, "num_steps": 4 * (method != "pc")})(
            network, z, noise=EntryNoise()
        )[0]
        for sde in (users_process(rank), Same(N=21))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_process_without_a_mean_of_x_is_named():
    process = users_process(2)
    process.marginal_prob = lambda x, t: (t[:, None] * t, t)
    with pytest.raises(ValueError, match=r"Mine.*mean of the shape of x"):
        time_grid(process, 4, 0.1, "edm")
