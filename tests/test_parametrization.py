"""Meanings of a network's output: coefficients, scores, losses, noise levels, refusals."""

from __future__ import annotations

import math

import foreign_sde
import pytest
import torch
from oracles import Cosine
from recordings import load_tensors

import losses
import sampling
from checks import process as check_process
from configs.defaults import load
from likelihood import get_log_likelihood_fn
from models.utils import Coefficients, Parametrization, get_parametrization, get_score_fn
from score_lib.base.tensors import SampleNoise, batch_mul
from score_lib.parametrization import EDM
from score_lib.scores import label_at
from score_lib.sdes.foreign import as_process
from score_lib.sdes.snr import log_snr, time_at
from score_lib.sdes.times import NoiseTimes
from sde_lib import VESDE, VPSDE, CosineVPSDE, create_sde, subVPSDE

NAMES = ("score", "noise", "x0", "v", "edm")
D = 0.5  # sigma_data


class TwiceTheNoise(Cosine):
    """A user's process, with m = cos(pi t / 2) and s = 2 sin(pi t / 2)."""

    T = 0.9

    def diffusion(self, t):
        return 2 * super().diffusion(t)

    def marginal_coeffs(self, t):
        m, s = super().marginal_coeffs(t)
        return m, 2 * s


PROCESSES = {
    "ve": VESDE(0.002, 80.0),
    "vp": VPSDE(),
    "subvp": subVPSDE(),
    "user's": TwiceTheNoise(),
    "foreign": foreign_sde.Exploding(0.01, 10.0, 100),
}


def golden():
    """Karras et al. 2022, table 1, in float64, by name."""
    return {name: array.double() for name, array in load_tensors("golden_edm.npz").items()}


def denoiser(x, t):
    """Some function of noisy data and time."""
    return torch.tanh(0.7 * x + 0.1) * batch_mul(1 + t, torch.ones_like(x))


def written_for(name, x, m, s, denoised):
    """Input, output and label of a network that knows a denoiser; None for the process's label.

    By the definitions, with x_t = m x_0 + s z.
    """
    z, sigma = batch_mul(1 / s, x - batch_mul(m, denoised)), s / m
    if name == "score":
        return x, batch_mul(-1 / s, z), None
    if name == "noise":
        return x, z, None
    if name == "x0":
        return x, denoised, None
    if name == "v":  # alpha z - sigma x_0 where alpha^2 + sigma^2 = 1
        r = (m**2 + s**2).sqrt()
        return batch_mul(1 / r, x), batch_mul(m / r, z) - batch_mul(s / r, denoised), None
    y, total = batch_mul(1 / m, x), sigma**2 + D**2
    target = denoised - batch_mul(D**2 / total, y)
    return batch_mul(total**-0.5, y), batch_mul(total.sqrt() / (sigma * D), target), sigma.log() / 4


# --- Scores ---------------------------------------------------------------------------------------


