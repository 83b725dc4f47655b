"""Figures while training, and the checkpoint that is best by them."""

import contextlib
import os
import shutil
import signal

import control_runs  # noqa: F401  (registers a small network)
import numpy as np
import pytest
import torch
from processes import together
from small_runs import logged, small_config
from test_any_data import config_of, numbers
from test_classifier_runs import Brightest

import run_lib
from score_lib.base import distributed
from score_lib.base.preemption import Preempted
from score_lib.data.sources import DataError
from score_lib.disk import checkpoints
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.disk.logs import MetricsLog, SilentLog
from score_lib.runs.check import _quality
from score_lib.runs.comparisons import HeldOutExamples, compare_with_data
from score_lib.runs.measures import evaluate_accuracy
from score_lib.runs.quality import Quality, evaluations_of, fast_sampling, get_quality
from score_lib.runs.rounds import Job
from score_lib.runs.start import BEST, META
from score_lib.runs.train import standardize, training_streams
from score_lib.samplers.configured import sampler_text

pytestmark = pytest.mark.slow  # whole runs

# Measured after steps 2, 4 and 6, of which the first two are the best so far.
MEASURED = {
    "model__name": "gaussian",
    "optim__lr": 0.6,
    "optim__warmup": 0,
    "training__n_iters": 6,
    "training__snapshot_freq": 4,
    "training__snapshot_freq_for_preemption": 3,
    "training__snapshot_sampling": False,
    "training__metrics_freq": 2,
    "training__metrics_samples": 16,
}
# An evaluation that draws as the measurements do.
AS_MEASURED = {
    "sampling__method": "dpmpp_2m",
    "sampling__num_steps": 20,
    "eval__batch_size": 16,
    "eval__num_samples": 16,
    "eval__enable_loss": False,
    "eval__enable_bpd": False,
}


def config_for(**changes):
    return small_config(**{**MEASURED, **changes})


def prepared(config):
    """A run that has made no step, and its measurements."""
    run = run_lib.setup(config)
    run.add_optimizer()
    streams = training_streams(run)
    quality = get_quality(run, None)
    standardize(run, streams[0].source)
    return run, quality


def figures(folder, name="fid"):
    """The figures in the log of a run, by step."""
    records = logged(folder)
    return {r["step"]: r[name] for r in records if name in r}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("measured")
    run_lib.train(config_for(), folder)
    return folder


def test_the_best_checkpoint_is_that_of_the_least_distance(undisturbed):
    found = figures(undisturbed)
    assert list(found) == [2, 4, 6] and found[4] < found[6] < found[2]
    best = read_checkpoint(undisturbed / BEST)
    assert best["step"] == best["best"]["step"] == 4 and best["best"]["value"] == found[4]
    assert best["best"]["sampler"] == "dpmpp_2m (num_steps = 20)"
    # A figure of the log is worth nothing without the steps and samples that it is of.
    assert set(figures(undisturbed, "sampler").values()) == {best["best"]["sampler"]}
    assert list(figures(undisturbed, "num_samples")) == list(found)
    same_step = read_checkpoint(undisturbed / "checkpoints/checkpoint_1.pth")
    assert best.keys() == same_step.keys() and best["config"] == same_step["config"]
    for key in ("model", "ema", "optimizer"):
        torch.testing.assert_close(best[key], same_step[key], rtol=0, atol=0)


def assert_same_file(path, other):
    ours, theirs = read_checkpoint(path), read_checkpoint(other)
    assert ours.keys() == theirs.keys()
    for key in ("model", "ema", "optimizer"):
        torch.testing.assert_close(ours.pop(key), theirs.pop(key), rtol=0, atol=0)
    assert ours == theirs


def test_an_evaluation_of_the_best_gives_its_figure(undisturbed):
    config = config_for(**AS_MEASURED, eval__checkpoint="best")
    (record,) = run_lib.evaluate(config, undisturbed)
    assert (record["checkpoint"], record["step"]) == ("best", 4)
    assert record["fid"] == figures(undisturbed)[4]


class Killed(BaseException):
    pass


def killed(*arguments, **options):
    raise Killed


