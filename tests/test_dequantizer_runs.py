"""`--mode train_dequantizer`, and evaluations with its checkpoint."""

from __future__ import annotations

import itertools
import shutil
import time

import numpy as np
import pytest
import torch
from processes import together
from recorder import Recorder
from small_runs import (
    ROOT,
    SMALL,
    dotted,
    run_forked,
    small_config,
    start_forked,
    stop_in_the_wait_for_data,
)
from test_wiring import recording

import run_lib
from likelihood import bits_per_dim, get_elbo_fn
from sampling import SampleNoise
from score_lib.base.preemption import Preempted
from score_lib.base.tensors import derive_seed
from score_lib.data.sources import DataError
from score_lib.data.stream import ImageStream
from score_lib.disk.checkpoints import read_checkpoint, save_checkpoint
from score_lib.runs.dequantizer import DEQUANTIZER, get_dequantization
from score_lib.runs.heldout import HeldOut
from score_lib.runs.start import META

SIZES = {"dequantizer.nf": 4, "dequantizer.num_layers": 2, "dequantizer.num_bins": 3}
TRAINING = {
    **SIZES,
    "dequantizer.n_iters": 6,
    "dequantizer.lr": 0.01,
    "training.snapshot_freq_for_preemption": 2,
    "training.snapshot_sampling": False,
}
EVALUATION = {
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1,
    "eval.enable_loss": False,
    "eval.enable_bpd": False,
    "eval.enable_sampling": False,
    "eval.enable_elbo": True,
    "eval.elbo_num_times": 2,
    "eval.batch_size": 200,
}


