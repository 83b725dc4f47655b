"""`--mode control`: inverse problems, classes and editing, their files, and mistakes."""

import math
import pathlib
import types

import numpy as np
import pytest
import torch
from control_runs import Runs, save
from PIL import Image
from small_runs import small_config

import run_lib
from sampling import SampleNoise
from score_lib.base.weights import weights_digest
from score_lib.runs import image_tasks, tasks
from score_lib.runs.tasks import closeness, psnr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


# --- Inverse problems -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ("dps", "pigdm", "projection", "tweedie"))
def test_inpainting(runs, method):
    arrays, (figures,), folder = runs.control("inpaint", "unet", method=method)
    assert arrays["input"].shape == (4, 1, 8, 8) and arrays["result"].shape == (4, 2, 1, 8, 8)
    known = arrays["measurement"][..., :4]
    np.testing.assert_allclose(known, arrays["input"][..., :4], atol=1e-6)
    np.testing.assert_allclose(arrays["measurement"][..., 4:], 0.5, atol=1e-6)
    assert figures["method"] == method and np.isfinite(figures["residual"])
    # Four rows of input, measurement and two results, each 32 px wide, and lines between.
    assert Image.open(folder / "grid.png").size == (4 * 34 + 2, 4 * 34 + 2)


def test_projection_keeps_known_pixels(runs):
    arrays, (figures,), _ = runs.control("inpaint", method="projection")
    known = arrays["input"][:, None, ..., :4].repeat(2, axis=1)
    np.testing.assert_allclose(arrays["result"][..., :4], known, atol=1e-3)
    assert figures["residual"] < 1e-3


@pytest.mark.parametrize(
    "operator", ("blur", "box", "projection", "random_mask", "super_resolution")
)
def test_restoring(runs, operator):
    arrays, (figures,), _ = runs.control("restore", operator=operator, noise_std=0.1)
    assert arrays["measurement"].shape == (4, 1, 8, 8)
    assert np.isfinite(arrays["result"]).all() and figures["noise_std"] == 0.1


def test_measurement_noise_is_in_units_of_images(runs):
    """The network's range is twice as wide, and so is the noise there."""
    options = {"operator": "blur", "num_images": 40, "num_results": 1}
    arrays, _, _ = runs.control("restore", noise_std=0.1, **options)
    clean, _, _ = runs.control("restore", noise_std=0.0, **options)
    assert (arrays["y"] - clean["y"]).std() == pytest.approx(0.2, rel=0.1)
    assert (arrays["measurement"] - clean["measurement"]).std() == pytest.approx(0.1, rel=0.1)


def test_the_noise_of_measurements_is_not_that_of_samples(runs):
    noisy, clean = (
        runs.control("restore", operator="blur", noise_std=std, num_results=1)[0]["y"]
        for std in (0.1, 0.0)
    )
    drawn = SampleNoise(runs.config("gaussian").seed, range(4))(torch.empty(4, 1, 8, 8)).numpy()
    assert abs(np.corrcoef((noisy - clean).ravel(), drawn.ravel())[0, 1]) < 0.3


def test_figures_of_a_restoration(runs):
    """Residual, and signal-to-noise ratios of result and measurement, in units of images."""
    arrays, (figures,), _ = runs.control("restore", noise_std=0.05, num_results=3)

    def coarse(x):
        return x.reshape(*x.shape[:-2], 4, 2, 4, 2).mean((-3, -1))

    residual = coarse(arrays["result"]) - coarse(arrays["measurement"])[:, None]
    assert figures["residual"] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-3)
    truth = arrays["input"][:, None]
    compared = {"psnr": arrays["result"], "psnr_measurement": arrays["measurement"][:, None]}
    for name, x in compared.items():
        error = ((x.clip(0, 1) - truth) ** 2).mean()
        assert figures[name] == pytest.approx(10 * np.log10(1 / error), rel=1e-3)


def test_labels_of_files_are_not_those_of_the_data_set(runs, tmp_path):
    path = str(tmp_path / "images.npz")
    np.savez(path, images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4))
    arrays, (figures,), _ = runs.control("inpaint", path=path)
    assert "labels" not in arrays and "recognised" not in figures
    arrays, (figures,), _ = runs.control("inpaint")
    assert len(arrays["labels"]) == 4 and "recognised" in figures