def broken(monkeypatch, fault):
    """Let a run end at the second measurement, or before the second best checkpoint is written."""
    count = iter(range(1, 10))
    measure, write = Quality.measure, checkpoints.atomic_write

    def measured(self):
        if fault in ("signalled", "unreadable") and next(count) == 2:
            if fault == "unreadable":
                raise DataError("of the held-out part")
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self)

    def written(path, **options):
        if fault == "written" and path.name == BEST.name and next(count) == 2:
            raise Killed
        return write(path, **options)

    monkeypatch.setattr(Quality, "measure", measured)
    monkeypatch.setattr(checkpoints, "atomic_write", written)


@pytest.mark.parametrize(
    "fault, error", [("written", Killed), ("signalled", Preempted), ("unreadable", DataError)]
)
def test_stopped_and_resumed(fault, error, undisturbed, tmp_path, monkeypatch):
    broken(monkeypatch, fault)
    with pytest.raises(error):
        run_lib.train(config_for(), tmp_path)
    state = read_checkpoint(tmp_path / META)
    if fault == "written":  # the state that it belongs to is there
        assert state["best"]["step"] == 4
    assert state["step"] == 4 and state["metrics_due"] is (fault != "written")
    monkeypatch.undo()
    run_lib.train(config_for(), tmp_path)
    assert_same_file(tmp_path / BEST, undisturbed / BEST)
    assert_same_file(tmp_path / META, undisturbed / META)
    name = "metrics.jsonl"
    assert (tmp_path / name).read_text() == (undisturbed / name).read_text()


