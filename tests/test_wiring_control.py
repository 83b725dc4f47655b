"""`--mode control` hands each option, seed and average to where it acts.

The network records its calls.  Its last weight is 0 and the average is 0.25, so that a call shows
which of them it was made with; results are compared with those of the samplers behind the door.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from control_runs import read, save
from ml_collections import ConfigDict
from recorder import Recorder
from small_runs import small_config

import controllable_generation as lib
import run_lib
import sampling
from models.utils import register_model
from sampling import SampleNoise
from score_lib.base.tensors import derive_seed
from score_lib.disk.checkpoints import CheckpointError
from score_lib.options import complete
from score_lib.runs.control import _READ_BY as tasks_reading
from score_lib.runs.tasks import TASKS

AVERAGE = 0.25
OPTIONS = {"control__num_images": 2, "control__num_results": 2, "control__tolerance": 1e-2}


@register_model(name="recording_classifier")
class RecordingClassifier(Recorder):
    """The recorder's output at ten pixels, as logits."""

    calls = []

    def forward(self, x, labels):
        return super().forward(x, labels).flatten(1)[:, :10]


def averaged(folder, experiment="vp/digits", name="recorder", **changes):
    """Write a checkpoint whose average differs from its last weights, and return its path."""
    run = run_lib.setup(small_config(experiment, model__name=name, **changes))
    run.state["ema"].shadow_params[0].fill_(AVERAGE)
    return save(run, folder / f"{name}.pth")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that name checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    classifier = averaged(folder, "vp/digits_classifier", "recording_classifier")
    score = averaged(folder)
    return {"eval__checkpoint": score, "control__other": score, "control__classifier": classifier}


@pytest.fixture
def control(given, tmp_path):
    """`control(task, **changes)`: the arrays of a task, and the restored run."""

    def carry_out(task, **changes):
        options = {**OPTIONS, **given, "control__task": task, **changes}
        for name, reader in {"classifier": "class", "other": "compare_codes"}.items():
            if task != reader:
                del options[f"control__{name}"]
        config = small_config(model__name="recorder", **options)
        Recorder.calls.clear()
        RecordingClassifier.calls.clear()
        arrays, _, _ = read(run_lib.control(config, tmp_path))
        return arrays, run_lib.restored(config, tmp_path)

    return carry_out


# --- Options that others read -------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"colorize"}))
def test_options_that_a_task_reads_are_not_refused_as_those_of_others(control, monkeypatch, task):
    read, get = set(), ConfigDict.__getattr__

    def noted(section, name):
        if "num_interpolations" in section:
            read.add(name)
        return get(section, name)

    monkeypatch.setattr(ConfigDict, "__getattr__", noted)
    control(task)
    assert "task" in read
    assert not {name for name in read if task not in tasks_reading.get(name, TASKS)}


def test_each_option_of_control_is_of_some_tasks_or_of_configs_for_several():
    shared = "task name method tolerance num_images num_results guidance_scale guidance_until"
    assert {*tasks_reading, *shared.split()} == {*complete({}).control}


# --- How the network is called --------------------------------------------------------------------


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
@pytest.mark.parametrize("task", sorted(set(TASKS) - {"colorize"}))
def test_networks_are_averaged_and_in_the_precision_of_sampling(control, task, precision):
    control(task, sampling__precision=precision)
    calls = Recorder.calls + RecordingClassifier.calls
    assert bool(RecordingClassifier.calls) == (task == "class") and Recorder.calls
    assert {call.weight for call in calls} == {AVERAGE}
    assert {call.autocast for call in calls} == {precision == "bfloat16"}
    assert not any(call.training for call in Recorder.calls)


def test_colorizing_too(tmp_path):
    checkpoint = averaged(tmp_path, "vp/color_digits")
    options = {**OPTIONS, "eval__checkpoint": checkpoint, "control__task": "colorize"}
    options |= {"model__name": "recorder", "sampling__precision": "bfloat16"}
    config = small_config("vp/color_digits", **options)
    Recorder.calls.clear()
    run_lib.control(config, tmp_path)
    assert {(call.weight, call.autocast) for call in Recorder.calls} == {(AVERAGE, True)}


@pytest.mark.parametrize("task", ("edit", "reconstruct", "compare_codes", "class"))
def test_networks_are_compiled_as_for_sampling(control, monkeypatch, task):
    modes = []

    def compile(function, mode):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    control(task, sampling__compile="max-autotune")
    assert modes == ["max-autotune"] * (2 if task in ("compare_codes", "class") else 1)


@pytest.mark.parametrize("task", ("edit", "reconstruct", "compare_codes", "class"))
def test_tf32_is_on_while_networks_compute(control, monkeypatch, task):
    seen = set()
    forward = Recorder.forward

    def note(self, x, labels):
        seen.add(torch.backends.cuda.matmul.allow_tf32)
        return forward(self, x, labels)

    monkeypatch.setattr(Recorder, "forward", note)
    for precision, expected in (("tf32", {True}), ("float32", {False})):
        seen.clear()
        control(task, sampling__precision=precision)
        assert seen == expected


