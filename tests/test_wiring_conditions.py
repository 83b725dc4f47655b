"""The condition of each image and of each sample arrives at the network, see `test_wiring`."""

import json
import shutil

import numpy as np
import pytest
import torch
from control_runs import read, save
from dataset_helpers import save_image
from recorder import Recorder
from small_runs import run_forked, small_config
from test_any_data import config_of
from test_wiring import recording, train

import run_lib
from evaluation import Statistics
from models.conditioning import Guided
from score_lib.data.digits import digits
from score_lib.disk.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from score_lib.runs import measures, quality, statistics
from score_lib.runs.comparisons import compare_with_data
from score_lib.runs.conditions import class_numbers
from score_lib.runs.rounds import Job

pytestmark = pytest.mark.slow  # whole runs

LABELLED = {"data__num_classes": 10, "training__condition": "classes"}
DROPPING = {**LABELLED, "training__condition_dropout": 0.25}
# Almost no noise, so that a network's input is the image itself.
CLEAR = {"model__beta_min": 1e-9, "model__beta_max": 1e-9}


def nearest_digit(images):
    """Distances in grey levels, (B,), of images in [-1, 1] to the nearest digit, and its label."""
    parts = [part.read(np.arange(len(part))) for part in digits((1, 8, 8))]
    known = torch.cat([pixels for pixels, _ in parts]).flatten(1).float()
    labels = torch.cat([found for _, found in parts])
    levels = ((images.flatten(1) + 1) / 2 * 17).floor().clamp(0, 16)
    distance, number = torch.cdist(levels, known).min(1)
    return distance, labels[number]


def label_of(images):
    return nearest_digit(images)[1]


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", (1, 3))
def test_training_tells_the_class_of_each_image(accumulation, tmp_path):
    options = {**LABELLED, **CLEAR, "training__grad_accumulation": accumulation}
    calls, _ = train(tmp_path, **options, training__eval_freq=1, sampling__corrector="none")
    calls = [call for call in Recorder.calls if call.x.shape[0] > 1]
    assert {call.training for call in calls} == {True, False}
    for call in calls[:8]:
        assert torch.equal(call.condition["classes"], label_of(call.x))


def test_dropout_replaces_classes_by_the_null_in_training_alone(tmp_path):
    calls, _ = train(tmp_path, **DROPPING, training__batch_size=128, training__eval_freq=1)
    told = torch.cat([call.condition["classes"] for call in calls])
    assert abs((told == 10).float().mean() - 0.25) < 0.04
    held_out = [c.condition["classes"] for c in Recorder.calls if not c.training and len(c.x) > 1]
    assert held_out and all(classes.max() < 10 for classes in held_out)


