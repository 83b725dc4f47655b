"""Runs of a noise-conditional classifier: its accuracy at each noise level, and its limits."""

import json

import numpy as np
import pytest
import torch
from control_runs import Runs
from dataset_helpers import save_image
from small_runs import ROOT, small_config

import run_lib
from configs.defaults import load
from datasets import read_inputs
from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.runs.measures import evaluate_accuracy
from score_lib.runs.quality import get_quality
from score_lib.runs.rounds import Job


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def classifier_config(runs, **changes):
    """Of an evaluation at three noise levels, with two draws of noise each."""
    options = {"eval__accuracy_num_levels": 3, "eval__accuracy_num_repeats": 2, **changes}
    checkpoint = runs.checkpoint("classifier")
    return runs.config("classifier", eval__checkpoint=checkpoint, **options)


def table(folder):
    """The columns of the table of accuracies."""
    (path,) = folder.glob("*_accuracy.md")
    rows = [line.split("|")[1:-1] for line in path.read_text().splitlines()[2:]]
    return [[float(entry.split()[0]) for entry in column] for column in zip(*rows, strict=True)]


def test_a_classifier_is_evaluated_at_every_level(runs, tmp_path):
    (record,) = run_lib.evaluate(classifier_config(runs, eval__loss_num_repeats=1), tmp_path)
    assert 0 <= record["accuracy"] <= 1 and record["loss"] > 0
    levels, stds = table(tmp_path / "eval")[:2]
    assert levels == [0.0, 0.5, 1.0]
    assert stds == pytest.approx([0.001, 0.9597, 1.0], abs=1e-4)


class TwoOrFive(torch.nn.Module):
    """Says 2 in little noise and 5 in much, for all images."""

    def forward(self, x, noise_std):
        return torch.nn.functional.one_hot(torch.where(noise_std < 0.5, 2, 5), 10).float()


class Brightest(torch.nn.Module):
    """Says which of the first ten pixels is the brightest."""

    def forward(self, x, noise_std):
        return x.flatten(1)[:, :10]


def accuracy_of(runs, folder, network, **changes):
    """Evaluate a network as a classifier."""
    run = run_lib.restored(classifier_config(runs, **changes), "")
    run.state["model"] = network
    return run, evaluate_accuracy(Job(run, folder, "1", ""))


def test_accuracy_is_the_share_of_right_answers_at_each_level(runs, tmp_path):
    run, found = accuracy_of(runs, tmp_path, TwoOrFive())
    labels = read_inputs(run.config, "", 10_000).labels
    shares = [float((labels == said).double().mean()) for said in (2, 5, 5)]
    assert found["accuracy"] == pytest.approx(shares[0]) and 0 < shares[0] < shares[1]
    assert table(tmp_path)[2] == pytest.approx(shares, abs=1e-4)


def test_levels_that_count_down_are_ordered_by_their_noise(tmp_path):
    """An evaluation and the best checkpoint of a training go by the least noise, of SMLD's last
    index."""
    chain = {"training__continuous": False, "model__num_scales": 10, "eval__accuracy_num_levels": 3}
    config = small_config("ve/digits_classifier", training__metrics_freq=1, **chain)
    run = run_lib.setup(config)
    run.state["model"] = TwoOrFive()
    found = evaluate_accuracy(Job(run, tmp_path, "1", ""))["accuracy"]
    labels = read_inputs(run.config, "", 10_000).labels
    shares = [float((labels == said).double().mean()) for said in (2, 2, 5)]
    levels, stds, accuracies = table(tmp_path)
    assert levels == [9, 5, 0] and stds == sorted(stds)
    assert accuracies == pytest.approx(shares, abs=1e-4)
    quality = get_quality(run, tmp_path)
    measured = quality.figures_of(torch.cat([quality.of_part(part) for part in quality.parts]))
    assert measured["accuracy"] == pytest.approx(found) == pytest.approx(shares[0])


def test_accuracy_is_measured_without_dropout(runs, tmp_path):
    network = TwoOrFive().train()
    run, _ = accuracy_of(runs, tmp_path, network, training__metrics_freq=1)
    assert not network.training
    network.train()
    get_quality(run, tmp_path).of_part(0)
    assert not network.training


def test_accuracy_does_not_depend_on_batches(runs, tmp_path):
    """At the highest noise level a guess from pixels is no better than chance, and each example
    has noise of its own."""
    results = []
    for batch_size in (64, 100):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        accuracy_of(runs, folder, Brightest(), eval__batch_size=batch_size)
        results.append(load_arrays(folder / "ckpt_1_accuracy_2.npz")["correct"])
    assert np.array_equal(*results)
    assert results[0].mean() == pytest.approx(0.1, abs=0.05) and set(results[0]) <= {0, 0.5, 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"data__num_classes": 0}, "data.num_classes = 0"),
        ({"data__num_classes": 5}, "data.num_classes = 5.*10 classes"),
        ({"eval__enable_bpd": True}, "eval.enable_bpd = True"),
        ({"training__snapshot_sampling": True}, "snapshot_sampling = True"),
        ({"training__objective": "classify"}, "training.objective = 'classify'"),
    ),
)
def test_options_that_a_classifier_cannot_have_are_named(changes, said, tmp_path):
    config = small_config("vp/digits_classifier", **changes)
    with pytest.raises(ValueError, match=said):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_draws_no_samples(runs):
    with pytest.raises(ValueError, match="'classifier' draws no samples"):
        run_lib.sample(classifier_config(runs), runs.folder / "classifier")


def test_digits_classifiers_fit_their_score_networks():
    for process in ("ve", "vp", "subvp"):
        score, classifier = load(f"{process}/digits"), load(f"{process}/digits_classifier")
        assert score.training.sde == classifier.training.sde
        assert score.data.centered == classifier.data.centered
    assert (ROOT / "configs" / "ve" / "cifar10_classifier.py").exists()


@pytest.mark.slow
def test_classes_are_recorded_and_others_refused(tmp_path, caplog):
    """A class folder that is added later would give all classes after it other labels."""
    for number in range(24):
        pixels = np.full((8, 8), 10 * number, np.uint8)
        save_image(tmp_path / "data", f"{('cat', 'dog')[number % 2]}/{number}.png", pixels)
    options = {"data__dataset": "IMAGES", "data__path": str(tmp_path / "data")}
    options |= {"data__num_classes": 3, "eval__enable_accuracy": True}
    config = small_config("vp/digits_classifier", **options, data__levels=0)
    config.eval.checkpoint = str(tmp_path / "run/checkpoints-meta/checkpoint.pth")
    caplog.set_level("INFO")
    run_lib.train(config, tmp_path / "run")
    classes = {"cat": 0, "dog": 1}
    assert "cat = 0, dog = 1" in (tmp_path / "run/stdout.txt").read_text()
    assert read_checkpoint(config.eval.checkpoint)["class_to_idx"] == classes
    (record,) = run_lib.evaluate(config, tmp_path / "run")
    (saved,) = json.loads((tmp_path / "run/eval/report.json").read_text())
    assert record["class_to_idx"] == saved["class_to_idx"] == classes
    assert "class_to_idx" not in (tmp_path / "run/eval/report.md").read_text()
    save_image(tmp_path / "data", "bird/1.png", pixels)
    said = "labels cat = 0, dog = 1, but the data have bird = 0"
    with pytest.raises(ValueError, match=said):
        run_lib.train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        run_lib.evaluate(config, tmp_path / "run", "again")