def test_a_mask_file_and_an_image_file(runs, tmp_path):
    mask = np.full((8, 8), 255, dtype=np.uint8)
    mask[2:5, 1:7] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "digit.png")
    paths = {"mask": str(tmp_path / "mask.png"), "path": str(tmp_path / "digit.png")}
    arrays, _, _ = runs.control("inpaint", method="projection", **paths)
    # The middle of each grey level out of 17, as in training.
    levels = (np.arange(64).reshape(8, 8) * 4 / 255 * 16 + 0.5) / 17
    np.testing.assert_allclose(arrays["input"][0, 0], levels, atol=1e-6)
    known = mask == 255
    results = arrays["result"][0, :, 0, known]
    np.testing.assert_allclose(results, levels[known][:, None].repeat(2, 1), atol=2e-3)
    assert "labels" not in arrays


def test_open_pixels_do_not_leak(runs, tmp_path):
    pictures, results = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8), []
    pictures[1, :, :4] = pictures[0, :, :4]
    for picture in pictures:
        Image.fromarray(picture).save(tmp_path / "digit.png")
        arrays, _, _ = runs.control("inpaint", path=str(tmp_path / "digit.png"))
        results.append(arrays["result"])
    assert np.array_equal(*results)


def test_colorizing(runs):
    arrays, (figures,), _ = runs.control("colorize", "colour", method="projection")
    assert arrays["result"].shape == (4, 2, 3, 8, 8) and arrays["y"].shape == (4, 1, 8, 8)
    gray = arrays["input"].mean(1, keepdims=True)
    np.testing.assert_allclose(arrays["measurement"], gray.repeat(3, axis=1), atol=1e-6)
    np.testing.assert_allclose(arrays["result"][:, 0].mean(1), gray[:, 0], atol=2e-3)
    assert figures["operator"] == "GrayScale"


# --- Classes --------------------------------------------------------------------------------------


def test_classes(runs):
    classifier = runs.checkpoint("classifier")
    arrays, (figures,), _ = runs.control("class", "unet", classifier=classifier, labels=(3, 7, 7))
    assert arrays["result"].shape == (3, 2, 1, 8, 8) and arrays["labels"].tolist() == [3, 7, 7]
    assert 0 <= figures["recognised"] <= 1
    arrays, _, _ = runs.control("class", classifier=classifier, num_results=1)
    assert arrays["labels"].tolist() == list(range(10))


def test_labels_may_be_names(runs, tmp_path):
    """Names are those in the classifier's checkpoint, else those of the data."""
    contents = torch.load(runs.checkpoint("classifier"), weights_only=True)
    digits = ("zero", "one", "two", "three")
    named = {**contents, "class_to_idx": {name: label for label, name in enumerate(digits)}}
    torch.save(named, tmp_path / "named.pth")
    options = {"classifier": str(tmp_path / "named.pth"), "num_results": 1}
    for labels in (("three", 7, "one"), ("three,one",)):
        arrays, _, _ = runs.control("class", labels=labels, **options)
        assert arrays["labels"].tolist() == ([3, 7, 1] if 7 in labels else [3, 1])
    with pytest.raises(ValueError, match=r"'four', but the classes are zero = 0, .*three = 3"):
        runs.control("class", labels=("four",), **options)
    del contents["class_to_idx"]
    torch.save(contents, tmp_path / "old.pth")
    options["classifier"] = str(tmp_path / "old.pth")
    arrays, _, _ = runs.control("class", labels=("7",), **options)
    assert arrays["labels"].tolist() == [7]


def test_labels_and_guidance_matter(runs):
    """Both samples of a row have noise of their own; rows of one noise differ by their label."""
    options = {"classifier": runs.checkpoint("classifier"), "num_results": 1}
    rows, _, _ = runs.control("class", labels=(3, 7), **options)
    same, _, _ = runs.control("class", labels=(3, 3), **options)
    assert np.array_equal(rows["result"][0], same["result"][0])
    assert not np.array_equal(rows["result"][1], same["result"][1])
    unguided, _, _ = runs.control("class", labels=(7,), guidance_scale=0.0, **options)
    never, _, _ = runs.control("class", labels=(3,), guidance_until=1e-9, **options)
    assert np.array_equal(unguided["result"], never["result"])
    assert not np.array_equal(unguided["result"][0], rows["result"][0])


