"""Options of an evaluation arrive where they should; see `test_wiring`."""

import json
import math

import numpy as np
import pytest
import torch
from recorder import Recorder
from small_runs import small_config
from test_wiring import edm, recording

import run_lib
from likelihood import bits_per_dim, get_elbo_fn, get_vlb_fn
from sampling import SampleNoise
from score_lib.base.tensors import derive_seed
from score_lib.data.sources import Subset
from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint, save_checkpoint
from score_lib.disk.reports import mean_and_error, write_report
from score_lib.runs import measures
from score_lib.runs.heldout import HeldOut
from score_lib.runs.rounds import Job


def likelihood_terms(**changes):
    run = run_lib.setup(recording(**{"eval__bpd_steps": 0, **changes}))
    images = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    return measures.likelihood_terms(run, images, 17, SampleNoise(0, range(2)))


def test_parametrization_arrives_in_the_likelihood():
    """The network is told log(sigma) / 4, up to sigma(1) = 152 of the VP process."""
    published, ours = likelihood_terms(), likelihood_terms(**edm())
    labels = torch.cat([call.labels for call in Recorder.calls])
    assert abs(labels.max() - math.log(152.17) / 4) < 1e-3 and labels.min() < 0
    assert not np.allclose(published["total"], ours["total"], rtol=1e-3)
    other = likelihood_terms(**edm(model__sigma_data=0.3))
    assert not np.allclose(other["total"], ours["total"], rtol=1e-3)


def test_parametrization_arrives_in_the_bounds():
    images = torch.arange(128).reshape(2, 1, 8, 8) % 17 / 8 - 1

    def values(terms, **changes):
        run = run_lib.setup(recording(**changes))
        Recorder.calls.clear()
        return terms(run, images, 17, SampleNoise(0, range(2)))["bpd"]

    values(measures.elbo_terms, **edm())
    assert max(float(call.labels.max()) for call in Recorder.calls) < 2  # log(152) / 4, not 999
    chain = {"training__continuous": False, "model__num_scales": 30}
    published, ours = (
        values(measures.vlb_terms, **chain, model__parametrization=name) for name in ("", "v")
    )
    assert not np.allclose(published, ours, rtol=1e-3)


def test_error_control_per_sample_arrives():
    """The value of an image does not depend on another one in its batch, which is far away."""
    images = torch.tensor([0.1, 30.0])[:, None, None, None].expand(2, 1, 8, 8)
    found = []
    for per_sample in (False, True):
        run = run_lib.setup(recording(eval__bpd_steps=0, eval__per_sample_error=per_sample))
        found += [
            measures.likelihood_terms(run, part, 17, SampleNoise(0, range(len(part))))["total"][0]
            for part in (images, images[:1])
        ]
    assert found[0] != found[1] and found[2] == pytest.approx(found[3], rel=1e-12)


def test_options_of_the_likelihood_arrive():
    one, several = likelihood_terms(), likelihood_terms(eval__num_probes=3)
    assert np.isnan(one["standard_error"]).all()
    assert np.isfinite(several["standard_error"]).all()
    assert "step_error" not in one
    stepped = likelihood_terms(eval__bpd_steps=30)
    assert stepped["nfe"] == 33
    assert 0 < np.abs(stepped["total"] - one["total"]).max() < 0.05
    half = likelihood_terms(eval__bpd_steps=15)
    assert stepped["step_error"] == pytest.approx(stepped["bpd"][:1] - half["bpd"][:1], rel=1e-6)
    exact = likelihood_terms(eval__hutchinson_type="exact")
    assert (exact["standard_error"] == 0).all()
    gaussian = likelihood_terms(eval__hutchinson_type="Gaussian")
    # A multiple of x has the same divergence along every Rademacher probe, but not Gaussian ones.
    np.testing.assert_allclose(one["divergence"], exact["divergence"], rtol=1e-5)
    assert not np.allclose(gaussian["divergence"], exact["divergence"], rtol=1e-3)


def test_losses_are_evaluated_without_dropout_and_with_noise_for_each_repetition(tmp_path):
    run = run_lib.setup(recording(eval__batch_size=200, eval__loss_num_repeats=3))
    Recorder.calls.clear()
    run.state["model"].train()
    measures.evaluate_loss(Job(run, tmp_path, "1", ""))
    assert {call.training for call in Recorder.calls} == {False}
    assert len({float(call.x.sum()) for call in Recorder.calls}) == len(Recorder.calls) == 3 * 2


