"""Several averages of one run: tracked, chosen by `eval.ema`, synthesised from snapshots.

A network of one weight, which records its calls, gives the weights after each step.
"""

import json
import logging
import re
import shutil

import pytest
import torch
from processes import together
from recorder import Recorder
from test_wiring import recording

import run_lib
from models.ema import ExponentialMovingAverage
from score_lib.base.profiles import Profile, gamma_of, weights_of
from score_lib.disk import snapshots
from score_lib.disk.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from score_lib.options import checked
from score_lib.runs.start import META

pytestmark = pytest.mark.slow  # whole runs

AVERAGES = {
    "model__ema_rate": 0.4,
    "model__ema_rates": (0.2, 0.9),
    "training__posthoc_profiles": (0.05, 0.1),
    "training__posthoc_freq": 4,
}


def options(**changes):
    common = {"training__snapshot_sampling": False, "training__eval_freq": 50}
    common |= {"optim__lr": 0.05, "optim__warmup": 0, "eval__enable_bpd": False}
    common |= {"eval__enable_sampling": False, "eval__loss_num_repeats": 1}
    common |= {"eval__begin_ckpt": 2, "eval__end_ckpt": 2}
    return recording(**{**common, **changes})


def train(folder, **changes):
    """The run's last checkpoint, and the network's weight after each step."""
    run_lib.train(options(**changes), folder)
    checkpoint = read_checkpoint(folder / META)
    before = [call.weight for call in Recorder.calls if call.training]
    return checkpoint, [*before[1:], float(checkpoint["model"]["module.weight"])]


def averaged(weights, decays, start=0.0):
    for weight, decay in zip(weights, decays, strict=True):
        start = decay * start + (1 - decay) * weight
    return start


def warmed_up(rate, steps=12):
    return [min(rate, (1 + n) / (10 + n)) for n in range(1, steps + 1)]