@pytest.fixture
def went_back(undisturbed, tmp_path):
    """A run that has lost its states after step 3, where step 2 is the best, but not its best."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    states = [folder / META, *(folder / META).parent.glob("checkpoint.*.pth")]
    for path in states:
        if read_checkpoint(path)["step"] != 3:
            path.unlink()
    return folder


def test_the_best_of_steps_to_come_stays(went_back, undisturbed):
    run_lib.train(config_for(), went_back)
    for path in (BEST, META):
        assert_same_file(went_back / path, undisturbed / path)
    names = [sorted(p.name for p in (f / BEST).parent.iterdir()) for f in (went_back, undisturbed)]
    assert names[0] == names[1]


def test_a_best_that_is_not_come_to_is_told(went_back, undisturbed, caplog):
    run_lib.train(config_for(training__n_iters=3), went_back)
    assert "at step 2; checkpoints/best.pth is not its checkpoint" in caplog.text
    assert_same_file(went_back / BEST, undisturbed / BEST)


def test_the_best_of_an_abandoned_course_is_set_aside(went_back, undisturbed, caplog):
    run_lib.train(config_for(optim__lr=0.3), went_back)
    assert_same_file(went_back / "checkpoints/set_aside/best_step_4.pth", undisturbed / BEST)
    assert "at step 2, is no longer in checkpoints/best.pth" in caplog.text
    found = {step: value for step, value in figures(went_back).items() if step > 3}
    best = read_checkpoint(went_back / BEST)
    assert best["best"]["value"] == min(found.values()) == found[best["step"]]
    assert best["best"] == read_checkpoint(went_back / META)["best"]


def test_a_measurement_that_is_made_again_is_logged_once(undisturbed, tmp_path, monkeypatch):
    """A signal came while it was made; after the resume it is, but the state is not saved."""
    broken(monkeypatch, "signalled")
    with pytest.raises(Preempted):
        run_lib.train(config_for(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "atomic_write", killed)
    with pytest.raises(Killed):
        run_lib.train(config_for(), tmp_path)
    monkeypatch.undo()
    assert list(figures(tmp_path)) == [2, 4] and read_checkpoint(tmp_path / META)["metrics_due"]
    run_lib.train(config_for(), tmp_path)
    logs = [(folder / "metrics.jsonl").read_text() for folder in (tmp_path, undisturbed)]
    assert logs[0] == logs[1]


def test_measuring_moves_no_weight(tmp_path):
    """Of a network with dropout, whose batches are shuffled."""
    small = {"model__name": "ncsnpp", "model__ch_mult": (1,), "model__attn_resolutions": ()}
    small |= {"model__dropout": 0.5, "training__n_iters": 3, "training__metrics_samples": 4}
    kept = []
    for freq in (0, 1):
        run_lib.train(config_for(**small, training__metrics_freq=freq), tmp_path / str(freq))
        state = read_checkpoint(tmp_path / str(freq) / META)
        kept.append({key: state[key] for key in ("model", "ema", "optimizer", "position")})
    assert len(figures(tmp_path / "1")) == 3
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def test_a_checkpoint_without_a_best_is_resumed(undisturbed, tmp_path):
    old = read_checkpoint(undisturbed / META) | {"step": 3, "position": 48}
    for key in ("best", "metrics_due"):
        del old[key]
    checkpoints.write_contents(tmp_path / META, old)
    run_lib.train(config_for(training__n_iters=4), tmp_path)
    assert read_checkpoint(tmp_path / BEST)["best"]["step"] == 4


def test_only_figures_that_are_measured_alike_are_compared(undisturbed, caplog):
    best = read_checkpoint(undisturbed / BEST)["best"]
    _, quality = prepared(config_for())
    assert quality.known(best) == best
    for found in ({}, "x", {"step": 2}, best | {"value": float("nan")}, best | {"step": None}):
        assert quality.known(found) == {}
    assert "another way" not in caplog.text
    quality.facts = {**quality.facts, "num_samples": 25}
    assert quality.known(best) == {} and "measured in another way" in caplog.text


@pytest.mark.parametrize("where", ["weights", "samples", "extractor"])
def test_a_failure_is_logged_and_never_the_best(where, tmp_path, caplog, monkeypatch):
    run, quality = prepared(config_for())
    if where == "extractor":
        monkeypatch.setattr(quality, "of_part", lambda part: 1 / 0)
    elif where == "samples":
        run.state["model"].forward = lambda x, labels: x / 0
    else:
        run.state["ema"].shadow_params[0].fill_(float("nan"))
    with MetricsLog(tmp_path) as log:
        assert quality.report(log, 2, quality.measure(), {}) == {}
    said = {"weights": "weights are not finite", "samples": "finite numbers", "extractor": "zero"}
    assert "step 2: no fid" in caplog.text and said[where] in caplog.text
    assert figures(tmp_path) == {2: None}


def measured_twice(config):
    """The result of a measurement, and of one in which the last process fails."""
    _, quality = prepared(config)
    found, of_part = quality.measure(), quality.of_part

    def or_fails(part):
        if distributed.rank() == distributed.world() - 1:
            raise RuntimeError("no memory")
        return of_part(part)

    quality.of_part = or_fails
    return found, quality.measure()


def test_several_processes_measure_the_same_and_fail_together():
    config = config_for(training__batch_size=8)
    (found, said), *others = [measured_twice(config), *together(2, measured_twice, config)]
    assert found["fid"] > 0 and said == "no memory"
    assert others == [(found, said)] * 2


FAST = "dpmpp_2m (num_steps = 20)"
GUIDED = {"sampling__guidance_scale": 3.0, "training__condition_dropout": 0.1}
ADAPTIVE = {"sampling__method": "ode", "training__metrics_sampler": "configured"}
LEVELS = {"training__continuous": False, "model__num_scales": 1000}
DDIM = "chain (respacing = '20', variance = 'ddim')"


@pytest.mark.parametrize(
    ("name", "changes", "text", "count"),
    [
        ("vp/digits", {}, FAST, 21),
        ("subvp/digits", {}, FAST, 21),
        ("edm/digits", {}, FAST, 21),
        ("vp/digits", LEVELS, DDIM, 20),
        ("ve/digits", {**LEVELS, "model__embedding_type": "positional"}, DDIM, 20),
        ("vp/digits_conditional", GUIDED, FAST[:-1] + ", guidance_scale = 3.0)", 42),
        ("vp/digits", {"sampling__method": "heun", "sampling__num_steps": 20}, FAST, 21),
        ("vp/digits", {"sampling__method": "heun", "sampling__churn": 9.0}, FAST, 21),
        (
            "vp/digits",
            {"sampling__method": "heun", "sampling__num_steps": 10},
            "heun (num_steps = 10)",
            21,
        ),
        (
            "vp/digits",
            {"sampling__num_steps": 30, "training__metrics_sampler": "configured"},
            "pc (predictor = 'euler_maruyama', corrector = 'none', num_steps = 30)",
            30,
        ),
    ],
)
def test_the_sampler_is_a_fast_one_unless_asked(name, changes, text, count):
    sampling = fast_sampling(run_lib.setup(small_config(name, **changes)))
    assert sampler_text(sampling.config) == text
    assert evaluations_of(sampling) == count


@pytest.mark.parametrize("kind", ["vectors", "points"])
def test_continuous_data_are_compared_as_in_an_evaluation(kind, tmp_path):
    shape = {"vectors": (3,), "points": (6, 2)}[kind]
    np.save(tmp_path / "a.npy", numbers(60, shape))
    options = {"training__metrics_freq": 1, "training__metrics_samples": 9, "eval__batch_size": 8}
    drawn = {"sampling__method": "ddim", "sampling__num_steps": 3, "eval__num_samples": 9}
    run, quality = prepared(config_of(kind, tmp_path / "a.npy", **options, **drawn))
    found = quality.measure()
    expected = compare_with_data(Job(run, tmp_path, "1", ""))
    assert expected == {**found, "num_samples": 9, "num_data": 6}
    worse, better = {"vectors": (0.7, 0.2), "points": (0.2, 0.6)}[kind]
    best = quality.report(SilentLog(), 2, found | {quality.name: worse}, {})
    best = quality.report(SilentLog(), 4, found | {quality.name: better}, best)
    assert (best["step"], best["value"]) == (4, better)
    assert best == quality.report(SilentLog(), 6, found | {quality.name: worse}, best)


@pytest.mark.parametrize(
    ("kind", "rows", "samples", "reason"),
    [
        ("vectors", 30, 9, "of vectors need 4 or more held-out examples, and .* has 3: set eval"),
        ("vectors", 60, 3, "eval.num_samples = 3 should be 4 or more for distances of vectors"),
        ("points", 60, 1, "eval.num_samples = 1 should be at least 2 for distances to the data"),
        ("points", 15, 9, "of points need 2 or more held-out examples, and .* has 1"),
    ],
)
def test_too_few_to_compare_are_told_before_samples_are_drawn(
    kind, rows, samples, reason, tmp_path, monkeypatch
):
    np.save(tmp_path / "a.npy", numbers(rows, {"vectors": (3,), "points": (6, 2)}[kind]))
    monkeypatch.setattr(run_lib.Run, "draw", lambda *_, **__: pytest.fail("samples are drawn"))
    options = {"eval__num_samples": samples, "eval__enable_sampling": True}
    with pytest.raises(ValueError, match=reason):
        run = run_lib.setup(config_of(kind, tmp_path / "a.npy", **options))
        compare_with_data(Job(run, tmp_path, "1", ""))


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_samples_are_compared_with_held_out_data_of_all_parts(order, tmp_path):
    """Of a perfect model of two clusters, stored one after the other or in turn.

    The distance to one cluster alone is 3, half the root mean square of their distance on an axis.
    """

    def clusters(which, seed):
        noise = np.random.default_rng(seed).normal(size=(len(which), 2))
        return (6.0 * which[:, None] + 0.3 * noise).astype("f4")

    count = 4000
    which = np.arange(count) // (count // 2) if order == "sorted" else np.arange(count) // 10 % 2
    np.save(tmp_path / "a.npy", clusters(which, seed=0))
    options = {"training__metrics_freq": 1, "training__metrics_samples": 200}
    changes = {"data__shape": (2,), "eval__num_samples": 200, "eval__batch_size": 64, **options}
    run, quality = prepared(config_of("vectors", tmp_path / "a.npy", **changes))
    run.draw = lambda indices: torch.from_numpy(clusters(np.array(indices) % 2, indices.start + 1))
    found = compare_with_data(Job(run, tmp_path, "1", ""))
    assert found["num_samples"] == found["num_data"] == 200 and found["sliced_w2"] < 1
    samples = torch.cat([run.draw(range(k, k + 100)) for k in (0, 100)])
    assert quality.figures_of(samples)["sliced_w2"] < 1
    assert quality.facts["against"] == "ARRAYS, random 200 of 400"


@pytest.mark.parametrize("levels", [2, 256])
def test_grey_levels_are_compared_as_the_network_learns_them(levels, tmp_path):
    """Of a perfect model, whose samples are dequantised as the data that it sees."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", random.integers(levels, size=(4000, 3), dtype=np.uint8))
    options = {"training__metrics_freq": 1, "training__metrics_samples": 400}
    options |= {"data__levels": levels, "data__uniform_dequantization": True}
    changes = {"data__shape": (3,), "eval__num_samples": 400, "eval__batch_size": 400, **options}
    run, quality = prepared(config_of("vectors", tmp_path / "a.npy", **changes))
    grey = random.integers(levels, size=(400, 3)) + random.random((400, 3))
    run.draw = lambda indices: torch.from_numpy(grey / levels).float()
    found = compare_with_data(Job(run, tmp_path, "1", ""))
    for name in ("energy_distance", "mmd"):
        assert abs(found[name]) < 3 * found[f"{name}_standard_error"]
    assert quality.figures_of(run.draw(range(400)))["mmd"] == found["mmd"]


