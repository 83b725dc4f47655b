"""A process with only the published methods is read by the published conventions."""

import copy

import foreign_sde
import pytest
import torch
from oracles import GaussianOracle

import sde_lib
from controllable_generation import get_decoder, get_encoder, get_pc_inpainter
from likelihood import get_likelihood_fn
from losses import get_ddpm_loss_fn, get_sde_loss_fn, get_smld_loss_fn, get_step_fn
from models.ema import ExponentialMovingAverage
from models.utils import get_score_fn
from sampling import (
    DDIM,
    LangevinCorrector,
    Predictor,
    ReverseDiffusionPredictor,
    get_adaptive_sampler,
    get_corrector,
    get_ode_sampler,
    get_pc_sampler,
    get_predictor,
    get_solver_sampler,
    shared_corrector_update_fn,
    shared_predictor_update_fn,
)
from score_lib.sdes.foreign import as_process

SHAPE = (2, 1, 4, 4)
KINDS = {"VESDE": (0.01, 5.0, 20), "VPSDE": (0.1, 15.0, 20), "subVPSDE": (0.1, 15.0, 20)}
MODES = [(kind, continuous) for kind in KINDS for continuous in (True, False)]


def identity(x):
    return x


def pair(kind):
    """A foreign process and ours."""
    return getattr(foreign_sde, kind)(*KINDS[kind]), getattr(sde_lib, kind)(*KINDS[kind])


def assert_agree(kind, compute, continuous=True):
    """`compute(sde, model)` gives the same bits for both processes."""
    theirs, ours = pair(kind)
    model = GaussianOracle(ours, continuous or kind == "subVPSDE")
    results = []
    for sde in (theirs, ours):
        torch.manual_seed(0)
        results.append(compute(sde, model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "continuous"), MODES)
def test_scores(kind, continuous):
    t = torch.linspace(0.01, 1, 7)
    x = torch.randn(7, 1, 4, 4)
    assert_agree(kind, lambda sde, m: get_score_fn(sde, m, continuous=continuous)(x, t), continuous)


