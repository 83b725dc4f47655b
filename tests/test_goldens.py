"""Recorded figures of processes, samplers, likelihoods, losses and training hold."""

import zlib

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from oracles import (
    SEEDS,
    GaussianOracle,
    assert_close_to_largest,
    golden_facts,
    golden_sde,
    goldens,
    inverse_scaler,
)

import losses
import sampling
from likelihood import get_likelihood_fn
from models.ema import ExponentialMovingAverage
from models.utils import get_score_fn

SDES = ("vesde", "vpsde", "subvpsde")
PC_CASES = sorted(name for name in goldens() if name.startswith("pc/"))
TIGHT = 2e-5


@pytest.mark.parametrize("name", SDES)
def test_process(name):
    g, sde = goldens(), golden_sde(name)
    x, t = g[f"sde/{name}/x"], g[f"sde/{name}/t"]
    values = dict(zip(("drift", "diffusion"), sde.sde(x, t), strict=True))
    values |= dict(zip(("mean", "std"), sde.marginal_prob(x, t), strict=True))
    values |= dict(zip(("f", "G"), sde.discretize(x, t), strict=True))
    values["prior_logp"] = sde.prior_logp(x)
    for key, value in values.items():
        expected = g[f"sde/{name}/{key}"]
        if expected.abs().max() == 0:
            assert value.abs().max() == 0, key
        else:
            assert_close_to_largest(value, expected, TIGHT)


@pytest.mark.parametrize("case", PC_CASES)
def test_predictor_corrector(case):
    _, name, grid, predictor, corrector, flow, denoise = case.split("/")
    facts, continuous = golden_facts()["pc"], grid == "continuous"
    sde = golden_sde(name)
    sampler = sampling.get_pc_sampler(
        sde,
        tuple(facts["shape"]),
        None if predictor == "none" else sampling.get_predictor(predictor),
        None if corrector == "none" else sampling.get_corrector(corrector),
        inverse_scaler,
        facts["snr"],
        n_steps=2 if corrector == "ald" else 1,
        probability_flow=flow == "ode",
        continuous=continuous,
        denoise=denoise == "denoise",
        eps=sde.sampling_eps,
        device="cpu",
    )
    torch.manual_seed(SEEDS["pc"])
    samples, evaluations = sampler(GaussianOracle(sde, continuous))
    assert_close_to_largest(samples, goldens()[case])
    per_step = (predictor != "none") + {"ald": 2, "langevin": 1, "none": 0}[corrector]
    assert evaluations == per_step * facts["N"]


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("denoise", (True, False))
def test_ode_sampler(name, denoise):
    """Denoised by Tweedie's formula: the recorded step of the chain depends on N."""
    facts, sde, oracle = golden_facts(), golden_sde(name), GaussianOracle(golden_sde(name))
    eps, expected = sde.sampling_eps, goldens()[f"ode/{name}/raw"]
    sampler = sampling.get_ode_sampler(
        sde, tuple(facts["pc"]["shape"]), inverse_scaler, denoise=denoise, eps=eps
    )
    torch.manual_seed(SEEDS["ode"])
    samples, evaluations = sampler(oracle)
    if denoise:
        x, t = 2 * expected - 1, torch.full((len(expected),), eps)
        score = get_score_fn(sde, oracle, continuous=True)(x, t)
        expected = inverse_scaler(sde.denoised(x, t, score))
    assert_close_to_largest(samples, expected, TIGHT)
    # The recorded runs lost digits in 1 - m(t)^2 near t = 0 and needed up to two steps more.
    assert -12 <= evaluations - denoise - facts["ode"][name]["nfe"] <= 6


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("probe", ("Rademacher", "Gaussian"))
def test_likelihood(name, probe):
    g, facts, sde = goldens(), golden_facts(), golden_sde(name)
    torch.manual_seed(SEEDS["likelihood"])
    bpd, z, nfe = get_likelihood_fn(sde, inverse_scaler, hutchinson_type=probe)(
        GaussianOracle(sde), g[f"likelihood/{name}/data"]
    )
    assert_close_to_largest(bpd, g[f"likelihood/{name}/{probe}/bpd"], TIGHT)
    assert_close_to_largest(z, g[f"likelihood/{name}/{probe}/z"], TIGHT)
    assert abs(nfe - facts["likelihood"][f"{name}/{probe}"]["nfe"]) <= 6


@pytest.mark.parametrize("case", sorted(golden_facts()["loss"]))
def test_loss(case):
    name, kind, *options = case.split("/")
    options = {key: value == "True" for key, value in (o.split("=") for o in options)}
    sde, facts = golden_sde(name), golden_facts()
    if kind == "continuous":
        loss_fn = losses.get_sde_loss_fn(sde, train=False, **options)
    else:
        make = {"smld": losses.get_smld_loss_fn, "ddpm": losses.get_ddpm_loss_fn}[kind]
        loss_fn = make(sde, train=False, **options)
    torch.manual_seed(SEEDS["loss"])
    loss = loss_fn(GaussianOracle(sde, kind == "continuous"), goldens()[f"loss/{name}/batch"])
    assert float(loss) == pytest.approx(facts["loss"][case], rel=2e-5)


class OneConvolution(torch.nn.Module):
    """The network of the recorded training runs, with weights that follow from their names."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        for name, parameter in self.named_parameters():
            z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape)
            z = z / np.sqrt(z[0].size) if parameter.dim() > 1 else 0.1 * z
            parameter.data = torch.from_numpy(z).float()

    def forward(self, x, labels):
        return self.conv(x)


def training_config():
    facts = golden_facts()["train"]["config"]
    return ConfigDict({"optim": facts["optim"]}), facts


def new_state(config, decay):
    model = OneConvolution()
    return {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": ExponentialMovingAverage(model.parameters(), decay),
        "step": 0,
    }


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("accumulation", (1, 2))
def test_training(name, accumulation):
    config, facts = training_config()
    expected, batch = golden_facts()["train"][name], goldens()[f"loss/{name}/batch"]
    options = {"reduce_mean": True, "continuous": True, "likelihood_weighting": False}
    state = new_state(config, facts["ema_decay"])
    train_step = losses.get_step_fn(
        golden_sde(name),
        True,
        losses.optimization_manager(config),
        accumulation=accumulation,
        **options,
    )
    torch.manual_seed(facts["seed_train"])
    history = [float(train_step(state, batch)) for _ in expected["train_losses"]]
    assert history == pytest.approx(expected["train_losses"], rel=2e-4)
    for key, parameter in state["model"].named_parameters():
        assert_close_to_largest(parameter, goldens()[f"train/{name}/param/{key}"])
    for i, average in enumerate(state["ema"].shadow_params):
        assert_close_to_largest(average, goldens()[f"train/{name}/ema/{i}"])

    torch.manual_seed(facts["seed_eval"])
    eval_loss = losses.get_step_fn(golden_sde(name), False, **options)(state, batch)
    assert float(eval_loss) == pytest.approx(expected["eval_loss_with_ema"], rel=2e-4)
    for key, parameter in state["model"].named_parameters():  # evaluation changed nothing
        assert_close_to_largest(parameter, goldens()[f"train/{name}/param/{key}"])
