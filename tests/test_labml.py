"""The page on labml's DDPM: its code gives the recorded figures of labml-nn."""

from __future__ import annotations

import functools

import pytest
import torch
from test_chain_sampling import goldens, off
from test_docs import example

# Steps, and the steps t of the recorded samples.
CASES = {"T1000": (1000, [0, 1, 500, 999]), "T20": (20, [0, 7, 19])}


def eps_model(x, t):
    return 0.1 * x + 0.01 * t.reshape(-1, *(1,) * (x.dim() - 1)).to(x)


@functools.cache
def page():
    return example("docs/labml.md", "class DenoiseDiffusion")["DenoiseDiffusion"]


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_that_of_labml(case):
    n_steps, t = CASES[case]
    golden = {
        key.removeprefix(f"labml/{case}/"): value
        for key, value in goldens().items()
        if key.startswith(f"labml/{case}/")
    }
    x0, xt, eps, t = golden["x0"], golden["xt"], golden["eps"], torch.tensor(t)
    theirs = page()(eps_model, n_steps)
    mean, variance = theirs.q_xt_x0(x0, t)
    found = {"q_xt_x0/mean": mean, "q_xt_x0/var": variance[:, :1, :1, :1]}
    found["q_sample/given_eps"] = theirs.q_sample(x0, t, eps)
    torch.manual_seed(11)
    found["q_sample/drawn_eps"] = theirs.q_sample(x0, t)
    torch.manual_seed(12)
    found["p_sample"] = theirs.p_sample(xt, t)
    torch.manual_seed(13)
    found["loss/drawn_noise"] = theirs.loss(x0)
    torch.manual_seed(13)
    found["loss/given_noise"] = theirs.loss(x0, eps)
    for name, value in found.items():
        assert value.shape == golden[name].shape and off(value, golden[name]) < 1e-6, name
    sde = theirs.sde
    torch.testing.assert_close(sde.alphas_cumprod, golden["alpha_bar"], rtol=0, atol=0)
    if n_steps == 20:
        for name in ("beta", "sigma2"):
            torch.testing.assert_close(sde.discrete_betas, golden[name], rtol=0, atol=0)


def test_chain_is_that_of_labml():
    sample = example("docs/labml.md", "def sample(eps_model")["sample"]
    expected = goldens()["labml/T20/chain"]
    torch.manual_seed(14)
    assert off(sample(eps_model, 20, expected.shape), expected) < 1e-6
    # Their order of draws, step by step.
    theirs, count = page()(eps_model, 20), len(expected)
    torch.manual_seed(14)
    x = torch.randn(expected.shape)
    for t in reversed(range(20)):
        x = theirs.p_sample(x, torch.full((count,), t))
    assert off(x, expected) < 1e-6
