"""`--mode control`: every task from the command line, its files, and mistakes in its input."""

import numpy as np
import pytest
import torch
from control_runs import EXPERIMENTS, TINY, checkpoint, control, spoiled, train_runs
from PIL import Image
from recorder import Recorder
from small_runs import small_config

import run_lib
import sampling
from controllable_generation import get_pc_inpainter
from score_lib.base.tensors import SampleNoise
from score_lib.runs.control import TASKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs: two score networks, one of colour images, and two classifiers."""
    return train_runs(tmp_path_factory.mktemp("runs"), *EXPERIMENTS)


def test_every_task_is_tested():
    tested = {"inpaint", "colorize", "restore", "class", "edit", "reconstruct", "interpolate"}
    assert set(TASKS) == tested | {"temperature", "compare_codes"}


@pytest.mark.parametrize("method", ("dps", "pigdm", "projection", "tweedie"))
def test_inpainting(runs, method):
    arrays, (figures,), folder = control(runs, "inpaint", method=method, iterations=2)
    assert arrays["input"].shape == (4, 1, 8, 8) and arrays["result"].shape == (4, 2, 1, 8, 8)
    known = arrays["measurement"][..., :4]
    np.testing.assert_allclose(known, arrays["input"][..., :4], atol=1e-6)
    np.testing.assert_allclose(arrays["measurement"][..., 4:], 0.5, atol=1e-6)
    assert figures["method"] == method and np.isfinite(figures["residual"])
    # Four rows of the input, the measurement and two results, each 32 px wide, and lines between.
    assert Image.open(folder / "grid.png").size == (4 * 34 + 2, 4 * 34 + 2)


def test_projection_keeps_known_pixels(runs):
    arrays, (figures,), _ = control(runs, "inpaint", method="projection")
    np.testing.assert_allclose(
        arrays["result"][..., :4], arrays["input"][:, None, ..., :4].repeat(2, axis=1), atol=1e-3
    )
    assert figures["residual"] < 1e-3


@pytest.mark.parametrize(
    "operator", ("blur", "box", "projection", "random_mask", "super_resolution")
)
def test_restoring(runs, operator):
    arrays, (figures,), _ = control(runs, "restore", operator=operator, noise_std=0.1)
    assert arrays["measurement"].shape == (4, 1, 8, 8)
    assert np.isfinite(arrays["result"]).all() and figures["noise_std"] == 0.1


def test_the_noise_of_a_measurement_is_in_units_of_images(runs):
    """The network's range is twice as wide, and so is the noise there."""
    arrays, _, _ = control(runs, "restore", operator="blur", noise_std=0.1, num_images=40)
    clean, _, _ = control(runs, "restore", operator="blur", noise_std=0.0, num_images=40)
    assert (arrays["y"] - clean["y"]).std() == pytest.approx(0.2, rel=0.1)
    assert (arrays["measurement"] - clean["measurement"]).std() == pytest.approx(0.1, rel=0.1)


def test_results_do_not_depend_on_how_many_there_are(runs):
    few, _, _ = control(runs, "inpaint", num_images=2, num_results=1)
    more, _, _ = control(runs, "inpaint", num_images=3, num_results=1)
    np.testing.assert_allclose(few["result"], more["result"][:2], atol=1e-5)


def test_the_noise_of_a_result_does_not_depend_on_its_batch(runs):
    """Twenty results of one class in batches of 16: no two of them share their noise."""
    arrays, _, _ = control(
        runs, "class", classifier=checkpoint(runs, "classifier"), labels=(3, 3), num_results=10
    )
    results = torch.from_numpy(arrays["result"]).reshape(20, -1)
    assert torch.pdist(results).min() > 0.1
    few, _, _ = control(
        runs, "class", classifier=checkpoint(runs, "classifier"), labels=(3,), num_results=10
    )
    np.testing.assert_allclose(few["result"], arrays["result"][:1], atol=1e-4)


def test_the_figures_of_a_restoration(runs):
    """Residual, and signal-to-noise ratios of result and measurement, in units of images."""
    arrays, (figures,), _ = control(runs, "restore", noise_std=0.05, num_results=3)

    def coarse(x):
        return x.reshape(*x.shape[:-2], 4, 2, 4, 2).mean((-3, -1))

    residual = coarse(arrays["result"]) - coarse(arrays["measurement"])[:, None]
    assert figures["residual"] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-3)
    truth = arrays["input"][:, None]
    for name, x in (("psnr", arrays["result"]), ("psnr_measurement", arrays["measurement"])):
        x = x if name == "psnr" else x[:, None]
        error = ((x.clip(0, 1) - truth) ** 2).mean()
        assert figures[name] == pytest.approx(10 * np.log10(1 / error), rel=1e-3)