def bounds(folder, option, seed_of, dequantize, bound, **changes):
    """A bound as an evaluation records it, and the same by hand for each held-out digit: by the
    averaged weights, the examples and the seed."""
    options = {"eval__end_ckpt": 1, "eval__begin_ckpt": 1, "eval__enable_loss": False}
    options |= {"eval__enable_bpd": False, "eval__enable_sampling": False}
    options |= {option: True, "eval__batch_size": 200, **changes}
    config = recording(training__snapshot_sampling=False, **options)
    run_lib.train(config, folder)
    (record,) = run_lib.evaluate(config, folder)
    config.eval.checkpoint = str(folder / "checkpoints" / "checkpoint_1.pth")
    run, seed, bpd = run_lib.restored(config, folder), derive_seed(42, seed_of, 0), []
    data = HeldOut(run, "test", dequantize, seed)
    with run.state["ema"].applied(run.state["model"].parameters()):
        for number in range(2):
            noise = SampleNoise(seed, data.indices(number))
            bpd.append(bound(run, data.read(number)[0], noise))
    return record, torch.cat(bpd)


def test_options_of_the_bound_arrive(tmp_path):
    """The averaged weights, the times, the examples and the seed: by hand, the same figure."""

    def by_hand(run, images, noise):
        total = get_elbo_fn(run.sde, num_times=3)(run.state["model"], images, noise=noise).total
        return bits_per_dim(total, 64, run.inverse_scaler, 17)

    times = {"eval__elbo_num_times": 3}
    record, values = bounds(tmp_path, "eval__enable_elbo", "elbo", True, by_hand, **times)
    assert len(values) == 296 and record["elbo_bpd"] == pytest.approx(float(values.mean()))
    expected = float(values.std() / len(values) ** 0.5)
    assert record["elbo_bpd_standard_error"] == pytest.approx(expected)


@pytest.mark.parametrize(("variance", "num_times"), (("small", 0), ("large", 2)))
def test_options_of_the_bound_of_a_chain_arrive(variance, num_times, tmp_path):
    """The same of a discrete model, whose data are not dequantised."""

    def by_hand(run, images, noise):
        settings = {"variance": variance, "num_times": num_times}
        bound = get_vlb_fn(run.sde, run.inverse_scaler, 17, **settings)
        return bound(run.state["model"], images, noise=noise).total

    changes = {"training__continuous": False, "model__num_scales": 30}
    changes |= {"sampling__predictor": "ancestral_sampling", "eval__vlb_variance": variance}
    changes |= {"eval__vlb_num_times": num_times}
    record, values = bounds(tmp_path, "eval__enable_vlb", "vlb", False, by_hand, **changes)
    assert len(values) == 296 and record["vlb_bpd"] == pytest.approx(float(values.mean()))
    calls = sum(len(call.x) == 200 for call in Recorder.calls)
    assert calls == 2 * (1 + num_times if num_times else 30)
    with np.load(tmp_path / "eval" / "test_ckpt_1_vlb_0.npz") as file:
        parts = file["prior"] + file["steps"] + file["decoder"]
        np.testing.assert_allclose(parts, file["bpd"])
        assert (file["standard_error"] > 0).all() == (num_times > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({}, "eval.enable_vlb = True needs training.continuous = False"),
        ({"training__continuous": False, "eval__vlb_num_times": 1}, "at least 2"),
    ),
)
def test_bound_of_a_chain_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        run_lib.setup(small_config(eval__enable_vlb=True, model__num_scales=30, **changes))