@pytest.mark.parametrize("method", ("projection", "dps", "pigdm", "tweedie"))
def test_gradients_are_on_where_a_method_needs_them(control, method):
    control("inpaint", control__method=method)
    assert {call.with_grad for call in Recorder.calls} == {method != "projection"}


def test_images_are_encoded_in_the_range_of_the_network(control):
    """At the first label, 999 eps; digits are centred."""
    arrays, run = control("reconstruct")
    first = Recorder.calls[0]
    np.testing.assert_allclose(first.x, 2 * arrays["input"] - 1, atol=1e-6)
    assert first.labels.tolist() == pytest.approx([999 * run.sde.sampling_eps] * 2)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"colorize"}))
def test_parametrization_decides_on_labels_and_inputs(control, task, tmp_path):
    """EDM's labels are log(sigma) / 4: not above 1.3 for VP; the published ones are 999 t."""
    changes = {"model__parametrization": "edm", "model__sigma_data": 0.4}
    checkpoint = averaged(tmp_path, **changes)
    control(task, **changes, eval__checkpoint=checkpoint, control__other=checkpoint)
    labels = torch.cat([call.labels for call in Recorder.calls])
    assert -2 < labels.min() < 0 and labels.max() < 1.3
    published = averaged(tmp_path / "published")
    control(task, eval__checkpoint=published, control__other=published)
    assert torch.cat([call.labels for call in Recorder.calls]).max() > 100


def test_network_of_another_parametrization_is_refused(control):
    with pytest.raises(CheckpointError, match="parametrization = 'v' instead of ''"):
        control("edit", model__parametrization="v")


def test_images_are_encoded_as_the_parametrization_scales_them(control, tmp_path):
    changes = {"model__parametrization": "edm", "model__sigma_data": 0.4}
    checkpoint = averaged(tmp_path, **changes)
    arrays, run = control("reconstruct", **changes, eval__checkpoint=checkpoint)
    first, eps = Recorder.calls[0], torch.tensor([run.sde.sampling_eps])
    m, s = map(float, run.sde.marginal_coeffs(eps))
    scaled = (2 * arrays["input"] - 1) / np.hypot(0.4 * m, s)
    np.testing.assert_allclose(first.x, scaled, atol=1e-5)
    assert first.labels.tolist() == pytest.approx([np.log(s / m) / 4] * 2, rel=1e-5)


def test_batches_are_no_larger_than_in_training(control):
    for task in ("edit", "reconstruct"):
        control(task, training__batch_size=3, control__num_images=4)
        assert max(len(call.x) for call in Recorder.calls) == 3


# --- Options of sampling --------------------------------------------------------------------------


def by_hand(get, run, *given, factory=None, **options):
    """Two samples for each row by a factory behind the door, with the averaged weights.

    The last of the given tensors has a row for each sample.
    """
    arguments = (run.sde, sampling.EulerMaruyamaPredictor, None, run.inverse_scaler, 0.16)
    sample = get(*arguments, continuous=True, eps=run.sde.sampling_eps, **(factory or {}))
    noise = SampleNoise(run.config.seed, range(len(given[-1])))
    with run.sampling_network() as model:
        return sample(model, *given, noise=noise, **options).unflatten(0, (-1, 2)).numpy()


@pytest.mark.parametrize(
    ("changes", "factory"),
    (
        ({}, {}),
        ({"seed": 7}, {}),
        ({"sampling__num_steps": 20}, {"steps": 20}),
        ({"sampling__noise_removal": False}, {"denoise": False}),
        ({"sampling__probability_flow": True}, {"probability_flow": True}),
        ({"sampling__time_grid": "edm", "sampling__num_steps": 20}, {"grid": "edm", "steps": 20}),
        ({"control__start_time": 0.8}, {"start_time": 0.8}),
    ),
)
def test_options_of_sampling_arrive(control, changes, factory):
    """Editing is sampling from noisy data; result r of row k is sample k num_results + r."""
    arrays, run = control("edit", **changes)
    data = torch.from_numpy(2 * arrays["input"] - 1).repeat_interleave(2, dim=0)
    factory = {"start_time": 0.5, **factory}
    expected = by_hand(lib.get_pc_editor, run, data, factory=factory)
    np.testing.assert_allclose(arrays["result"], expected, atol=1e-6)
    if changes:
        usual, _ = control("edit")
        assert not np.allclose(arrays["result"], usual["result"], atol=1e-3)


def test_number_of_results_arrives(control):
    """More results leave the first one as it is."""
    arrays, _ = control("edit", control__num_results=3, control__num_images=1)
    fewer, _ = control("edit", control__num_results=1, control__num_images=1)
    assert arrays["result"].shape == (1, 3, 1, 8, 8)
    np.testing.assert_allclose(arrays["result"][:, :1], fewer["result"], atol=1e-6)