def test_noise_of_a_result_does_not_depend_on_its_batch(runs):
    """Twenty results of one class in batches of 16: no two of them share their noise."""
    options = {"classifier": runs.checkpoint("classifier"), "num_results": 10}
    arrays, _, _ = runs.control("class", labels=(3, 3), **options)
    results = torch.from_numpy(arrays["result"]).reshape(20, -1)
    assert torch.pdist(results).min() > 0.1
    few, _, _ = runs.control("class", labels=(3,), **options)
    np.testing.assert_allclose(few["result"], arrays["result"][:1], atol=1e-4)


# --- Editing --------------------------------------------------------------------------------------


def test_editing(runs):
    arrays, (figures,), _ = runs.control("edit", start_time=0.3)
    assert arrays["noisy"].shape == (4, 1, 8, 8) and figures["start_time"] == pytest.approx(0.3)
    assert not np.array_equal(arrays["result"][:, 0], arrays["result"][:, 1])


def test_hardly_edited_images_keep_their_classes(runs):
    """One step from t = 0.001, where the noise is 1% of the range, leaves digits recognisable."""
    arrays, (figures,), _ = runs.control("edit", start_time=0.001, num_images=10)
    assert figures["recognised"] > 0.8 and figures["psnr"] > 25
    assert len(np.unique(arrays["labels"])) > 5


@pytest.mark.parametrize(("of_images", "error"), [(True, 1 / 12**0.5), (False, (0.25 / 19) ** 0.5)])
def test_results_of_an_image_are_no_more_than_one_of_recognition(monkeypatch, of_images, error):
    """Of four rows of five results each, all of two rows are recognised, and none of the others."""
    said = torch.eye(2)[torch.tensor([0, 0, 1, 1]).repeat_interleave(5)]
    monkeypatch.setattr(tasks, "get_extractor", lambda *_: lambda pixels: {"logits": said})
    run = run_lib.setup(small_config("vp/digits"))
    labels = torch.zeros(4, dtype=torch.int64)
    found = tasks.recognised(run, torch.zeros(4, 5, 1, 8, 8), labels, of_images=of_images)
    assert found == pytest.approx({"recognised": 0.5, "recognised_standard_error": error})


# --- Mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "unknown task": ("inpant", {}, "'inpant'.*'inpaint'"),
    "unknown operator": ("restore", {"operator": "blurr"}, "'blurr'.*'blur'"),
    "unknown method": ("restore", {"method": "ddrm"}, "method.*'ddrm'"),
    "factor": ("restore", {"factor": 3}, "factor 3"),
    "box": ("restore", {"operator": "box", "box": (0, 0, 9, 2)}, r"\(0, 0, 9, 2\)"),
    "keep": ("restore", {"operator": "random_mask", "keep": 2.0}, r"control.keep = 2\.0"),
    "gray model": ("colorize", {}, "'colorize'.*channels"),
    "no classifier": ("class", {}, "control.classifier"),
    "classifier missing": ("class", {"classifier": "nowhere.pth"}, "no checkpoint.* nowhere.pth"),
    "no other": ("compare_codes", {}, "control.other"),
    "start time": ("edit", {"start_time": 1e-9}, "from T = 1, .* not from 1e-09 to 0.001"),
    "early start": (
        "edit",
        {"start_time": 1e-9},
        r"^control.start_time = 1e-09: choose .* 0\.001, .* T = 1 \(",
    ),
    "late start": ("edit", {"start_time": 2.0}, r"^control.start_time = 2: .* 0\.001, .* T = 1 \("),
    "one image": ("interpolate", {"num_images": 1}, "at least 2 images"),
    "no image": ("inpaint", {"path": "nowhere.png"}, "nowhere.png"),
    "no mask": ("inpaint", {"mask": "nowhere.png"}, "mask.*'nowhere.png'"),
    "two operators": ("inpaint", {"mask": "a.png", "operator": "box"}, "control.mask.*'box'"),
    "another operator": (
        "inpaint",
        {"box": (2, 2, 4, 4)},
        r"control.box = \(2, 2, 4, 4\) is an option of 'box', and control.operator = 'half' does",
    ),
    "a mask and keep": (
        "inpaint",
        {"mask": "a.png", "keep": 0.5},
        r"keep = 0\.5 .*control.mask = ",
    ),
    "another method": (
        "restore",
        {"strength": 0.5},
        "'dps', and control.method = 'pigdm' does not",
    ),
    "a task of masks": (
        "inpaint",
        {"operator": "blur"},
        "operator = 'blur', set control.task = 'r",
    ),
    "mask of a task without": (
        "edit",
        {"mask": "a.png"},
        "control.mask = 'a.png' counts for nothing",
    ),
    "a measurement of a task without": (
        "edit",
        {"factor": 4},
        "control.factor = 4 counts for nothing .* colorize, inpaint, restore$",
    ),
    "codes of a task without": (
        "inpaint",
        {"temperatures": (1.0,)},
        r"temperatures = \(1\.0,\) counts for nothing .* from temperature$",
    ),
    "guided inpainting": ("inpaint", {"classifier": "a.pth"}, "choose a task from class"),
    "labels for none": (
        "edit",
        {"labels": (3,)},
        r"labels = \(3,\) counts for nothing, as the net",
    ),
    "no results": ("inpaint", {"num_results": 0}, "control.num_results = 0.*at least 1"),
    "noise": ("restore", {"noise_std": -0.1}, r"control.noise_std = -0\.1.*at least 0"),
    "temperature": ("temperature", {"temperatures": (-1.0,)}, r"temperatures = \(-1\.0,\)"),
}


