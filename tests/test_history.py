"""Runs resumed with other options, and the names of their snapshots."""

import json
import shutil

import control_runs  # noqa: F401  (registers a small network)
import numpy as np
import pytest
import torch
from small_runs import contents, dotted, small_config

import run_lib
from score_lib.disk.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from score_lib.options import complete
from score_lib.runs.history import run_digest
from score_lib.runs.start import META
from score_lib.runs.train import snapshot_name

pytestmark = pytest.mark.slow  # whole runs

QUIET = {"training__snapshot_sampling": False, "training__eval_freq": 50}
CHANGED = {
    "optim__eps": 1e-4,
    "optim__beta1": 0.5,
    "optim__weight_decay": 0.25,
    "model__ema_rate": 0.5,
}


def train(folder, until, **changes):
    run_lib.train(small_config(**(QUIET | changes), training__n_iters=until), folder)
    return read_checkpoint(folder / META)


def history(folder):
    return [json.loads(line) for line in (folder / "config_history.jsonl").open()]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run that made three steps."""
    folder = tmp_path_factory.mktemp("started")
    train(folder, 3)
    return folder


@pytest.fixture
def workdir(started, tmp_path):
    for path in (META, "config.json", "config_history.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((started / path).read_bytes())
    return tmp_path


def test_changed_options_hold_from_the_resume_on(workdir, caplog):
    first = read_checkpoint(workdir / META)
    second = train(workdir, 4, **CHANGED)
    (group,) = second["optimizer"]["param_groups"]
    assert group["betas"] == (0.5, 0.999)
    assert (group["eps"], group["weight_decay"]) == (1e-4, 0.25)
    # The average's decay after n updates is the smaller of its own and (1 + n) / (10 + n).
    names = [key for key in second["model"] if key in first["model"]]
    assert second["ema"]["decay"] == 0.5 and len(names) == len(first["model"])
    assert "optim.eps = 0.0001 instead of 1e-08" in caplog.text
    assert "model.ema_rate = 0.5 instead of 0.998" in caplog.text


def test_a_step_after_a_change_is_that_of_adam_with_the_new_settings(workdir):
    """m = beta1 m + (1 - beta1) g with the new beta1: g, recovered from it, gives v."""
    old = read_checkpoint(workdir / META)["optimizer"]["state"]
    new = train(workdir, 4, optim__beta1=0.5)["optimizer"]["state"]
    for number in (0, 5):
        gradient = 2 * new[number]["exp_avg"] - old[number]["exp_avg"]
        expected = 0.999 * old[number]["exp_avg_sq"] + 0.001 * gradient**2
        torch.testing.assert_close(new[number]["exp_avg_sq"], expected, rtol=1e-4, atol=1e-12)


def test_the_average_follows_the_new_rate(workdir):
    old = read_checkpoint(workdir / META)["ema"]["shadow_params"]
    new = train(workdir, 4, model__ema_rate=0.125)
    weights = new["model"]["module.all_modules.0.weight"]
    shape = weights.shape
    (k,) = [k for k, value in enumerate(old) if value.shape == shape][:1]
    expected = 0.125 * old[k] + 0.875 * weights
    torch.testing.assert_close(new["ema"]["shadow_params"][k], expected)


def test_amsgrad_may_be_switched_on_and_off(workdir):
    on = train(workdir, 4, optim__amsgrad=True)["optimizer"]["state"][0]
    assert torch.equal(on["max_exp_avg_sq"], on["exp_avg_sq"])
    off = train(workdir, 5)["optimizer"]
    assert "max_exp_avg_sq" not in off["state"][0] and not off["param_groups"][0]["amsgrad"]


def test_a_run_past_its_last_step_is_refused(workdir):
    before = contents(workdir)
    with pytest.raises(
        CheckpointError, match=r"of step \d, later than training.n_iters = 1: raise"
    ):
        train(workdir, 1)
    assert {path: path.read_bytes() for path in before} == before


def test_history_has_the_start_and_each_change(workdir):
    (start,) = history(workdir)
    config = json.loads((workdir / "config.json").read_text())
    assert start["step"] == 0 and start["config"]["optim"] == config["optim"]
    # Options that change no weight do not count.
    assert not {"device", "eval", "sampling"} & start["config"].keys()
    train(workdir, 4, device="cpu", training__log_freq=2, sampling__num_samples=8)
    assert history(workdir) == [start]
    train(workdir, 5, optim__eps=1e-6, optim__lr=1e-3)
    changed = {"optim.eps": [1e-8, 1e-6], "optim.lr": [4e-3, 1e-3]}
    assert history(workdir) == [start, {"step": 4, "changed": changed}]
    train(workdir, 6, optim__eps=1e-6)
    back = {"step": 5, "changed": {"optim.lr": [1e-3, 4e-3]}}
    assert history(workdir) == [start, {"step": 4, "changed": changed}, back]


def test_options_that_are_newer_than_a_history_had_their_defaults(workdir, caplog):
    (start,) = history(workdir)
    del start["config"]["training"]["weighting"], start["config"]["model"]["ema_rates"]
    (workdir / "config_history.jsonl").write_text(json.dumps(start) + "\n")
    train(workdir, 4)
    assert history(workdir) == [start] and "instead of" not in caplog.text
    train(workdir, 4, model__ema_rates=(0.5,))
    changed = {"model.ema_rates": [[], [0.5]]}
    assert history(workdir)[1:] == [{"step": 4, "changed": changed}]


def test_history_past_the_resumed_step_is_dropped(workdir):
    train(workdir, 6, optim__eps=1e-6)
    expected = history(workdir)
    # As a kill leaves it: lines of steps that will be repeated, and one that was cut short.
    with (workdir / "config_history.jsonl").open("a") as file:
        file.write('{"step": 6, "changed": {"optim.lr": [1, 2]}}\n{"step": 7, "ch')
    train(workdir, 6, optim__eps=1e-6)
    assert history(workdir) == expected


def test_a_start_without_a_checkpoint_begins_the_history(workdir):
    (workdir / META).unlink()
    train(workdir, 1, optim__eps=1e-6)
    (record,) = history(workdir)
    assert record["step"] == 0 and record["config"]["optim"]["eps"] == 1e-6


def test_a_damaged_history_begins_anew_with_the_config_of_the_checkpoint(workdir):
    lines = "[]", '{"step": 0}', '{"step": 0, "config": 1}\xff', '{"step": 0, "config": {"a.b": 1}}'
    lines += ('{"step": 0, "config": {"model": 1}}',)
    for line in ("", *lines, "[" * 10**6, "\0" * 1000):
        (workdir / "config_history.jsonl").write_text(line + "\n")
        train(workdir, 3, optim__eps=1e-6)
        first, second = history(workdir)
        assert first["step"] == 3 and first["config"]["optim"]["eps"] == 1e-8
        assert second == {"step": 3, "changed": {"optim.eps": [1e-8, 1e-6]}}


@pytest.mark.parametrize(
    "changes",
    (
        {"training__sde": "subvpsde"},
        {"training__continuous": False, "model__num_scales": 40},
        {"model__beta_max": 10.0},
        {"model__name": "ddpm"},
        {"model__nonlinearity": "relu"},
        {"data__dataset": "COLOR_DIGITS", "data__num_channels": 3},
        {"data__centered": False},
        {"data__range": (0, 4095)},
        {"data__split": "last"},
        {"data__background": "#ffffff"},
        {"data__levels": 100},
    ),
    ids=str,
)
def test_options_that_the_state_was_made_for_are_refused(changes, workdir):
    before = contents(workdir)
    with pytest.raises(CheckpointError, match=r"--workdir$") as error:
        train(workdir, 4, **changes)
    shown = {*dotted(changes)} - {"data.num_channels"}
    assert all(f"{key} = " in str(error.value) for key in shown)
    after = contents(workdir)
    after.pop(workdir / ".lock")
    assert after == before


def test_data_of_another_shape_are_told(tmp_path, caplog):
    """A set transformer takes sets of any number of points, and reads them as if nothing were."""
    run = run_lib.setup(small_config("vp/points"))
    units = {"mean": torch.zeros(1, 1), "std": torch.ones(1, 1), "dtype": "float32"}
    run.scaler.load_state_dict(units)
    run.add_optimizer()
    config = {"config": run.config.to_json_best_effort()}
    save_checkpoint(tmp_path / META, run.state | config)
    run_lib.restored(run.config, tmp_path)
    assert "another shape" not in caplog.text
    run_lib.restored(small_config("vp/points", data__shape=(32, 3)), tmp_path)
    assert "another shape: data.shape = [32, 3] instead of [64, 3]" in caplog.text


def test_the_same_data_are_split_and_scaled_as_in_training(tmp_path):
    """Where they were not, held-out examples would be of the training; other data are free."""
    for name in ("mine", "others"):
        np.save(tmp_path / f"{name}.npy", np.zeros((20, 8, 8), dtype=np.uint8))
    options = {**QUIET, "data__dataset": "IMAGES", "data__path": str(tmp_path / "mine.npy")}
    options["data__levels"] = 0
    run_lib.train(small_config(**options, training__n_iters=1), tmp_path)
    once = {"eval__enable_bpd": False, "eval__loss_num_repeats": 1, "eval__end_ckpt": 0}
    options |= {**once, "eval__begin_ckpt": 0, "eval__enable_sampling": False}
    for changes in ({"data__split": "last"}, {"data__range": (0, 9)}, {"data__levels": 17}):
        (key,) = dotted(changes)
        with pytest.raises(CheckpointError, match=f"its data would be read wrongly with {key} = "):
            run_lib.evaluate(small_config(**{**options, **changes}), tmp_path)
        changes["data__path"] = str(tmp_path / "others.npy")
        run_lib.evaluate(small_config(**{**options, **changes}), tmp_path, "others" + key)
    options["data__path"] = str(tmp_path / "." / "mine.npy")
    run_lib.evaluate(small_config(**options), tmp_path)


@pytest.mark.parametrize("relative", (False, True))
def test_the_same_data_are_known_by_any_path(tmp_path, monkeypatch, relative):
    """By a link, from the home folder, and from another folder than that of the training."""
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "mine.npy", np.zeros((20, 8, 8), dtype=np.uint8))
    (tmp_path / "link.npy").symlink_to("mine.npy")
    monkeypatch.chdir(tmp_path)
    path = "./mine.npy" if relative else str(tmp_path / "mine.npy")
    options = {**QUIET, "data__dataset": "IMAGES", "data__levels": 0}
    run_lib.train(small_config(**options, data__path=path, training__n_iters=1), tmp_path)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    chosen = {"eval__checkpoint": str(tmp_path / "checkpoints/checkpoint_0.pth")}
    for path in ("~/mine.npy", "../mine.npy", "../link.npy"):
        changed = small_config(**options, **chosen, data__path=path, data__split="last")
        with pytest.raises(
            CheckpointError, match=r"would be read wrongly with data.split = 'last'"
        ):
            run_lib.evaluate(changed, tmp_path)


def test_a_config_that_cannot_be_read_is_refused(workdir):
    contents = read_checkpoint(workdir / META)
    save_checkpoint(workdir / META, {**contents, "config": "{"})
    with pytest.raises(CheckpointError, match="config that cannot be read"):
        train(workdir, 4)


def test_a_checkpoint_without_a_config_is_resumed(workdir, caplog):
    """As published ones are: the settings of their optimiser are compared."""
    contents = read_checkpoint(workdir / META)
    del contents["config"]
    save_checkpoint(workdir / META, contents)
    (workdir / "config_history.jsonl").unlink()
    train(workdir, 4, optim__eps=1e-6)
    assert "optim.eps = 1e-06 instead of 1e-08" in caplog.text


@pytest.mark.parametrize(
    ("step", "name"),
    ((10, "0"), (20, "1"), (35, "last"), (40, "2"), (41, "last")),
)
def test_names_of_snapshots(step, name):
    assert snapshot_name(step, 20) == f"checkpoint_{name}.pth"


def test_the_end_of_a_run_replaces_no_numbered_checkpoint(tmp_path):
    config = small_config(
        **QUIET, training__n_iters=7, training__snapshot_freq=4,
        eval__enable_bpd=False, eval__enable_sampling=False,
        eval__checkpoint=str(tmp_path / "checkpoints/checkpoint_last.pth"),
    )  # fmt: skip
    run_lib.train(config, tmp_path)
    steps = {p.name: read_checkpoint(p)["step"] for p in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"checkpoint_1.pth": 4, "checkpoint_last.pth": 7}
    (record,) = run_lib.evaluate(config, tmp_path)
    assert (record["checkpoint"], record["step"]) == ("last", 7)


# --- files of another course, or of another step ---

FEW = {"model__name": "gaussian", "optim__warmup": 0, "training__snapshot_freq": 3}


def checkpoints_in(folder):
    """Steps of the checkpoints that count, and of those that were set aside, by name."""
    return [
        {path.stem.removeprefix("checkpoint_"): read_checkpoint(path)["step"] for path in paths}
        for paths in (
            (folder / "checkpoints").glob(f"{place}*.pth") for place in ("", "set_aside/")
        )
    ]


def go_back_to(folder, number):
    """As where all later states are damaged, and were moved away."""
    shutil.rmtree((folder / META).parent)
    (folder / META).parent.mkdir()
    shutil.copy(folder / f"checkpoints/checkpoint_{number}.pth", folder / META)


def test_checkpoints_of_an_abandoned_course_are_set_aside(tmp_path, caplog):
    train(tmp_path, 12, **FEW)
    go_back_to(tmp_path, 2)
    third = (tmp_path / "checkpoints/checkpoint_3.pth").read_bytes()
    train(tmp_path, 10, **FEW, optim__lr=0.1)
    aside = {"3_step_9": 9, "4_step_12": 12}
    assert checkpoints_in(tmp_path) == [{"1": 3, "2": 6, "3": 9, "last": 10}, aside]
    moved = tmp_path / "checkpoints/set_aside/checkpoint_3_step_9.pth"
    assert moved.read_bytes() == third and f"it is now {moved}" in caplog.text
    assert str(moved) in (tmp_path / "stdout.txt").read_text()


def test_samples_and_metrics_of_an_abandoned_course_are_set_aside(tmp_path):
    options = FEW | {"training__snapshot_sampling": True, "sampling__num_samples": 1}
    train(tmp_path, 6, **options)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    go_back_to(tmp_path, 1)
    train(tmp_path, 4, **options)
    assert not list(tmp_path.rglob("set_aside"))  # it comes to them again
    go_back_to(tmp_path, 1)
    train(tmp_path, 4, **options, optim__lr=0.1)
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"iter_3", "iter_4", "set_aside"}
    assert (tmp_path / "samples/set_aside/iter_6_abandoned/sample.np").exists()
    kept = (tmp_path / "set_aside/metrics_abandoned.jsonl").read_bytes()
    assert metrics.startswith(kept) and b'"step": 4' in kept


def test_a_course_on_other_examples_is_another_one(tmp_path):
    """Images were added since, and the last checkpoint removed, so that training begins anew."""
    rows = np.random.default_rng(0).normal(size=(30, 2))
    options = {"name": "vp/vectors", "data__path": str(tmp_path / "rows.npy"), "data__shape": (2,)}
    options |= {"model__nf": 4, "training__snapshot_freq": 3}
    np.save(tmp_path / "rows.npy", rows)
    train(tmp_path / "run", 6, **options)
    np.save(tmp_path / "rows.npy", rows[:25])
    shutil.rmtree((tmp_path / "run" / META).parent)
    train(tmp_path / "run", 2, **options)
    assert checkpoints_in(tmp_path / "run") == [{"0": 2}, {"1_step_3": 3, "2_step_6": 6}]


def test_a_figure_on_other_examples_is_not_the_best(tmp_path):
    """As many rows, of other values: their distances cannot be compared."""
    options = {"name": "vp/vectors", "data__path": str(tmp_path / "rows.npy"), "data__shape": (2,)}
    options |= {"model__nf": 4, "training__metrics_freq": 1, "training__metrics_samples": 4}
    rows = np.random.default_rng(0).normal(size=(80, 2))
    np.save(tmp_path / "rows.npy", rows)
    run = tmp_path / "run"
    trained = train(run, 2, **options)
    save_checkpoint(run / META, trained | {"best": trained["best"] | {"value": 0.0}})
    shutil.copy(run / META, run / "checkpoints/best.pth")
    assert train(run, 3, **options)["best"]["value"] == 0
    np.save(tmp_path / "rows.npy", 2 * rows)
    assert train(run, 4, **options)["best"]["step"] == 4


@pytest.mark.parametrize("until", (11, 12))
def test_what_a_run_comes_to_again_stays(until, tmp_path):
    train(tmp_path, 12, **FEW)
    before = read_checkpoint(tmp_path / "checkpoints/checkpoint_4.pth")
    go_back_to(tmp_path, 2)
    train(tmp_path, until, **FEW, training__log_freq=2)
    numbered = {"1": 3, "2": 6, "3": 9, "4": 12}
    assert checkpoints_in(tmp_path) == [numbered | ({"last": 11} if until == 11 else {}), {}]
    after = read_checkpoint(tmp_path / "checkpoints/checkpoint_4.pth")
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)


@pytest.mark.parametrize(("number", "aside"), ((1, {"2_step_6", "3_step_9"}), (2, set())))
def test_options_that_changed_between_count(number, aside, tmp_path):
    """At step 6 they changed to those that now hold from an earlier step on, or from there."""
    train(tmp_path, 6, **FEW)
    train(tmp_path, 9, **FEW, optim__lr=0.1)
    go_back_to(tmp_path, number)
    train(tmp_path, 3 * number + 1, **FEW, optim__lr=0.1)
    assert checkpoints_in(tmp_path)[1].keys() == aside


def test_a_course_from_other_weights_is_another_one(tmp_path):
    train(tmp_path / "a", 3, **FEW)
    train(tmp_path / "b", 3, **FEW, model__weights=str(tmp_path / "a" / META))
    shutil.rmtree((tmp_path / "b" / META).parent)
    train(tmp_path / "b", 2, **FEW)
    assert checkpoints_in(tmp_path / "b") == [{"0": 2}, {"1_step_3": 3}]


def test_files_that_tell_no_course_stay(tmp_path):
    """Those of others hold no config, or one that cannot be read here."""
    train(tmp_path, 12, **FEW)
    for number, changed in ((3, {"config": ""}), (4, {"config": "{"})):
        path = tmp_path / f"checkpoints/checkpoint_{number}.pth"
        save_checkpoint(path, read_checkpoint(path) | changed)
    (tmp_path / "checkpoints/checkpoint_5.pth").write_bytes(b"damaged")
    go_back_to(tmp_path, 2)
    train(tmp_path, 7, **FEW, optim__lr=0.1)
    (tmp_path / "checkpoints/checkpoint_5.pth").unlink()
    assert checkpoints_in(tmp_path) == [{"1": 3, "2": 6, "3": 9, "4": 12, "last": 7}, {}]


def test_the_last_checkpoint_is_that_of_the_last_step(tmp_path):
    for until in (4, 5, 6):
        train(tmp_path, until, **FEW)
    assert checkpoints_in(tmp_path) == [{"1": 3, "2": 6}, {"last_step_5": 5}]
    train(tmp_path, 7, **FEW)
    assert checkpoints_in(tmp_path)[0] == {"1": 3, "2": 6, "last": 7}


def test_numbers_of_another_frequency_are_not_written_over(tmp_path, caplog):
    train(tmp_path, 6, **{**FEW, "training__snapshot_freq": 2})
    train(tmp_path, 9, **FEW)
    assert checkpoints_in(tmp_path) == [{"1": 2, "2": 4, "3": 9}, {"3_step_6": 6}]
    assert "checkpoint_3.pth is set aside" in caplog.text


def test_the_last_step_counts_where_the_learning_rate_falls_to_it(tmp_path, caplog):
    few = {**QUIET, "optim__cooldown": 2}
    run_lib.train(small_config(**few, training__n_iters=3), tmp_path)
    run_lib.train(small_config(**few, training__n_iters=5), tmp_path)
    assert "from step 3 on, training.n_iters = 5 instead of 3" in caplog.text
    first, changed = map(json.loads, (tmp_path / "config_history.jsonl").read_text().splitlines())
    assert first["config"]["training"]["n_iters"] == 3
    assert changed == {"step": 3, "changed": {"training.n_iters": [3, 5]}}
    run_lib.train(small_config(**QUIET, training__n_iters=6), tmp_path)
    last = json.loads((tmp_path / "config_history.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 5, "changed": {"optim.cooldown": [2, 0]}}
    digests = {
        run_digest(complete(small_config(training__n_iters=n, optim__cooldown=c)))
        for n in (3, 5)
        for c in (0, 2)
    }
    assert len(digests) == 3