def noised(images, run, scale, std):
    """Images with noise of their own, in the network's range."""
    noise = SampleNoise(derive_seed(run.config.seed, "shown"), range(2))(torch.empty(2, 1, 8, 8))
    return scale * (2 * torch.from_numpy(images) - 1) + std * noise


@pytest.mark.parametrize(
    "options",
    (
        {"sampling__num_steps": 20, "sampling__time_grid": "edm"},
        {"sampling__method": "ddim", "sampling__num_steps": 1},
        {"sampling__method": "dpmpp_2m", "sampling__num_steps": 2},
        {"sampling__method": "ode"},
    ),
    ids=lambda options: options.get("sampling__method", "pc"),
)
def test_noisy_images_are_at_the_first_time(control, options):
    """Of the configured grid for predictors, and start_time itself for solvers."""
    arrays, run = control("edit", control__start_time=0.5, **options)
    first = Recorder.calls[0].labels[0] / 999
    assert (first == 0.5) == ("sampling__method" in options)
    expected = noised(arrays["input"], run, *run.sde.marginal_coeffs(first[None]))
    np.testing.assert_allclose(2 * arrays["noisy"] - 1, expected, atol=1e-5)


def test_noisy_images_are_at_the_first_level_of_a_chain(control, tmp_path):
    changes = {"training__continuous": False, "model__num_scales": 50, "sampling__method": "chain"}
    changes |= {"sampling__respacing": "8"}
    arrays, run = control("edit", **changes, eval__checkpoint=averaged(tmp_path, **changes))
    level = int(Recorder.calls[0].labels[0])
    assert 15 < level < 25
    _, m, s = run.sde.discrete_chain()
    expected = noised(arrays["input"], run, m[level].float(), s[level].float())
    np.testing.assert_allclose(2 * arrays["noisy"] - 1, expected, atol=1e-5)


# --- Options of control ---------------------------------------------------------------------------

METHODS = {
    "projection": ({}, {}),
    "dps": ({"strength": 0.2}, {"strength": 0.2}),
    "pigdm": ({"data_std": 0.1, "iterations": 2}, {"data_std": 0.2, "iterations": 2}),
    "tweedie": ({"iterations": 2}, {"iterations": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_options_of_methods_arrive(control, method):
    """Standard deviations are those of images in [0, 1], half of those in the network's range."""
    options, keywords = METHODS[method]
    named = {f"control__{key}": value for key, value in options.items()}
    blurred = {"control__operator": "blur", "control__blur_std": 0.7, "control__noise_std": 0.05}
    arrays, run = control("restore", control__method=method, **blurred, **named)
    if method != "projection":
        keywords = {"bounds": (-1.0, 1.0), **keywords}
    operator, y = lib.GaussianBlur((1, 8, 8), 0.7), torch.from_numpy(arrays["y"])
    given = (operator, y.repeat_interleave(2, dim=0))
    keywords |= {"noise_std": 0.1, "method": method}
    expected = by_hand(lib.get_pc_restorer, run, *given, **keywords)
    np.testing.assert_allclose(arrays["result"], expected, atol=1e-5)
    if options:
        usual, _ = control("restore", control__method=method, **blurred)
        assert not np.allclose(arrays["result"], usual["result"], atol=1e-4)


@pytest.mark.parametrize(("scale", "until"), ((1.0, 0.7), (3.0, 0.7), (1.0, 1.0)))
def test_options_of_classes_arrive(control, scale, until):
    """The classifier's gradient is that of its averaged weights."""
    guided = {"control__guidance_scale": scale, "control__guidance_until": until}
    arrays, run = control("class", control__labels=(3, 5), **guided)
    network = RecordingClassifier(None)
    network.weight.data.fill_(AVERAGE)
    guidance = lib.ClassGuidance(network, torch.tensor([3, 3, 5, 5]), scale, until=until)
    factory = lib.pc_factory(lambda like: (guidance, like.shape, None))
    expected = by_hand(factory, run, torch.empty(4, 1, 8, 8))
    np.testing.assert_allclose(arrays["result"], expected, atol=1e-6)


def test_temperatures_scale_the_same_draws(control):
    """Draws of the run's seed, decoded along the flow of the averaged network."""
    arrays, run = control("temperature", control__temperatures=(0.5, 1.5), control__tolerance=1e-5)
    z = SampleNoise(run.config.seed, range(2))(torch.empty(2, 1, 8, 8))
    decode = lib.get_decoder(run.sde, run.inverse_scaler)
    with run.sampling_network() as model:
        expected = [decode(model, temperature * z)[0].numpy() for temperature in (0.5, 1.5)]
    np.testing.assert_allclose(arrays["result"], expected, rtol=1e-3, atol=1e-3)
