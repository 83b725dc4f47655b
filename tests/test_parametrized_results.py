"""A parametrised network gives the same results wherever it is read; see `test_parametrization`."""

import functools

import pytest
import torch
from small_runs import small_config
from test_parametrization import NAMES

import run_lib
import sampling
from controllable_generation import get_encoder, get_pc_inpainter
from likelihood import get_elbo_fn, get_log_likelihood_fn, get_vlb_fn
from models.utils import get_parametrization
from score_lib.base.tensors import SampleNoise, batch_mul
from score_lib.dequantization import UniformDequantization, get_dequantization_loss_fn
from sde_lib import VPSDE


def learned(chosen, published, scaled, m, s, mean=0.3, std=0.4):
    """The output of a network that has learned data ~ N(mean, std^2).

    Args:
        published: the output's factor in the score without a parametrisation, (B,).
    """
    none = (torch.zeros_like(s), published, torch.ones_like(s))
    skip, out, scale = chosen.coefficients(m, s) if chosen else none
    x = batch_mul(1 / scale, scaled)
    centred = x - batch_mul(m * mean, torch.ones_like(x))
    score = batch_mul(-1 / ((m * std) ** 2 + s**2), centred)
    return batch_mul(1 / out, score - batch_mul(skip, x))


def exact(sde, name):
    """The network of a parametrisation that has learned Gaussian data."""
    chosen = get_parametrization(name)

    def network(scaled, labels):
        # Labels tell the time: at one time only one of the functions below is asked for.
        t = times(labels)
        m, s = sde.marginal_coeffs(t)
        return learned(chosen, -1 / s, scaled, m, s)

    def times(labels):
        if name != "edm":
            return labels / 999
        # sigma^2 = exp(9.95 t^2 + 0.1 t) - 1 of the default VP process.
        integral = torch.log1p(torch.exp(8 * labels))
        return ((0.01 + 39.8 * integral).sqrt() - 0.1) / 19.9

    return network


EVERYWHERE = {
    "pc": functools.partial(
        sampling.get_pc_sampler,
        predictor=sampling.ReverseDiffusionPredictor,
        corrector=sampling.LangevinCorrector,
        snr=0.1,
    ),
    "ode": sampling.get_ode_sampler,
    "adaptive": functools.partial(sampling.get_adaptive_sampler, rtol=0.2),
    "ddim": functools.partial(sampling.get_solver_sampler, solver=sampling.DDIM),
    "heun": functools.partial(sampling.get_solver_sampler, solver=sampling.Heun),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", EVERYWHERE)
def test_samplers_give_the_same_samples_whatever_the_output_means(method, name):
    sde, z = VPSDE(N=30), torch.randn(4, 2, dtype=torch.float64)

    def draw(name):
        sampler = EVERYWHERE[method](
            sde, (4, 2), inverse_scaler=lambda x: x, continuous=True, parametrization=name
        )
        noise = SampleNoise(1, range(4))
        return sampler(exact(sde, name), z, noise=noise)[0]

    torch.testing.assert_close(draw(name), draw(""), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("v", "edm"))
def test_published_factories_take_a_parametrization(name):
    sde, data = VPSDE(N=20), torch.randn(4, 2, dtype=torch.float64)
    mask, t = torch.tensor([1.0, 0.0]).expand(4, 2), torch.full((4,), 0.4, dtype=torch.float64)

    def found(name):
        reading = {"continuous": True, "parametrization": name}
        predictor, corrector = sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector
        inpainter = get_pc_inpainter(sde, predictor, corrector, lambda x: x, 0.1, **reading)
        yield inpainter(exact(sde, name), data, mask, noise=SampleNoise(1, range(4)))
        network = exact(sde, name)
        keywords = {"sde": sde, "model": network, **reading}
        yield sampling.shared_predictor_update_fn(
            data, t, predictor=predictor, probability_flow=True, **keywords
        )[0]
        yield sampling.shared_corrector_update_fn(
            data, t, corrector=sampling.NoneCorrector, snr=0.1, n_steps=1, **keywords
        )[0]

    for ours, published in zip(found(name), found(""), strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_and_codes_are_the_same_whatever_the_output_means(name):
    sde, data = VPSDE(), torch.randn(3, 2, dtype=torch.float64)

    def found(name):
        keywords = {"parametrization": name, "eps": 1e-3}
        likelihood = get_log_likelihood_fn(sde, hutchinson_type="exact", **keywords)
        codes, _ = get_encoder(sde, lambda x: x, **keywords)(exact(sde, name), data)
        return likelihood(exact(sde, name), data).total, codes

    for ours, published in zip(found(name), found(""), strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-5)


class Linear(torch.nn.Module):
    """Notes whether dropout is on."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x, labels):
        self.modes.append(self.training)
        return 0.5 * x


OTHERS = {
    "likelihood": lambda sde: get_log_likelihood_fn(sde),
    "lower bound": lambda sde: get_elbo_fn(sde, num_times=2),
    "variational bound": lambda sde: get_vlb_fn(sde, lambda x: x, levels=2),
    "codes": lambda sde: get_encoder(sde, lambda x: x),
    "dequantization": lambda sde: get_dequantization_loss_fn(
        sde, UniformDequantization(4), lambda x: x, lambda x: x
    ),
}


@pytest.mark.parametrize("method", [*EVERYWHERE, *OTHERS])
@pytest.mark.quick_cases(10)
def test_a_network_is_read_without_dropout(method):
    network, x = Linear().train(), torch.rand(4, 2).round()
    if method in OTHERS:
        OTHERS[method](VPSDE(N=30))(network, x)
    else:
        sampler = EVERYWHERE[method](VPSDE(N=30), (4, 2), inverse_scaler=lambda x: x)
        sampler(network, x)
    assert set(network.modes) == {False}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experiment", ("ve/digits", "vp/digits", "subvp/digits"))
def test_published_networks_are_trained_and_sampled(experiment, name):
    """The dry run of `setup`, a loss with gradients at drawn times, and a short sample."""
    changes = {"model__scale_by_sigma": False, "sampling__method": "heun"}
    if name == "edm":
        changes["model__fourier_log"] = False  # of the embedding of ve/digits
    run = run_lib.setup(small_config(experiment, model__parametrization=name, **changes))
    torch.manual_seed(0)
    loss = run.loss_fn(True)(run.state["model"], run.scaler(torch.rand(16, 1, 8, 8)))
    loss.backward()
    gradients = [p.grad for p in run.state["model"].parameters() if p.grad is not None]
    assert len(gradients) > 10 and all(g.isfinite().all() for g in [loss, *gradients])
    assert run.draw(range(2)).isfinite().all()