def test_all_held_out_data_are_compared_in_their_order(tmp_path):
    """Or those that the samples of a network conditional on images are of."""
    np.save(tmp_path / "a.npy", numbers(100, (2, 4, 4)))
    run = run_lib.setup(config_of("images", tmp_path / "a.npy", data__standardize="none"))
    held_out = torch.from_numpy(np.load(tmp_path / "a.npy"))[9::10]
    standardize(run, training_streams(run)[0].source)
    for most in (10, 11):
        torch.testing.assert_close(HeldOutExamples(run, most).read(), held_out)
    some = HeldOutExamples(run, 4).read()
    places = [int((held_out - x).abs().sum((1, 2, 3)).argmin()) for x in some]
    assert len(places) == 4 and places == sorted(places) != list(range(4))
    torch.testing.assert_close(some, held_out[places])
    run.conditions.kinds = ("image",)
    torch.testing.assert_close(HeldOutExamples(run, 4).read(), held_out[:4])


def test_a_classifier_has_the_accuracy_of_an_evaluation(tmp_path):
    changes = {"training__metrics_freq": 1, "eval__accuracy_num_levels": 2, "eval__batch_size": 99}
    run, quality = prepared(small_config("vp/digits_classifier", **changes))

    @contextlib.contextmanager
    def applied(parameters):
        run.state["model"] = Brightest()
        yield

    run.state["ema"].applied = applied
    found = quality.measure()
    run.state["model"] = Brightest()
    assert found == {"accuracy": evaluate_accuracy(Job(run, tmp_path, "1", ""))["accuracy"]}
    assert 0 < found["accuracy"] < 0.3 and quality.loss(0.9) < quality.loss(0.8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval__stats": "none.npz"}, "no statistics of DIGITS at none.npz"),
        ({"eval__extractor": "dinov2"}, "extractor"),
        ({"training__metrics_samples": 3}, "training.metrics_samples = 3"),
        ({"training__n_jitted_steps": 4}, "metrics_freq = 2 should be a multiple"),
    ],
)
def test_missing_files_are_told_before_the_first_step(changes, said, tmp_path):
    with pytest.raises((OSError, ValueError), match=said):
        run_lib.train(config_for(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_check_tells_the_cost():
    assert _quality(run_lib.setup(config_for(training__metrics_freq=0))) == []
    (finding,) = _quality(run_lib.setup(config_for()))
    # 21 evaluations of 16 samples, and 3 of each of 16 images in a step.
    cost = f"16 samples by {FAST}; 336 evaluations of the network, as 7 training steps"
    assert finding.state == "ok" and cost in finding.text
    (finding,) = _quality(run_lib.setup(config_for(**ADAPTIVE)))
    assert "as it chooses" in finding.text
