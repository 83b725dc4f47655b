"""Diffusers itself loads what is written here, to the same outputs and samples.

Skipped where it is not installed: `pip install diffusers==0.42.1`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from diffusers_helpers import DDPM, OURS, PIPELINES, arrays_of, recorded_folder
from networks import build, error, fill_weights, images
from small_runs import ROOT

from datasets import get_data_inverse_scaler
from models.foreign import load_diffusers, save_diffusers
from sampling import get_sampling_fn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
    ),
]
NAMES = ["subfolders", "flat_legacy", "ncsnpp_a", "ddpm_a", "ddpm_b", "defaults"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders that were read and written again: their models, processes, facts and paths."""
    root, found = tmp_path_factory.mktemp("diffusers"), {}
    for layout in ("subfolders", "flat_legacy"):
        model, sde, facts = load_diffusers(PIPELINES / layout, "cpu")
        found[layout] = (model, sde, facts, save(root / layout, facts, model, sde))
    for case in ("ncsnpp_a", "ddpm_a", "ddpm_b", "defaults"):
        scheduler = DDPM if case == "ddpm_a" else None
        folder = recorded_folder(root / f"{case}_first", case, scheduler)
        model, sde, facts = load_diffusers(folder, "cpu")
        found[case] = (model, sde, facts, save(root / case, facts, model, sde))
    for name, config in OURS.items():
        model = fill_weights(build(config())).eval()
        save_diffusers(root / name, config(), model)
        found[name] = (model, None, {"config": config()}, root / name)
    return found


def save(folder, facts, model, sde):
    options = {k: v for k, v in facts["sampling"].items() if v is not None}
    save_diffusers(folder, facts["config"], model, sde, scheduler=options)
    return folder


@pytest.fixture(scope="module")
def computed(written, tmp_path_factory):
    """Results of the library, by the names of the jobs."""
    jobs = {}
    for name, (_, sde, _, folder) in written.items():
        arrays = arguments(name)
        at = folder if sde is None else folder / "unet"
        given = {key: arrays[key] for key in ("x", "timesteps", "classes") if key in arrays}
        jobs[name] = {"folder": at, **given}
        if sde is not None:
            jobs[f"{name} samples"] = {"folder": folder, "seed": 5, "steps": 4}
    root = tmp_path_factory.mktemp("jobs")
    torch.save({k: {**v, "folder": str(v["folder"])} for k, v in jobs.items()}, root / "in.pt")
    command = [sys.executable, ROOT / "tests/diffusers_probe.py", root / "in.pt", root / "out.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(root / "out.pt")


def arguments(name):
    """Arrays of a recorded case, or arguments of one of our own networks."""
    if name in OURS:
        given = {"x": images(OURS[name]()), "timesteps": torch.tensor([3.0, 70.0])}
        return {**given, "classes": torch.tensor([2, 5])} if name == "classes" else given
    return arrays_of("ncsnpp_files" if name in ("subfolders", "flat_legacy") else name)


@pytest.mark.parametrize("name", [*NAMES, *OURS])
def test_networks(name, written, computed):
    arrays = arguments(name)
    condition = {"classes": arrays["classes"]} if "classes" in arrays else {}
    ours = written[name][0](arrays["x"], arrays["timesteps"], **condition).detach()
    assert error(computed[name], ours) < 2e-5
    if name in NAMES:
        assert error(computed[name], arrays["out"]) < 2e-5


@pytest.mark.parametrize("name", ["subfolders", "flat_legacy", "ddpm_a"])
def test_samples(name, written, computed):
    model, sde, facts, _ = written[name]
    kind, images = computed[f"{name} samples"]
    assert kind == facts["pipeline"]
    config = facts["config"]
    if name == "ddpm_a":
        config.sampling.respacing = "leading4"
    else:
        sde.N = 4
    inverse_scaler = get_data_inverse_scaler(config)
    sample = get_sampling_fn(config, sde, (2, 3, 8, 8), inverse_scaler, sde.sampling_eps)
    torch.manual_seed(5)
    ours, _ = sample(model)
    ours = ours.clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-4)