def assert_reads_its_denoiser(sde, name, t, m, s, told, continuous):
    """A network that knows a denoiser is given what it needs, and its output is the score.

    Args:
        told: the process's label, for parametrisations without one of their own.
    """
    x = torch.randn(len(t), 2, 3, 3, dtype=torch.float64) * 2
    given, output, label = written_for(name, x, m, s, denoiser(x, t))
    label = told if label is None else label

    def network(scaled, told):
        torch.testing.assert_close(scaled, given, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(told, label, rtol=1e-12, atol=1e-12)
        return output

    score = get_score_fn(sde, network, continuous=continuous, parametrization=name)(x, t)
    expected = batch_mul(s**-2, batch_mul(m, denoiser(x, t)) - x)
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)
    chosen = get_parametrization(name)
    same = get_score_fn(sde, network, False, continuous, parametrization=chosen)(x, t)
    assert torch.equal(same, score)
    found = label_at(sde, t, continuous, name)
    torch.testing.assert_close(found, label, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parametrization_gives_the_score_of_its_denoiser(name, process):
    known = as_process(PROCESSES[process])
    t = torch.linspace(0.02, 0.95, 7, dtype=torch.float64) * known.T
    told, coeffs = known.noise_label(t, True), known.scale_and_std(t, 3)
    assert_reads_its_denoiser(PROCESSES[process], name, t, *coeffs, told, True)


@pytest.mark.parametrize("process", PROCESSES)
def test_without_a_parametrization_the_process_decides(process):
    sde = PROCESSES[process]
    known = as_process(sde)
    x, t = torch.randn(5, 1, 2, 2), torch.rand(5) * 0.8 + 0.05

    def network(x, labels):
        return batch_mul(labels, x) + 1

    expected = known.to_score(network(x, known.noise_label(t, True)), t, True)
    for nothing in ({}, {"parametrization": None}, {"parametrization": ""}):
        assert torch.equal(get_score_fn(sde, network, False, True, **nothing)(x, t), expected)


@pytest.mark.parametrize(
    ("name", "sde", "continuous"),
    (
        ("noise", VPSDE(), True),
        ("noise", subVPSDE(), True),
        ("score", VESDE(0.002, 80.0), True),
        ("noise", VPSDE(N=40), False),
        ("noise", CosineVPSDE(N=30, continuous=False), False),
        ("score", VESDE(0.02, 10.0, N=30), False),
    ),
    ids=str,
)
def test_published_conventions_are_among_them(name, sde, continuous):
    x, t = torch.randn(9, 2), torch.linspace(0.05, 0.97, 9)  # off the levels
    ours, published = (
        get_score_fn(sde, lambda x, labels: batch_mul(labels, x) + x, False, continuous, **which)
        for which in ({"parametrization": name}, {})
    )
    assert torch.equal(ours(x, t), published(x, t))


# --- Karras et al. 2022, table 1 ------------------------------------------------------------------


def at_golden_levels(case):
    """A process, the times of recorded noise levels, and the recorded arrays by name."""
    arrays = {k.partition("/")[2]: v for k, v in golden().items() if k.startswith(f"{case}/")}
    if case == "vp":
        return VPSDE(), time_at(VPSDE(), -arrays["sigma"].log()), arrays
    return VESDE(0.002, 80.0), (arrays["sigma"] / 0.002).log() / math.log(40000), arrays


def linear(x, labels):
    """The network of the recorded figures."""
    return 0.3 * x + batch_mul(0.05 * labels, torch.ones_like(x))


@pytest.mark.parametrize("case", ("edm", "edm_other_sigma_data"))
@pytest.mark.parametrize("process", ("ve", "vp", "subvp"))
def test_coefficients_of_edm_are_the_published_ones(case, process):
    sde, arrays = PROCESSES[process], at_golden_levels(case)[2]
    sigma, chosen = arrays["sigma"], EDM(float(arrays["sigma_data"]))
    m = {"ve": torch.ones_like(sigma)}.get(process, (1 + sigma**2) ** -0.5)
    skip, out, scale = chosen.coefficients(m, sigma * m)
    # From those of the score of x to those of the denoised x of y = x / m.
    found = {
        "c_skip": 1 + skip * (sigma * m) ** 2,
        "c_out": out * sigma**2 * m,
        "c_in": scale * m,
        "c_noise": chosen.label(sde, None, m, sigma * m),
        "weight": (sigma * out * m * sigma) ** -2,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, arrays[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", ("edm", "edm_other_sigma_data", "vp"))
def test_denoised_and_loss_are_the_published_ones(case):
    sde, t, arrays = at_golden_levels(case)
    edm = case != "vp"
    chosen = EDM(float(arrays["sigma_data"])) if edm else "noise"
    m, s = sde.marginal_coeffs(t)
    x = batch_mul(m, arrays["y"]) + batch_mul(s, arrays["n"])
    score = get_score_fn(sde, linear, False, True, parametrization=chosen)(x, t)
    torch.testing.assert_close(sde.denoised(x, t, score), arrays["D"], rtol=1e-6, atol=1e-6)
    options = {"parametrization": chosen, "weighting": "output", "likelihood_weighting": False}
    loss_fn = losses.get_sde_loss_fn(sde, False, False, noise_levels="lognormal", **options)
    found = 2 * loss_fn.per_sample(linear, arrays["y"], losses.Draws(t, arrays["n"]))
    torch.testing.assert_close(found, arrays["loss_per_sample"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", ("ve", "vp", "subvp"))
def test_noise_levels_of_training_are_the_published_ones(process):
    sde = PROCESSES[process]
    z, expected = golden()["train/z"], golden()["train/sigma"]
    m, s = sde.marginal_coeffs(losses.LogNormalLevels(sde, eps=0.0).at(torch.special.ndtr(z)))
    torch.testing.assert_close(s / m, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", (18, 40))
def test_grid_of_edm_is_the_published_one(steps):
    sde, expected = VESDE(0.002, 80.0), golden()[f"grid/edm_N{steps}"]
    found = sde.sigma(sampling.time_grid(sde, steps - 1, 0.0, "edm"))
    torch.testing.assert_close(found, expected[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("network", ("ddpmpp", "ncsnpp"))
def test_experiments_of_edm_sample_at_the_published_levels(network):
    """35 evaluations: two at each of 17 levels below the first, and one at that."""
    config, labels = load(f"edm/cifar10_{network}"), []
    config.device = "cpu"

    def told(x, label):
        labels.append(label[0])
        return x

    sde = create_sde(config)
    sampler = sampling.get_sampling_fn(config, sde, (1, 2), lambda x: x, sde.sampling_eps)
    _, evaluations = sampler(told)
    expected = golden()["grid/edm_N18"][:-1].repeat_interleave(2)[1:]
    assert evaluations == len(labels) == 35
    # Sampling ends at time 1e-5, where sigma is a ten-thousandth above the smallest.
    found = (4 * torch.stack(labels).double()).exp()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


# --- Losses ---------------------------------------------------------------------------------------


def loss_of(sde, batch, draws, network=linear, **options):
    loss_fn = losses.get_sde_loss_fn(sde, False, True, likelihood_weighting=False, **options)
    return loss_fn.per_sample(network, batch, draws)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_weighting_by_the_output_is_the_square_error_of_the_output(name, process):
    sde = PROCESSES[process]
    known = as_process(sde)
    t = torch.linspace(0.05, 0.9, 6, dtype=torch.float64) * known.T
    batch = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    z = torch.randn_like(batch)
    m, s = known.scale_and_std(t, 3)
    x = batch_mul(m, batch) + batch_mul(s, z)
    given, target, label = written_for(name, x, m, s, batch)
    output = linear(given, known.noise_label(t, True) if label is None else label)
    expected = (output - target).square().flatten(1).mean(1)
    found = loss_of(sde, batch, losses.Draws(t, z), parametrization=name, weighting="output")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ("", "edm"))
def test_min_snr_weights_denoised_data_by_at_most_five(name):
    sde, t = VPSDE(), torch.linspace(0.05, 0.9, 6, dtype=torch.float64)
    batch = torch.randn(6, 3, dtype=torch.float64)
    z = torch.randn_like(batch)
    m, s = sde.marginal_coeffs(t)
    x = batch_mul(m, batch) + batch_mul(s, z)
    score = get_score_fn(sde, linear, False, True, parametrization=name)(x, t)
    error = (sde.denoised(x, t, score) - batch).square().mean(1)
    expected = torch.minimum((m / s) ** 2, torch.tensor(5.0)) * error
    assert ((m / s) ** 2 > 5).any() and ((m / s) ** 2 < 5).any()
    options = {"parametrization": name, "weighting": "min_snr"}
    torch.testing.assert_close(loss_of(sde, batch, losses.Draws(t, z), **options), expected)


@pytest.mark.parametrize("process", PROCESSES)
def test_lognormal_levels_are_lognormal_between_the_ends_of_time(process):
    sde = as_process(PROCESSES[process])
    levels = losses.LogNormalLevels(sde)
    quantiles = torch.tensor([0.0, 1e-9, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    t = levels.at(quantiles)
    assert t[0] == levels.eps and abs(t[-1] - sde.T) < 1e-12 and (t.diff() >= 0).all()
    m, s = sde.scale_and_std(t[2:5], 3)
    z = torch.tensor([-0.6744897501960817, 0.0, 0.6744897501960817]).double()
    torch.testing.assert_close((s / m).log(), -1.2 + 1.2 * z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_times_from_a_table_have_the_noise_levels_to_the_rounding_of_a_float(process):
    sde = as_process(PROCESSES[process])
    t = torch.logspace(-4.9, math.log10(sde.T), 999, dtype=torch.float64)
    found = NoiseTimes(sde, 1e-5).at(log_snr(sde, t))
    torch.testing.assert_close(found, t, rtol=1e-7, atol=0)


def test_lognormal_draws_of_a_sample_follow_its_own_noise():
    loss_fn = losses.get_sde_loss_fn(
        VPSDE(), False, likelihood_weighting=False, noise_levels="lognormal"
    )
    batch = torch.zeros(4, 1, 2, 2)
    whole = loss_fn.draw(batch, SampleNoise(3, range(4)))
    part = loss_fn.draw(batch[2:], SampleNoise(3, range(2, 4)))
    assert torch.equal(whole.level[2:], part.level) and torch.equal(whole.z[2:], part.z)
    torch.manual_seed(0)
    log_sigma = -torch.tensor([1.2])
    drawn = loss_fn.levels.draw(4000, torch.device("cpu"))
    m, s = VPSDE().marginal_coeffs(drawn)
    assert ((s / m).log().mean() - log_sigma).abs() < 0.08
    assert ((s / m).log().std() - 1.2).abs() < 0.05


# --- A user's own, and refusals -------------------------------------------------------------------


def test_an_object_of_a_users_class_is_taken():
    class Half(Parametrization):
        def coefficients(self, m, s):
            return Coefficients(-1 / s, 0.5 / s, 2 * m)

        def label(self, sde, t, m, s):
            return 7 * t

    sde, x, t = VPSDE(), torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.7])
    m, s = sde.marginal_coeffs(t)
    expected = batch_mul(-1 / s, x) + batch_mul(0.5 / s, linear(batch_mul(2 * m, x), 7 * t))
    score = get_score_fn(sde, linear, continuous=True, parametrization=Half())(x, t)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize(
    "options",
    (
        {"sde": VPSDE()},
        {"sde": VPSDE(N=40), "continuous": False},
        {"sde": VESDE(0.02, 10.0, N=30), "continuous": False},
        {"sde": CosineVPSDE(N=30, continuous=False), "continuous": False},
    ),
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_checks_know_the_label_and_the_output(name, options):
    findings = {f.subject: f for f in check_process(**options, parametrization=name)}
    assert findings["convention"].state == "ok"
    assert repr(get_parametrization(name)) in findings["convention"].text


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: get_parametrization("edn"), "known are edm, noise, score, v, x0; did you mean"),
        (lambda: EDM(0.0), "above 0, not 0"),
        (
            lambda: losses.get_sde_loss_fn(VPSDE(), False, noise_levels="uniform"),
            "known are '', 'lognormal'",
        ),
        (
            lambda: losses.get_sde_loss_fn(
                VPSDE(), False, likelihood_weighting=False, weighting="snr"
            ),
            "known are '', 'output', 'min_snr'",
        ),
        (
            lambda: losses.get_sde_loss_fn(VPSDE(), False, weighting="min_snr"),
            "training.likelihood_weighting = False",
        ),
        (
            lambda: losses.get_sde_loss_fn(
                VPSDE(), False, likelihood_weighting=False, weighting="output"
            ),
            "set model.parametrization",
        ),
        (
            lambda: losses.get_loss_fn(VPSDE(), False, True, False, False, weighting="output"),
            "set model.parametrization",
        ),
        (
            lambda: losses.get_loss_fn(
                VPSDE(), False, True, False, False, noise_levels="lognormal"
            ),
            "training.continuous = True",
        ),
        (
            lambda: sampling.get_ode_sampler(VPSDE(), (1, 2), lambda x: x, parametrization="vv"),
            "unknown model.parametrization 'vv'",
        ),
        (
            lambda: get_log_likelihood_fn(VPSDE(), parametrization="vv"),
            "unknown model.parametrization 'vv'",
        ),
    ),
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
