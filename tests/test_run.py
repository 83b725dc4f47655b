"""Training runs: files, resumption after a kill, clear ends."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (
    SMALL,
    command,
    logged,
    run,
    run_forked,
    small_config,
    stop_in_the_wait_for_data,
)
from torch.nn import GroupNorm

import run_lib
from models.conditioning import UNCONDITIONAL
from models.ema import ExponentialMovingAverage
from sampling import get_sampling_fn
from score_lib.base.preemption import Preempted
from score_lib.data.sources import DataError
from score_lib.disk.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(small_config(), folder)
    return folder


def assert_same_weights(*folders):
    """Bitwise the same weights at the end."""
    one, other = (read_checkpoint(f / "checkpoints/checkpoint_2.pth")["model"] for f in folders)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_run(folder, expected):
    """Bitwise the same weights, averages, optimiser and log."""
    for name in ("checkpoints-meta/checkpoint.pth", "checkpoints/checkpoint_2.pth"):
        ours, theirs = read_checkpoint(folder / name), read_checkpoint(expected / name)
        assert ours.pop("config") == theirs.pop("config")
        assert ours.pop("examples") == theirs.pop("examples")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name in ("metrics.jsonl", "config_history.jsonl"):
        assert (folder / name).read_text() == (expected / name).read_text()
    for name in ("samples/iter_6/sample.np", "samples/iter_12/sample.np"):
        assert np.array_equal(np.load(folder / name), np.load(expected / name))


def test_files(undisturbed):
    found = {str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*") if p.is_file()}
    assert {
        "checkpoints/checkpoint_1.pth",
        "checkpoints/checkpoint_2.pth",
        "checkpoints-meta/checkpoint.pth",
        "samples/iter_6/sample.np",
        "samples/iter_6/sample.png",
        "samples/iter_12/sample.np",
        "metrics.jsonl",
        "stdout.txt",
        "config.json",
        "config_history.jsonl",
    } <= found
    assert any(name.startswith("tensorboard/events") for name in found)
    records = logged(undisturbed)
    assert [r["step"] for r in records if "training_loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 8, 12]
    samples = np.load(undisturbed / "samples" / "iter_12" / "sample.np")
    assert samples.shape == (4, 8, 8, 1) and samples.dtype == np.uint8
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["model"]["nf"] == 8
    checkpoint = read_checkpoint(undisturbed / "checkpoints" / "checkpoint_1.pth")
    assert checkpoint["step"] == 6 and checkpoint["position"] == 96
    assert json.loads(checkpoint["config"])["model"]["nf"] == 8


def test_tensorboard_shows_losses_and_samples(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    assert {"training_loss", "eval_loss", "learning_rate", "grad_norm", "images_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["samples"]
    assert [e.step for e in events.Scalars("eval_loss")] == [4, 8, 12]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("stop", (1, 3, 6, 11))
def test_stop_and_resume_equals_no_stop(stop, undisturbed, tmp_path, monkeypatch):
    """Before the first checkpoint, right after one of each kind, and steps after one: those are
    repeated."""

    class Killed(BaseException):
        pass

    original = ExponentialMovingAverage.update

    def dying(self, parameters):
        if self.num_updates == stop:
            raise Killed
        original(self, parameters)

    monkeypatch.setattr(ExponentialMovingAverage, "update", dying)
    with pytest.raises(Killed):
        run_lib.train(small_config(), tmp_path)
    monkeypatch.undo()
    run_lib.train(small_config(), tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("04.png", "19.png"))
def test_an_image_that_cannot_be_read_costs_no_step(name, tmp_path, monkeypatch):
    """To train on, or held out.  Once it is mended, training ends as if nothing had been wrong."""
    monkeypatch.setattr("score_lib.runs.examples._READ", 2)  # at the start, of many
    images = tmp_path / "images"
    images.mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(images / f"{k:02}.png")
    data = {"data__dataset": "IMAGES", "data__path": str(images), "data__levels": 256}
    few = {"n_iters": 6, "snapshot_freq": 3, "batch_size": 4, "snapshot_sampling": False}
    config = small_config(**{f"training__{key}": value for key, value in few.items()}, **data)
    config.training.snapshot_freq_for_preemption = 1000
    run_lib.train(config, tmp_path / "whole")
    good = (images / name).read_bytes()
    (images / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name} in .* is not a readable image"):
        run_lib.train(config, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run/checkpoints-meta/checkpoint.pth")["step"] == 3
    (images / name).write_bytes(good)
    run_lib.train(config, tmp_path / "run")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_a_signal_ends_the_wait_for_data(undisturbed, tmp_path, monkeypatch):
    """Data that never came kept a run from ending."""
    stop_in_the_wait_for_data(monkeypatch, after=3)
    with pytest.raises(Preempted):
        run_lib.train(small_config(), tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 3
    monkeypatch.undo()
    run_lib.train(small_config(), tmp_path)
    assert_same_weights(tmp_path, undisturbed)


def test_a_signal_ends_the_look_at_the_data(tmp_path, monkeypatch):
    def stuck(run, source):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        pytest.fail("it goes on")

    monkeypatch.setattr("score_lib.runs.train.standardize", stuck)
    with pytest.raises(Preempted):
        run_lib.train(small_config(), tmp_path)
    assert not (tmp_path / "checkpoints-meta").exists()


@pytest.mark.slow
def test_what_is_logged_changes_nothing(undisturbed, tmp_path):
    """Evaluating and sampling at other steps leaves the weights as they are."""
    run_lib.train(small_config(training__eval_freq=5, training__snapshot_sampling=False), tmp_path)
    assert_same_weights(tmp_path, undisturbed)


def test_several_steps_a_call(undisturbed, tmp_path):
    run_lib.train(small_config(training__n_jitted_steps=2, training__log_freq=2,
                               training__snapshot_freq_for_preemption=6), tmp_path)  # fmt: skip
    assert_same_weights(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_resume_between_two_calls_of_several_steps_misses_no_event(tmp_path):
    """A run of 5 steps has ended with a call of one step; from there on it goes by two again."""
    options = {"training__n_jitted_steps": 2, "training__log_freq": 2, "training__eval_freq": 4}
    options |= {"training__snapshot_freq": 4, "training__snapshot_freq_for_preemption": 2}
    options |= {"training__snapshot_sampling": False}
    for folder, ends in (("parts", (5, 9)), ("whole", (9,))):
        for end in ends:
            run_lib.train(small_config(**options, training__n_iters=end), tmp_path / folder)
    names = [sorted(p.name for p in (tmp_path / f / "checkpoints").iterdir()) for f in
             ("parts", "whole")]  # fmt: skip
    assert names[0] == names[1]
    logs = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("parts", "whole")]
    steps = [[(row["step"], "eval_loss" in row) for row in map(json.loads, log)] for log in logs]
    assert steps[0] == steps[1] and steps[0]


def test_a_finished_run_stays_as_it_is(undisturbed, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.pth")}
    run_lib.train(small_config(), undisturbed)
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.pth")}


def test_a_program_without_streams_trains(tmp_path):
    """As of a job that was started with its output closed."""

    def close():
        sys.stdout = sys.stderr = None

    few = command(workdir=tmp_path, training__n_iters=1, training__snapshot_sampling=False)
    code, output = run_forked(few[2:], prepare=close)
    assert code == 0 and (tmp_path / "checkpoints/checkpoint_0.pth").exists(), output


def test_sample_mode(undisturbed, tmp_path):
    checkpoint = str(undisturbed / "checkpoints" / "checkpoint_2.pth")
    folder = run_lib.sample(small_config(eval__checkpoint=checkpoint), tmp_path)
    expected = undisturbed / "samples" / "iter_12" / "sample.np"
    assert np.array_equal(np.load(folder / "sample.np"), np.load(expected))
    assert (folder / "sample.png").stat().st_size > 0


def test_samples_by_other_options_stay(undisturbed, tmp_path):
    config = small_config(eval__checkpoint=str(undisturbed / "checkpoints" / "checkpoint_2.pth"))
    folder = run_lib.sample(config, tmp_path)
    first = np.load(folder / "sample.np")
    assert run_lib.sample(config, tmp_path) == folder and len(list(folder.parent.iterdir())) == 1
    config.seed += 1
    assert run_lib.sample(config, tmp_path) == folder
    assert json.loads((folder / "config.json").read_text())["seed"] == config.seed
    aside = folder.parent / "set_aside" / f"{folder.name}_other_options"
    assert np.array_equal(np.load(aside / "sample.np"), first)
    assert not np.array_equal(np.load(folder / "sample.np"), first)


def test_samples_come_in_batches_that_fit(undisturbed, tmp_path):
    """More samples than a training batch holds: the same ones, in several batches."""
    checkpoint = str(undisturbed / "checkpoints" / "checkpoint_2.pth")
    config = small_config(eval__checkpoint=checkpoint, sampling__num_samples=20)
    samples = np.load(run_lib.sample(config, tmp_path) / "sample.np")
    assert samples.shape == (20, 8, 8, 1)
    few = np.load(undisturbed / "samples" / "iter_12" / "sample.np")
    assert (samples[:4] == few).mean() > 0.99  # up to the rounding of matrix products


def test_number_of_sampling_steps():
    """A continuous model is sampled in as many steps as asked for; 0 are those of training."""
    for steps, expected in ((0, 5), (24, 24)):
        run = run_lib.setup(small_config(sampling__num_steps=steps))
        shape, eps = (2, *run.shape), run.sde.sampling_eps
        sampler = get_sampling_fn(run.config, run.sde, shape, run.inverse_scaler, eps)
        _, evaluations = sampler(run.state["model"])
        assert evaluations == expected and run.sde.N == 5


def test_losses_likelihoods_and_samples_call_a_unet_in_the_fast_order():
    """Channels last, on a CPU; in float32 but for samples, which have a precision of their own."""
    run = run_lib.setup(small_config(device="cpu", sampling__precision="bfloat16"))
    seen = []
    normalization = next(m for m in run.state["model"].modules() if isinstance(m, GroupNorm))
    normalization.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run.network(UNCONDITIONAL)(torch.rand(2, *run.shape), torch.tensor([1.0, 2.0]))
    run.draw(range(2))
    kinds = [features.dtype for features in seen]
    assert len(kinds) > 1 and kinds == [torch.float32] + [torch.bfloat16] * (len(kinds) - 1)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert not any(x.is_contiguous() for x in seen)


@pytest.mark.parametrize("name", ("ve/digits", "subvp/digits"))
@pytest.mark.quick_cases(1)
def test_other_processes_train(name, tmp_path):
    config = small_config(name, training__n_iters=2, training__snapshot_freq=2)
    run_lib.train(config, tmp_path)
    assert (tmp_path / "samples" / "iter_2" / "sample.png").exists()


@pytest.mark.slow
def test_no_tensorflow_and_quick_start(tmp_path):
    """Training loads no TensorFlow, though it is installed; nor does the help."""
    code = (
        "import sys, runpy; sys.argv = {argv!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "found = [m for m in sys.modules if m.split('.')[0] in "
        "('tensorflow', 'tensorflow_datasets', 'jax')]\n"
        "assert not found, found[:3]"
    )
    training = command(workdir=tmp_path, training__n_iters=1, training__snapshot_freq=1)[1:]
    for argv in (training, [training[0], "--helpfull"]):
        result = run([command()[0], "-c", code.format(argv=argv)])
        # absl's help ends with 1.
        assert result.returncode == 0 or "flags:" in result.stdout, result.stderr
        assert "AssertionError: [" not in result.stderr


@pytest.mark.slow
def test_runs_where_tensorflow_is_not_installed(tmp_path):
    blocker = tmp_path / "block"
    for name in ("tensorflow", "tensorflow_datasets", "tensorflow_gan", "jax"):
        (blocker / name).mkdir(parents=True)
        (blocker / name / "__init__.py").write_text("raise ImportError('not installed here')")
    arguments = command(workdir=tmp_path / "w", training__n_iters=1, training__snapshot_freq=1)
    result = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(blocker)},
    )
    assert result.returncode == 0, result.stderr
    assert pathlib.Path(tmp_path / "w" / "samples" / "iter_1" / "sample.png").exists()


assert SMALL["training.n_iters"] == 12  # the steps above count on it