@pytest.mark.parametrize("flow", (False, True))
@pytest.mark.parametrize("corrector", ("none", "langevin", "ald"))
@pytest.mark.parametrize("predictor", ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"))
@pytest.mark.parametrize(("kind", "continuous"), MODES)
def test_pc_samples(kind, continuous, predictor, corrector, flow):
    if predictor == "ancestral_sampling" and (flow or kind == "subVPSDE"):
        return
    classes = get_predictor(predictor), get_corrector(corrector)

    def samples(sde, model):
        settings = {"probability_flow": flow, "continuous": continuous}
        return get_pc_sampler(sde, SHAPE, *classes, identity, 0.1, **settings)(model)[0]

    assert_agree(kind, samples, continuous)


def step_once(sde, model):
    x, t = torch.randn(SHAPE), torch.tensor([0.3, 0.9])
    x, _ = shared_predictor_update_fn(x, t, sde, model, ReverseDiffusionPredictor, False, True)
    return shared_corrector_update_fn(x, t, sde, model, LangevinCorrector, True, 0.1, 2)


def other_steps(sde, model):
    samplers = [
        get_pc_sampler(
            sde, SHAPE, predictor, LangevinCorrector, identity, 0.1, continuous=True, steps=120
        )
        for predictor in (ReverseDiffusionPredictor, get_predictor("euler_maruyama"))
    ]
    return [sample(model)[0] for sample in samplers]


def coded(sde, model):
    codes, _ = get_encoder(sde, identity)(model, torch.rand(SHAPE))
    return codes, get_decoder(sde, identity)(model, codes)[0]


def trained(sde, model):
    network = torch.nn.Module()
    network.weight = torch.nn.Parameter(torch.ones(1))
    network.forward = lambda x, labels: network.weight * model(x, labels)
    ema = ExponentialMovingAverage(network.parameters(), 0.9)
    step = get_step_fn(sde, False, continuous=True, likelihood_weighting=True)
    return step({"model": network, "ema": ema}, torch.rand(SHAPE))


CALLS = {
    "ode": lambda sde, m: get_ode_sampler(sde, SHAPE, identity, denoise=True)(m)[0],
    "adaptive": lambda sde, m: get_adaptive_sampler(sde, SHAPE, identity)(m)[0],
    "solver": lambda sde, m: get_solver_sampler(sde, SHAPE, DDIM, identity, 5)(m)[0],
    "likelihood": lambda sde, m: get_likelihood_fn(sde, identity)(m, torch.rand(SHAPE)),
    "loss": lambda sde, m: get_sde_loss_fn(sde, False)(m, torch.rand(SHAPE)),
    "inpainting": lambda sde, m: get_pc_inpainter(
        sde, ReverseDiffusionPredictor, LangevinCorrector, identity, 0.1, continuous=True
    )(m, torch.rand(SHAPE), torch.ones(SHAPE).tril()),
    "step": step_once,
    "other steps": other_steps,
    "codes": coded,
    "evaluation": trained,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_results(kind, call):
    assert_agree(kind, CALLS[call])


@pytest.mark.parametrize("kind", ("VESDE", "VPSDE"))
def test_discrete_losses(kind):
    loss = {"VESDE": get_smld_loss_fn, "VPSDE": get_ddpm_loss_fn}[kind]
    assert_agree(kind, lambda sde, m: loss(sde, True)(m, torch.rand(SHAPE)), continuous=False)


def test_processes_without_a_name_are_told_by_their_attributes():
    t, model = torch.tensor([0.2, 0.7]), lambda x, labels: x * labels[:, None, None, None]
    x, numbers = torch.randn(SHAPE), KINDS["VESDE"]
    score = get_score_fn(foreign_sde.Exploding(*numbers), model, continuous=True)(x, t)
    expected = get_score_fn(sde_lib.VESDE(*numbers), model, continuous=True)(x, t)
    assert torch.equal(score, expected)
    plain = foreign_sde.Plain(10)
    score = get_score_fn(plain, model, continuous=True)(x, t)
    std = plain.marginal_prob(x, t)[1][:, None, None, None]
    torch.testing.assert_close(score, -x * 999 * t[:, None, None, None] / std)


class Mine(Predictor):
    """Of another code base: it asks for its own class, and makes the steps of a chain only."""

    def update_fn(self, x, t):
        assert isinstance(self.sde, foreign_sde.VPSDE) and self.sde.my_option == 3
        f, _ = self.rsde.discretize(x, t)
        return x - f, x - f


def test_a_predictor_finds_its_own_process():
    sde, _ = pair("VPSDE")
    sde.my_option = 3
    before = copy.copy(vars(sde))
    settings = SHAPE, Mine, None, identity, 0.1
    get_pc_sampler(sde, *settings)(lambda x, labels: x)
    assert {**vars(sde), **before} == vars(sde) and type(sde) is foreign_sde.VPSDE
    assert all(name.startswith("_") for name in vars(sde).keys() - before.keys())
    with pytest.raises(ValueError, match=r"VPSDE has tables for N = 20 .*N = 5"):
        get_pc_sampler(sde, *settings, continuous=True, steps=5)


class Reverting(foreign_sde.SDE):
    """Towards a mean that its owner sets for each batch."""

    mu = 0.0

    def sde(self, x, t):
        return self.mu - x, torch.full_like(t, 0.01)

    def marginal_prob(self, x, t):
        scale = torch.exp(-t)[:, None, None, None]
        return scale * x + (1 - scale) * self.mu, 0.01 * torch.sqrt(-torch.expm1(-2 * t) / 2)


def test_attributes_that_change_later_count():
    """Of an own process, in a sampler and a loss that were made before."""
    sde = Reverting(1000)
    settings = SHAPE, get_predictor("euler_maruyama"), None, identity, 0.1
    sample = get_pc_sampler(sde, *settings, continuous=True)
    loss_fn = get_sde_loss_fn(sde, False)
    seen = []
    sde.mu, sde.N = 5.0, 100

    def model(x, labels):
        seen.append(x)
        return 0 * x

    x, evaluations = sample(model, z=torch.full(SHAPE, 5.0))
    torch.testing.assert_close(x, torch.full(SHAPE, 5.0), rtol=0, atol=0.1)
    assert evaluations == 100
    loss_fn(model, torch.full(SHAPE, 5.0))
    torch.testing.assert_close(seen[-1], torch.full(SHAPE, 5.0), rtol=0, atol=0.1)


def test_a_process_may_refuse_to_set_attributes():
    class Closed(Reverting):
        def __init__(self):
            vars(self).update(N=10)

        def __setattr__(self, name, value):
            raise TypeError("read-only")

    assert get_sde_loss_fn(Closed(), False)(lambda x, labels: x, torch.zeros(SHAPE)).isfinite()


def test_edited_methods_are_used():
    class Edited(foreign_sde.VPSDE):
        def prior_sampling(self, shape):
            return torch.full(shape, 7.0)

        def reverse(self, score_fn, probability_flow=False):
            return super().reverse(lambda x, t: 0 * x, probability_flow)

    sde = Edited(*KINDS["VPSDE"])
    assert as_process(sde).prior_sampling((2,)).eq(7).all()
    model = GaussianOracle(sde_lib.VPSDE(*KINDS["VPSDE"]))
    samples, _ = get_ode_sampler(sde, SHAPE, identity)(model)
    assert samples.gt(7).all()  # the drift alone, backwards


@pytest.mark.parametrize("wrong", (None, "vpsde", object()))
def test_other_objects_are_refused(wrong):
    with pytest.raises(ValueError, match=r"no process: it has no marginal_prob, .*sde_lib"):
        get_score_fn(wrong, lambda x, labels: x)