def test_a_chain_starts_at_t_at_most(monkeypatch):
    """A start above T would be taken for T; nothing is read before."""
    changes = {"training__continuous": False, "sampling__method": "chain", "model__num_scales": 50}
    run = run_lib.setup(small_config(control__start_time=2.0, **changes))
    monkeypatch.setattr(image_tasks, "read_images", lambda run: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"^control.start_time = 2: .* T = 1 \("):
        image_tasks.edit(run)


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(runs, case):
    task, options, said = MISTAKES[case]
    with pytest.raises((ValueError, OSError), match=said):
        runs.control(task, **{**options, "name": "mistake"})
    assert not (runs.folder / "gaussian" / "control" / "mistake").exists()


def test_results_by_other_options_make_way(runs):
    *_, folder = runs.control("inpaint", name="again")
    before = (folder / "arrays.npz").read_bytes()
    runs.control("inpaint", name="again")
    aside = folder.parent / "set_aside" / "again_other_options"
    assert not aside.exists()
    runs.control("inpaint", name="again", method="projection")
    assert (aside / "arrays.npz").read_bytes() == before


def test_results_of_other_weights_make_way(tmp_path):
    """By the same command, of the latest checkpoint, which has changed since."""
    runs = Runs(tmp_path)
    *_, folder = runs.control("edit")
    before = (folder / "arrays.npz").read_bytes()
    path = runs.checkpoint("gaussian")
    run = run_lib.from_checkpoint(path, "cpu")
    run.state["ema"].shadow_params[0] += 1
    save(run, pathlib.Path(path))
    runs.control("edit")
    assert (folder.parent / "set_aside/out_other_weights/arrays.npz").read_bytes() == before


def test_reports_say_which_weights_they_are_of(runs):
    """As those of evaluations do, also of a further network."""
    _, rows, _ = runs.control(
        "temperature", num_images=2, temperatures=(0.5, 1.0), eval__ema="none"
    )
    model = run_lib.from_checkpoint(runs.checkpoint("gaussian"), "cpu").state["model"]
    weights = {"digest": weights_digest(model)}
    of = {"checkpoint": "checkpoint", "step": 7, "ema": "none", "trained_with": {}}
    for row in rows:
        assert row.items() >= {**of, "weights": weights}.items() and row["temperature"]
    other = runs.checkpoint("classifier")
    options = {"classifier": other, "labels": (1,), "num_results": 1}
    _, (row,), folder = runs.control("class", "unet", **options)
    digest = weights_digest(run_lib.from_checkpoint(other, "cpu").state["model"])
    assert row["classifier"]["weights"] == {"digest": digest} != row["weights"]
    assert (folder / "report.md").read_text().startswith("| checkpoint | step |")


