"""Folders of Diffusers: the same networks and samples, both ways, or a refusal and its reason."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from diffusers_helpers import (
    DDPM,
    OURS,
    PIPELINES,
    VE,
    a_folder,
    arrays_of,
    as_trained,
    ddpm_config,
    drawn_for,
    golden,
    google,
    ncsnpp_config,
    recorded_folder,
    weights_of,
    write_json,
)
from networks import build, error, fill_weights, images, out_and_gradient, tiny_config
from recordings import load_tensors

import run_lib
from configs.defaults import load
from datasets import get_data_inverse_scaler
from models.foreign import load_diffusers, save_diffusers
from models.utils import create_model
from sampling import get_sampling_fn
from score_lib.exchange import schedulers, unet_configs, unet_names
from score_lib.options import checked, complete
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE

EXPRESSIBLE = ["ncsnpp_a", "ncsnpp_b", "ncsnpp_files", "ddpm_a", "ddpm_b", "defaults"]


def outputs(model, case):
    """Output and gradient of a network on the arguments of a case."""
    arrays = arrays_of(case)
    given = arrays["x"], arrays["timesteps"]
    return out_and_gradient(model, *given, cotangent=arrays["cotangent"])


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- Networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_networks_are_the_recorded_functions(case, tmp_path):
    model, sde, _ = load_diffusers(recorded_folder(tmp_path, case), "cpu")
    assert sde is None and not model.training
    out, gradient = outputs(model, case)
    assert error(out, arrays_of(case)["out"]) < 2e-5
    assert error(gradient, arrays_of(case)["grad_x"]) < 2e-5


@pytest.mark.parametrize(
    "option, value",
    [
        ("num_head_channels", 0),
        ("norm_groups", 8),
        ("norm_eps", 1e-3),
        ("freq_shift", 1.0),
        ("symmetric_padding", False),
        ("attn_every_block", False),
    ],
)
def test_options_of_networks_arrive(option, value, tmp_path):
    """The library's defaults are recorded, and differ from ours in each of these."""
    model, _, facts = load_diffusers(recorded_folder(tmp_path, "defaults"), "cpu")
    assert facts["config"].model[option] != value
    other = build(as_trained(facts["config"], **{f"model__{option}": value})).eval()
    if option == "attn_every_block":
        assert len(model.all_modules) == len(other.all_modules) + 1
        return
    other.load_state_dict(model.state_dict())
    assert error(outputs(other, "defaults")[0], arrays_of("defaults")["out"]) > 1e-4