def profile(sigma_rel, steps=12):
    return [(1 - 1 / n) ** (gamma_of(sigma_rel) + 1) for n in range(1, steps + 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder, last checkpoint and weights of a run with all kinds of averages."""
    folder = tmp_path_factory.mktemp("averages")
    return folder, *train(folder, **AVERAGES)


def value(average):
    return float(average["shadow_params"][0])


# --- While training ------------------------------------------------------------------------------


def test_each_average_follows_its_decays(trained):
    _, checkpoint, weights = trained
    found = {name: value(average) for name, average in checkpoint["averages"].items()}
    expected = {"0.2": averaged(weights, warmed_up(0.2)), "0.9": averaged(weights, warmed_up(0.9))}
    expected |= {f"posthoc_{s}": averaged(weights, profile(s)) for s in (0.05, 0.1)}
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found.values())) == 4
    assert value(checkpoint["ema"]) == pytest.approx(averaged(weights, warmed_up(0.4)), rel=1e-5)
    assert checkpoint["ema"].keys() == {"decay", "num_updates", "shadow_params"}


def test_without_further_averages_the_checkpoint_has_no_key_for_them(trained, tmp_path):
    plain, weights = train(tmp_path, model__ema_rate=0.4)
    assert plain.keys() == trained[1].keys() - {"averages"} and weights == trained[2]
    assert value(plain["ema"]) == value(trained[1]["ema"])
    assert not (tmp_path / snapshots.FOLDER).exists()


def test_half_life_in_images(tmp_path):
    """A share 0.5 of the images seen, at most 40, in batches of 16."""
    checkpoint, weights = train(tmp_path, model__ema_halflife=40.0, model__ema_rampup=0.5)
    decays = [0.0] + [0.5 ** (16 / min(40, 0.5 * 16 * n)) for n in range(1, 12)]
    assert value(checkpoint["ema"]) == pytest.approx(averaged(weights, decays), rel=1e-5)
    assert checkpoint["ema"]["decay"] == 0.5 ** (16 / 40)


def test_snapshots_hold_the_profiles_in_half_precision(trained):
    folder, checkpoint, weights = trained
    files = sorted(path.name for path in (folder / snapshots.FOLDER).iterdir())
    assert files == [f"step_{step}_0.05_0.1.pth" for step in (12, 4, 8)]
    for stored in snapshots.find(folder):
        contents = torch.load(stored.path, weights_only=True)
        average = contents["averages"][stored.name][0]
        assert contents["step"] == stored.step and average.dtype == torch.float16
        sigma_rel = float(stored.name.removeprefix("posthoc_"))
        expected = averaged(weights[: stored.step], profile(sigma_rel, stored.step))
        assert float(average) == pytest.approx(expected, rel=1e-3)
    last = torch.load(folder / snapshots.FOLDER / files[0], weights_only=True)["averages"]
    for name, tensors in last.items():
        exact = [t.half() for t in checkpoint["averages"][name]["shadow_params"]]
        assert all(map(torch.equal, tensors, exact))


@pytest.mark.parametrize("stop", (5, 9))
def test_a_killed_run_ends_with_the_same_averages_and_snapshots(
    stop, trained, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    original = ExponentialMovingAverage.update

    def dying(self, parameters):
        if self.num_updates == stop and self.decay == 0.4:
            raise Killed
        original(self, parameters)

    monkeypatch.setattr(ExponentialMovingAverage, "update", dying)
    with pytest.raises(Killed):
        train(tmp_path, **AVERAGES)
    monkeypatch.undo()
    checkpoint, _ = train(tmp_path, **AVERAGES)
    torch.testing.assert_close(checkpoint["averages"], trained[1]["averages"], rtol=0, atol=0)
    for path in (trained[0] / snapshots.FOLDER).iterdir():
        assert (tmp_path / snapshots.FOLDER / path.name).read_bytes() == path.read_bytes()


def test_an_average_displaces_none_of_other_weights(tmp_path):
    """Those of another checkpoint of the same step."""
    for name, rate in (("a", 0.05), ("b", 0.1)):
        train(tmp_path / name, training__n_iters=2, optim__lr=rate)
    (path,) = run_lib.write_averages(options(), tmp_path / "a")
    first = path.read_bytes()
    run_lib.write_averages(options(), tmp_path / "a")
    other = options(eval__checkpoint=str(tmp_path / "b" / META))
    assert not (path.parent / "set_aside").exists()
    assert run_lib.write_averages(other, tmp_path / "a") == [path]
    assert (path.parent / "set_aside/step_2_ema_other_weights.pth").read_bytes() == first


@pytest.mark.parametrize("change, stays", (({"optim__lr": 0.1}, False), ({}, True)))
def test_snapshots_of_an_abandoned_course_are_set_aside(change, stays, tmp_path):
    """They were removed, also where a run began anew, since its last checkpoint was gone."""
    train(tmp_path, **AVERAGES)
    last = snapshots.path_of(tmp_path, 12, ["posthoc_0.05", "posthoc_0.1"])
    content = last.read_bytes()
    shutil.rmtree((tmp_path / META).parent)
    train(tmp_path, **AVERAGES, **change, training__n_iters=5)
    aside = last.parent / "set_aside" / f"{last.stem}_abandoned.pth"
    assert last.exists() == stays and aside.exists() != stays
    assert (last if stays else aside).read_bytes() == content


def test_two_processes_write_each_snapshot_once(trained, tmp_path):
    together(2, run_lib.train, options(**AVERAGES), tmp_path)
    ours, theirs = read_checkpoint(tmp_path / META)["averages"], trained[1]["averages"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for path in (trained[0] / snapshots.FOLDER).iterdir():
        copies = [torch.load(d / snapshots.FOLDER / path.name, weights_only=True)
                  for d in (tmp_path, trained[0])]  # fmt: skip
        assert copies[0].pop("run") == copies[1].pop("run")
        torch.testing.assert_close(*copies, rtol=2e-3, atol=1e-5)


def test_a_new_rate_begins_at_the_weights_and_a_dropped_one_ends(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    started, _ = train(tmp_path, model__ema_rates=(0.9,), training__n_iters=3)
    weights = started["model"]["module.weight"]
    resumed, later = train(tmp_path, model__ema_rates=(0.5,), training__n_iters=5)
    expected = averaged(later, warmed_up(0.5, 2), start=float(weights))
    assert resumed["averages"].keys() == {"0.5"}
    assert value(resumed["averages"]["0.5"]) == pytest.approx(expected, rel=1e-5)
    assert "averages that begin at the weights of step 3: 0.5" in caplog.text
    assert "model.ema_rates = [0.5] instead of [0.9]" in caplog.text


def test_a_run_resumes_with_a_half_life(tmp_path, caplog):
    started, _ = train(tmp_path, training__n_iters=3)
    resumed, weights = train(tmp_path, training__n_iters=5, model__ema_halflife=16.0)
    decays = [0.5 ** (16 / (0.05 * 16 * n)) for n in (3, 4)]
    expected = averaged(weights, decays, start=value(started["ema"]))
    assert value(resumed["ema"]) == pytest.approx(expected, rel=1e-5)
    assert "model.ema_halflife = 16.0 instead of 0.0" in caplog.text
    assert "model.ema_rate" not in caplog.text


def test_a_half_life_counts_the_images_of_batches_of_any_size(tmp_path):
    half_life = {"model__ema_halflife": 1e6, "model__ema_rampup": 0.1}
    started, _ = train(tmp_path, training__n_iters=3, training__batch_size=8, **half_life)
    resumed, weights = train(tmp_path, training__n_iters=5, training__batch_size=16, **half_life)
    decays = [0.5 ** (16 / (0.1 * seen)) for seen in (3 * 8, 3 * 8 + 16)]
    expected = averaged(weights, decays, start=value(started["ema"]))
    assert value(resumed["ema"]) == pytest.approx(expected, rel=1e-5)


def test_a_new_profile_is_refused_when_a_run_resumes(tmp_path):
    train(tmp_path, training__n_iters=3, training__posthoc_profiles=(0.1,))
    before = (tmp_path / META).read_bytes()
    with pytest.raises(CheckpointError, match=r"does not hold \[0\.05\], .* counts all steps"):
        train(tmp_path, training__n_iters=5, training__posthoc_profiles=(0.1, 0.05))
    assert (tmp_path / META).read_bytes() == before
    resumed, _ = train(tmp_path, training__n_iters=5)  # without any
    assert "averages" not in resumed


@pytest.mark.parametrize(
    ("key", "given"),
    (
        ("model__ema_rates", (0.5, 0.5)),
        ("model__ema_rates", (1.5,)),
        ("model__ema_halflife", -1.0),
        ("model__ema_rampup", -0.1),
        ("training__posthoc_profiles", (0.3,)),
        ("training__posthoc_profiles", (0.0,)),
        ("training__posthoc_freq", 0),
    ),
)
def test_impossible_options(key, given):
    with pytest.raises(ValueError, match=key.replace("__", r"\.")):
        checked(options(**{key: given}))


def test_frequencies_of_snapshots_agree_with_steps_at_once():
    many = {"training__n_jitted_steps": 3, "training__log_freq": 3, "training__eval_freq": 3}
    with pytest.raises(ValueError, match=r"training\.posthoc_freq = 4 should be a multiple"):
        checked(options(**AVERAGES, **many))
    checked(options(**{**AVERAGES, **many, "training__posthoc_profiles": ()}))


# --- Chosen by `eval.ema` ------------------------------------------------------------------------


def synthesised(trained, sigma_rel, step=12):
    """By hand: the sum over snapshots, and at the last step over the checkpoint's averages."""
    folder, checkpoint, _ = trained
    stored = [s for s in snapshots.find(folder) if s.step <= step]
    weights, _ = weights_of([s.profile for s in stored], Profile(step, gamma_of(sigma_rel)))
    values = [
        value(checkpoint["averages"][s.name])
        if s.step == 12
        else float(torch.load(s.path, weights_only=True)["averages"][s.name][0])
        for s in stored
    ]
    return float(weights @ values)


def choices(trained):
    """Names of averages, and the weight that they stand for."""
    _, checkpoint, weights = trained
    return {
        "": value(checkpoint["ema"]),
        "0.4": value(checkpoint["ema"]),
        "none": weights[-1],
        "0.2": value(checkpoint["averages"]["0.2"]),
        "0.90": value(checkpoint["averages"]["0.9"]),
        "posthoc_0.1": value(checkpoint["averages"]["posthoc_0.1"]),
        "posthoc_0.12": synthesised(trained, 0.12),
        "posthoc_0.05@8": synthesised(trained, 0.05, step=8),
        "posthoc_0.2@8": synthesised(trained, 0.2, step=8),
    }


def test_an_evaluation_takes_several_averages(trained):
    folder, expected = trained[0], choices(trained)
    config = options(eval__ema=",".join(expected))
    records = run_lib.evaluate(config, folder)
    assert [record.get("ema", "") for record in records] == list(expected)
    assert [record["step"] for record in records] == [12] * 7 + [8] * 2
    seen = [call.weight for call in Recorder.calls if len(call.x) > 1]
    count = len(seen) // len(expected)
    assert seen[::count] == pytest.approx(list(expected.values()), rel=1e-5)
    assert len(set(seen)) == 8  # "0.4" is the main one
    assert records[0]["loss"] == records[1]["loss"] != records[2]["loss"]
    # Again, with fewer of them: the rounds are there.
    Recorder.calls.clear()
    config.eval.ema = "none,posthoc_0.12,none"  # each once
    assert run_lib.evaluate(config, folder) == [records[2], records[6]]
    assert not [call for call in Recorder.calls if len(call.x) > 1]


@pytest.mark.parametrize("name", ("", "none", "0.2", "posthoc_0.12"))
def test_sampling_takes_an_average(name, trained):
    config = options(eval__ema=name)
    folder = run_lib.sample(config, trained[0])
    assert folder.name == ("step_12_" + name if name else "step_12")
    weights = {call.weight for call in Recorder.calls if len(call.x) == 4}
    assert list(weights) == pytest.approx([choices(trained)[name]], rel=1e-5)


@pytest.mark.parametrize("name", ("", "posthoc_0.2@8"))
def test_an_average_becomes_a_checkpoint(name, trained, tmp_path):
    """It can be evaluated like any other, and is enough without the run."""
    config = options(eval__ema=name, eval__checkpoint=str(trained[0] / META))
    (path,) = run_lib.write_averages(config, tmp_path)
    assert path == tmp_path / "ema" / ("step_8_posthoc_0.2.pth" if name else "step_12_ema.pth")
    contents = read_checkpoint(path)
    assert value(contents["ema"]) == float(contents["model"]["module.weight"])
    assert value(contents["ema"]) == pytest.approx(choices(trained)[name], rel=1e-5)
    assert json.loads(contents["config"])["model"]["name"] == "recorder"
    run = run_lib.restored(options(eval__checkpoint=str(path)), tmp_path)
    assert value(run.state["ema"].state_dict()) == value(contents["ema"])
    assert run.state["step"] == (8 if name else 12)


@pytest.mark.parametrize(
    ("name", "others"),
    (
        ("", ("none", "0.2", "posthoc_0.1")),
        ("none", ("0.4", "0.2")),
        ("0.2", ("none", "0.4", "0.9", "posthoc_0.05")),
        ("posthoc_0.1", ("none", "0.4", "posthoc_0.05")),
    ),
)
def test_a_file_of_one_average_answers_to_its_own_name_alone(name, others, trained, tmp_path):
    (path,) = run_lib.write_averages(options(eval__ema=name), trained[0])
    export = {"export__folder": str(tmp_path / "e"), "eval__ema": name}
    exported = run_lib.export(options(**export), trained[0]) / "weights.safetensors"
    for file in (path, exported):
        # A checkpoint holds the rate of its main average.
        for asked in ("", name, *["0.4"] * (name == "" and file == path)):
            run = run_lib.restored(options(eval__ema=asked, eval__checkpoint=str(file)), tmp_path)
            found = value(run.state["ema"].state_dict())
            assert found == pytest.approx(choices(trained)[name], rel=1e-5)
        for asked in others:
            with pytest.raises(ValueError, match=r"is no average of .* alone: set eval.ema to ''"):
                run_lib.restored(options(eval__ema=asked, eval__checkpoint=str(file)), tmp_path)


def copy(trained, folder):
    """A copy of the run's last checkpoint and of its snapshots."""
    for path in [trained[0] / META, *(trained[0] / snapshots.FOLDER).iterdir()]:
        target = folder / path.relative_to(trained[0])
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("name", "said"),
    (
        ("0.7", r"'0\.7' is no average of .*'', '0\.4', 'none', '0\.2', '0\.9', 'posthoc_0\.05'"),
        ("postho_0.1", r"is no average of .*posthoc_0\.12"),
        ("posthoc_0.4", r"sigma_rel = 0\.4 should be above 0 and at most 0\.2887"),
        ("posthoc_0.1@7", r"step 7, but there are averages of the steps 4, 8, 12"),
        ("posthoc_0.1@13", r"step from 1 to that of the checkpoint, 12"),
        ("posthoc_0.1@", r"step from 1"),
        ("none,0.2", r"names several averages: only --mode eval takes them"),
    ),
)
def test_averages_that_there_are_not(name, said, trained, tmp_path):
    copy(trained, tmp_path)
    with pytest.raises(ValueError, match=said):
        run_lib.restored(options(eval__ema=name), tmp_path)


def test_a_sum_that_magnifies_the_rounding_of_snapshots_is_told(tmp_path, caplog):
    """Many snapshots give a narrow profile, by large weights of both signs."""
    train(tmp_path, **AVERAGES | {"training__posthoc_freq": 1, "training__n_iters": 24})
    for name, magnified in (("posthoc_0.03", False), ("posthoc_0.003", True)):
        caplog.clear()
        run_lib.restored(options(eval__ema=name), tmp_path)
        assert ("the rounding of snapshots" in caplog.text) == magnified


def test_a_run_without_profiles_gives_none(tmp_path):
    train(tmp_path, training__n_iters=3)
    with pytest.raises(ValueError, match=r"no snapshots in .*posthoc: train with training\.post"):
        run_lib.restored(options(eval__ema="posthoc_0.1"), tmp_path)


def test_snapshots_that_do_not_fit(trained, tmp_path):
    copy(trained, tmp_path)
    path = snapshots.path_of(tmp_path, 4, ["posthoc_0.05", "posthoc_0.1"])
    contents = torch.load(path, weights_only=True)
    first, second = contents["averages"]["posthoc_0.05"]

    def refused(averages, said):
        torch.save({"step": 4, "averages": averages}, path)
        with pytest.raises(CheckpointError, match=re.escape(path.name) + said):
            run_lib.restored(options(eval__ema="posthoc_0.12"), tmp_path)

    both = contents["averages"]
    refused({**both, "posthoc_0.1": [first]}, " is of another network: it averages 1 parameters")
    refused({**both, "posthoc_0.1": [first, torch.zeros(2)]}, " does not fit .* parameter 1 is")
    refused({"posthoc_0.1": [first, second]}, " is not a snapshot: it holds no .*posthoc_0.05")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name} cannot be read .* damaged"):
        run_lib.restored(options(eval__ema="posthoc_0.12"), tmp_path)