def test_dropout_changes_no_other_draw(tmp_path):
    with_it, _ = train(tmp_path / "a", **DROPPING)
    without, _ = train(tmp_path / "b", **LABELLED)
    plain, _ = train(tmp_path / "c")
    assert not plain[0].condition
    for a, b, c in zip(with_it, without, plain, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(b.labels, c.labels)
    assert torch.equal(with_it[0].x, plain[0].x)


@pytest.mark.parametrize(
    ("options", "shape"),
    (
        ({}, (1, 4, 4)),
        ({"training__condition_factor": 4}, (1, 2, 2)),
        ({"training__condition_operator": "half"}, (1, 8, 8)),
    ),
)
def test_the_image_is_a_measurement_of_the_grey_levels(options, shape, tmp_path):
    """It knows nothing of the noise of dequantisation: it is a function of the levels."""
    options = {"training__condition": "image", **CLEAR, **options}
    calls, _ = train(tmp_path, **options, sampling__corrector="none")
    levels = ((calls[0].x + 1) / 2 * 17).floor().clamp(0, 16)
    known = 2 * (levels + 0.5) / 17 - 1
    image = calls[0].condition["image"]
    assert image.shape[1:] == shape
    if "training__condition_operator" in options:
        expected = known.clone()
        expected[..., 4:] = 0.0
    else:
        expected = torch.nn.functional.avg_pool2d(known, 8 // shape[1])
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


def test_features_are_zeros_where_the_data_have_none(tmp_path):
    calls, _ = train(tmp_path, training__condition="features", model__num_features=3)
    assert torch.equal(calls[0].condition["features"], torch.zeros(16, 3))


def test_the_network_is_told_the_augmentation_of_each_image(tmp_path):
    options = {"training__condition": "features", "data__augment": 0.12, **CLEAR}
    calls, _ = train(tmp_path, **options, training__eval_freq=1, sampling__corrector="none")
    for call in calls[:3]:
        plain = (call.condition["features"] == 0).all(1)
        assert 0 < plain.sum() < 16 and call.condition["features"].shape == (16, 9)
        # Images that were left alone are digits of the data set.
        distance = nearest_digit(call.x)[0]
        assert (distance[plain] < 2).all() and distance[~plain].median() > 2
    held_out = [c for c in Recorder.calls if not c.training and len(c.x) > 1]
    assert held_out and not any(call.condition["features"].any() for call in held_out)
    with pytest.raises(ValueError, match=r"data.augment = 0.5 would leak .*'features'"):
        run_lib.setup(small_config(data__augment=0.5))


# --- Sampling -------------------------------------------------------------------------------------


def drawn(indices, **changes):
    """The calls that draw samples of these numbers."""
    run = run_lib.setup(recording(**changes))
    Recorder.calls.clear()
    run.draw(indices)
    return list(Recorder.calls)


def test_the_class_of_a_sample_is_a_function_of_its_number():
    calls = drawn(range(8, 13), **LABELLED)
    assert all(c.condition["classes"].tolist() == [8, 9, 0, 1, 2] for c in calls)
    calls = drawn(range(1, 5), **LABELLED, sampling__classes=(7, 3, 3))
    assert calls[0].condition["classes"].tolist() == [3, 3, 7, 3]
    calls = drawn(range(2), **LABELLED, sampling__classes=("9,4",))
    assert calls[0].condition["classes"].tolist() == [9, 4]


def test_classes_of_a_checkpoint_are_not_told_of_another(tmp_path):
    """The second file records none, as published ones do."""
    few = {"eval__enable_bpd": False, "eval__enable_sampling": False, "eval__loss_num_repeats": 1}
    config = recording(**LABELLED, **few, training__snapshot_sampling=False, eval__end_ckpt=2)
    config.eval.begin_ckpt = 1
    run_lib.train(config, tmp_path)
    first, second = (tmp_path / "checkpoints" / f"checkpoint_{k}.pth" for k in (1, 2))
    state = read_checkpoint(first)
    save_checkpoint(second, {key: state[key] for key in ("model", "ema", "optimizer", "step")})
    found = run_lib.evaluate(config, tmp_path)
    assert len(found[0]["class_to_idx"]) == 10 and "class_to_idx" not in found[1]


@pytest.mark.parametrize("classes", [(), (0, 1, 1, 1)])
def test_other_shares_of_classes_than_the_data_s_are_told_in_an_evaluation(
    classes, tmp_path, caplog
):
    """Of vectors, three quarters of which have label 1, and of statistics of such images."""
    labels = np.array([0, 1, 1, 1])[np.arange(400) // 10 % 4]
    np.savez(tmp_path / "a.npz", data=np.random.default_rng(0).normal(size=(400, 3)), labels=labels)
    options = {**LABELLED, "data__num_classes": 2, "sampling__classes": classes}
    few = {"eval__num_samples": 40, "eval__batch_size": 40, "sampling__num_steps": 2}
    run = run_lib.setup(config_of("vectors", tmp_path / "a.npz", **options, **few))
    run.scaler.fitted = True
    told = "the class 0 has a share of 0.25 of the data and 0.5 of the samples"
    compare_with_data(Job(run, tmp_path, "1", ""))
    assert (told in caplog.text) == (not classes)
    caplog.clear()
    quality._examples(run, 40)
    assert (told in caplog.text) == (not classes)
    caplog.clear()
    run = run_lib.setup(recording(**options, eval__num_samples=40))
    stats = Statistics(pool_3=np.random.default_rng(0).normal(size=(400, 3)), labels=labels)
    statistics._check_classes(run, stats)
    assert (told in caplog.text) == (not classes)


def test_the_image_of_a_sample_is_that_of_a_held_out_picture():
    test = digits((1, 8, 8))[1]
    calls = drawn(range(3, 5), training__condition="image")
    pixels = test.images([3, 4]).float()
    known = 2 * (pixels + 0.5) / 17 - 1
    expected = torch.nn.functional.avg_pool2d(known, 2)
    torch.testing.assert_close(calls[0].condition["image"], expected)
    around = drawn(range(len(test) + 3, len(test) + 5), training__condition="image")
    assert torch.equal(around[0].condition["image"], calls[0].condition["image"])


def test_guidance_evaluates_both_and_its_scale_and_interval_arrive(monkeypatch):
    seen = []

    def note(self, *arguments, interval=None):
        seen.append((*arguments[1:], interval))
        Guided.__init__(self, *arguments, interval=interval)

    spy = type("Spy", (Guided,), {"__init__": note})
    monkeypatch.setattr("score_lib.runs.setup.Guided", spy)
    guidance = {"sampling__guidance_scale": 2.5, "sampling__guidance_interval": (0.2, 0.7)}
    calls = drawn(range(2), **DROPPING, **guidance)
    assert all(call.condition["classes"].tolist() == [0, 1, 10, 10] for call in calls)
    condition, null, scale, interval = seen[-1]
    assert condition["classes"].tolist() == [0, 1] and null == {"classes": 10} and scale == 2.5
    assert interval == pytest.approx((0.2 * 999, 0.7 * 999))


@pytest.mark.parametrize(("given", "same"), (((-0.5, 0.6), (0, 0.6)), ((0.2, 9.0), (0.2, 1))))
def test_an_interval_beyond_the_process_ends_where_that_does(given, same):
    """There the label of "edm" is no number: the log of a negative m or variance."""
    options = {**DROPPING, "training__sde": "cosine_vpsde", "model__parametrization": "edm"}
    intervals = []
    for ends in (given, same):
        guidance = {"sampling__guidance_scale": 2.0, "sampling__guidance_interval": ends}
        run = run_lib.setup(recording(**options, **guidance))
        intervals.append(run.conditioned(run.state["model"], {"classes": 3}).interval)
    assert intervals[0] == intervals[1]


def test_guided_samples_follow_the_formula():
    """A network that gives its class as noise: guided with w it gives null + w (class - null)."""
    run = run_lib.setup(recording(**DROPPING, sampling__guidance_scale=3.0))
    x, labels = torch.zeros(2, 1, 8, 8), torch.full((2,), 500.0)

    def network(x, labels, *, classes):
        return classes.to(x)[:, None, None, None].expand_as(x)

    model = run.conditioned(network, {"classes": torch.tensor([2, 4])})
    assert model(x, labels)[:, 0, 0, 0].tolist() == [10 + 3 * (2 - 10), 10 + 3 * (4 - 10)]


# --- Evaluation -----------------------------------------------------------------------------------


def test_loss_and_likelihoods_are_told_the_classes(tmp_path):
    options = {
        **LABELLED,
        "eval__enable_bpd": True,
        "eval__enable_elbo": True,
        "eval__elbo_num_times": 2,
        "eval__batch_size": 148,
        "eval__enable_sampling": False,
        "eval__loss_num_repeats": 1,
    }
    config = recording(training__snapshot_sampling=False, **options)
    run_lib.train(config, tmp_path)
    Recorder.calls.clear()
    labels = digits((1, 8, 8))[1].read(np.arange(296))[1]
    run_lib.evaluate(config, tmp_path)
    told = [call.condition["classes"] for call in Recorder.calls if len(call.x) == 148]
    assert len(told) > 10
    for classes in told:
        assert torch.equal(classes, labels[:148]) or torch.equal(classes, labels[148:])


def write_classes(folder, *names):
    """Images in turn of classes with these names; the options that name them."""
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(24):
        name = f"{names[number % len(names)]}/{number}.png"
        save_image(folder, name, np.full((8, 8), 10 * number, np.uint8))
    return {"data__dataset": "IMAGES", "data__path": str(folder), "data__levels": 256}


@pytest.mark.parametrize("measure", ("loss", "bpd"))
def test_labels_that_the_network_has_not_learned_are_refused(measure, tmp_path):
    """They would be others of its classes, and images without labels would all be of class 0."""
    images, run = tmp_path / "images", tmp_path / "run"

    def evaluated(folder, names, **changes):
        options = write_classes(images, *names)
        options |= {f"eval__enable_{name}": name == measure for name in ("loss", "bpd", "sampling")}
        config = recording(training__snapshot_sampling=False, **options, **changes)
        config.eval.checkpoint = str(run / "checkpoints-meta/checkpoint.pth")
        if folder == "eval":
            run_lib.train(config, run)
        return run_lib.evaluate(config, run, folder)

    told = {**LABELLED, "data__num_classes": 3}
    evaluated("eval", ("cat", "dog"), **told)
    with pytest.raises(ValueError, match="labels cat = 0, dog = 1, but the data have bird = 0"):
        evaluated("added", ("bird", "cat", "dog"), **told)
    with pytest.raises(ValueError, match="but the data have dog = 0, eel = 1"):
        evaluated("renamed", ("dog", "eel"), **told)
    with pytest.raises(ValueError, match="IMAGES, which has 0 classes"):
        evaluated("unlabelled", ".", **told)
    shutil.rmtree(run)
    assert evaluated("eval", ".")


@pytest.mark.parametrize("option", ["sampling.classes", "control.labels"])
def test_numbers_that_are_names_of_other_classes_are_refused(option):
    """Folders 1, 2 and 10 have the labels 0, 1 and 2: 1 is a label and the name of another."""

    def numbers(*wanted, known=("1", "2", "10")):
        config = small_config(**{option.replace(".", "__"): wanted})
        return class_numbers(config, option, {name: k for k, name in enumerate(known)})

    assert numbers("1", "10") == [0, 2] and numbers("10,2") == [2, 1] and numbers(0) == [0]
    for wanted in [(1,), (0, 10), ("1", 2)]:
        with pytest.raises(ValueError, match=r"may mean the class called '(1|10|2)', .* in quotes"):
            numbers(*wanted)
    assert numbers(1, 0, known=("0", "1")) == numbers(1, 0, known=("cat", "dog")) == [1, 0]


def test_samples_for_other_images_are_not_reused(tmp_path):
    """Each was drawn for the condition of a held-out image."""
    options = {"eval__enable_sampling": True, "eval__num_samples": 4, "eval__extractor": "digits"}
    options |= {"eval__enable_bpd": False, "eval__enable_loss": False}
    options |= {**write_classes(tmp_path / "images", "cat"), "training__condition": "image"}
    config = recording(training__snapshot_sampling=False, **options)
    run_lib.train(config, tmp_path)
    run_lib.fid_stats(config, tmp_path)
    run_lib.evaluate(config, tmp_path)
    write_classes(tmp_path / "images", "cat", "dog")
    with pytest.raises(ValueError, match="holds an evaluation of 2 examples"):
        run_lib.evaluate(config, tmp_path)


def test_statistics_record_the_classes_of_samples_and_data(tmp_path, monkeypatch):
    options = {"eval__enable_sampling": True, "eval__num_samples": 4, "eval__extractor": "digits"}
    options |= {"eval__enable_bpd": False, "eval__enable_loss": False, **LABELLED}
    options |= {**write_classes(tmp_path / "images", "cat", "dog"), "data__num_classes": 2}
    config = recording(training__snapshot_sampling=False, **options)
    run_lib.train(config, tmp_path)
    run_lib.fid_stats(config, tmp_path)
    found = []
    monkeypatch.setattr(measures, "class_metrics", lambda *both, **_: found.extend(both) or {})
    run_lib.evaluate(config, tmp_path)
    assert found[0].classes == found[1].classes == '{"cat": 0, "dog": 1}'


def test_samples_of_classes_without_an_image_are_refused(tmp_path):
    """Labels from 1 leave a class 0, which the network has not learned."""
    images = np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 3 + 1)
    options = {"eval__num_samples": 9, "eval__extractor": "digits", **LABELLED}
    options |= {"eval__enable_bpd": False, "eval__enable_loss": False}
    options |= {"data__dataset": "IMAGES", "data__path": str(tmp_path / "a.npz")}
    options |= {"data__num_classes": 4, "data__levels": 0, "training__snapshot_sampling": False}
    config = recording(**options, eval__enable_sampling=True)
    run_lib.train(config, tmp_path)
    run_lib.fid_stats(config, tmp_path)
    with pytest.raises(ValueError, match=r"of the class 0, .* --config.sampling.classes=1,2,3$"):
        run_lib.evaluate(config, tmp_path)
    config.sampling.classes = (1, 2, 3)
    (record,) = run_lib.evaluate(config, tmp_path)
    assert record["fid_within_classes"] > 0


def test_samples_are_judged_by_the_classes_they_were_drawn_for(tmp_path, monkeypatch):
    options = {"eval__enable_sampling": True, "eval__num_samples": 24, "eval__batch_size": 10}
    options |= {"eval__enable_bpd": False, "eval__enable_loss": False}
    config = recording(training__snapshot_sampling=False, **LABELLED, **options)
    run_lib.train(config, tmp_path)
    found = []

    def noted(real, fake, recognises, *, distance):
        assert distance == "fid"
        found.append((fake.labels.tolist(), recognises, real.labels is not None))
        return {"recognised": 0.5}

    monkeypatch.setattr(measures, "class_metrics", noted)
    (record,) = run_lib.evaluate(config, tmp_path)
    assert found == [([k % 10 for k in range(24)], True, True)] and record["recognised"] == 0.5


# --- Control --------------------------------------------------------------------------------------


def controlled(folder, task, experiment="vp/digits", **changes):
    """The calls of a task with a conditional recorder, and its arrays."""
    options = {"control__num_images": 3, "control__num_results": 2, "control__tolerance": 1e-2}
    config = small_config(
        experiment, model__name="recorder", control__task=task, **{**options, **changes}
    )
    config.eval.checkpoint = save(run_lib.setup(config), folder / "network.pth")
    Recorder.calls.clear()
    arrays, _, _ = read(run_lib.control(config, folder))
    return list(Recorder.calls), arrays


@pytest.mark.parametrize("task", ("inpaint", "edit"))
def test_tasks_tell_the_class_of_the_image_of_each_row(task, tmp_path):
    calls, arrays = controlled(tmp_path, task, **LABELLED)
    expected = torch.from_numpy(arrays["labels"]).repeat_interleave(2)
    assert all(torch.equal(call.condition["classes"], expected) for call in calls)


@pytest.mark.parametrize("task", ("reconstruct", "temperature"))
def test_codes_are_of_the_conditional_flow(task, tmp_path):
    guidance = {**DROPPING, "sampling__guidance_scale": 4.0}
    calls, _ = controlled(tmp_path, task, **guidance)
    labels = digits((1, 8, 8))[1].read(np.arange(3))[1].tolist()
    expected = labels if task == "reconstruct" else [0, 1, 2] * 4
    assert calls and all(call.condition["classes"].tolist() == expected for call in calls)


def test_interpolations_are_decoded_under_the_nearer_class(tmp_path):
    options = {"control__num_images": 2, "control__num_interpolations": 4}
    calls, _ = controlled(tmp_path, "interpolate", **LABELLED, **options)
    first, second = digits((1, 8, 8))[1].read(np.arange(2))[1].tolist()
    told = [call.condition["classes"].tolist() for call in calls]
    assert told[0] == [first] and [second] in told
    assert told[-1] == [first, first, second, second]


def test_classes_are_drawn_by_condition_without_a_classifier(tmp_path):
    options = {"control__labels": (5, 1), "sampling__guidance_scale": 2.0}
    calls, arrays = controlled(tmp_path, "class", **DROPPING, **options)
    assert arrays["labels"].tolist() == [5, 1] and arrays["result"].shape == (2, 2, 1, 8, 8)
    assert all(c.condition["classes"].tolist() == [5, 5, 1, 1, *[10] * 4] for c in calls)


def other_network(folder, **changes):
    """The path of another network's checkpoint."""
    config = small_config(model__name="recorder", **changes)
    return save(run_lib.setup(config), folder / "other.pth")


@pytest.mark.parametrize("told_too", (True, False))
def test_both_networks_are_told_the_named_class(told_too, tmp_path):
    """So their codes are of one class; a network without classes is told none."""
    options = {"control__other": other_network(tmp_path, **LABELLED), "control__labels": (6,)}
    calls, _ = controlled(tmp_path, "compare_codes", **options, **LABELLED if told_too else {})
    told = [call.condition["classes"].tolist() for call in calls if call.condition]
    assert told and all(classes == [6] * 3 for classes in told)
    assert told_too == all(call.condition for call in calls)


def test_both_networks_are_told_an_image_as_they_know_it(tmp_path):
    """One knows the middle of a grey level, the other, of data without noise, its value."""
    image = {"training__condition": "image"}
    plain = other_network(tmp_path, **image, data__uniform_dequantization=False)
    calls, _ = controlled(tmp_path, "compare_codes", **image, control__other=plain)
    levels = digits((1, 8, 8))[1].read(np.arange(3))[0].float()
    expected = [
        torch.nn.functional.avg_pool2d(2 * known - 1, 2)
        for known in ((levels + 0.5) / 17, levels / 16)
    ]
    told = [call.condition["image"] for call in calls]
    near = [[torch.allclose(image, e, atol=1e-5) for e in expected] for image in told]
    assert {tuple(pair) for pair in near} == {(True, False), (False, True)}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    config = small_config("vp/digits_classifier", model__channel_multiplier=1)
    return save(run_lib.setup(config), tmp_path_factory.mktemp("classifier") / "checkpoint.pth")


def test_a_classifier_guides_a_network_that_is_told_the_same_classes(classifier, tmp_path):
    options = {"control__classifier": classifier, "control__labels": (5, 1)}
    calls, arrays = controlled(tmp_path, "class", **LABELLED, **options)
    assert arrays["labels"].tolist() == [5, 1]
    assert all(call.condition["classes"].tolist() == [5, 5, 1, 1] for call in calls)


def test_a_classifier_of_other_classes_needs_labels(classifier, tmp_path):
    options = {**LABELLED, "data__num_classes": 5, "control__classifier": classifier}
    with pytest.raises(ValueError, match=r"tells 10 classes apart, and the network 5.*labels"):
        controlled(tmp_path, "class", **options)
    calls, _ = controlled(tmp_path, "class", **options, control__labels=(4,))
    assert all(call.condition["classes"].tolist() == [4, 4] for call in calls)


def test_restoration_by_the_condition_alone(tmp_path):
    options = {"training__condition": "image", "control__method": "none"}
    calls, arrays = controlled(tmp_path, "restore", **options)
    y = torch.from_numpy(arrays["y"])
    assert y.shape == (3, 1, 4, 4)
    expected = y.repeat_interleave(2, dim=0)
    assert all(torch.allclose(call.condition["image"], expected, atol=1e-5) for call in calls)
    with pytest.raises(ValueError, match="'none' needs a network that is told the measurement"):
        controlled(tmp_path / "other", "restore", control__method="none")


@pytest.mark.parametrize(
    ("experiment", "operator", "method"),
    (
        ("vp/digits", "half", "none"),
        ("vp/digits", "half", "projection"),
        ("vp/color_digits", "gray", "none"),
        ("vp/color_digits", "gray", "pigdm"),
    ),
)
def test_the_network_is_told_the_measurement_with_its_noise(experiment, operator, method, tmp_path):
    """That of the report; a gray one in each channel of the image."""
    options = {"training__condition": "image", "training__condition_operator": operator}
    options |= {"control__method": method, "control__noise_std": 0.2}
    calls, arrays = controlled(tmp_path, "restore", experiment, **options)
    y = torch.from_numpy(arrays["y"])
    shape = calls[0].condition["image"].shape[1:]
    expected = y.expand(-1, *shape).repeat_interleave(2, dim=0)
    assert all(torch.allclose(call.condition["image"], expected, atol=1e-5) for call in calls)
    noise = y - expected_of_grey_levels(arrays["input"], operator)
    measured = noise[noise != 0] if operator == "half" else noise
    assert measured.std() == pytest.approx(0.4, rel=0.2)  # the range is two wide


def expected_of_grey_levels(images, operator):
    """The measurement without noise, in the network's range."""
    x = 2 * torch.from_numpy(images) - 1
    if operator == "gray":
        return x.mean(1, keepdim=True)
    x[..., 4:] = 0
    return x


TOLD = {"training__condition": "image"}
CONTRADICTIONS = {
    "mask": ("inpaint", "half", {"mask": "nowhere.png"}, r"control.mask = 'nowhere.png' should be"),
    "operator": ("restore", "super_resolution", {"operator": "blur"}, r"'blur' should be 'super_r"),
    "factor": ("restore", "super_resolution", {"factor": 4}, r"control.factor = 4 should be 2"),
    "keep": ("inpaint", "random_mask", {"keep": 0.5}, r"control.keep = 0.5 should be 0.25"),
    "inpaint": ("inpaint", "super_resolution", {}, r"'super_resolution'.*task = 'restore'"),
    "colorize": ("colorize", "half", {}, r"training.condition_operator = 'half'.*task = 'restore'"),
}


@pytest.mark.parametrize("method", ("none", "pigdm"))
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_another_measurement_than_that_of_the_condition_is_refused(case, method, tmp_path):
    task, operator, changes, message = CONTRADICTIONS[case]
    changes = {f"control__{option}": value for option, value in changes.items()}
    experiment = "vp/color_digits" if task == "colorize" else "vp/digits"
    options = {**TOLD, "control__method": method, **changes}
    options["training__condition_operator"] = operator
    with pytest.raises(ValueError, match=message):
        controlled(tmp_path, task, experiment, **options)


@pytest.mark.parametrize(
    ("task", "operator", "changes"),
    (
        ("inpaint", "box", {}),
        ("inpaint", "half", {"control__operator": "Half"}),
        ("colorize", "gray", {}),
        ("restore", "super_resolution", {"training__condition_factor": 4}),
        (
            "restore",
            "super_resolution",
            {k: 4 for k in ("training__condition_factor", "control__factor")},
        ),
    ),
)
def test_options_that_suit_the_condition_are_taken(task, operator, changes, tmp_path):
    """Defaults do, and the same operator, in any case."""
    experiment = "vp/color_digits" if task == "colorize" else "vp/digits"
    options = {**TOLD, "control__method": "none", **changes}
    options["training__condition_operator"] = operator
    calls, arrays = controlled(tmp_path, task, experiment, **options)
    assert calls and np.isfinite(arrays["result"]).all()


def test_images_of_ones_own_need_labels(tmp_path):
    from PIL import Image

    path = tmp_path / "digit.png"
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(path)
    options = {**LABELLED, "control__path": str(path), "control__num_images": 1}
    with pytest.raises(ValueError, match=r"have no labels: set control.labels"):
        controlled(tmp_path, "edit", **options)
    calls, _ = controlled(tmp_path, "edit", **options, control__labels=(6,))
    assert all(call.condition["classes"].tolist() == [6, 6] for call in calls)
    with pytest.raises(ValueError, match="names 2 classes for 1 images"):
        controlled(tmp_path, "edit", **options, control__labels=(6, 7))


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"training__condition": "classes"}, r"data.num_classes = 0 should be the number of"),
        ({"training__condition": "colour"}, r"training.condition = 'colour' should be '', 'clas"),
        ({"training__condition_dropout": 0.1}, r"drops a condition, and there is none"),
        ({"sampling__guidance_scale": 2.0}, r"training.condition_dropout above 0"),
        ({**LABELLED, "sampling__guidance_scale": 2.0}, r"training.condition_dropout above 0"),
        ({**LABELLED, "sampling__guidance_interval": (0.5, 0.2)}, r"two numbers, such as"),
        ({**LABELLED, "sampling__classes": (3, 10)}, r"sampling.classes = .* from 0 to 9"),
        (
            {**DROPPING, "sampling__guidance_scale": 2.0, "sampling__guidance_interval": (2, 3)},
            r"sampling.guidance_interval = \(2, 3\) holds no time of the process, from 0 to T = 1:",
        ),
        (
            {"training__condition": "image", "training__condition_factor": 3},
            r"factor 3 needs sides that it divides",
        ),
        (
            {"training__condition": "image", "training__condition_operator": "smear"},
            r"unknown operator 'smear'",
        ),
    ),
)
def test_options_that_do_not_fit_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        run_lib.setup(small_config(**changes))


