"""Data of every rank: samplers, likelihoods, bounds and losses.

All shapes have as many entries.  With the same noise, entry by entry, the results for data of any
rank are those for the flattened data, to rounding, and these are compared with closed forms:
Gaussian data whose entries all have different means and are all correlated.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianDataOracle, exact_moments
from ranks import (
    DOUBLE,
    EVERY_RANK,
    FEW,
    FEW_COVARIANCE,
    FEW_MEAN,
    METHODS,
    ROOT,
    SDES,
    SHAPES,
    B,
    EntryNoise,
    assert_as_flat,
    batch,
    coeffs,
    configured,
    few_oracle,
    flow,
    grey,
    k,
    n,
    oracle,
)

import controllable_generation as control
import likelihood
import losses
from score_lib.base.tensors import batch_mul
from score_lib.elbo import get_elbo_fn
from score_lib.samplers.grids import time_grid
from score_lib.samplers.steps import _CORRECTORS, _PREDICTORS
from score_lib.vlb import get_vlb_fn
from sde_lib import SDE, VPSDE, LinearSDE

# --- Samplers ---------------------------------------------------------------------------------


def _names():
    """Every sampler, and predictor and corrector of predictor-corrector sampling."""
    others = [{"method": name, "num_steps": 4} for name in METHODS if name != "pc"]
    churned = [{"method": "heun", "num_steps": 4, "churn": 10.0}]
    pc = [{"predictor": name, "corrector": "none"} for name in _PREDICTORS if name != "none"]
    flow = [{"predictor": "reverse_diffusion", "corrector": "none", "probability_flow": True}]
    correctors = [{"predictor": "none", "corrector": name} for name in _CORRECTORS]
    found = others + churned + [{"method": "pc", **c} for c in pc + flow + correctors]
    return {"-".join(map(str, case.values())): case for case in found}


SAMPLERS = _names()


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_any_rank_are_those_of_vectors(name):
    # Sub-VP has no ancestral sampling.
    kinds = [kind for kind in SDES if (kind, "ancestral" in name) != ("subvp", True)]
    sde = SDES[kinds[list(SAMPLERS).index(name) % len(kinds)]](21)

    def samples(shape):
        sample = configured(sde, (B, *shape), SAMPLERS[name])
        x, _ = sample(oracle(sde), noise=EntryNoise())
        assert x.shape == (B, *shape)
        return x

    assert_as_flat(samples)


# --- Closed forms -------------------------------------------------------------------------------


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
    solver = {"rtol": 1e-5, "atol": 1e-5, "eps": 0.01}
    found = likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", **solver)(
        few_oracle(sde), x
    )
    z, volume = flow(sde, x.flatten(1), 0.01, sde.T)
    torch.testing.assert_close(found.z.flatten(1), z, rtol=1e-5, atol=3e-4)
    torch.testing.assert_close(found.total, sde.prior_logp(z) + volume, rtol=3e-5, atol=0)


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
    log_likelihood = likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", rtol=1e-5)
    network = GaussianDataOracle(sde, torch.zeros(length, **DOUBLE), covariance)
    found = log_likelihood(network, x[:, None])
    torch.testing.assert_close(found.total, nats, rtol=1e-4, atol=0)


# --- Likelihoods, bounds and losses ---------------------------------------------------------------


def linear(shape):
    """A network of (x, labels) that mixes all entries, for bounds whose labels are indices."""

    def network(x, labels):
        flat = x.flatten(1) @ ROOT / math.sqrt(n)
        return batch_mul(torch.sin(labels.double()), flat.reshape(x.shape))

    return network


def per_sample(loss_fn, network):
    """The loss of each sample, for data of any shape, with fixed draws."""

    def values(shape):
        x = batch(shape)
        labels = torch.arange(B)
        return loss_fn.per_sample(network(shape), x, loss_fn.draw(x, EntryNoise()), labels)

    return values


def classifier(shape):
    """Logits (B, 5) of all entries."""
    return lambda x, label: batch_mul(1 / (1 + label), x.flatten(1) @ ROOT[:, :5])


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
    assert_as_flat(VALUES[name])


@EVERY_RANK
def test_the_elbo_is_the_exact_density(rank, kind):
    """With the exact score, at eps: of one datum, many times, within four standard errors."""
    sde, eps = SDES[kind](10), 1e-2
    x = EntryNoise()(torch.empty(1, *FEW[rank])).expand(1500, *FEW[rank])
    found = get_elbo_fn(sde, num_times=20, eps=eps)(few_oracle(sde), x, noise=EntryNoise(2)).total
    (m,), (s,) = coeffs(sde, eps)
    covariance = m**2 * FEW_COVARIANCE + s**2 * torch.eye(k)
    law = torch.distributions.MultivariateNormal(m * FEW_MEAN, covariance)
    error = found.std() / math.sqrt(len(x))
    assert error < 0.25 and (found.mean() - law.log_prob(x[0].flatten())).abs() < 4 * error


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


@pytest.mark.parametrize("method", METHODS)
def test_a_process_of_one_rank_has_every_sampler(method):
    rank = 1 + METHODS.index(method) % 5
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