def test_labels_of_files_are_not_those_of_the_data_set(runs, tmp_path):
    path = str(tmp_path / "images.npz")
    np.savez(path, images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4))
    arrays, (figures,), _ = control(runs, "inpaint", path=path)
    assert "labels" not in arrays and "recognised" not in figures
    arrays, (figures,), _ = control(runs, "inpaint")
    assert len(arrays["labels"]) == 4 and "recognised" in figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "option", "name"),
    (
        ("edit", "weights", "score"),
        ("class", "classifier", "classifier"),
        ("compare_codes", "other", "other"),
    ),
)
def test_networks_have_the_averaged_weights_of_their_checkpoint(runs, tmp_path, task, option, name):
    """The weights of the last step change nothing; other averages do."""
    options = {"classifier": checkpoint(runs, "classifier"), "labels": (3,)}
    options = {**(options if task == "class" else {}), "num_images": 2}
    own, _, _ = control(runs, task, **{**options, option: checkpoint(runs, name)})
    last, _, _ = control(runs, task, **{**options, option: spoiled(runs, name, "model", tmp_path)})
    average, _, _ = control(runs, task, **{**options, option: spoiled(runs, name, "ema", tmp_path)})
    assert all(np.array_equal(own[key], last[key]) for key in own)
    assert not all(np.array_equal(own[key], average[key]) for key in own)


def test_a_mask_file_and_an_image_file(runs, tmp_path):
    mask = np.full((8, 8), 255, dtype=np.uint8)
    mask[2:5, 1:7] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "digit.png")
    arrays, _, _ = control(
        runs,
        "inpaint",
        mask=str(tmp_path / "mask.png"),
        path=str(tmp_path / "digit.png"),
        method="projection",
    )
    pixels = np.arange(64).reshape(8, 8) * 4 / 255
    # In the middle of a grey level out of 17, as the network was trained.
    np.testing.assert_allclose(arrays["input"][0, 0], (pixels * 16 + 0.5) / 17, atol=1e-6)
    known = mask == 255
    np.testing.assert_allclose(
        arrays["result"][0, :, 0, known],
        arrays["input"][0, 0, known][:, None].repeat(2, 1),
        atol=2e-3,
    )
    assert "labels" not in arrays


def test_values_under_a_mask_change_nothing(runs, tmp_path):
    pictures, results = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8), []
    pictures[1, :, :4] = pictures[0, :, :4]
    for picture in pictures:
        Image.fromarray(picture).save(tmp_path / "digit.png")
        arrays, _, _ = control(runs, "inpaint", path=str(tmp_path / "digit.png"))
        results.append(arrays["result"])
    assert np.array_equal(*results)


def test_colorizing(runs):
    arrays, (figures,), _ = control(
        runs, "colorize", run="colour", experiment="vp/color_digits", method="projection"
    )
    assert arrays["result"].shape == (4, 2, 3, 8, 8) and arrays["y"].shape == (4, 1, 8, 8)
    gray = arrays["input"].mean(1, keepdims=True)
    np.testing.assert_allclose(arrays["measurement"], gray.repeat(3, axis=1), atol=1e-6)
    np.testing.assert_allclose(arrays["result"][:, 0].mean(1), gray[:, 0], atol=2e-3)
    assert figures["operator"] == "GrayScale"


def test_classes(runs):
    arrays, (figures,), _ = control(
        runs, "class", classifier=checkpoint(runs, "classifier"), labels=(3, 7, 7)
    )
    assert arrays["result"].shape == (3, 2, 1, 8, 8) and arrays["labels"].tolist() == [3, 7, 7]
    assert 0 <= figures["recognised"] <= 1
    arrays, _, _ = control(runs, "class", classifier=checkpoint(runs, "classifier"))
    assert arrays["labels"].tolist() == list(range(10))


def test_the_classifier_matters(runs):
    """Both samples of a row have noise of their own; rows of one noise differ by their label."""
    options = {"classifier": checkpoint(runs, "classifier"), "num_results": 1}
    three, _, _ = control(runs, "class", labels=(3,), **options)
    seven, _, _ = control(runs, "class", labels=(7,), **options)
    unguided, _, _ = control(runs, "class", labels=(7,), guidance_scale=0.0, **options)
    never, _, _ = control(runs, "class", labels=(3,), guidance_until=1e-9, **options)
    assert not np.array_equal(three["result"], seven["result"])
    assert np.array_equal(unguided["result"], never["result"])
    rows, _, _ = control(runs, "class", labels=(3, 7), **options)
    same, _, _ = control(runs, "class", labels=(3, 3), **options)
    assert np.array_equal(rows["result"][0], same["result"][0])
    assert not np.array_equal(rows["result"][1], same["result"][1])


