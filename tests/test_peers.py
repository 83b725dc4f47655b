"""The comparison with peers is fair: turns, rates, noise levels and solvers are as they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from small_runs import small_config

from benchmarks.peers import (
    __main__ as command_line,
)
from benchmarks.peers import (
    commands,
    contest,
    diffusers_loop,
    environment,
    plain_loop,
    results,
    shared,
    torchdiffeq_likelihood,
)
from configs.defaults import load
from run_lib import restored, setup

MODEL = small_config("vp/digits").model
# Takes SIGTERM as a run of ours does.
PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
while True:
    time.sleep(0.01)
"""


class Steps:
    """Turns that are over after a number of steps."""

    def __init__(self, count):
        self.left = count

    def over(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.slow
def test_a_plain_loop_lowers_its_loss_and_ends_with_its_turns(tmp_path):
    run = setup(small_config("vp/digits", training__batch_size=32, optim__warmup=5))
    images = results.write_images(run.config, tmp_path / "images.npz")
    again = shared.load_images(tmp_path / "images.npz")
    assert torch.equal(again.train, images.train) and again.levels == 17
    assert images.train.shape[1:] == (1, 8, 8) and images.train.max() == 16
    file, network = tmp_path / "log.jsonl", run.state["model"]
    plain_loop.train(network, run.config, images, Steps(30), shared.Journal(file, 1))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert [record["step"] for record in records] == list(range(1, 31))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_turns_are_windows_of_their_own_time(monkeypatch):
    now, stops = [100.0], []

    def stop(*_):
        stops.append(now[0])
        now[0] += 1000  # others train

    monkeypatch.setattr(shared.time, "time", lambda: now[0])
    monkeypatch.setattr(shared.signal, "pthread_kill", stop)
    turns = shared.Turns(20, rounds=2, started=100.0)
    used, over = [], False
    while not over:
        now[0] += 4
        used.append(turns.used())
        over = turns.over()
    assert used == pytest.approx([0.2, 0.4, 0.5, 0.7, 0.9, 1.0])
    assert stops == [112]


def test_rates_are_of_neighbouring_lines_inside_a_window():
    entries = [(1, 10), (2, 20), (4, 40), (50, 45), (51, 65), (53, 85), (99, 86)]
    found = contest.rates(entries, [(0, 10), (48, 53), (90, 95)], batch_size=2)
    assert [list(values) for values in found] == [[20, 20], [40, 20], []]
    assert contest.summary(found)["images/s"] == 20
    ratio = contest.times_as_fast(found, [np.array([5.0]), np.array([10.0]), np.array([1.0])])
    assert ratio["ours / it"] == pytest.approx(3.5)  # of 4 and 3


def test_lines_of_a_run_are_read(tmp_path):
    file = tmp_path / "stdout.txt"
    file.write_text(
        "2026-03-01 10:00:00,250 I training from step 0 to 9 on cpu, processes: 1\n"
        "2026-03-01 10:00:01,500 I step 10: training loss 1.0e+00, gradient norm 2\n"
        "2026-03-01 10:00:04,000 I step 20: training loss 9.0e-01, gradient norm 2, 51 images/s\n"
        "2026-03-01 10:00:05,000 I step 20: evaluation loss 9.0e-01\n"
    )
    (first, step), (second, last) = contest.entries_of_run(file)
    assert (second - first, step, last) == (2.5, 10, 20)


def test_a_run_is_stopped_between_its_turns_and_ended_by_a_signal(tmp_path):
    command = [sys.executable, "-S", "-c", PATIENT]
    one = contest.Contestant("ours", lambda _: command, tmp_path, False, dict(os.environ))
    try:
        one.turn(0.2, last=False)
        assert one._wait(one.windows[0][1] + 1, stopped=True) == "stopped"
        one.turn(0.1, last=True)
    finally:
        one.end()
    assert one.process.returncode == 75 and one.peak_mb > 1
    assert len(one.windows) == 2 and one.windows[1][0] >= one.windows[0][1]


def test_a_training_that_fails_is_told_with_what_it_said(tmp_path):
    command = [sys.executable, "-S", "-c", "raise SystemExit('no such thing')"]
    one = contest.Contestant("plain", lambda _: command, tmp_path, True, dict(os.environ))
    with pytest.raises(RuntimeError, match=r"plain is ended with exit code 1:\nno such thing"):
        one.turn(0.2, last=False)


def test_our_runs_train_for_their_time_in_their_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "python_of", lambda _: "python")
    monkeypatch.setattr(commands, "fast_precision", {"cpu": "bfloat16"}.get)
    monkeypatch.setattr(results, "timed", lambda work, _: 0.5)
    given = command_line.parse(["--config", "vp/digits", "--workdir", str(tmp_path)])
    config = small_config("vp/digits", device="cpu")
    assert results.steps_in(30, config, "float32") == 66
    steps = {commands.OURS: 66, commands.FLOAT32: 33}
    made = commands.Commands(given, config, "python", 1, steps)
    for name, precision in ((commands.OURS, "bfloat16"), (commands.FLOAT32, "float32")):
        command = made.train(name, 0.0)
        assert f"--config.training.precision={precision}" in command
        assert f"--config.training.n_iters={steps[name]}" in command
        assert f"--config.optim.cooldown={steps[name] // 2}" in command


