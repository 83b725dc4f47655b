"""Parametrised networks of discrete noise levels: scores, losses, samples, bounds, wiring."""

from __future__ import annotations

import functools

import foreign_sde
import numpy as np
import pytest
import torch
from oracles import inverse_scaler
from recorder import Recorder
from test_parametrization import NAMES, assert_reads_its_denoiser, linear, written_for
from test_parametrized_results import learned
from test_wiring import draw_by_config, draw_by_hand, recording, train

import losses
import run_lib
import sampling
from likelihood import get_vlb_fn
from models.utils import Coefficients, Parametrization, get_parametrization, get_score_fn
from score_lib.base.tensors import SampleNoise, batch_mul
from score_lib.parametrization import EDM
from score_lib.runs import measures
from score_lib.sdes.foreign import as_process
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE

PROCESSES = {
    "ve": VESDE(0.02, 10.0, N=30),
    "vp": VPSDE(N=40),
    "cosine": CosineVPSDE(N=30, continuous=False),
    "foreign ve": foreign_sde.Exploding(0.02, 10.0, 30),
}
OURS = ("ve", "vp", "cosine")


def some_levels(N):
    """Noise indices, the first and the last among them."""
    return torch.tensor([0, 1, 7, 12, N - 2, N - 1])


def at_levels(sde, index, off=0.0):
    """Time, label, m and s of noise indices, or of places so far above them, by definition."""
    place, last = index + torch.tensor(off, dtype=torch.float64), sde.N - 1
    if isinstance(sde, CosineVPSDE):
        t = 1 / sde.N + place / last * (sde.last_level - 1 / sde.N)
        m, s = sde.marginal_coeffs(((place + 1) / sde.N).clamp(max=sde.last_level))
        return t, place, m, s
    m, s = (value.double() for value in as_process(sde).discrete_coeffs(index))
    if isinstance(sde, VPSDE):
        # A hair above the level, as rounding may not change it.
        return (place + 1e-9) / last, place + 1e-9, m, s
    return 1 - place / last, index, m, s


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", (0.0, 0.3))
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parametrization_gives_the_score_of_its_denoiser(name, process, off):
    """At levels and between them, with m and s of the level that the network is told."""
    sde = PROCESSES[process]
    t, told, m, s = at_levels(sde, some_levels(sde.N)[:-1], off)
    assert_reads_its_denoiser(sde, name, t, m, s, told, False)


@pytest.mark.parametrize("process", PROCESSES)
def test_times_of_levels_are_told_as_their_indices(process):
    sde = as_process(PROCESSES[process])
    index = some_levels(sde.N)
    told = sde.noise_label(sde.level_time(index), False)
    torch.testing.assert_close(told.double(), index.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sde.level_time(index).double(), at_levels(sde, index)[0])


# --- Losses ---------------------------------------------------------------------------------------


def a_loss(process, name, weighting):
    """Loss of each of six samples, as the config's loss is made, and everything in its formula."""
    sde = PROCESSES[process]
    level = some_levels(sde.N)
    m, s = (value.double() for value in as_process(sde).discrete_coeffs(level))
    batch = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    z, seen = torch.randn_like(batch), []

    def network(x, labels):
        seen.append((x, labels))
        return linear(x, labels / 30)

    options = {"parametrization": name, "weighting": weighting}
    loss_fn = losses.get_loss_fn(sde, True, True, False, False, **options)
    found = loss_fn.per_sample(network, batch, losses.Draws(level, z))
    return found, seen[0], (level, m, s, batch, z)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_weighting_by_the_output_are_the_formulas(name, process):
    for weighting in ("", "output"):
        found, (given, labels), (level, m, s, batch, z) = a_loss(process, name, weighting)
        x = batch_mul(m, batch) + batch_mul(s, z)
        expected, target, label = written_for(name, x, m, s, batch)
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)
        if label is None:
            assert torch.equal(labels, level)
        else:
            torch.testing.assert_close(labels, label)
        error = (linear(given, labels / 30) - target).square().flatten(1).mean(1)
        out = get_parametrization(name).coefficients(m, s).out
        if not weighting:
            error = error * (s * out) ** 2
        torch.testing.assert_close(found, error, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("process", OURS)
@pytest.mark.parametrize("name", ("", "v"))
def test_min_snr_weights_denoised_data_by_at_most_five(name, process):
    found, (given, labels), (_, m, s, batch, z) = a_loss(process, name, "min_snr")
    x, output = batch_mul(m, batch) + batch_mul(s, z), linear(given, labels / 30)
    if name:
        coefficients = get_parametrization(name).coefficients(m, s)
        score = batch_mul(coefficients.skip, x) + batch_mul(coefficients.out, output)
    else:
        score = PROCESSES[process].score_from_output(output, s)
    denoised = batch_mul(1 / m, x + batch_mul(s**2, score))
    snr = (m / s) ** 2
    assert (snr > 5).any() and (snr < 5).any()
    expected = snr.clamp(max=5) * (denoised - batch).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)