def test_averages_of_another_network_do_not_fit(trained, tmp_path):
    copy(trained, tmp_path)
    contents = read_checkpoint(tmp_path / META)
    contents["averages"]["0.2"]["shadow_params"][0] = torch.zeros(2)
    save_checkpoint(tmp_path / META, contents)
    for use in (
        lambda: run_lib.restored(options(eval__ema="0.2"), tmp_path),
        lambda: train(tmp_path, **AVERAGES, training__n_iters=13),
    ):
        with pytest.raises(CheckpointError, match=r"does not fit this network: averaged param"):
            use()


def test_snapshots_of_another_run_are_refused(trained, tmp_path):
    """As were left behind, or copied; those that do not tell their run are taken."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    config = options(eval__ema="posthoc_0.12", eval__checkpoint=str(folder / META))
    run_lib.restored(config, folder)
    path = snapshots.path_of(folder, 4, ["posthoc_0.05", "posthoc_0.1"])
    contents = torch.load(path, weights_only=True)
    torch.save(contents | {"run": ""}, path)
    run_lib.restored(config, folder)
    run_lib.train(options(seed=5, **AVERAGES), tmp_path / "other")
    shutil.copy(tmp_path / "other" / snapshots.FOLDER / path.name, path)
    with pytest.raises(ValueError, match=r"step_4_.*\.pth is of another run than .*run records"):
        run_lib.restored(config, folder)