def test_guidance_needs_a_network_that_has_seen_its_condition_dropped(tmp_path):
    """Of an image, nothing in the shape of weights tells; training on with dropout is allowed."""
    options = {"training__condition": "image", "model__name": "recorder", "training__n_iters": 1}
    options |= {"training__snapshot_sampling": False}
    dropping = {**options, "training__condition_dropout": 0.1}
    guided = small_config(**dropping, sampling__guidance_scale=3.0)
    run_lib.train(small_config(**options), tmp_path / "a")
    said = r"with training.condition_dropout = 0, .* sampling.guidance_scale = 3.0 needs: set the"
    with pytest.raises(CheckpointError, match=said):
        run_lib.restored(guided, tmp_path / "a")
    start = {"model__weights": str(tmp_path / "a/checkpoints/checkpoint_0.pth")}
    with pytest.raises(CheckpointError, match=said):
        guided.model.weights = start["model__weights"]
        run_lib.restored(guided, tmp_path / "b")
    run_lib.restored(small_config(**dropping), tmp_path / "a")
    guided.training.n_iters = 2
    run_lib.train(guided, tmp_path / "a")
    run_lib.restored(guided, tmp_path / "a")
    run_lib.train(guided, tmp_path / "b")


def test_unknown_classes_are_refused():
    for classes in ((3, 10), ("eleven",)):
        run = run_lib.setup(small_config(**LABELLED))
        run.config.sampling.classes = classes
        with pytest.raises(ValueError, match=r"sampling.classes = .*(0 to 9|classes are 0 = 0)"):
            run.draw(range(2))