# --- Results: a network that has learned Gaussian data --------------------------------------------


def exact(name, sde, m, s):
    """A network that has learned Gaussian data, given m and s (N,) by noise index."""
    chosen = get_parametrization(name)

    def network(scaled, labels):
        level = labels.long()
        if name == "edm":
            table = torch.log(s / m) / 4
            level = (labels.double()[:, None] - table).abs().argmin(1)
        published = torch.ones_like(s) if isinstance(sde, VESDE) else -1 / s
        return learned(chosen, published[level], scaled, m[level], s[level])

    return network


SAMPLERS = {
    "ancestral": functools.partial(
        sampling.get_pc_sampler,
        predictor=sampling.AncestralSamplingPredictor,
        corrector=None,
        snr=0.1,
    ),
    "langevin": functools.partial(
        sampling.get_pc_sampler,
        predictor=sampling.ReverseDiffusionPredictor,
        corrector=sampling.LangevinCorrector,
        snr=0.1,
    ),
    "ddim": functools.partial(sampling.get_solver_sampler, solver=sampling.DDIM),
    "heun": functools.partial(sampling.get_solver_sampler, solver=sampling.Heun),
    "adaptive": functools.partial(sampling.get_adaptive_sampler, rtol=0.2),
    "ode": functools.partial(sampling.get_ode_sampler, rtol=0.1, atol=0.1),
}
DRAWS = (("vp", kind) for kind in SAMPLERS)


@pytest.mark.parametrize(
    ("process", "kind"), (*DRAWS, ("ve", "ancestral"), ("cosine", "ancestral"))
)
def test_samples_are_the_same_whatever_the_output_means(process, kind):
    sde, z = PROCESSES[process], torch.randn(4, 2, dtype=torch.float64)
    z = sde.prior_from_normal(z)
    m, s = (value.double() for value in sde.discrete_coeffs(torch.arange(sde.N)))

    def draw(name):
        options = {"continuous": False, "eps": sde.sampling_eps, "parametrization": name}
        sampler = SAMPLERS[kind](sde, (4, 2), inverse_scaler=lambda x: x, **options)
        return sampler(exact(name, sde, m, s), z, noise=SampleNoise(1, range(4)))[0]

    published = draw("")
    for name in NAMES:
        torch.testing.assert_close(draw(name), published, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("process", OURS)
def test_bounds_are_the_same_whatever_the_output_means(process):
    sde = PROCESSES[process]
    labels, m, s = sde.discrete_chain()
    m, s = (torch.empty_like(m).index_copy(0, labels, value) for value in (m, s))
    data = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]

    def bound(name):
        vlb_fn = get_vlb_fn(sde, inverse_scaler, 17, parametrization=name, clip=False)
        return vlb_fn(exact(name, sde, m, s), data, noise=SampleNoise(2, range(17)))

    published = bound("")
    for name in NAMES:
        found = bound(name)
        torch.testing.assert_close(found.total, published.total, rtol=1e-8, atol=1e-8, msg=name)


def test_a_network_of_float32_is_given_and_told_float32_in_the_bound():
    def network(x, labels):
        assert x.dtype == torch.float32 == labels.dtype
        return x

    bound = get_vlb_fn(PROCESSES["vp"], inverse_scaler, 3, parametrization="edm")
    assert bound(network, torch.tensor([[-1.0, 0.0, 1.0]])).total.isfinite().all()


# --- By config ------------------------------------------------------------------------------------

DISCRETE = {
    "training__continuous": False,
    "sampling__predictor": "ancestral_sampling",
    "sampling__num_steps": 0,
}


def edm_labels(sde):
    """log(s / m) / 4 of each noise index."""
    m, s = sde.discrete_coeffs(torch.arange(sde.N))
    return torch.log(s / m) / 4


def test_training_sees_scaled_inputs_and_labels_of_levels(tmp_path):
    changes = {"model__parametrization": "edm", "model__num_scales": 40, **DISCRETE}
    calls, _ = train(tmp_path, training__weighting="output", **changes)
    labels, x = (torch.cat(parts) for parts in zip(*((c.labels, c.x) for c in calls), strict=True))
    table = edm_labels(VPSDE(N=40))
    torch.testing.assert_close((labels[:, None] - table).abs().amin(1), torch.zeros(len(labels)))
    assert labels.min() < table[3] and labels.max() > table[36]
    # Of centred digits the mean square is about 0.7, of which EDM knows sigma_data^2 = 0.25.
    assert 0.7 < x[labels > table[30]].square().mean() < 1.4
    assert 1.5 < x[labels < table[5]].square().mean() < 4