def test_editing(runs):
    arrays, (figures,), _ = control(runs, "edit", start_time=0.3)
    assert arrays["noisy"].shape == (4, 1, 8, 8) and figures["start_time"] == pytest.approx(0.3)
    assert not np.array_equal(arrays["result"][:, 0], arrays["result"][:, 1])


def test_hardly_edited_images_keep_their_classes(runs):
    """One step from t = 0.001, where the noise is 1% of the range, leaves digits recognisable."""
    arrays, (figures,), _ = control(runs, "edit", start_time=0.001, num_images=10)
    assert figures["recognised"] > 0.8 and figures["psnr"] > 25
    assert len(np.unique(arrays["labels"])) > 5


def test_reconstructing(runs):
    arrays, (figures,), _ = control(runs, "reconstruct", tolerance=1e-5)
    assert figures["largest_error"] < 1e-3
    np.testing.assert_allclose(arrays["result"], arrays["input"], atol=1e-3)
    assert np.isfinite(arrays["codes"]).all() and arrays["codes"].shape == (4, 1, 8, 8)


def test_interpolating(runs):
    arrays, (figures,), _ = control(runs, "interpolate", num_interpolations=3, tolerance=1e-5)
    assert arrays["result"].shape == (2, 3, 1, 8, 8)
    np.testing.assert_allclose(arrays["result"][:, 0], arrays["first"], atol=1e-3)
    np.testing.assert_allclose(arrays["result"][:, -1], arrays["second"], atol=1e-3)
    assert figures["largest_error_at_ends"] < 1e-3


def test_temperatures(runs):
    arrays, figures, _ = control(runs, "temperature", temperatures=(0.5, 1.0))
    assert arrays["result"].shape == (2, 4, 1, 8, 8)
    assert [row["temperature"] for row in figures] == [0.5, 1.0]


@pytest.mark.slow
def test_comparing_codes(runs):
    _, (same,), _ = control(runs, "compare_codes", other=checkpoint(runs, "score"))
    assert same["correlation_same_image"] == pytest.approx(1) and same["relative_distance"] < 1e-6
    arrays, (differ,), _ = control(runs, "compare_codes", other=checkpoint(runs, "other"))
    assert differ["correlation_same_image"] < 1 and arrays["by_the_other"].shape == (4, 1, 8, 8)
    assert differ["relative_distance"] > 1e-3


@pytest.mark.slow
def test_another_network_does_not_decode_as_the_own_one(runs, tmp_path):
    other = spoiled(runs, "other", "ema", tmp_path)
    arrays, _, _ = control(runs, "compare_codes", other=other)
    np.testing.assert_allclose(arrays["own"], arrays["input"], atol=0.05)
    assert np.abs(arrays["by_the_other"] - arrays["own"]).max() > 0.1


@pytest.mark.slow
def test_the_ode_sampler_can_be_guided(runs):
    config = small_config("vp/digits", **TINY, sampling__method="ode", sampling__num_steps=30)
    config.control.update(task="inpaint", num_images=1, num_results=1)
    folder = run_lib.control(config, runs / "score")
    assert np.isfinite(np.load(folder / "arrays.npz")["result"]).all()


