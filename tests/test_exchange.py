"""Folders of Diffusers: the same networks and samples, both ways; and what cannot be expressed."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers_helpers import (
    DDPM,
    PIPELINES,
    VE,
    arrays_of,
    error,
    golden,
    recorded_folder,
    write_json,
)

from models.foreign import load_diffusers, save_diffusers
from models.utils import create_model
from sampling import get_sampling_fn
from score_lib.options import checked
from sde_lib import CosineVPSDE

EXPRESSIBLE = ["ncsnpp_a", "ncsnpp_b", "ncsnpp_files", "ddpm_a", "ddpm_b", "defaults"]


def outputs(model, case):
    """Output and gradient of a network on the arguments of a case."""
    arrays = arrays_of(case)
    x = arrays["x"].clone().requires_grad_()
    out = model(x, arrays["timesteps"])
    (gradient,) = torch.autograd.grad((out * arrays["cotangent"]).sum(), x)
    return out.detach(), gradient


# --- Networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_networks_are_the_recorded_functions(case, tmp_path):
    model, sde, _ = load_diffusers(recorded_folder(tmp_path, case), "cpu")
    assert sde is None and not model.training
    out, gradient = outputs(model, case)
    assert error(out, arrays_of(case)["out"]) < 2e-5
    assert error(gradient, arrays_of(case)["grad_x"]) < 2e-5


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_networks_are_written_as_they_were_read(case, tmp_path):
    model, sde, facts = load_diffusers(recorded_folder(tmp_path / "a", case, VE), "cpu")
    save_diffusers(tmp_path / "b", facts["config"], model, sde)
    again, sde_again, facts_again = load_diffusers(tmp_path / "b", "cpu")
    assert facts_again["config"] == facts["config"] and repr(sde_again) == repr(sde)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    stored = json.loads((tmp_path / "b/unet/config.json").read_text())
    arguments = golden().networks[case]["arguments"]
    if case != "defaults":  # whose sines and cosines are swapped
        assert {key: stored[key] for key in arguments} == arguments


@pytest.mark.parametrize("layout", ["subfolders", "flat_legacy"])
def test_both_layouts_on_disk(layout):
    model, sde, facts = load_diffusers(PIPELINES / layout, "cpu")
    out, gradient = outputs(model, "ncsnpp_files")
    assert error(out, arrays_of("ncsnpp_files")["out"]) < 2e-5
    assert error(gradient, arrays_of("ncsnpp_files")["grad_x"]) < 2e-5
    assert (sde.sigma_min, sde.sigma_max, sde.N, sde.sampling_eps) == (0.01, 50.0, 2000, 1e-5)
    assert facts["pipeline"] == "ScoreSdeVePipeline" and facts["dtype"] == "float32"
    version = {"subfolders": "0.42.1", "flat_legacy": "0.1.1"}[layout]
    assert set(facts["versions"].values()) == {version}
    assert facts["sampling"]["snr"] == 0.15 and "sigma_max = 50" in facts["notes"][0]


def test_early_folders_say_model_for_unet(tmp_path):
    folder = recorded_folder(tmp_path, "ncsnpp_files", VE)
    (folder / "unet").rename(folder / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["model"] = index.pop("unet")
    write_json(folder / "model_index.json", index)
    model, _, _ = load_diffusers(folder, "cpu")
    assert error(outputs(model, "ncsnpp_files")[0], arrays_of("ncsnpp_files")["out"]) < 2e-5


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_diffusers(PIPELINES / "subfolders", "cpu")
    assert torch.equal(torch.rand(4), expected)


def test_facts_build_the_same_network():
    model, _, facts = load_diffusers(PIPELINES / "subfolders", "cpu")
    again = create_model(facts["config"], "cpu").eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, "ncsnpp_files")[0], outputs(model, "ncsnpp_files")[0])
    checked(facts["config"])


# --- Sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["N6_c1", "N4_c2"])
def test_samples_are_the_recorded_ones_from_the_same_noise(run, tmp_path):
    record, arrays = golden().runs[run], arrays_of(run)
    scheduler = {"_class_name": "ScoreSdeVeScheduler", **record["scheduler"]}
    folder = recorded_folder(tmp_path, "ncsnpp_a", scheduler)
    model, sde, facts = load_diffusers(folder, "cpu")
    sde.N = record["num_inference_steps"]
    prior, *noises = arrays["noises"]
    sample = get_sampling_fn(facts["config"], sde, prior.shape, lambda x: x, sde.sampling_eps)
    images, _ = sample(model, sde.sigma_max * prior, noise=lambda x: noises.pop(0))
    assert error(images, arrays["final_mean"]) < 1e-4
    shown = images.clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(shown, arrays["pipeline_images_NHWC"], rtol=0, atol=1e-4)


def test_settings_of_schedulers_arrive(tmp_path):
    scheduler = {**VE, "snr": 0.3, "correct_steps": 3, "sigma_min": 0.5, "sampling_eps": 0.01}
    _, sde, facts = load_diffusers(recorded_folder(tmp_path / "ve", "ncsnpp_a", scheduler), "cpu")
    options = facts["config"].sampling
    assert (options.snr, options.n_steps_each, options.corrector) == (0.3, 3, "langevin")
    assert repr(sde) == "VESDE(0.5, 50.0, N=2000)" and sde.sampling_eps == 0.01
    scheduler = {**DDPM, "num_train_timesteps": 50, "beta_end": 0.1, "prediction_type": "sample"}
    _, sde, facts = load_diffusers(recorded_folder(tmp_path / "vp", "ddpm_a", scheduler), "cpu")
    torch.testing.assert_close(sde.discrete_betas, torch.linspace(1e-4, 0.1, 50))
    assert facts["config"].model.parametrization == "x0" and not facts["config"].training.continuous
    assert facts["sampling"]["variance_type"] == "fixed_large" and facts["sampling"]["clip_sample"]
    scheduler = {**DDPM, "beta_schedule": "squaredcos_cap_v2"}
    _, sde, _ = load_diffusers(recorded_folder(tmp_path / "cos", "ddpm_a", scheduler), "cpu")
    assert isinstance(sde, CosineVPSDE) and not sde.continuous and sde.N == 1000
