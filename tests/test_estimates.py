"""Estimates before a run: counts with known answers, and memory that a trial takes."""

import argparse
import mmap
import types

import pytest
import torch
from small_runs import small_config

import run_lib
from benchmarks import estimates as benchmark
from score_lib.base import memory
from score_lib.checks.network import Cost
from score_lib.data.sources import MemorySource
from score_lib.data.stream import ImageStream
from score_lib.runs import estimates, train, trial
from score_lib.runs.trial import LIKELIHOOD, Trial

CPU = torch.device("cpu")
# Powers of two, so that sums tell which parts are in them.
TRIAL = Trial(
    "measured",
    step=1.0,
    forward=2.0,
    sampling=4.0,
    likelihood=8.0,
    checkpoint=16.0,
    pictures=32.0,
    memory=1,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    ((2e-4, "200 us"), (0.0123, "12 ms"), (59, "59 s"), (90, "1.5 minutes"), (5400, "1.5 hours")),
)
def test_times_are_in_units_for_people(seconds, text):
    assert estimates.duration(seconds) == text


def test_sizes_are_in_units_for_people():
    assert [estimates.size(x) for x in (410e6, 3.14e9, 5e12)] == ["410 MB", "3.1 GB", "5 TB"]


def test_events_of_training_are_counted():
    """12 steps: 3 losses, 2 numbered checkpoints, 2 states, and one of each at the end."""
    config = small_config(training__snapshot_freq=5, training__snapshot_freq_for_preemption=5)
    found = estimates._training(run_lib.setup(config), TRIAL, draw=0.5)
    assert found == {
        "steps": 12.0,
        "losses": 3 * 16 * 2.0,
        "checkpoints": 6 * 16.0,
        "samples": 3 * (4 * 0.5 + 32),
    }
    config.training.update(snapshot_freq=6, snapshot_freq_for_preemption=4, snapshot_sampling=False)
    found = estimates._training(run_lib.setup(config), TRIAL, draw=0.5)
    assert found["checkpoints"] == (2 + 3) * 16 and "samples" not in found
    # Four measurements by the solver's 20 steps and the denoising after them.
    config.training.update(metrics_freq=3, metrics_samples=10)
    found = estimates._training(run_lib.setup(config), TRIAL, draw=0.5)
    assert found["quality"] == 4 * 10 * 21 * TRIAL.sampling


def test_measures_of_an_evaluation_are_counted():
    changes = {"eval__loss_num_repeats": 3, "eval__enable_elbo": True, "eval__elbo_num_times": 5}
    changes |= {"eval__enable_bpd": True, "eval__bpd_num_repeats": 2, "eval__num_samples": 7}
    changes |= {"eval__bpd_steps": 0}
    run = run_lib.setup(small_config(eval__enable_sampling=True, **changes))
    found = estimates._evaluation(run, TRIAL, 0.5, {"train": 1000, "test": 10})
    assert found == {
        "enable_loss": 10 * 3 * 2.0,
        "enable_bpd": 10 * 2 * LIKELIHOOD * 8.0,
        "enable_elbo": 10 * 5 * 3 * 2.0,
        "enable_sampling": 7 * 0.5,
    }
    run.config.eval.update(bpd_num_images=4, bpd_steps=32)
    found = estimates._evaluation(run, TRIAL, 0.5, {"train": 1000, "test": 10})
    assert found["enable_bpd"] == 4 * 2 * (3 + 32 + 1) * 8.0


def test_measures_of_data_that_are_not_here_are_named():
    """The time of the others would be taken for that of the whole evaluation."""
    run = run_lib.setup(small_config("vp/vectors", eval__num_samples=7))
    found = estimates.Estimate(TRIAL, {}, estimates._evaluation(run, TRIAL, 0.5, {}))
    told = estimates.evaluation_text(run, found)
    assert told == (
        "of a checkpoint about 3.5 s: sampling 3.5 s; without loss and bpd, whose data are not here"
    )


@pytest.mark.parametrize(
    ("name", "changes", "evaluations"),
    (
        ("vp/digits", {}, 5),
        ("ve/digits", {"sampling__n_steps_each": 2}, 15),
        ("vp/digits", {"sampling__method": "ddim", "sampling__num_steps": 7}, 7),
        ("vp/digits", {"sampling__method": "ode"}, estimates.ADAPTIVE["ode"]),
    ),
)
def test_evaluations_of_the_sampler_are_counted(name, changes, evaluations):
    run = run_lib.setup(small_config(name, **changes))
    found = estimates._evaluations_of_sampler(run)
    assert found - evaluations in (0, 1), "denoising may take one more"


def use_memory(count):
    """Take bytes from the system, not from those that the process keeps, and give them back."""
    with mmap.mmap(-1, count) as taken:
        for _ in range(count >> 20):
            taken.write(bytes(1 << 20))


def test_peak_memory_begins_anew():
    use_memory(40 << 20)
    memory.reset_peak(CPU)
    before = memory.peak_memory(CPU)
    if before > memory.held_memory(CPU) + (10 << 20):
        pytest.skip("this system does not let a process reset its peak")
    use_memory(40 << 20)
    assert 39 << 20 < memory.peak_memory(CPU) - before < 60 << 20


