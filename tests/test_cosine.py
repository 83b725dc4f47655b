"""The cosine schedule: its published chain, and the process that the chain is made of."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import MU, S0, GaussianOracle, exact_moments, exact_pc
from recordings import load_tensors
from small_runs import small_config

import checks
import sampling
from configs.defaults import load
from likelihood import get_log_likelihood_fn
from losses import get_ddpm_loss_fn
from sampling import AncestralSamplingPredictor, ReverseDiffusionPredictor
from score_lib.losses.objectives import Draws
from score_lib.options import checked
from sde_lib import CosineVPSDE, batch_mul, create_sde


def golden(name):
    """A recorded table, float64."""
    return load_tensors("golden_cosine.npz")[name]


def levels(N=1000):
    return CosineVPSDE(N, continuous=False)


# --- Tables ---------------------------------------------------------------------------------------


def test_tables_are_the_published_ones():
    sde = levels()
    for N in (100, 1000):
        torch.testing.assert_close(
            levels(N).discrete_betas, golden(f"betas_{N}"), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(
        sde.alphas_cumprod, golden("alphas_cumprod_1000"), rtol=1e-6, atol=1e-12
    )
    assert sde.discrete_betas[-1] == 0.999 and (sde.discrete_betas[:-1] < 0.999).all()
    sde.N = 100
    torch.testing.assert_close(sde.discrete_betas, levels(100).discrete_betas, rtol=0, atol=0)
    assert sde.T == levels(100).T < levels(1000).T


@pytest.mark.parametrize("N", (2, 100, 1000, 4000))
def test_the_chain_is_made_of_the_process(N):
    """Level i is at (i + 1) / N, the last one at T, and each has a whole number as its label."""
    sde = levels(N)
    t = torch.arange(1, N, dtype=torch.float64) / N
    t = torch.cat([t, torch.tensor([sde.T], dtype=torch.float64)])
    scale, std = sde.marginal_coeffs(t)
    torch.testing.assert_close(scale, sde.sqrt_alphas_cumprod, rtol=1e-9, atol=0)
    torch.testing.assert_close(std, sde.sqrt_1m_alphas_cumprod, rtol=1e-9, atol=0)
    visited = torch.linspace(sde.T, sde.sampling_eps, N)
    descending = torch.arange(N - 1, -1, -1)
    assert torch.equal(sde.noise_label(visited, False), descending.float())
    assert torch.equal(sde.step_index(visited), descending)
    scale, std = sde.discrete_coeffs(descending)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(sde.noise_std(visited, False), std, rtol=1e-6, atol=0)


def test_coefficients_are_accurate_at_both_ends():
    """In float32, also where they are small."""
    sde = levels()
    t = torch.cat([torch.logspace(-6, -1, 20), 1 - torch.logspace(-4, -1, 20)])
    s = t * 0.99
    for few, many in (
        (sde.marginal_coeffs(t), sde.marginal_coeffs(t.double())),
        (sde.transition(t, s), sde.transition(t.double(), s.double())),
        ((sde.beta(t),), (sde.beta(t.double()),)),
    ):
        for value, expected in zip(few, many, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    cosine = torch.cos((t.double() + 0.008) / 1.008 * math.pi / 2)
    expected = cosine / math.cos(0.008 / 1.008 * math.pi / 2)
    torch.testing.assert_close(sde.marginal_coeffs(t.double())[0], expected, rtol=1e-9, atol=0)


def test_time_ends_before_the_diffusion_does():
    """Where the linear schedule ends, too; steps of 1 / N of Euler-Maruyama are stable."""
    sde = CosineVPSDE()
    end = torch.tensor([sde.T])
    assert 0.005 < sde.marginal_coeffs(end)[0] < 0.01
    assert sde.diffusion(end) ** 2 / sde.N < 1
    with pytest.raises(ValueError, match="at least two steps, not N = 1"):
        CosineVPSDE(N=1)


def test_the_config_says_which_end():
    for continuous in (True, False):
        options = {"training__continuous": continuous, "model__num_scales": 40}
        options |= {"sampling__predictor": "ancestral_sampling"}
        config = small_config("vp/digits", training__sde="cosine_vpsde", **options)
        assert repr(create_sde(checked(config)[0])) == repr(CosineVPSDE(40, continuous))


def test_unstable_steps_are_refused():
    config = small_config("vp/digits", training__sde="cosine_vpsde")
    assert checked(config)[0].sampling.predictor == "euler_maruyama"
    config.training.continuous = False
    with pytest.raises(ValueError, match=r"euler_maruyama.*unstable.*'ancestral_sampling'"):
        checked(config)
    config.sampling.method = "dpmpp_2m"
    checked(config)


# --- Networks of discrete levels ------------------------------------------------------------------


def test_ancestral_sampling_is_that_of_the_recorded_chain():
    """Mean and variance of a Gaussian, by the formula of DDPM in float64."""
    betas, mean, variance = golden("betas_100"), 0.0, 1.0
    scales = torch.cumprod(1 - betas, dim=0).sqrt()
    for i in range(99, -1, -1):
        m, beta = scales[i].item(), betas[i].item()
        spread = m**2 * S0**2 + 1 - m**2
        gain, shift = 1 - beta / spread, beta * m * MU / spread
        mean = (gain * mean + shift) / math.sqrt(1 - beta)
        variance = gain**2 * variance / (1 - beta) + (beta if i > 0 else 0)
    sde = levels(100)
    options = {"continuous": False, "eps": sde.sampling_eps}
    oracle = GaussianOracle(sde, continuous=False).double()

    def draw(count, noise):
        sampler = exact_pc(sde, (count, 1), AncestralSamplingPredictor, **options)
        return sampler(oracle, torch.zeros(count, 1, dtype=torch.float64), noise=noise)[0]

    moments = exact_moments(draw, 1)
    prior = _response_to_the_start(sde, oracle, options)
    assert moments[0].item() == pytest.approx(mean, abs=1e-4)
    assert moments[1].item() + prior**2 == pytest.approx(variance, rel=1e-4)


def _response_to_the_start(sde, oracle, options):
    sampler = exact_pc(sde, (2, 1), AncestralSamplingPredictor, **options)
    x, _ = sampler(oracle, torch.tensor([[0.0], [1.0]]).double(), noise=torch.zeros_like)
    return (x[1] - x[0]).item()


def test_the_loss_is_at_the_levels_of_the_tables():
    sde, seen = levels(100), {}

    def network(x, labels):
        seen.update(x=x, labels=labels)
        return torch.zeros_like(x)

    batch, z, level = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 42, 99])
    loss = get_ddpm_loss_fn(sde, train=False).per_sample(network, batch, Draws(level, z))
    torch.testing.assert_close(loss, z.square().mean(1))
    cumprod = torch.cumprod(1 - golden("betas_100"), dim=0)[level].float()
    expected = batch_mul(cumprod.sqrt(), batch) + batch_mul((1 - cumprod).sqrt(), z)
    torch.testing.assert_close(seen["x"], expected)
    assert torch.equal(seen["labels"], level)


@pytest.mark.parametrize("continuous", (True, False))
@pytest.mark.parametrize("method", ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde"))
def test_solvers_return_a_gaussian(method, continuous):
    """For a network of discrete levels, up to its labels between them."""
    sde = CosineVPSDE(1000, continuous)
    config = small_config(
        "vp/digits",
        sampling__method=method,
        sampling__num_steps=400 if method == "ddim" else 100,
        training__continuous=continuous,
    )
    sampler = sampling.get_sampling_fn(config, sde, (4000, 3), lambda x: x, sde.sampling_eps)
    torch.manual_seed(0)
    x, _ = sampler(ExactScore(sde, continuous))
    assert x.mean() == pytest.approx(MU, abs=0.02)
    assert x.std() == pytest.approx(S0, rel=0.02)


class ExactScore(torch.nn.Module):
    """Minus the scaled score of N(MU, S0^2), at the place between levels that a label says."""

    def __init__(self, sde, continuous):
        super().__init__()
        self.sde, self.continuous = sde, continuous

    def forward(self, x, labels):
        t = labels / 999 if self.continuous else (labels + 1) / self.sde.N
        m, s = self.sde.marginal_coeffs(t)
        centred = x - batch_mul(m * MU, torch.ones_like(x))
        return batch_mul(s / ((m * S0) ** 2 + s**2), centred)


# --- Networks of all times ------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", (ReverseDiffusionPredictor, AncestralSamplingPredictor))
def test_the_chain_of_a_network_of_all_times_converges(predictor):
    """Its error is of first order in 1 / N: the chain ends at T, too."""
    errors = []
    for N in (100, 200):
        sde = CosineVPSDE(N)
        t = torch.linspace(sde.T, sde.sampling_eps, N, dtype=torch.float64)
        step = predictor(sde, lambda x, t, sde=sde: -x / _spread(sde, t)[:, None])
        step.noise = torch.ones_like
        x, x_mean = step.update_fn(torch.ones(N, 1, dtype=torch.float64), t)
        variance = 1.0
        for gain, noise in zip(x_mean.flatten(), (x - x_mean).flatten(), strict=True):
            variance = gain**2 * variance + noise**2
        errors.append(abs(float(variance) ** 0.5 / S0 - 1))
    assert errors[0] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.3)


def _spread(sde, t):
    m, s = sde.marginal_coeffs(t)
    return (m * S0) ** 2 + s**2


@pytest.mark.parametrize("continuous", (True, False))
def test_likelihood_is_that_of_a_gaussian(continuous):
    """Its flow is linear, so that also the distance of the prior from p_T counts."""
    sde = CosineVPSDE(continuous=continuous)
    x = MU + S0 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    found = get_log_likelihood_fn(sde, hutchinson_type="exact")(ExactScore(sde, True), x).total
    ends = torch.tensor([1e-5, sde.T])
    scale, std = sde.marginal_coeffs(ends)[0], _spread(sde, ends).sqrt()
    code = (x - scale[0] * MU) * std[1] / std[0] + scale[1] * MU
    expected = sde.prior_logp(code) + 2 * (std[1] / std[0]).log()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)
    exact = torch.distributions.Normal(MU, S0).log_prob(x).sum(1)
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("continuous", (True, False))
def test_the_process_is_consistent(continuous):
    findings = checks.process(CosineVPSDE(continuous=continuous), continuous)
    assert {finding.state for finding in findings} == {"ok"}


def test_the_experiments_have_it():
    score, classifier = load("vp/digits_adm"), load("vp/digits_adm_classifier")
    assert repr(create_sde(score)) == repr(create_sde(classifier)) == repr(levels())