def settings(**changes):
    config = recording(data__random_flip=True)
    config.update_from_flattened_dict({**TRAINING, **EVALUATION, **dotted(changes)})
    return config


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The folder of a trained score network."""
    folder = tmp_path_factory.mktemp("scored")
    run_lib.train(settings(), folder)
    return folder


@pytest.fixture
def folder(scored, tmp_path):
    """A copy of it."""
    return shutil.copytree(scored, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(scored, tmp_path_factory):
    """The same with a dequantizer that was trained without a stop."""
    folder = shutil.copytree(scored, tmp_path_factory.mktemp("trained") / "run")
    run_lib.train_dequantizer(settings(), folder)
    return folder


def assert_same_training(folder, other):
    ours, theirs = (read_checkpoint(place / DEQUANTIZER) for place in (folder, other))
    for key in ("model", "ema", "optimizer", "step", "position"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    records = [(place / "dequantizer" / "metrics.jsonl").read_text() for place in (folder, other)]
    assert records[0] == records[1]


# --- Training -------------------------------------------------------------------------------------


def test_training_changes_the_flow_and_leaves_the_score_network(trained, scored):
    contents = read_checkpoint(trained / DEQUANTIZER)
    assert contents["step"] == 6 and contents["position"] == 6 * SMALL["training.batch_size"]
    assert contents["levels"] == 17 and contents["score_step"] == 12
    last = contents["model"]["module.couplings.1.4.weight"]
    assert last.shape == (10, 4, 3, 3) and last.abs().max() > 0
    assert (trained / "dequantizer" / "checkpoint.2.pth").exists()
    for name in ("checkpoints/checkpoint_2.pth", "checkpoints-meta/checkpoint.pth"):
        assert (trained / name).read_bytes() == (scored / name).read_bytes()


def test_every_step_draws_new_times_and_reads_the_network_as_it_was_trained(tmp_path):
    """Of a network that is told log(sigma) / 4, at most log(152) / 4, and not 999 t."""
    changes = {"model__parametrization": "edm", "training__n_iters": 1}
    run_lib.train(settings(**changes), tmp_path)
    config = settings(**changes)
    run_lib.train_dequantizer(config, tmp_path)
    labels = [call.labels for call in Recorder.calls if len(call.x) == 16]
    assert len({float(told.sum()) for told in labels}) == len(labels) == 6
    assert torch.cat(labels).max() < 2


def test_a_training_that_stops_and_resumes_equals_one_that_does_not(folder, trained):
    run_lib.train_dequantizer(settings(dequantizer__n_iters=3), folder)
    run_lib.train_dequantizer(settings(), folder)
    assert_same_training(folder, trained)


def test_a_signal_ends_the_wait_for_data(folder, trained, monkeypatch):
    stop_in_the_wait_for_data(monkeypatch, after=3)
    with pytest.raises(Preempted):
        run_lib.train_dequantizer(settings(), folder)
    assert read_checkpoint(folder / DEQUANTIZER)["step"] == 3
    monkeypatch.undo()
    run_lib.train_dequantizer(settings(), folder)
    assert_same_training(folder, trained)


def test_what_was_trained_before_data_that_cannot_be_read_is_saved(folder, monkeypatch):
    batches = ImageStream._batches

    def broken(self, start):
        yield from itertools.islice(batches(self, start), 3)
        raise DataError("image 7 is broken")

    monkeypatch.setattr(ImageStream, "_batches", broken)
    with pytest.raises(DataError, match="image 7 is broken"):
        run_lib.train_dequantizer(settings(), folder)
    assert read_checkpoint(folder / DEQUANTIZER)["step"] == 3


def test_a_damaged_checkpoint_displaces_no_predecessor(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = folder / DEQUANTIZER
    path.write_bytes(path.read_bytes()[:1000])
    run_lib.train_dequantizer(settings(), folder)
    assert_same_training(folder, trained)
    assert read_checkpoint(path.with_name("checkpoint.1.pth"))["step"] == 4
    assert (path.parent / "set_aside" / "checkpoint_damaged.pth").stat().st_size == 1000


@pytest.mark.slow
def test_a_killed_training_resumes_from_the_command_line(folder, trained):
    changes = {**SMALL, **TRAINING, "model.name": "recorder", "data.random_flip": True}
    command = [f"--config={ROOT}/configs/vp/digits.py", f"--workdir={folder}"]
    command += ["--mode=train_dequantizer", *(f"--config.{k}={v}" for k, v in changes.items())]
    with (folder / "output.txt").open("w") as output:
        process = start_forked([*command, "--config.dequantizer.n_iters=100000"], output)
        deadline = time.monotonic() + 60
        while not (folder / DEQUANTIZER).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.join()
    for file in (folder / "dequantizer").glob("checkpoint*.pth"):
        if read_checkpoint(file)["step"] > 4:
            file.unlink()
    code, output = run_forked(command)
    assert code == 0, output
    if "starting from scratch" not in output:
        assert "from step 2 to 6" in output or "from step 4 to 6" in output
    assert_same_training(folder, trained)


@pytest.mark.slow
def test_several_processes_train_the_same_dequantizer(folder, trained):
    assert together(2, run_lib.train_dequantizer, settings(), folder) == [None] * 2
    ours, theirs = (read_checkpoint(place / DEQUANTIZER)["model"] for place in (folder, trained))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_options_of_the_training_arrive(folder):
    options = {"dequantizer__nf": 6, "dequantizer__num_layers": 3, "dequantizer__num_bins": 2}
    config = settings(**options, dequantizer__n_iters=1, dequantizer__lr=0.02)
    Recorder.calls.clear()
    run_lib.train_dequantizer(config, folder)
    contents = read_checkpoint(folder / DEQUANTIZER)
    weights = [value for name, value in contents["model"].items() if name.endswith("4.weight")]
    assert [w.shape for w in weights] == [(7, 6, 3, 3)] * 3 and contents["step"] == 1
    # Adam's first step has the size of the learning rate.
    assert float(weights[0].abs().max()) == pytest.approx(0.02, rel=1e-3)
    call = Recorder.calls[-1]
    average = read_checkpoint(folder / "checkpoints-meta" / "checkpoint.pth")["ema"]
    assert call.weight == float(average["shadow_params"][0])
    assert call.x.shape == (16, 1, 8, 8) and not call.training and not call.with_grad


# --- Evaluation -----------------------------------------------------------------------------------


def values(folder, name="eval"):
    rounds = [np.load(folder / name / f"test_ckpt_1_elbo_{k}.npz")["bpd"] for k in range(2)]
    return np.concatenate(rounds)


def by_hand(folder, config):
    """Bits/dim of each held-out digit, from explicit uniform noise."""
    config.eval.checkpoint = str(folder / "checkpoints" / "checkpoint_1.pth")
    run, seed, found = run_lib.restored(config, folder), derive_seed(42, "elbo", 0), []
    data, grey = (HeldOut(run, "test", spread, seed) for spread in (True, False))
    dequantize = get_dequantization(run, 17, folder)
    bound = get_elbo_fn(run.sde, num_times=2)
    for number in range(2):
        images, x = data.read(number)[0], run.inverse_scaler(grey.read(number)[0])
        u = (run.inverse_scaler(images) * 17 - (16 * x).round()).clamp(0, 1)
        with torch.no_grad():
            learned, log_q = dequantize(x, lambda like, u=u: u)
        if not config.eval.dequantizer:
            learned, log_q = run.inverse_scaler(images), 0.0
            torch.testing.assert_close(data.uniform(number), u, rtol=0, atol=1e-5)
        noise = SampleNoise(seed, data.indices(number))
        with run.state["ema"].applied(run.state["model"].parameters()):
            total = bound(run.state["model"], run.scaler(learned), noise=noise).total
        found.append(bits_per_dim(total - log_q, 64, run.inverse_scaler, 17))
    return torch.cat(found).numpy()


def test_uniform_noise_gives_the_numbers_of_dequantised_data(trained):
    """Bit for bit, although the evaluation reads grey levels and adds the noise itself."""
    config = settings()
    run = run_lib.restored(config, trained)
    dequantize = get_dequantization(run, 17, trained)
    data, grey = (HeldOut(run, "test", spread, 5) for spread in (True, False))
    for number in range(2):
        x, expected = run.inverse_scaler(grey.read(number)[0]), data.read(number)[0]
        images, log_q = dequantize(x, lambda like, k=number: grey.uniform(k))
        assert torch.equal(run.scaler(images), expected) and (log_q == 0).all()
    (record,) = run_lib.evaluate(config, trained, "uniform")
    found = values(trained, "uniform")
    np.testing.assert_allclose(found, by_hand(trained, settings()), rtol=1e-12)
    assert record["elbo_bpd"] == pytest.approx(found.mean())


def test_learned_noise_counts_with_its_density(trained):
    (record,) = run_lib.evaluate(settings(eval__dequantizer="run"), trained, "own")
    found = values(trained, "own")
    np.testing.assert_allclose(
        found, by_hand(trained, settings(eval__dequantizer="run")), rtol=1e-4
    )
    assert record["elbo_bpd"] == pytest.approx(found.mean())
    assert not np.allclose(found, by_hand(trained, settings()), rtol=1e-3)
    file = shutil.copy(trained / DEQUANTIZER, trained / "other.pth")
    run_lib.evaluate(settings(eval__dequantizer=str(file)), trained, "file")
    np.testing.assert_array_equal(values(trained, "file"), found)


def test_evaluations_use_averaged_weights(trained):
    run = run_lib.setup(settings(eval__dequantizer="run"))
    used = list(get_dequantization(run, 17, trained).flow.parameters())
    contents = read_checkpoint(trained / DEQUANTIZER)
    torch.testing.assert_close([p.detach() for p in used], contents["ema"]["shadow_params"])
    assert not torch.equal(used[-1].detach(), contents["model"]["module.couplings.1.4.bias"])


def test_rounds_of_another_dequantizer_are_not_reused(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    config = settings(eval__dequantizer="run")
    run_lib.evaluate(config, folder)
    run_lib.train_dequantizer(settings(dequantizer__n_iters=7), folder)
    with pytest.raises(ValueError, match="another checkpoint"):
        run_lib.evaluate(config, folder)


def test_mistakes_are_refused_in_a_sentence(folder, trained):
    for dequantizer, message in (
        ("run", "there is no dequantizer at .* --mode train_dequantizer"),
        (str(folder / "checkpoints" / "checkpoint_1.pth"), "is no dequantizer"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_lib.evaluate(settings(eval__dequantizer=dequantizer), folder)
    run = run_lib.setup(settings(eval__dequantizer="run"))
    with pytest.raises(ValueError, match="17 grey levels, but the data have 256"):
        get_dequantization(run, 256, trained)
    with pytest.raises(ValueError, match="does not fit"):
        run_lib.train_dequantizer(settings(dequantizer__nf=5), trained)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run_lib.train_dequantizer(settings(), folder / "empty")


def test_a_classifier_is_refused(tmp_path):
    config = small_config("vp/digits_classifier")
    save_checkpoint(tmp_path / META, run_lib.setup(config).state)
    with pytest.raises(ValueError, match="needs the density of a score network"):
        run_lib.train_dequantizer(config, tmp_path)


def test_grey_levels_of_a_resumed_training_are_those_of_the_data(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ValueError, match="17 grey levels, but the data have 30"):
        run_lib.train_dequantizer(settings(data__levels=30), folder)


def test_changed_options_of_the_optimiser_hold_from_the_resume_on(trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "run")
    steps = read_checkpoint(folder / DEQUANTIZER)["step"] + 1
    changed = {"optim__beta1": 0.5, "optim__eps": 1e-3, "optim__weight_decay": 0.1}
    run_lib.train_dequantizer(settings(**changed, dequantizer__n_iters=steps), folder)
    (group,) = read_checkpoint(folder / DEQUANTIZER)["optimizer"]["param_groups"]
    found = group["betas"], group["eps"], group["weight_decay"]
    assert found == ((0.5, 0.999), 1e-3, 0.1) and "optim.eps = 0.001 instead of" in caplog.text


def test_training_for_another_score_network_is_told(folder, trained, caplog):
    shutil.copytree(trained / "dequantizer", folder / "dequantizer")
    path = folder / DEQUANTIZER
    contents = read_checkpoint(path)
    torch.save({**contents, "score_step": 3}, path)
    run_lib.train_dequantizer(settings(dequantizer__n_iters=7), folder)
    assert "score network of step 3" in caplog.text
    assert read_checkpoint(path)["score_step"] == 12
