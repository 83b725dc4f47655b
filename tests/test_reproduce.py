"""Weights that come with the project, and figures beside the published ones."""

from __future__ import annotations

import pytest
import torch
from small_runs import ROOT

import run_lib
from score_lib.base.tensors import SampleNoise
from score_lib.likelihood import get_log_likelihood_fn
from score_lib.runs.heldout import HeldOut

WEIGHTS = ROOT / "assets" / "weights" / "digits.safetensors"


def test_weights_of_digits_give_the_recorded_bits_per_dim():
    run = run_lib.from_checkpoint(WEIGHTS, "cpu")
    assert run.state["step"] == 2000 and run.config.model.weights == ""
    data = HeldOut(run, "test", dequantize=True, seed=0)
    images = data.read(0)[0][:8]
    log_likelihood = get_log_likelihood_fn(run.sde, rtol=1e-2, atol=1e-2, **run.reading)
    found = log_likelihood(run.state["model"], images, noise=SampleNoise(0, range(8), "cpu"))
    bpd = run.unit.of(found.total, data.levels)
    assert torch.mean(bpd).item() == pytest.approx(1.9664, abs=1e-3)
