"""The benchmark of Fashion-MNIST: what it kills, and what it counts."""

import argparse
import collections
import copy
import json
import os
import subprocess
import sys

import pytest
import torch

import run_lib
from benchmarks import fashion_mnist, guidance
from datasets import get_streams
from evaluation import get_extractor, to_uint8
from score_lib.disk.arrays import save_arrays
from score_lib.runs.heldout import DataBytes

# Stands for training: logs a step now and then, and goes on where the file ends.
TRAINING = """
import json, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
first = len(file.read_text().splitlines()) if file.exists() else 0
for step in range(first + 1, 31):
    with file.open("a") as lines:
        lines.write(json.dumps({"step": step}) + chr(10))
    time.sleep(0.01)
"""


class Stand(fashion_mnist.Experiment):
    """An experiment of 30 steps whose training takes no network."""

    def __init__(self, folder):
        super().__init__("vp/fashion_mnist", folder, ["training.n_iters=30"])
        self.processes = []

    def start(self, mode, *options):
        command = [sys.executable, "-c", TRAINING, str(self.workdir / "metrics.jsonl")]
        self.processes.append(subprocess.Popen(command))
        return self.processes[-1]


@pytest.mark.parametrize("chosen, used", [("", "cpu"), ("plain", "plain")])
def test_kernels_of_the_cpu_are_used_unless_others_are_chosen(tmp_path, monkeypatch, chosen, used):
    started = []
    monkeypatch.setattr(
        fashion_mnist.subprocess, "Popen", lambda command, **given: started.append(given["env"])
    )
    monkeypatch.delenv("OP_BACKEND", raising=False)
    if chosen:
        monkeypatch.setenv("OP_BACKEND", chosen)
    fashion_mnist.Experiment("vp/digits", tmp_path, []).start("train")
    assert started[0]["OP_BACKEND"] == used
    assert started[0]["PATH"] == os.environ["PATH"]


