"""DDPM and DDIM on integer steps: recorded runs of other libraries, closed forms, and wiring."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from networks import DATA, _weights, tiny_config
from oracles import MU, S0, GaussianOracle, exact_moments, inverse_scaler
from small_runs import small_config

import run_lib
import sampling
from controllable_generation import ClassGuidance
from models.utils import get_model
from score_lib.samplers.chain import ChainScore, ChainStep, StepSettings, get_chain_sampler
from score_lib.samplers.respacing import kept_levels
from score_lib.scores import LevelDenoiser
from score_lib.sdes.chain import Chain, Levels
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE


@functools.cache
def goldens() -> dict[str, torch.Tensor]:
    with np.load(DATA / "golden_chains.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def process(schedule, N):
    return VPSDE(N=N) if schedule == "linear" else CosineVPSDE(N, continuous=False)


def off(value, expected):
    """The largest error relative to the largest value."""
    return float((value.double() - expected.double()).abs().max() / expected.abs().max())


# --- Respacing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "N", "respacing"),
    (
        ("linear", 1000, ""),
        ("linear", 250, ""),
        ("cosine", 1000, ""),
        ("cosine", 100, "10,5,5,2"),
        ("linear", 1000, "250"),
        ("linear", 1000, "ddim25"),
    ),
)
def test_respaced_chains_are_those_of_guided_diffusion(schedule, N, respacing):
    """The recorded betas are of float64, ours of the linear schedule are published in float32."""
    name = {"10,5,5,2": "_of_4"}.get(respacing, f"_{respacing}" * bool(respacing))
    golden = functools.partial("adm_schedule/{}_{}{}/{}".format, schedule, N, name)
    kept = kept_levels(N, respacing)
    chain = Chain(process(schedule, N), kept=kept)
    assert torch.equal(kept, goldens()[golden("timestep_map")])
    for found, name in (
        (chain.m**2, "alphas_cumprod"),
        (chain.log_step.exp(), "betas"),
        (chain.log_posterior, "posterior_log_variance_clipped"),
        (chain.weight, "posterior_mean_coef1"),
        (chain.weight_x, "posterior_mean_coef2"),
    ):
        torch.testing.assert_close(found, goldens()[golden(name)], rtol=5e-7, atol=0)


def test_strides_of_diffusers_and_what_is_refused():
    assert kept_levels(1000, "leading8").tolist() == list(range(0, 1000, 125))
    assert kept_levels(1000, "leading6").tolist() == [166 * i for i in range(6)]
    assert kept_levels(1000, "trailing8").tolist() == list(range(124, 1000, 125))
    assert kept_levels(10, "trailing3").tolist() == [2, 6, 9]
    assert kept_levels(10, 4).tolist() == [0, 3, 6, 9] and len(kept_levels(10, "0")) == 10
    for wrong, message in (
        ("11", "11 levels of 10"),
        ("3,3,9", "9 levels of 3"),
        ("leading11", "11 levels of 10"),
        ("ddim6", "'6' or 'leading6'"),
        ("fast", "should be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            kept_levels(10, wrong)


# --- Recorded runs of Diffusers -------------------------------------------------------------------

# The layers of a small DDPM in our order, by their names there.
LAYERS = """time_embedding.linear_1 time_embedding.linear_2 conv_in down_blocks.0.resnets.0
down_blocks.0.downsamplers.0.conv down_blocks.1.resnets.0 mid_block.resnets.0
mid_block.attentions.0 mid_block.resnets.1 up_blocks.0.resnets.0 up_blocks.0.resnets.1
up_blocks.0.upsamplers.0.conv up_blocks.1.resnets.0 up_blocks.1.resnets.1 conv_norm_out
conv_out""".split()
PARTS = {
    "resnets": {
        "GroupNorm_0": "norm1",
        "Conv_0": "conv1",
        "Dense_0": "time_emb_proj",
        "GroupNorm_1": "norm2",
        "Conv_1": "conv2",
        "NIN_0": "conv_shortcut",
    },
    "attentions": {
        "GroupNorm_0": "group_norm",
        "NIN_0": "to_q",
        "NIN_1": "to_k",
        "NIN_2": "to_v",
        "NIN_3": "to_out.0",
    },
}


@functools.cache
def recorded_network():
    """Our DDPM with the weights of the recorded one, which are drawn by the names there."""
    config = tiny_config("ddpm", nf=32, attn_resolutions=(), num_scales=1000, centered=True)
    model, state = get_model("ddpm")(config).eval(), {}
    for name, value in model.state_dict().items():
        if name == "sigmas":
            continue
        _, k, *part, end = name.split(".")
        layer = LAYERS[int(k)]
        kind = layer.split(".")[-2] if "." in layer else ""
        theirs = ".".join([layer, *(PARTS[kind][p] for p in part if kind in PARTS)])
        shape, dense = tuple(value.shape), end == "W"
        if dense:
            shape = shape[::-1] + ((1, 1) if kind == "resnets" else ())
        leaf = {"W": "weight", "b": "bias"}.get(end, end)
        filled = _weights(f"{theirs}.{leaf}", shape)
        state[name] = filled.flatten(1).T.contiguous() if dense else filled
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize(
    ("case", "N", "tolerance", "options"),
    (
        ("ddpm_fixed_large", 20, 2e-5, {"variance": "large", "clip": False}),
        ("ddpm_fixed_small_clip_strided", 1000, 2e-5, {"respacing": "leading8"}),
        # x_0 = (x - s eps) / m has 1 / m = 33 times the rounding of eps, which is recorded, too.
        (
            "ddim_clip",
            1000,
            5e-5,
            {"variance": "ddim", "clip_noise": False, "respacing": "leading6"},
        ),
    ),
)
def test_runs_are_those_of_diffusers(case, N, tolerance, options):
    golden = {
        key.removeprefix(f"ddpm_run/{case}/"): value
        for key, value in goldens().items()
        if key.startswith(f"ddpm_run/{case}/")
    }
    sde = VPSDE(1e-4 * N, 0.02 * N, N)
    z, *noises = [*golden["noises"], torch.zeros(())]
    draws, path, told = iter(noises), [], []

    def model(x, labels):
        told.append(labels)
        return recorded_network()(x, labels)

    sample = get_chain_sampler(sde, z.shape, inverse_scaler, **options)
    x, evaluations = sample(
        model,
        z,
        noise=lambda like: next(draws).expand_as(like),
        callback=lambda i, t, x, x_mean: path.append(x),
    )
    path[-1] = 2 * x - 1
    assert evaluations == len(path) == len(golden["timesteps"])
    assert torch.equal(torch.stack(told)[:, 0], golden["timesteps"])
    assert told[0].dtype == torch.int64
    assert off(torch.stack(path), golden["x_after_step"]) < tolerance


# --- Recorded runs of guided-diffusion ------------------------------------------------------------

ADM = {
    "learned_range": ("linear", 1000, "", "learned", [0, 1, 400, 999]),
    "learned_range_respaced": ("cosine", 1000, "20", "learned", [0, 3, 19]),
    # Its network is told 1000 i / N.
    "fixed_large": ("linear", 100, "", "large", [0, 50, 99]),
}


def adm_network(N, variance, x, labels):
    label = (labels * (1000 / N if variance == "large" else 1)).reshape(-1, 1, 1, 1).to(x)
    eps = 0.3 * x + 0.0005 * label
    return torch.cat([eps, 0.5 * torch.sin(3 * x)], dim=1) if variance == "learned" else eps


def toward(x, t, labels=None):
    """The recorded gradient of a classifier."""
    return -1.5 * (x - 0.2)


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("case", ADM)
def test_steps_are_those_of_guided_diffusion(case, clip):
    """Each sample of the batch at a level of its own; recorded without noise at level 0."""
    schedule, N, respacing, variance, numbers = ADM[case]
    sde, kept = process(schedule, N), kept_levels(N, respacing)
    chain = Chain(sde, kept=kept)
    levels, x = Levels(sde, chain), goldens()[f"adm_diffusion/{case}/x"]
    model = functools.partial(adm_network, N, variance)
    denoiser = LevelDenoiser(sde, model, variance == "learned", None)
    network = ChainScore(levels, chain, denoiser, (-1.0, 1.0) if clip else None)
    t = levels.times[torch.tensor(numbers)].float()
    torch.manual_seed(31)
    z, noisy = torch.randn_like(x), torch.tensor(numbers).reshape(-1, 1, 1, 1) > 0

    def step(settings, guide=None):
        def guided(x, t):
            return network(x, t) + toward(x, t)

        made = ChainStep(network, guided if guide else network, lambda x: z, settings)
        found, mean = made(x, t, t)
        return torch.where(noisy, found, mean)

    found = {
        f"p_sample/clip={clip}": step(StepSettings(variance)),
        f"p_sample_classifier/clip={clip}": step(StepSettings(variance, shift_mean=True), toward),
        f"ddim_classifier/clip={clip}/eta=0.0": step(StepSettings("ddim"), toward),
    }
    for eta in (0.0, 0.5, 1.0):
        found[f"ddim/clip={clip}/eta={eta}"] = step(StepSettings("ddim", eta))
    for name, value in found.items():
        # The recorded float32 figures of clamped DDIM are up to 4.5e-5 from those of float64.
        tolerance = 5e-5 if clip and "ddim" in name else 1e-6
        assert off(value, goldens()[f"adm_diffusion/{case}/{name}"]) < tolerance, name


@pytest.mark.parametrize("method", ("p_sample", "ddim_sample"))
@pytest.mark.parametrize("case", ADM)
def test_loops_are_those_of_guided_diffusion(case, method):
    schedule, N, respacing, variance, _ = ADM[case]
    model = functools.partial(adm_network, N, variance)
    x = goldens()[f"adm_diffusion/{case}/x"]
    kind = variance if method == "p_sample" else "ddim"
    if kind == "ddim" and variance == "learned":
        learned = model
        model = lambda x, labels: learned(x, labels)[:, : x.shape[1]]  # noqa: E731
    sample = get_chain_sampler(
        process(schedule, N), x.shape, lambda x: (x + 1) / 2, respacing=respacing, variance=kind
    )
    torch.manual_seed(31)
    found = 2 * sample(model, x)[0] - 1
    assert off(found, goldens()[f"adm_diffusion/{case}/{method}_loop"]) < 2e-5