@pytest.mark.slow
def test_options_of_an_evaluation_arrive(tmp_path):
    """Passes, batches and parts of the data, seen from the files and from the network."""
    changes = {"eval__loss_num_repeats": 2, "eval__bpd_num_repeats": 3, "eval__batch_size": 150}
    changes |= {"eval__dataset": "train", "eval__enable_sampling": False, "eval__begin_ckpt": 2}
    config = recording(eval__end_ckpt=2, training__snapshot_sampling=False, **changes)
    config.data.path = ""
    run_lib.train(config, tmp_path)
    Recorder.calls.clear()
    run_lib.evaluate(config, tmp_path)
    sizes = [len(call.x) for call in Recorder.calls if len(call.x) > 1]
    assert sizes[:5] == [16, 150, 146, 150, 146][1:] + [150]  # two passes over 296, then 1,501
    files = list((tmp_path / "eval").glob("train_ckpt_2_bpd_*.npz"))
    assert len(files) == 3 * 11
    config.eval.bpd_num_images, config.eval.enable_loss = 200, False
    report = run_lib.evaluate(config, tmp_path, "first")
    firsts = sorted((tmp_path / "first").glob("*_bpd_*.npz"))
    parts = [load_arrays(file)["bpd"] for file in firsts]
    assert [len(part) for part in parts] == [150, 50] * 3
    whole = load_arrays(tmp_path / "eval" / "train_ckpt_2_bpd_1.npz")["bpd"]
    np.testing.assert_allclose(parts[1], whole[:50], rtol=1e-4)
    assert report[0]["bpd"] == pytest.approx(np.concatenate(parts).mean())
    config.eval.bpd_num_images = 1502
    with pytest.raises(ValueError, match="1502 examples are asked for, and the train part"):
        run_lib.evaluate(config, tmp_path, "more")
    average = read_checkpoint(tmp_path / "checkpoints" / "checkpoint_2.pth")["ema"]
    weights = {call.weight for call in Recorder.calls if len(call.x) > 1}
    assert weights == {float(average["shadow_params"][0])}


def test_the_first_examples_of_data_stored_class_by_class_are_told(caplog, monkeypatch):
    """They are of some classes alone, so that the mean and its error are not those of all."""
    run = run_lib.setup(recording())

    def told(count, *, in_order):
        data = HeldOut(run, "test", False, count=count)
        source = data.stream.source
        labels = source.read(np.arange(len(source)))[1]
        data.stream.source = Subset(source, labels.argsort().numpy()) if in_order else source
        caplog.clear()
        data.tell_order()
        return caplog.text

    assert "the first 100 of 296 examples are not like the others" in told(100, in_order=True)
    assert not told(0, in_order=True) and not told(100, in_order=False)
    data = HeldOut(run, "test", False, count=100)
    monkeypatch.setattr(data.stream.source, "read", lambda numbers: (None, None))
    data.tell_order()  # has no labels


@pytest.mark.parametrize("measure", ["loss", "bpd", "elbo"])
def test_figures_that_are_not_finite_are_refused(measure, tmp_path):
    """Of weights that diverged; a histogram of bits/dim ended in an error of its own."""
    chosen = {f"eval__enable_{name}": name == measure for name in ("loss", "bpd", "sampling")}
    chosen |= {"eval__enable_elbo": measure == "elbo", "eval__bpd_steps": 8}
    chosen |= {"eval__begin_ckpt": 1, "eval__end_ckpt": 1, "eval__bpd_num_images": 20}
    config = recording(training__snapshot_sampling=False, **chosen)
    run_lib.train(config, tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint_1.pth"
    state = read_checkpoint(path)
    state["ema"]["shadow_params"] = [p + 3e38 for p in state["ema"]["shadow_params"]]
    save_checkpoint(path, state)
    name, count = ("loss", 296) if measure == "loss" else ("bits/dim", 20)
    with pytest.raises(FloatingPointError, match=f"the {name} of {count} of {count} examples is"):
        run_lib.evaluate(config, tmp_path)


def test_a_report_is_json_where_an_error_is_not_known(tmp_path):
    """One example tells no error, and JSON has no number that is none."""
    record = {"step": 1, **mean_and_error("bpd", np.array([2.0])), "table": {"x": [math.inf, 3.0]}}
    write_report(tmp_path, [record])
    text = (tmp_path / "report.json").read_text()
    (found,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["bpd"] == 2 and found["bpd_standard_error"] is None
    assert found["table"] == {"x": [None, 3]} and found["step"] == 1
    assert "2.0000 ± nan" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("dequantised", [True, False])
def test_samples_have_the_levels_that_the_network_learns(dequantised):
    """Level k is [k, k + 1) / 17 of dequantised data, and else what is nearest to k / 16."""
    run = run_lib.setup(recording(data__uniform_dequantization=dequantised))
    levels, spread = torch.arange(17.0), torch.linspace(-0.49, 0.49, 51)[:, None]
    near = (levels + 0.5 + spread) / 17 if dequantised else (levels + spread) / 16
    expected = (levels * 255 / 16).round().byte().expand(51, 17)
    assert torch.equal(run.to_bytes(near[:, None, None])[:, 0, :, 0], expected)