def test_training_is_killed_on_the_way_and_ends(tmp_path, monkeypatch):
    pause = fashion_mnist.time.sleep
    monkeypatch.setattr(fashion_mnist.time, "sleep", lambda seconds: pause(0.005))
    run = Stand(tmp_path)
    assert fashion_mnist.train(run, kills=2) > 0
    assert [process.returncode for process in run.processes] == [-9, -9, 0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == list(range(1, 31)) and run.last_step() == 30
    fashion_mnist.train(run, kills=2)  # once more: there is nothing to kill
    assert len(run.processes) == 4


@pytest.mark.parametrize(
    ("units", "precision"),
    (({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({}, "float32")),
)
def test_a_cpu_without_units_trains_in_float32(units, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert fashion_mnist.fast_precision("cpu") == precision


def test_sureness_is_the_share_above_the_threshold():
    probabilities = torch.tensor([[0.91, 0.09], [0.89, 0.11], [0.05, 0.95], [0.5, 0.5]])
    found = fashion_mnist.sureness(probabilities.log())
    assert found["sure"] == 0.5
    assert found["sure_standard_error"] == pytest.approx((1 / 3) ** 0.5 / 2)


def in_turn(classes):
    """An order in which the classes take turns, as long as they last."""
    seen = collections.Counter()
    turns = []
    for label in classes:
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(classes)), key=turns.__getitem__)


def test_the_table_has_figures_of_the_report_and_errors_of_the_images(tmp_path):
    """The samples are the test set here, its classes in turn, in three parts: errors are equal."""
    run = fashion_mnist.Experiment("vp/digits", tmp_path, ["eval.batch_size=100"])
    extractor = get_extractor(run.config)
    source = get_streams(run.config, evaluation=True)[2].sources["test"]
    found = [extractor(images) for images in DataBytes(run.config, source)]
    found = {name: torch.cat([part[name] for part in found]) for name in ("pool_3", "logits")}
    order = in_turn(found["logits"].argmax(dim=1).tolist())
    for number in range(3):
        part = {name: rows[order[100 * number :][:100]].numpy() for name, rows in found.items()}
        save_arrays(tmp_path / "eval" / "ckpt_4" / f"statistics_{number}.npz", **part)
    report = {"checkpoint": 4, "fid": 1.5, "inception_score": 8.0, "precision": 0.7, "recall": 0.8}
    report |= {"kid": 0.1, "kid_standard_error": 0.02, "fid_within_classes": 7.0}
    report |= {"recognised": 0.9, "recognised_standard_error": 0.01}
    report |= {"bpd": 2.0, "bpd_standard_error": 0.1, "loss": 0.3}
    earlier = report | {"checkpoint": 3, "fid": 9.0}
    (tmp_path / "eval" / "report.json").write_text(json.dumps([earlier, report]))
    samples, test, model = fashion_mnist.compare(run)
    assert samples["images"] == "296 samples" and samples["fid"] == 1.5
    assert samples["recognised"] == 0.9 and samples["recognised_standard_error"] == 0.01
    assert "fid_within_classes" not in samples and "recognised" not in test
    assert test["fid"] == pytest.approx(1.96, abs=0.01)  # as published of these digits
    assert samples["sure_standard_error"] == test["sure_standard_error"] > 0
    for name in ("fid_standard_error", "inception_score_standard_error"):
        assert samples[name] == pytest.approx(test[name], rel=0.5) and test[name] > 0
    assert model == {"images": "model", "bpd": 2.0, "bpd_standard_error": 0.1}


def test_errors_of_the_table_know_the_classes_of_samples(tmp_path, monkeypatch):
    """Other samples would be of the same classes."""
    run, seen = fashion_mnist.Experiment("vp/digits_conditional", tmp_path, []), []
    number = torch.arange(25.0)[:, None]
    part = {"pool_3": number.expand(-1, 64).numpy(), "logits": number.expand(-1, 10).numpy()}
    save_arrays(tmp_path / "eval" / "ckpt_1" / "statistics_0.npz", **part)
    names = "checkpoint", "fid", "inception_score", "kid", "kid_standard_error"
    found = dict.fromkeys((*names, "precision", "recall"), 1)
    (tmp_path / "eval" / "report.json").write_text(json.dumps([found]))
    monkeypatch.setattr(fashion_mnist, "sampling_errors", lambda _, of: seen.append(of) or {})
    monkeypatch.setattr(fashion_mnist, "metrics", lambda *_: found)
    fashion_mnist.compare(run)
    samples, _ = seen
    assert (samples.labels == samples.pool_3[:, 0] % 10).all() and samples.count == 25


@pytest.mark.slow
def test_the_project_s_weights_draw_the_clothing_that_is_asked_for():
    weights = fashion_mnist.ROOT / "assets" / "weights" / "fashion_mnist_conditional.safetensors"
    run = run_lib.from_checkpoint(weights, "cpu")
    assert run.state["step"] == run.config.training.n_iters == 6400
    assert (run.config.sampling.method, run.config.sampling.num_steps) == ("dpmpp_2m", 20)
    run.config.sampling.num_steps = 10
    images = to_uint8(run.draw(range(20)), run.levels)
    found = get_extractor(run.config)(images)["logits"].argmax(dim=1)
    assert (found == torch.arange(20) % 10).sum() > 16  # by chance 2; here 19


def test_a_setting_reaches_the_config_and_the_command(tmp_path):
    run = fashion_mnist.Experiment("vp/digits", tmp_path, ["training.n_iters=7"])
    assert run.config.training.n_iters == 7 and "--config.training.n_iters=7" in run.command


@pytest.mark.parametrize("changed", ("step", "model", "ema", "optimizer"))
def test_a_killed_training_that_differs_is_found(changed, tmp_path, monkeypatch):
    """Of trainings that are not carried out, but whose checkpoints are there."""
    monkeypatch.setattr(fashion_mnist, "train", lambda run, kills: 0.0)
    runs = [Stand(tmp_path / name) for name in ("killed", "undisturbed")]
    contents = {
        "step": 3,
        "model": {"weight": torch.zeros(2)},
        "ema": {"decay": 0.9, "shadow_params": [torch.zeros(2)]},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    }
    other = copy.deepcopy(contents)
    for run in runs:
        save_checkpoint(run.workdir, contents)
    fashion_mnist.compare_with_undisturbed(*runs, kills=2)
    other[changed] = {
        "step": 4,
        "model": {"weight": torch.tensor([0.0, 1e-30])},
        "ema": {"decay": 0.9, "shadow_params": [torch.tensor([1e-30, 0.0])]},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }[changed]
    save_checkpoint(runs[1].workdir, other)
    with pytest.raises(SystemExit, match=f"{changed} of the killed training"):
        fashion_mnist.compare_with_undisturbed(*runs, kills=2)


def save_checkpoint(folder, contents):
    path = folder / fashion_mnist.META
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, path)


def test_a_training_that_cannot_be_killed_is_no_proof(tmp_path, monkeypatch):
    """It logs nothing before it ends; or it is an earlier one."""
    monkeypatch.setattr(Stand, "last_step", lambda self: 0)
    with pytest.raises(SystemExit, match="ended before it was killed"):
        fashion_mnist.train(Stand(tmp_path), kills=1)
    monkeypatch.setattr(Stand, "last_step", lambda self: 30)
    with pytest.raises(SystemExit, match="choose another --workdir"):
        fashion_mnist.compare_with_undisturbed(Stand(tmp_path), Stand(tmp_path), kills=2)


@pytest.mark.parametrize("name", ("vp/fashion_mnist", "vp/fashion_mnist_conditional"))
def test_only_a_network_that_is_not_told_classes_needs_a_guide(name, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        fashion_mnist.Experiment, "call", lambda self, *words: calls.append((self.workdir, *words))
    )
    run = fashion_mnist.Experiment(name, tmp_path, [])
    guide = fashion_mnist.Experiment("vp/fashion_mnist_classifier", tmp_path / "guide", [])
    fashion_mnist.draw_controlled(run, guide)
    weights = tmp_path / "guide" / "checkpoints" / "checkpoint_1.pth"
    by_guide = (f"--config.control.classifier={weights}",) if name == "vp/fashion_mnist" else ()
    assert calls == [(guide.workdir, "train")] * bool(by_guide) + [
        (tmp_path, "control", "--config.control.task=class", *by_guide),
        (tmp_path, "control", "--config.control.task=inpaint", *fashion_mnist.RESTORING),
        (tmp_path, "control", "--config.control.task=interpolate"),
    ]


def test_samples_in_parts_are_guided_to_the_classes_of_their_numbers(monkeypatch):
    """Twelve samples of three sets, five at a time."""
    drawn = []

    class Stand:
        def draw(self, indices, seed, constraints):
            drawn.append((seed, list(indices), constraints[0].tolist()))
            return torch.full((len(indices), 1), float(seed))

    monkeypatch.setattr(guidance, "quality", lambda run, images, folder: {"fid": images.sum()})
    given = argparse.Namespace(repeats=3, num_samples=12, batch_size=5, conditional="")
    found = guidance.repeated(Stand(), given, lambda labels: labels)
    assert found["fid"] == 12  # the mean of 0, 12 and 24
    assert found["fid_standard_error"] == pytest.approx(12 / 3**0.5)
    assert drawn[3:6] == [
        (1, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (1, [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),
        (1, [10, 11], [0, 1]),
    ]
    assert len(drawn) == 9