def test_all_are_asked_at_the_same_noise_levels():
    kept = shared.chain_levels()
    mean, std = plain_loop.marginal(plain_loop.time_of(kept, MODEL), MODEL)
    # The last products of the chain are a little below those of continuous time.
    torch.testing.assert_close(mean.view(-1).square()[:990], kept[:990], rtol=1e-9, atol=0)
    torch.testing.assert_close((mean**2 + std**2).view(-1), torch.ones_like(kept))
    data = torch.rand(40, 1, 3, 3) * 2 - 1
    scale = kept.float().view(-1, 1, 1, 1)

    def knowing(x, level):
        return (x - scale[level].sqrt() * data) / (1 - scale[level]).sqrt()

    assert shared.noise_error(knowing, data).max() < 1e-6
    ignorant = shared.noise_error(lambda x, _: torch.zeros_like(x), data)
    assert ignorant.shape == (40,) and ignorant.mean() == pytest.approx(1, abs=0.2)


def test_heun_leaves_normal_data_as_they_are(monkeypatch):
    """The flow of a process that starts at its own prior does not move."""
    config = small_config("vp/digits")

    def of_normal_data(x, label):
        return x * plain_loop.marginal(label / 999, config.model)[1]

    start = torch.randn(2, 1, 4, 4)
    monkeypatch.setattr(torch, "randn", lambda _: start)
    found = plain_loop.heun(of_normal_data, config, start.shape, evaluations=20)
    torch.testing.assert_close(found, start)


def test_times_at_equal_error_are_between_those_of_tolerances():
    errors, times = [1e-2, 1e-4], [1.0, 4.0]
    assert torchdiffeq_likelihood.time_at(1e-3, errors, times) == pytest.approx(2)
    assert torchdiffeq_likelihood.time_at(1e-4, errors, times) == pytest.approx(4)
    assert torchdiffeq_likelihood.time_at(1e-5, errors, times) is None


@pytest.mark.slow
def test_both_likelihoods_are_of_one_flow(tmp_path, monkeypatch):
    """With a solver that stands for torchdiffeq's: the midpoint rule in many steps."""

    def odeint(slope, state, times, *, rtol, atol, method):
        assert (rtol, atol, method) == (0.125, 0.125, "dopri5")
        nodes = torch.linspace(0, 1, 101).square() * (times[1] - times[0]) + times[0]
        for t, dt in zip(nodes[:-1], nodes.diff(), strict=True):
            k = slope(t, state)
            half = slope(t + dt / 2, [x + dt / 2 * v for x, v in zip(state, k, strict=True)])
            state = [x + dt * v for x, v in zip(state, half, strict=True)]
        return [torch.stack((x, x)) for x in state]

    monkeypatch.setitem(sys.modules, "torchdiffeq", types.SimpleNamespace(odeint=odeint))
    config = load("vp/digits")
    config.eval.batch_size, config.device = 2, "cpu"
    config.model.weights = "assets/weights/digits.safetensors"
    run = restored(config, tmp_path)
    (batch,) = torchdiffeq_likelihood.batches_of(run, 1)
    theirs = torchdiffeq_likelihood.by_torchdiffeq(run, batch, 0.125)
    ours = torchdiffeq_likelihood.by_us(run, batch, 64)
    assert theirs.evaluations == 200
    torch.testing.assert_close(theirs.bits, ours.bits, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "script", (command_line, plain_loop, diffusers_loop, torchdiffeq_likelihood)
)
def test_scripts_tell_their_options(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0 and "--batch_size" in capsys.readouterr().out


def test_without_network_and_environment_there_is_one_sentence(tmp_path, monkeypatch):
    def failing(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: no connection\n")

    monkeypatch.setattr(environment.subprocess, "run", failing)
    with pytest.raises(OSError, match=r"\(ERROR: no connection\): connect to .* --environment$"):
        environment.python_of(tmp_path / "env")


def test_other_processes_are_refused():
    given = command_line.parse(["--config", "ve/digits"])
    with pytest.raises(ValueError, match=r"ve/digits is not .* vp/fashion_mnist or vp/digits"):
        command_line.configured(given)