@pytest.mark.parametrize(
    ("experiment", "changes", "loss"),
    (
        ("vp/digits", {"model__parametrization": "v"}, {"parametrization": "v"}),
        ("ve/digits", {"model__parametrization": "x0"}, {"parametrization": "x0"}),
        (
            "vp/digits",
            {"model__parametrization": "edm", "model__sigma_data": 0.3},
            {"parametrization": EDM(0.3)},
        ),
        ("vp/digits", {"training__weighting": "min_snr"}, {"weighting": "min_snr"}),
        (
            "vp/digits",
            {"model__parametrization": "v", "training__weighting": "output"},
            {"parametrization": "v", "weighting": "output"},
        ),
    ),
)
def test_parametrization_and_weighting_arrive_in_the_loss(experiment, changes, loss):
    """The configured loss is the published factory's with those keywords, and no other."""

    def value(loss_fn):
        torch.manual_seed(0)
        return loss_fn(run.state["model"], torch.rand(64, 1, 8, 8))

    free = {"model__scale_by_sigma": False, "model__num_scales": 30, **DISCRETE}
    run = run_lib.setup(recording(experiment, **free, **changes))
    makers = {"vp": losses.get_ddpm_loss_fn, "ve": losses.get_smld_loss_fn}
    make = functools.partial(makers[experiment[:2]], run.sde, False)
    configured = value(run.loss_fn(False))
    assert torch.equal(configured, value(make(**loss))) and configured != value(make())


def test_parametrization_arrives_in_samples():
    """The network is told log(s / m) / 4 of each level, from the most noise on."""
    changes = {"model__parametrization": "edm", "model__sigma_data": 0.3, **DISCRETE}
    run, images = draw_by_config(**changes)
    told = torch.stack([call.labels[0] for call in Recorder.calls])
    at = torch.linspace(1, run.sde.sampling_eps, 25) * 24
    torch.testing.assert_close(told, edm_labels(VPSDE(N=25))[at.long()])
    options = {"predictor": sampling.AncestralSamplingPredictor, "corrector": None, "snr": 0.16}
    options |= {"inverse_scaler": run.inverse_scaler, "continuous": False}
    by_hand = functools.partial(draw_by_hand, run, sampling.get_pc_sampler, **options)
    assert torch.equal(images, by_hand(parametrization=EDM(0.3)))
    assert not torch.equal(images, by_hand(parametrization=EDM(0.5)))


def test_parametrization_arrives_in_the_bound():
    run = run_lib.setup(
        recording(
            model__parametrization="edm", model__sigma_data=0.3, model__num_scales=30, **DISCRETE
        )
    )
    images = torch.linspace(-1, 1, 17)[torch.arange(128) % 17].reshape(2, 1, 8, 8)
    Recorder.calls.clear()
    found = measures.vlb_terms(run, images, 17, SampleNoise(0, range(2)))["bpd"]
    told = torch.stack([call.labels[0] for call in Recorder.calls])
    torch.testing.assert_close(told.sort()[0], edm_labels(run.sde), rtol=1e-3, atol=1e-5)

    def by_hand(name):
        bound = get_vlb_fn(run.sde, run.inverse_scaler, 17, parametrization=name)
        return bound(run.state["model"], images, noise=SampleNoise(0, range(2))).total.numpy()

    assert np.array_equal(found, by_hand(EDM(0.3)))
    assert abs(found - by_hand("edm")).min() > 1e-3 < abs(found - by_hand(None)).min()


# --- A user's own, checks, refusals ---------------------------------------------------------------


class OfTime(Parametrization):
    """Told a number of its own at each time."""

    def coefficients(self, m, s):
        return Coefficients(-1 / s, 0.5 / s, 2 * m)

    def label(self, sde, t, m, s):
        return 7 * t


class OfTheProcess(OfTime):
    """Told a multiple of what the process tells."""

    def label(self, sde, t, m, s):
        return 3 * Parametrization.label(self, sde, t, m, s)


@pytest.mark.parametrize("process", OURS)
def test_labels_of_a_users_class_are_told(process):
    sde, seen = PROCESSES[process], []
    index = some_levels(sde.N)
    t, told, m, s = at_levels(sde, index)
    x = torch.randn(6, 2, dtype=torch.float64)

    def network(x, labels):
        seen.append(labels.double())
        return x

    for chosen, label in ((OfTime(), 7 * t), (OfTheProcess(), 3 * told)):
        score = get_score_fn(sde, network, parametrization=chosen)(x, t)
        torch.testing.assert_close(score, batch_mul((m - 1) / s, x))
        loss_fn = losses.get_ddpm_loss_fn(sde, False, parametrization=chosen)
        loss_fn.per_sample(network, x, losses.Draws(index, x))
        for found in seen[-2:]:
            torch.testing.assert_close(found, label.double(), rtol=1e-6, atol=1e-6)


def test_processes_without_levels_are_refused():
    x, words = torch.randn(2, 3), "subVPSDE has no discrete noise levels"
    with pytest.raises(NotImplementedError, match=words):
        get_score_fn(subVPSDE(), lambda x, labels: x, parametrization="v")(x, torch.rand(2))
    config = recording("subvp/digits", training__continuous=False, model__num_scales=30)
    config.model.parametrization = "v"
    with pytest.raises(NotImplementedError, match=words):
        run_lib.setup(config)