@pytest.mark.parametrize("case", ["ncsnpp_a", "ddpm_a", "defaults"])
def test_networks_are_written_as_they_were_read(case, tmp_path):
    scheduler = VE if case.startswith("ncsnpp") else DDPM  # which has the range of the network
    model, sde, facts = load_diffusers(recorded_folder(tmp_path / "a", case, scheduler), "cpu")
    save_diffusers(tmp_path / "b", facts["config"], model, sde)
    again, sde_again, facts_again = load_diffusers(tmp_path / "b", "cpu")
    assert facts_again["config"] == facts["config"] and repr(sde_again) == repr(sde)
    assert_same_weights(again, model)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("ncsnpp-church-256", 65_574_549),
        ("ncsnpp-ffhq-1024", 105_785_896),
        ("ddpm-cifar10-32", 35_746_307),
        ("ddpm-celebahq-256", 113_673_219),
    ],
)
def test_public_networks_are_expressible(name, parameters):
    options = unet_configs.checked(name, google(name))
    config = complete(unet_configs.to_ours(options))
    with torch.device("meta"):
        network = build(config)
    unet_configs.check_groups(name, network, options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    written = unet_configs.to_theirs(config, network)
    assert {key: written[key] for key in google(name)} == google(name)


def test_early_folders_say_model_for_unet(tmp_path):
    folder = recorded_folder(tmp_path, "ncsnpp_files", VE)
    (folder / "unet").rename(folder / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["model"] = index.pop("unet")
    write_json(folder / "model_index.json", index)
    model, _, _ = load_diffusers(folder, "cpu")
    assert error(outputs(model, "ncsnpp_files")[0], arrays_of("ncsnpp_files")["out"]) < 2e-5


def test_names_of_before_2023():
    attention = "mid_block.attentions.0"
    renamed = {
        f"{attention}.query.bias": f"{attention}.to_q.bias",
        "time_proj.W": "time_proj.weight",
    }
    renamed |= {f"{attention}.proj_attn.weight": f"{attention}.to_out.0.weight"}
    assert unet_names.todays_names(renamed) == renamed
    both = {"time_proj.W", "time_proj.weight", "down_blocks.0.query.weight"}
    assert unet_names.todays_names(both) == {name: name for name in both - {"time_proj.W"}}


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


CHAINS = {
    "ddpm_fixed_large": (DDPM, 20, {"variance_type": "fixed_large", "clip_sample": False}),
    "ddpm_fixed_small_clip_strided": (DDPM, 1000, {"variance_type": "fixed_small"}),
    "ddim_clip": ({"_class_name": "DDIMScheduler"}, 1000, {}),
}


@pytest.mark.parametrize("run", CHAINS)
def test_samples_of_chains_are_the_recorded_ones(run, tmp_path):
    record = golden().chains[run]
    scheduler, N, changes = CHAINS[run]
    scheduler = {**scheduler, **changes, "num_train_timesteps": N}
    weights = drawn_for(record["network"])
    a_folder(tmp_path, record["network"], weights, scheduler, "DDPMPipeline")
    model, sde, facts = load_diffusers(tmp_path, "cpu")
    recorded = load_tensors("golden_chains.npz")
    z, *draws = [*recorded[f"ddpm_run/{run}/noises"], torch.zeros(())]
    config = facts["config"]
    if record["num_inference_steps"] < N:
        config.sampling.respacing = f"leading{record['num_inference_steps']}"
    inverse_scaler = get_data_inverse_scaler(config)
    sample = get_sampling_fn(config, sde, z.shape, inverse_scaler, sde.sampling_eps)
    images, _ = sample(model, z, noise=lambda x: draws.pop(0).expand_as(x))
    expected = recorded[f"ddpm_run/{run}/x_after_step"][-1]
    assert error(2 * images - 1, expected) < 1e-4


def test_chains_are_not_clamped_to_another_range_than_theirs(tmp_path):
    """A network of [0, 1] whose pipeline clamps to [-1, 1]."""
    z, found = torch.randn(2, 3, 8, 8), {}
    small = {**DDPM, "num_train_timesteps": 6}
    for clip in (False, True):
        scheduler = {**small, "clip_sample": clip}
        folder = tmp_path / str(clip)
        recorded_folder(folder, "ddpm_a", scheduler, center_input_sample=True)
        model, sde, facts = load_diffusers(folder, "cpu")
        config = facts["config"]
        sample = get_sampling_fn(config, sde, z.shape, get_data_inverse_scaler(config), 1e-3)
        found[clip] = sample(model, z, noise=torch.zeros_like)[0]
        assert ("sampling.clip = False" in facts["notes"][-1]) == clip
    assert torch.equal(found[True], found[False]) and found[True].min() < -0.1
    config.sampling.clip = True  # as the note says, whose last step gives the clamped x_0
    sample = get_sampling_fn(config, sde, z.shape, lambda x: x / 2 + 0.5, 1e-3)
    clamped = sample(model, z, noise=torch.zeros_like)[0]
    assert clamped.min() == 0 and clamped.max() <= 1
    _, _, facts = load_diffusers(recorded_folder(tmp_path / "other", "ddpm_a", small), "cpu")
    assert facts["config"].sampling.clip and facts["notes"] == []


@pytest.mark.parametrize(
    "kind, changes, notes",
    [
        ("DDPM", {"steps_offset": 1}, ["steps_offset = 1.* 'leading50\\+1'"]),
        (
            "DDPM",
            {"steps_offset": 1, "variance_type": "fixed_large"},
            ["'leading50\\+1' with sampling.noise_removal = False"],
        ),
        ("DDIM", {"steps_offset": 1}, ["steps_offset = 1.* 'leading50\\+1', .* noisy level$"]),
        ("DDIM", {"steps_offset": 1, "timestep_spacing": "trailing"}, ["'trailing'.* divides N"]),
        ("DDIM", {"timestep_spacing": "linspace"}, ["'linspace', .* N // n below.* visited one$"]),
        ("DDPM", {"timestep_spacing": "linspace", "steps_offset": 1}, []),
    ],
)
def test_steps_that_differ_are_noted(kind, changes, notes, tmp_path):
    scheduler = {"_class_name": f"{kind}Scheduler", **changes}
    recorded_folder(tmp_path, "ddpm_a", {**scheduler, "num_train_timesteps": 40})
    write_json(tmp_path / "model_index.json", {"_class_name": f"{kind}Pipeline"})
    found = load_diffusers(tmp_path, "cpu")[2]["notes"]
    assert len(found) == len(notes)
    for note, expected in zip(found, notes, strict=True):
        assert re.search(expected, note)


@pytest.mark.parametrize(
    "kind, pipeline, N, changes, respacing",
    [
        ("DDIM", "DDIM", 1000, {}, "leading50"),
        ("DDIM", "DDIM", 1000, {"timestep_spacing": "trailing"}, "trailing50"),
        ("DDIM", "DDIM", 1000, {"timestep_spacing": "linspace"}, "50"),
        ("DDIM", "DDIM", 1000, {"steps_offset": 1}, "leading50+1"),
        ("DDIM", "DDIM", 50, {}, ""),
        ("DDIM", "DDPM", 1000, {}, ""),
        ("DDPM", "DDPM", 1000, {}, ""),
        ("DDPM", "DDPM", 4000, {}, "leading1000"),
        ("DDPM", "DDIM", 1000, {"variance_type": "fixed_large"}, "leading50"),
    ],
)
def test_configs_make_the_steps_of_the_pipeline(kind, pipeline, N, changes, respacing, tmp_path):
    scheduler = {"_class_name": f"{kind}Scheduler", "num_train_timesteps": N, **changes}
    recorded_folder(tmp_path, "ddpm_a", scheduler)
    write_json(tmp_path / "model_index.json", {"_class_name": f"{pipeline}Pipeline"})
    _, _, facts = load_diffusers(tmp_path, "cpu")
    assert facts["config"].sampling.respacing == respacing
    # Whatever scheduler it is given, DDIM's pipeline makes steps of DDIM.
    assert (facts["config"].sampling.variance == "ddim") == ("DDIM" in (kind, pipeline))
    assert any(repr(respacing) in note for note in facts["notes"]) == bool(respacing)


@pytest.mark.parametrize(
    "changes, lowest",
    [
        ({"timestep_spacing": "trailing"}, 2),
        ({"steps_offset": 1}, 1),
        ({"timestep_spacing": "linspace"}, None),
        ({}, None),
        ({"timestep_spacing": "trailing", "variance_type": "fixed_small"}, None),
    ],
)
def test_the_last_step_adds_noise_where_the_scheduler_does(changes, lowest, tmp_path, monkeypatch):
    """DDPM of theirs does at any level above 0, there of the variance 1 - bar alpha."""
    monkeypatch.setitem(schedulers._STEPS_BY_DEFAULT, "DDPMPipeline", 4)
    large = {"variance_type": "fixed_large", "clip_sample": False, "num_train_timesteps": 12}
    recorded_folder(tmp_path, "ddpm_a", {**DDPM, **large, **changes})
    write_json(tmp_path / "model_index.json", {"_class_name": "DDPMPipeline"})
    model, sde, facts = load_diffusers(tmp_path, "cpu")
    z = torch.randn(1, 3, 8, 8)
    sample = get_sampling_fn(facts["config"], sde, z.shape, lambda x: x, 1e-3)

    def drawn(last):
        draws = [*[torch.zeros_like(z)] * 3, torch.full_like(z, last)]
        return sample(model, z, noise=lambda x: draws.pop(0))[0]

    added = (drawn(1.0) - drawn(0.0)).unique()
    expected = 0.0 if lowest is None else (1 - sde.alphas_cumprod[lowest]).sqrt()
    torch.testing.assert_close(added, torch.full_like(added, float(expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps, count", [(1e-5, 0), (0.05, 1)])
def test_an_end_that_no_option_tells_is_noted(eps, count, tmp_path):
    """A process of the same config has another one."""
    recorded_folder(tmp_path, "ncsnpp_a", {**VE, "sampling_eps": eps})
    _, sde, facts = load_diffusers(tmp_path, "cpu")
    assert sde.sampling_eps == eps
    assert len([note for note in facts["notes"] if "sampling_eps = 0.05" in note]) == count


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


# --- Writing -----------------------------------------------------------------------------------


def written(tmp_path, config, sde=None, **scheduler):
    """A network of ours written and read again: both networks, and the facts."""
    model = fill_weights(build(config)).eval()
    save_diffusers(tmp_path, config, model, sde, scheduler=scheduler)
    again, sde_again, facts = load_diffusers(tmp_path, "cpu")
    if isinstance(sde, VPSDE):
        torch.testing.assert_close(sde_again.discrete_betas, sde.discrete_betas)
    return model, again, facts


def test_attention_that_the_network_lacks_adds_nothing(tmp_path):
    """Published DDPM attends once at a resolution on the way up, theirs after each block."""
    config = as_trained(ddpm_config(num_head_channels=16), training__continuous=False)
    model, again, facts = written(tmp_path, config, VPSDE(0.1, 20.0, 1000))
    assert facts["config"].model.attn_every_block and not config.model.attn_every_block
    more = len(again.state_dict()) - len(model.state_dict())
    assert more == 10 * config.model.num_res_blocks
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    assert error(again(x, labels), model(x, labels)) < 1e-6


@pytest.mark.parametrize("variant", OURS)
def test_other_networks_that_can_be_written(variant, tmp_path):
    config = OURS[variant]()
    model, again, _ = written(tmp_path, config)
    x, labels = images(config), torch.tensor([3.0, 7.0])
    condition = {"classes": torch.tensor([2, 5])} if variant == "classes" else {}
    assert error(again(x, labels, **condition), model(x, labels, **condition)) < 1e-6


def test_settings_of_schedulers_are_written(tmp_path):
    sde = VESDE(0.02, 7, N=30)
    sde.sampling_eps = 1e-4
    options = {"sampling__corrector": "langevin", "sampling__predictor": "reverse_diffusion"}
    config = as_trained(ncsnpp_config(), **options, sampling__snr=0.2, sampling__n_steps_each=2)
    as_trained(config, training__continuous=True)
    _, _, facts = written(tmp_path / "ve", config, sde)
    levels = {"sigma_min": 0.02, "sigma_max": 7.0, "num_train_timesteps": 30}
    assert facts["sampling"] == {**levels, "snr": 0.2, "correct_steps": 2, "sampling_eps": 1e-4}
    config = as_trained(ddpm_config(parametrization="v"), training__continuous=False)
    changes = {"variance_type": "fixed_small", "clip_sample": True}
    _, _, facts = written(tmp_path / "ddpm", config, CosineVPSDE(50, False), **changes)
    assert changes.items() <= facts["sampling"].items() and facts["pipeline"] == "DDPMPipeline"
    assert facts["sampling"]["prediction_type"] == "v_prediction"
    assert facts["config"].model.parametrization == "v"
    ddim = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    config = as_trained(ddpm_config(), training__continuous=False)
    _, _, facts = written(tmp_path / "ddim", config, VPSDE(0.1, 20.0, 49), **ddim)
    assert facts["pipeline"] == "DDIMPipeline" and not facts["sampling"]["set_alpha_to_one"]


@pytest.mark.parametrize(
    "kind, respacing, again",
    [
        ("DDPM", "trailing7", "trailing50"),
        ("DDPM", "leading7+1", "leading50+1"),
        ("DDPM", "7", "50"),
        ("DDIM", "trailing7", "trailing50"),
        ("DDIM", "7", "leading50"),
        ("DDPM", "10,10,5", "leading50"),
    ],
)
def test_the_levels_that_are_visited_are_written(kind, respacing, again, tmp_path, monkeypatch):
    """As the number of steps is the pipeline's; those that no scheduler has are left out."""
    monkeypatch.setitem(schedulers._STEPS_BY_DEFAULT, "DDPMPipeline", 50)
    config = as_trained(ddpm_config(), training__continuous=False, sampling__respacing=respacing)
    config.sampling.method = "chain"
    config.sampling.variance = "ddim" if kind == "DDIM" else "small"
    _, _, facts = written(tmp_path, config, VPSDE(0.1, 20.0, 90))
    assert facts["scheduler"] == f"{kind}Scheduler"
    assert facts["config"].sampling.respacing == again


def test_a_network_alone_is_not_written_beside_a_pipeline(tmp_path):
    """The pipeline's older network would be read."""
    config = as_trained(ddpm_config(), training__continuous=False)
    written(tmp_path, config, VPSDE(0.1, 20.0, 30))
    model, _, facts = written(tmp_path, config, VPSDE(0.1, 20.0, 50))
    assert facts["config"].model.num_scales == 50
    with pytest.raises(
        ValueError, match=r"holds a pipeline, whose model_index\.json would be read"
    ):
        save_diffusers(tmp_path, config, model)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"whose unet/config\.json would be read"):
        save_diffusers(tmp_path, config, model)


def test_a_run_is_written_averaged(tmp_path):
    run = run_lib.setup(load("ve/celebahq_256_ncsnpp_continuous"))
    changes = {"data.image_size": 8, "model.nf": 8, "model.ch_mult": (1, 2)}
    config = as_trained(run.config, **{k.replace(".", "__"): v for k, v in changes.items()})
    run = run_lib.setup(as_trained(config, device="cpu"))
    with torch.no_grad():
        for shadow in run.state["ema"].shadow_params:
            shadow.mul_(0.5)
    own = [p.detach().clone() for p in run.state["model"].parameters()]
    save_diffusers(tmp_path, run)
    model, sde, facts = load_diffusers(tmp_path, "cpu")
    assert repr(sde) == repr(run.sde) == "VESDE(0.01, 348.0, N=2000)"
    trained = [p.requires_grad for p in run.state["model"].parameters()]
    for mine, averaged, trains in zip(own, model.parameters(), trained, strict=True):
        assert torch.equal(averaged, 0.5 * mine if trains else mine)
    assert all(map(torch.equal, own, run.state["model"].parameters()))
    assert facts["sampling"]["snr"] == 0.075


@functools.cache
def any_network():
    return build(ncsnpp_config())


@functools.cache
def ddpm_network():
    return build(ddpm_config())


# --- What cannot be expressed ------------------------------------------------------------------


def test_unequal_groups_are_refused(tmp_path):
    """Names and shapes fit, and the function would be another one."""
    with pytest.raises(ValueError, match="in 32 groups and the one here in 16"):
        load_diffusers(recorded_folder(tmp_path, "ncsnpp_c"), "cpu")
    config = ncsnpp_config(nf=32, attn_resolutions=(4,))
    with pytest.raises(ValueError, match=r"at down_blocks.1.attentions.0.group_norm"):
        save_diffusers(tmp_path / "b", config, build(config))
    config = ddpm_config(nf=48, attn_resolutions=())
    with pytest.raises(ValueError, match="the same weights would be another function"):
        save_diffusers(tmp_path / "b", config, build(config))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "config, reason",
    [
        (lambda: ncsnpp_config(progressive="residual"), "model.progressive = 'residual'"),
        (lambda: ncsnpp_config(progressive_input="residual"), "model.progressive_input"),
        (lambda: ncsnpp_config(progressive_combine="cat"), "model.progressive_combine = 'cat'"),
        (lambda: ncsnpp_config(fir=False), "model.fir = False"),
        (lambda: ncsnpp_config(fir_kernel=(1, 2, 1)), "model.fir_kernel"),
        (lambda: ncsnpp_config(skip_rescale=False), "model.skip_rescale"),
        (lambda: ncsnpp_config(num_channels=1), "data.num_channels = 1"),
        (lambda: ncsnpp_config(ch_mult=(2, 2)), r"model.ch_mult\[0\] = 2"),
        (lambda: ncsnpp_config(nonlinearity="elu"), "model.nonlinearity"),
        (lambda: ncsnpp_config(conditional=False), "model.conditional"),
        (lambda: ncsnpp_config(scale_by_sigma=False), "model.scale_by_sigma = False"),
        (lambda: ncsnpp_config(embedding_type="positional"), "model.scale_by_sigma = True"),
        (lambda: ncsnpp_config(fourier_log=False), "model.fourier_log"),
        (lambda: ncsnpp_config(norm_groups=2), "model.norm_groups"),
        (lambda: ddpm_config(scale_by_sigma=True), "model.scale_by_sigma"),
        (lambda: ddpm_config(resamp_with_conv=False), "model.resamp_with_conv"),
        (lambda: ddpm_config(num_res_blocks=0), "model.num_res_blocks = 0"),
        (
            lambda: ddpm_config(num_heads=2, attn_resolutions=(8, 4)),
            "16 or 32 features",
        ),
        (lambda: tiny_config("ncsnv2_64"), "model.name is 'ncsnv2_64'"),
    ],
)
def test_networks_that_cannot_be_written(config, reason, tmp_path):
    config = config()
    network = build(config) if "features" in reason else any_network()
    with pytest.raises(ValueError, match=reason):
        save_diffusers(tmp_path / "a", config, network)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "sde, continuous, options, reason",
    [
        (VPSDE(), True, {}, "no scheduler of theirs"),
        (subVPSDE(), True, {}, "no scheduler of theirs"),
        (VESDE(), False, {}, "no scheduler of theirs is VESDE.* with discrete noise levels"),
        (VESDE(), True, {"model__parametrization": "x0"}, "model.parametrization = 'x0'"),
        (VPSDE(), False, {"model__parametrization": "edm"}, "model.parametrization = 'edm'"),
    ],
)
def test_processes_that_cannot_be_written(sde, continuous, options, reason, tmp_path):
    config = as_trained(ddpm_config(), training__continuous=continuous, **options)
    with pytest.raises(ValueError, match=reason):
        save_diffusers(tmp_path / "a", config, ddpm_network(), sde)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "sde, config, reason",
    [
        (VPSDE(), ddpm_config, r"False .* \[0, 1\], .* from \[-1, 1\]"),
        (CosineVPSDE(50, False), ddpm_config, r"False .* \[0, 1\], .* from \[-1, 1\]"),
        (VESDE(), ncsnpp_config, r"True .* \[-1, 1\], .* to \[0, 1\]"),
    ],
)
def test_data_of_another_range_than_the_pipeline_has(sde, config, reason, tmp_path):
    exploding = isinstance(sde, VESDE)
    sampling = {"sampling__corrector": "none", "sampling__snr": 0.2}
    config = as_trained(config(centered=exploding), training__continuous=exploding, **sampling)
    network = fill_weights(build(config)).eval()
    with pytest.raises(ValueError, match=f"data.centered = {reason}.*sde=None"):
        save_diffusers(tmp_path / "a", config, network, sde)
    assert not (tmp_path / "a").exists()
    save_diffusers(tmp_path / "a", config, network)
    assert load_diffusers(tmp_path / "a", "cpu")[2]["config"].data.centered == config.data.centered


def test_options_of_schedulers_that_do_not_fit(tmp_path):
    config = as_trained(ddpm_config(), training__continuous=False)
    for changes, reason in (
        ({"clip": True}, "has no option clip"),
        ({"beta_end": 0.1}, "not VPSDE"),
        ({"variance_type": "learned"}, "fixed_small"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_diffusers(tmp_path, config, ddpm_network(), VPSDE(), scheduler=changes)


def test_predict_epsilon_of_2022_says_what_the_network_predicts(tmp_path):
    for predicts_noise, ours in ((True, ""), (False, "x0")):
        scheduler = {**DDPM, "predict_epsilon": predicts_noise}
        folder = recorded_folder(tmp_path / ours, "ddpm_a", scheduler)
        facts = load_diffusers(folder, "cpu")[2]
        assert facts["config"].model.parametrization == ours
        assert "predict_epsilon" not in facts["sampling"]
    folder = recorded_folder(
        tmp_path, "ddpm_a", {**DDPM, "predict_epsilon": False, "prediction_type": "epsilon"}
    )
    with pytest.raises(ValueError, match="'sample', as predict_epsilon says"):
        load_diffusers(folder, "cpu")


def test_unknown_options_of_schedulers_are_refused(tmp_path):
    harmless = {"_use_default_values": [], "tensor_format": "pt", "timestep_values": None}
    harmless |= {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    load_diffusers(recorded_folder(tmp_path / "a", "ddpm_a", {**DDPM, **harmless}), "cpu")
    folder = recorded_folder(tmp_path / "b", "ddpm_a", {**DDPM, "betas_are_squared": True})
    with pytest.raises(ValueError, match="option betas_are_squared = true, which is unknown here"):
        load_diffusers(folder, "cpu")


def test_weights_of_8_bits_are_read(tmp_path):
    weights = {name: w.to(torch.float8_e4m3fn) for name, w in weights_of("ddpm_a").items()}
    arguments = golden().networks["ddpm_a"]["arguments"]
    model = load_diffusers(a_folder(tmp_path, arguments, weights), "cpu")[0]
    assert all(p.isfinite().all() for p in model.parameters())