@pytest.mark.parametrize("method, kept", (("dpmpp_sde", 0.0), ("heun", 40.0)))
def test_options_of_another_method_that_a_checkpoint_holds_are_told(
    method, kept, runs, tmp_path, caplog
):
    """They never counted; where a command sets them, they are refused."""
    run = run_lib.setup(runs.config("gaussian", sampling__method=method))
    run.config.sampling.update(churn=40.0, eta=0.5)
    other = run_lib.from_checkpoint(save(run, tmp_path / "stored.pth"), "cpu")
    assert (other.config.sampling.churn, other.config.sampling.eta) == (kept, 0.0)
    assert "sampling.eta = 0.5 is left out" in caplog.text
    assert ("sampling.churn" in caplog.text) is not bool(kept)


@pytest.mark.parametrize("name", ("..", "../../gaussian"))
def test_results_do_not_replace_files_of_the_run(runs, name):
    runs.checkpoint("gaussian")
    with pytest.raises(ValueError, match=r"^control.name = .* would replace files of the run"):
        runs.control("inpaint", name=name)
    assert not (runs.folder / "gaussian" / "config.json").exists()


@pytest.mark.parametrize(
    ("classifier", "options", "said"),
    (
        ("classifier", {"labels": (1, 10)}, r"control.labels = \(1, 10\) .*from 0 to 9"),
        ("classifier", {"labels": (0.5,)}, r"control.labels = \(0.5,\) .*whole"),
        ("ve_classifier", {}, "another process"),
        ("other_gaussian", {}, "training.objective = 'score'.*classifier"),
    ),
)
def test_wrong_classes_are_named(runs, classifier, options, said):
    with pytest.raises(ValueError, match=said):
        runs.control("class", classifier=runs.checkpoint(classifier), **options)


@pytest.mark.parametrize(
    ("task", "options"),
    (
        ("class", {"classifier": "classifier", "labels": (3,)}),
        ("compare_codes", {"other": "other_gaussian", "num_images": 2}),
    ),
)
def test_networks_of_all_times_have_a_process_in_any_number_of_steps(runs, task, options):
    paths = {
        key: runs.checkpoint(options[key]) for key in ("classifier", "other") if key in options
    }
    _, records, _ = runs.control(task, **{**options, **paths}, model__num_scales=7)
    assert len(records) == 1


def test_codes_of_another_process_or_shape_are_refused(runs):
    with pytest.raises(ValueError, match="another process or shape"):
        runs.control("compare_codes", other=runs.checkpoint("colour"))


def test_checkpoints_without_a_config_are_refused(runs, tmp_path):
    """Published checkpoints hold none."""
    contents = torch.load(runs.checkpoint("other_gaussian"), weights_only=True)
    del contents["config"]
    torch.save(contents, tmp_path / "published.pth")
    with pytest.raises(ValueError, match="no config"):
        runs.control("compare_codes", other=str(tmp_path / "published.pth"))


def test_closeness_has_the_error_of_its_mean_square():
    """Of two images with mean square errors 0.01 and 0.04: 0.025 +- 0.015."""
    results = torch.tensor([0.1, 0.2])[:, None, None, None, None].expand(2, 3, 1, 4, 4)
    found = psnr("psnr", results, torch.zeros(2, 1, 4, 4))
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.025))
    assert found["psnr_standard_error"] == pytest.approx(10 / math.log(10) * 0.015 / 0.025)
    assert psnr("psnr", results[:1], torch.zeros(1, 1, 4, 4)).keys() == {"psnr"}
    run = types.SimpleNamespace(continuous=True)
    found = closeness(run, "", results, torch.zeros(2, 1, 4, 4))
    expected = {"rmse": 0.025**0.5, "rmse_standard_error": 0.015 / (2 * 0.025**0.5)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "network, options, hinted",
    [
        ("gaussian", {"sampling__method": "heun"}, True),
        ("gaussian", {"sampling__method": "heun", "sampling__churn": 1.0}, False),
        ("gaussian", {"sampling__method": "dpmpp_sde"}, False),
        ("told", {"sampling__method": "heun", "method": "none"}, False),
    ],
)
def test_the_log_says_where_noise_at_every_step_would_restore_better(
    runs, caplog, network, options, hinted
):
    steps = {"sampling__num_steps": 3, "num_results": 1}
    with caplog.at_level("INFO"):
        runs.control("restore", network, **steps, **options)
    hints = [r.getMessage() for r in caplog.records if "follows the flow" in r.getMessage()]
    assert len(hints) == hinted
    assert not hints or "'heun' follows the flow; with noise at every step" in hints[0]
