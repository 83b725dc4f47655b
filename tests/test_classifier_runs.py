"""Classifiers of noisy images: training, and accuracy at every noise level."""

import numpy as np
import pytest
import torch
from control_runs import CLASSIFIER, TINY, train_runs
from small_runs import ROOT, small_config

import run_lib
from configs.defaults import load
from datasets import read_inputs
from score_lib.runs.measures import evaluate_accuracy
from score_lib.runs.rounds import Job


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return train_runs(tmp_path_factory.mktemp("runs"), "score", "classifier")


def test_a_classifier_is_evaluated_at_every_level(runs):
    config = small_config("vp/digits_classifier", **TINY, **CLASSIFIER, eval__loss_num_repeats=1)
    config.eval.update(accuracy_num_levels=3, accuracy_num_repeats=2)
    (record,) = run_lib.evaluate(config, runs / "classifier")
    assert 0 <= record["accuracy"] <= 1 and record["loss"] > 0
    table = (runs / "classifier" / "eval" / "ckpt_1_accuracy.md").read_text()
    levels = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    assert [float(level) for level, _ in levels] == [0.0, 0.5, 1.0]
    assert [float(std) for _, std in levels] == pytest.approx([0.001, 0.9597, 1.0], abs=1e-4)


class Says(torch.nn.Module):
    """Says 2 in little noise and 5 in much, whatever it sees."""

    def forward(self, x, noise_std):
        return torch.nn.functional.one_hot(torch.where(noise_std < 0.5, 2, 5), 10).float()


class Brightest(torch.nn.Module):
    """Says which of the first ten pixels is the brightest."""

    def forward(self, x, noise_std):
        return x.flatten(1)[:, :10]


def accuracy_job(runs, folder, network, **changes):
    """An evaluation of a network as a classifier."""
    config = small_config("vp/digits_classifier", **TINY, **CLASSIFIER)
    config.eval.update(accuracy_num_levels=3, accuracy_num_repeats=2, **changes)
    run = run_lib.restored(config, runs / "classifier")
    run.state["model"] = network
    return Job(run, folder, "1", "")


def test_accuracy_is_the_share_of_right_answers_at_each_level(runs, tmp_path):
    job = accuracy_job(runs, tmp_path, Says())
    found = evaluate_accuracy(job)
    labels = read_inputs(job.run.config, "", 10_000).labels
    shares = [float((labels == said).double().mean()) for said in (2, 5, 5)]
    assert found["accuracy"] == pytest.approx(shares[0]) and 0 < shares[0] < shares[1]
    table = (tmp_path / "ckpt_1_accuracy.md").read_text()
    column = [float(line.split("|")[3].split()[0]) for line in table.splitlines()[2:]]
    assert column == pytest.approx(shares, abs=1e-4)


def test_accuracy_does_not_depend_on_batches(runs, tmp_path):
    """In the most noise a guess from pixels is no better than chance, with noise of its own for
    each example."""
    results = []
    for batch_size in (64, 100):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        evaluate_accuracy(accuracy_job(runs, folder, Brightest(), batch_size=batch_size))
        with np.load(folder / "ckpt_1_accuracy_2.npz") as arrays:
            results.append(arrays["correct"])
    assert np.array_equal(*results)
    assert results[0].mean() == pytest.approx(0.1, abs=0.05) and set(results[0]) <= {0, 0.5, 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"data__num_classes": 0}, "data.num_classes = 0"),
        ({"data__num_classes": 5}, "data.num_classes = 5 .*has 10 classes"),
        ({"eval__enable_bpd": True}, "eval.enable_bpd = True needs a score network"),
        ({"training__snapshot_sampling": True}, "snapshot_sampling = True needs a score"),
        ({"training__objective": "classify"}, "training.objective = 'classify' should be"),
    ),
)
def test_options_that_a_classifier_cannot_follow_are_refused(changes, said, tmp_path):
    config = small_config("vp/digits_classifier", **{**TINY, **changes})
    with pytest.raises(ValueError, match=said):
        run_lib.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_draws_no_samples_and_a_score_network_has_no_accuracy(runs):
    with pytest.raises(ValueError, match="'classifier' draws no samples"):
        config = small_config("vp/digits_classifier", **TINY, **CLASSIFIER)
        run_lib.sample(config, runs / "classifier")
    config = small_config("vp/digits", **TINY, eval__enable_accuracy=True)
    with pytest.raises(ValueError, match=r"enable_accuracy = True needs .*'classifier'"):
        run_lib.evaluate(config, runs / "score")


def test_digits_classifiers_fit_their_score_networks():
    for process in ("ve", "vp", "subvp"):
        score, classifier = load(f"{process}/digits"), load(f"{process}/digits_classifier")
        assert score.training.sde == classifier.training.sde
        assert score.data.centered == classifier.data.centered
    assert (ROOT / "configs" / "ve" / "cifar10_classifier.py").exists()