@pytest.mark.parametrize("count", (3, 16, 100))
def test_memory_of_the_batch_is_that_of_a_part_in_proportion(count, monkeypatch):
    """Of 64 MB beside 12 bytes a weight and 8 MB for each image; its checkpoint has 16 a weight."""
    config = small_config(training__batch_size=20)
    run, cost = run_lib.setup(config), Cost(1000, 10**6, 10**6, {})
    tried = min(count, 20)
    rate = 3e6 * (count + 0.5) * 4 / trial.BUDGET
    peak = (64 << 20) + 12 * 1000 + tried * (8 << 20)
    monkeypatch.setattr(trial, "_product_rate", lambda device: rate)
    monkeypatch.setattr(trial, "held_memory", lambda device: 64 << 20)
    monkeypatch.setattr(trial, "peak_memory", lambda device: peak)
    monkeypatch.setattr(trial, "_step", lambda run, count, stream: (float(count), 3))
    for name in ("_forward", "_sampling", "_checkpoint", "_pictures", "_likelihood"):
        monkeypatch.setattr(trial, name, lambda *_: 0.0)
    found = trial.try_out(run, cost, None)
    assert (found.step, found.how) == (tried, f"measured on 3 steps of {tried}")
    assert found.memory == (64 << 20) + (12 + 16) * 1000 + 20 * (8 << 20)


def test_steps_of_a_part_of_the_batch_take_longer_in_proportion(monkeypatch):
    """But for the update, whose time does not depend on the batch."""
    run = run_lib.setup(small_config(training__batch_size=32))
    run.add_optimizer()
    times = iter((5.0, 1.0))
    monkeypatch.setattr(trial, "_median", lambda work, budget: (work(), (next(times), 7))[1])
    assert trial._step(run, 8, None) == (1 + 4 * (32 / 8), 7)


def test_times_of_a_trial_are_for_a_datum(monkeypatch):
    """Of calls that take 6 s: of two data, of a sampler's five evaluations, of three readers."""
    monkeypatch.setattr(trial, "_median", lambda work, budget: (work(), (6.0, 3))[1])
    monkeypatch.setattr(trial, "cores", lambda: 3)
    run = run_lib.setup(small_config(eval__enable_bpd=True))
    monkeypatch.setattr(run, "sampler", lambda count, short: lambda model, noise: (None, 5))
    stream = ImageStream(MemorySource(torch.zeros(8, 1, 8, 8)), 2, num_workers=4)
    assert trial._forward(run, 2) == 6 / 2
    assert trial._sampling(run, 2) == 6 / 5 / 2
    assert trial._likelihood(run, 2, 1e-9) == 6 / 2
    assert trial._reading(run, stream) == 6 / 3


def test_a_large_checkpoint_is_written_in_part(monkeypatch):
    """24 of 64 bytes, the tensors that fit into 31, and at least the first."""
    state = {"a": torch.zeros(2), "none": torch.zeros(0), "b": [torch.zeros(4), torch.zeros(10)]}
    monkeypatch.setattr(trial, "contents_of", lambda state: state)
    monkeypatch.setattr(trial, "_seconds", lambda work: (work(), 6.0)[1])
    for limit, part in ((31, 24), (3, 8)):
        monkeypatch.setattr(trial, "_WRITTEN", limit)
        run = types.SimpleNamespace(state=state)
        assert trial._checkpoint(run) == 6 * 64 / part


def test_a_network_larger_than_the_machine_is_not_tried(monkeypatch):
    monkeypatch.setattr(trial, "total_memory", lambda device: 1 << 20)
    monkeypatch.setattr(estimates, "total_memory", lambda device: 1 << 20)
    run = run_lib.setup(config := small_config())
    monkeypatch.setattr(type(run), "add_optimizer", lambda self: pytest.fail("it was tried"))
    cost = Cost(parameters=10**9, operations=10**6, activations=10**9, attention={})
    found = estimates.estimate(run, cost, None, {})
    # Weights, gradients, moments, average, and their copy without gradients; activations of 16.
    expected = 36e9 + 16e9
    assert found.trial.memory == pytest.approx(expected, abs=2e9)
    # A step is a forward and a backward pass, which takes twice the time.
    assert found.trial.step / config.training.batch_size == pytest.approx(3 * found.trial.forward)
    text, fits = estimates.memory_text(run, found)
    assert not fits and "GB at most, this machine has 1 MB: training will fail here" in text


def test_estimates_are_compared_with_a_run(monkeypatch):
    figures = {
        "check": iter(({"step s": 1.0, "MB": 90.0}, {"step s": 2.0, "MB": 110.0})),
        "train": iter(({"step s": 3.0, "MB": 80.0},)),
    }
    monkeypatch.setattr(benchmark, "_child", lambda part, *_: next(figures[part]))
    row = benchmark.row("a", argparse.Namespace(rounds=1, evaluate=False))
    assert row.pop("case") == "a"
    assert (row["step s, ratio"], row["MB, ratio"], row["MB, estimated"]) == (0.5, 1.25, 100)


@pytest.mark.slow
def test_parts_of_the_comparison_have_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "PATIENCE", 0.0)
    for method in ("_steps", "run_to_the_end"):
        monkeypatch.setattr(train.Training, method, getattr(train.Training, method))
    case = benchmark.Case("vp/vectors", (50, 2), {"training.batch_size": 8, "model.nf": 8}, steps=4)
    config = benchmark.configured(case, 4, tmp_path)
    expected = benchmark.checked(config, tmp_path)
    measured = benchmark.trained(config, tmp_path)
    assert measured.keys() <= expected.keys()
    assert 0 < measured["step s"] < measured["training s"]
    assert measured["MB"] == pytest.approx(expected["MB"], rel=0.5)