# --- Wiring: options, average and seed arrive -----------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A checkpoint of the recorder whose averaged weight is 0.3, and the last one another."""
    folder = tmp_path_factory.mktemp("recorded")
    run_lib.train(recording(training__snapshot_sampling=False), folder)
    contents = torch.load(folder / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
    contents["ema"]["shadow_params"][0].fill_(0.3)
    torch.save(contents, folder / "averaged.pth")
    return folder


def recording(**changes):
    """A small config whose network is the recorder, with an empty record."""
    Recorder.calls.clear()
    network = {"model__name": "recorder", "model__num_scales": 25}
    return small_config("vp/digits", **TINY, **network, **changes)


def control_recorder(folder, task, **changes):
    """A task with the recorder: the run and the arrays."""
    few = {"control__num_images": 2, "control__num_results": 2, "control__tolerance": 1e-3}
    weights = {"eval__checkpoint": str(folder / "averaged.pth"), "control__task": task}
    config = recording(**few, **weights, **changes)
    with np.load(run_lib.control(config, folder) / "arrays.npz") as arrays:
        return run_lib.restored(config, folder), dict(arrays)


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
@pytest.mark.parametrize("task", ("inpaint", "edit", "reconstruct", "interpolate", "temperature"))
def test_every_call_is_of_the_average_and_in_the_precision_of_sampling(recorded, task, precision):
    run, _ = control_recorder(recorded, task, sampling__precision=precision)
    assert Recorder.calls
    assert all(call.weight == pytest.approx(0.3) for call in Recorder.calls)
    assert float(run.state["model"].weight.detach()) != pytest.approx(0.3)
    assert {call.autocast for call in Recorder.calls} == {precision == "bfloat16"}
    assert not any(call.training for call in Recorder.calls)


def inpaint_by_hand(run, images, **options):
    """Two results for each image by the published inpainter, which sees their left half."""
    usual = {"continuous": True, "eps": run.sde.sampling_eps, "denoise": True, **options}
    sampler = get_pc_inpainter(
        run.sde, sampling.EulerMaruyamaPredictor, None, run.inverse_scaler, 0.16, **usual
    )
    data = run.scaler(torch.from_numpy(images)).repeat_interleave(2, dim=0)
    mask = (torch.arange(8) < 4).float()
    with run.state["ema"].applied(run.state["model"].parameters()):
        noise = SampleNoise(run.config.seed, range(4))
        return sampler(run.state["model"], data, mask, noise=noise).unflatten(0, (2, 2)).numpy()


@pytest.mark.parametrize(
    ("changes", "options"),
    (
        ({}, {}),
        ({"sampling__num_steps": 6}, {"steps": 6}),
        ({"sampling__noise_removal": False}, {"denoise": False}),
        ({"seed": 3}, {}),
        ({"sampling__precision": "bfloat16"}, {}),
    ),
)
def test_options_of_sampling_and_the_seed_arrive(recorded, changes, options):
    run, arrays = control_recorder(recorded, "inpaint", control__method="projection", **changes)
    steps = changes.get("sampling__num_steps", 25)
    assert len(Recorder.calls) == steps
    expected = inpaint_by_hand(run, arrays["input"], **options)
    np.testing.assert_allclose(arrays["result"], expected, atol=1e-6)
    if changes and "sampling__precision" not in changes:
        _, usual = control_recorder(recorded, "inpaint", control__method="projection")
        assert np.abs(usual["result"] - arrays["result"]).max() > 1e-3


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "unknown task": ("inpant", {}, "'inpant'.*'inpaint'"),
    "unknown operator": ("restore", {"operator": "blurr"}, "'blurr'.*'blur'"),
    "unknown method": ("restore", {"method": "ddrm"}, "method.*'ddrm'"),
    "factor": ("restore", {"factor": 3}, "factor 3 "),
    "box": ("restore", {"operator": "box", "box": (0, 0, 9, 2)}, r"a box .*\(0, 0, 9, 2\)"),
    "keep": (
        "restore",
        {"operator": "random_mask", "keep": 2.0},
        "control.keep = 2.0 .*0 to 1",
    ),
    "gray model": ("colorize", {}, "'colorize' needs .*several channels.*have one"),
    "no classifier": ("class", {}, "needs control.classifier"),
    "classifier missing": ("class", {"classifier": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
    "no other": ("compare_codes", {}, "needs control.other"),
    "start time": ("edit", {"start_time": 1e-9}, "none of the 5 times"),
    "one image": ("interpolate", {"num_images": 1}, "needs at least 2 images"),
    "no image": ("inpaint", {"path": "nowhere.png"}, "nowhere.png"),
    "no mask": ("inpaint", {"mask": "nowhere.png"}, "no mask file 'nowhere.png'"),
    "two operators": ("inpaint", {"mask": "a.png", "operator": "box"}, "exclude each other"),
    "no results": ("inpaint", {"num_results": 0}, "control.num_results = 0 .*at least 1"),
    "noise": ("restore", {"noise_std": -0.1}, "control.noise_std = -0.1 .*at least 0"),
    "temperature": ("temperature", {"temperatures": (-1.0,)}, "number of 0 or more, not -1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(runs, case):
    task, options, said = MISTAKES[case]
    with pytest.raises((ValueError, OSError), match=said):
        control(runs, task, **{**options, "name": "mistake"})
    assert not (runs / "score" / "control" / "mistake").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    (
        ({"labels": (1, 10)}, r"control.labels = \(1, 10\) .*from 0 to 9"),
        ({"labels": (0.5,)}, r"control.labels = \(0.5,\) .*whole numbers"),
        ({"classifier": "ve_classifier"}, "trained for another process"),
        ({"classifier": "other"}, "control.classifier = .*objective = 'score'"),
    ),
)
def test_wrong_classes_are_named(runs, options, said):
    path = checkpoint(runs, options.pop("classifier", "classifier"))
    with pytest.raises(ValueError, match=said):
        control(runs, "class", classifier=path, **options)


def test_another_networks_codes_are_refused(runs):
    with pytest.raises(ValueError, match="codes of another process or shape"):
        control(runs, "compare_codes", other=checkpoint(runs, "colour"))


def test_a_published_checkpoint_does_not_say_what_its_network_is(runs, tmp_path):
    contents = torch.load(checkpoint(runs, "other"), weights_only=True)
    del contents["config"]
    torch.save(contents, tmp_path / "published.pth")
    with pytest.raises(ValueError, match="holds no config"):
        control(runs, "compare_codes", other=str(tmp_path / "published.pth"))