def test_unknown_classes_of_snapshots_are_refused_before_training(tmp_path):
    config = recording(**LABELLED, sampling__classes=("eleven",))
    with pytest.raises(ValueError, match="names 'eleven', but the classes are 0 = 0"):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_with_more_classes_are_refused(tmp_path):
    config = recording(**{**LABELLED, "data__num_classes": 9})
    with pytest.raises(ValueError, match=r"data.num_classes = 9 cannot learn .*DIGITS, .* 10"):
        run_lib.train(config, tmp_path)


def test_another_condition_than_that_of_training_is_refused(tmp_path):
    options = {"training__condition": "image", "training__snapshot_sampling": False}
    run_lib.train(recording(**options), tmp_path)
    other = small_config(model__name="recorder", **options, training__condition_factor=4)
    with pytest.raises(CheckpointError, match=r"training.condition_factor = 4 instead of 2"):
        run_lib.sample(other, tmp_path)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", ("vp/digits_conditional", "vp/digits_superres"))
def test_a_resumed_conditional_run_equals_an_undisturbed_one(experiment, tmp_path):
    options = {"training__snapshot_sampling": True, "sampling__corrector": "none"}
    options |= {"sampling__method": "heun", "sampling__num_steps": 9}
    for name, stops in (("whole", (12,)), ("parts", (5, 12))):
        for stop in stops:
            config = small_config(experiment, **options, training__n_iters=stop)
            run_lib.train(config, tmp_path / name)
    whole, parts = (
        read_checkpoint(tmp_path / name / "checkpoints-meta" / "checkpoint.pth")
        for name in ("whole", "parts")
    )
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key
    samples = [
        np.load(tmp_path / name / "samples/iter_12/sample.np") for name in ("whole", "parts")
    ]
    assert np.array_equal(*samples)


def test_names_of_classes_by_the_command_line(tmp_path):
    config = small_config("vp/digits_conditional", training__snapshot_sampling=False)
    run_lib.train(config, tmp_path)
    arguments = [
        "--config=configs/vp/digits_conditional.py",
        f"--workdir={tmp_path}",
        "--mode=control",
        "--config.model.nf=8",
        "--config.model.num_scales=5",
        "--config.control.task=class",
        "--config.control.labels=('7', '2')",
        "--config.sampling.method=dpmpp_2m",
        "--config.sampling.num_steps=20",
    ]
    code, output = run_forked(arguments)
    assert code == 0, output
    (figures,) = json.loads((tmp_path / "control/class/report.json").read_text())
    assert 0 <= figures["recognised"] <= 1 and figures["guidance_scale"] == 1.5
