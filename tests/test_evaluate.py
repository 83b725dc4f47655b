"""Evaluation runs: files, reports, and going on after a kill."""

import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch
from small_runs import few_digits, small_config

import run_lib
from datasets import MemorySource, get_streams
from evaluation import load_statistics
from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint, save_checkpoint
from score_lib.disk.reports import mean_and_error
from score_lib.options import complete
from score_lib.runs import evaluate, rounds, statistics
from score_lib.runs.evaluate import find_checkpoints
from score_lib.runs.examples import present_examples
from score_lib.runs.heldout import examples_text
from score_lib.runs.rounds import Job
from score_lib.runs.start import META
from score_lib.runs.statistics import sampled_pixels

pytestmark = pytest.mark.slow  # whole runs


def killed(job):
    raise KeyboardInterrupt


KILLED = {"enable_loss": killed}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Evaluation data, and a small network, which is easy to integrate while near its start."""
    options = few_digits(
        tmp_path_factory.mktemp("data"),
        optim__lr=1e-5,
        model__ch_mult=(1,),
        model__attn_resolutions=(),
        eval__end_ckpt=2,
        eval__batch_size=20,
        eval__num_samples=32,
        eval__bpd_num_repeats=2,
    )
    run_lib.fid_stats(small_config(**options))
    return options


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, options):
    """A trained run, evaluated without a disturbance."""
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(small_config(**options), folder)
    run_lib.evaluate(small_config(**options), folder)
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_files_and_report(workdir):
    folder = workdir / "eval"
    records = report(folder)
    assert [r["checkpoint"] for r in records] == ["1", "2"] and records[1]["step"] == 12
    assert {"loss", "bpd", "bpd_standard_error", "fid", "kid", "precision"} <= records[0].keys()
    losses = load_arrays(folder / "ckpt_2_loss.npz")
    assert losses["all_losses"].shape == (40,)
    assert losses["mean_loss"] == pytest.approx(records[1]["loss"])
    rounds = [load_arrays(folder / f"test_ckpt_1_bpd_{i}.npz") for i in range(4)]
    assert [len(r["bpd"]) for r in rounds] == [20, 20, 20, 20]
    mean = np.mean([np.concatenate([r["bpd"] for r in rounds[i : i + 2]]) for i in (0, 2)])
    assert records[0]["bpd"] == pytest.approx(mean)
    terms = rounds[0]
    nats_per_dim = (terms["prior"] + terms["divergence"]) / 64
    offset = terms["dequantisation"] + terms["scaling"]
    assert terms["bpd"] == pytest.approx(offset - nats_per_dim / np.log(2))
    assert offset == pytest.approx(np.log2(17) - 1)
    # The two passes have noise of their own.
    assert not np.allclose(rounds[0]["bpd"], rounds[2]["bpd"], atol=1e-3)
    samples = [load_arrays(folder / "ckpt_1" / f"samples_{i}.npz")["samples"] for i in range(2)]
    assert [s.shape for s in samples] == [(20, 8, 8, 1), (12, 8, 8, 1)]
    assert load_arrays(folder / "ckpt_1" / "statistics_1.npz")["pool_3"].shape[0] == 12
    published = load_arrays(folder / "report_2.npz")
    assert published["fid"] == pytest.approx(records[1]["fid"])
    assert {"IS", "kid"} <= published.keys()
    table = (folder / "report.md").read_text()
    assert "bpd" in table and "±" in table and len(table.splitlines()) == 4
    assert (folder / "ckpt_1" / "samples.png").exists()
    assert (folder / "ckpt_1_bpd.png").exists()


class Killed(BaseException):
    pass


def test_killed_after_every_round(workdir, options, monkeypatch):
    """The same report, and no round is made twice."""
    written, original = [], rounds.save_arrays
    budget = iter([])

    def dying(path, **arrays):
        if next(budget, None) is None:
            raise Killed
        written.append(path)
        original(path, **arrays)

    monkeypatch.setattr(rounds, "save_arrays", dying)
    folder = workdir / "killed"
    for attempt in range(100):
        budget = iter(range(2 + attempt % 3))
        try:
            run_lib.evaluate(small_config(**options), workdir, "killed")
            break
        except Killed:
            continue
    assert attempt > 4
    made = [p for p in written if "report" not in str(p)]
    assert len(made) == len(set(made)) == 2 * (1 + 4 + 2 + 2)
    assert (folder / "report.json").read_text() == (workdir / "eval" / "report.json").read_text()


def test_batches_do_not_matter(workdir, options):
    """Other batches, the same losses and samples, and bits/dim within the solver's tolerance."""
    changes = {"eval__batch_size": 30, "eval__end_ckpt": 1}
    run_lib.evaluate(small_config(**{**options, **changes}), workdir, "other")
    ours, theirs = report(workdir / "other")[0], report(workdir / "eval")[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["bpd"] == pytest.approx(theirs["bpd"], abs=1e-3)

    def samples(name):
        files = sorted((workdir / name / "ckpt_1").glob("samples_*.npz"))
        return np.concatenate([load_arrays(f)["samples"] for f in files])

    # Rounding may differ with the size of a matrix product, and tip a pixel over.
    assert (samples("other") == samples("eval")).mean() > 0.999


def test_one_file_anywhere(workdir, options, tmp_path):
    """A checkpoint by its path, into another work directory."""
    path = workdir / "checkpoints" / "checkpoint_2.pth"
    only_loss = {"eval__enable_sampling": False, "eval__enable_bpd": False}
    changes = {"eval__checkpoint": str(path), **only_loss}
    records = run_lib.evaluate(small_config(**{**options, **changes}), tmp_path)
    assert records[0]["checkpoint"] == "2"
    assert records[0]["loss"] == report(workdir / "eval")[1]["loss"]


def test_rounds_of_another_evaluation_are_not_reused(workdir, options, tmp_path):
    with pytest.raises(ValueError, match="holds an evaluation with another seed: choose"):
        run_lib.evaluate(small_config(**options, seed=7), workdir)
    # A folder that is older than an option does not differ by it.
    config = json.loads((workdir / "eval/config.json").read_text())
    del config["eval"]["vlb_variance"], config["dequantizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "1_loss.npz").touch()
    for changes, told in (({}, "version of this program"), ({"seed": 7}, "seed")):
        with pytest.raises(ValueError, match=f"with another {told}: choose"):
            rounds.check_folder(complete(small_config(**options, **changes)), tmp_path)


def test_rounds_stay_where_their_data_have_moved(workdir, options, tmp_path):
    """As to another disk, with their statistics, by a run that trains on at another rate."""
    moved = {"optim__lr": 1e-6}
    for option in ("data__path", "eval__stats"):
        moved[option] = shutil.copy(options[option], tmp_path)
    folder = shutil.copytree(workdir, tmp_path / "run")
    rounds = {path: path.stat().st_mtime_ns for path in (folder / "eval").rglob("*_*_*.npz")}
    again = run_lib.evaluate(small_config(**{**options, **moved}), folder)
    for before, now in zip(report(workdir / "eval"), again, strict=True):
        assert all(now[name] == before[name] for name in ("loss", "bpd", "fid"))
    assert rounds == {path: path.stat().st_mtime_ns for path in rounds}


def test_another_extractor_measures_the_samples_that_are_there(
    workdir, options, tmp_path, monkeypatch
):
    text = "def make(device):\n    return lambda x: x.float().flatten(1)[:, ::8] / 255\n"
    (tmp_path / "every_eighth.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"eval__extractor": "every_eighth:make", "eval__stats": str(tmp_path / "own.npz")}
    config = small_config(**{**options, **own})
    run_lib.fid_stats(config)
    folder = shutil.copytree(workdir, tmp_path / "run")
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "eval").rglob("samples_*.npz")}
    records = run_lib.evaluate(config, folder)
    assert all("every_eighth" in one["statistics"]["extractor"] for one in records)
    assert drawn == {path: path.stat().st_mtime_ns for path in drawn} and drawn


def test_a_report_does_not_stay_beside_options_of_another(workdir, options, tmp_path):
    """Its rounds were removed, and the next evaluation is killed before its first figure."""
    only_loss = {"eval__enable_sampling": False, "eval__enable_bpd": False, "eval__end_ckpt": 1}
    quick = {**options, **only_loss, "eval__checkpoint": str(workdir / META)}
    run_lib.evaluate(small_config(**quick), tmp_path)
    found = (tmp_path / "eval/report.json").read_bytes()
    for path in (tmp_path / "eval").glob("*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match="is no average of"):
        run_lib.evaluate(small_config(**quick, eval__ema="0.5"), tmp_path)
    assert (tmp_path / "eval/report.json").read_bytes() == found
    with pytest.raises(KeyboardInterrupt):
        run_lib.evaluate(small_config(**quick, seed=7), tmp_path, measures=KILLED)
    assert not (tmp_path / "eval/report.json").exists()
    aside = tmp_path / "eval/set_aside/report_other_options.json"
    assert aside.read_bytes() == found


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    workdir, options, tmp_path, monkeypatch
):
    """By a training run: its rounds would count as those of the weights before."""
    loaded = evaluate.load_trained

    def load(run, path, **given):
        choice = loaded(run, path, **given)
        save_checkpoint(path, read_checkpoint(path) | {"step": 99})
        return choice

    monkeypatch.setattr(evaluate, "load_trained", load)
    shutil.copy(workdir / META, tmp_path)
    chosen = {**options, "eval__checkpoint": str(tmp_path / META.name)}
    with pytest.raises(OSError, match=r"checkpoint\.pth was replaced while it was read"):
        run_lib.evaluate(small_config(**chosen), tmp_path, measures={})


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"eval__stats": "none.npz"}, "there are no statistics of IMAGES at none.npz"),
        ({"eval__bpd_num_images": 41}, "41 examples are asked for, and the test part of .* has 40"),
        ({"eval__ema": ",none,0.5"}, r"eval\.ema = '0\.5' is no average of .*checkpoint_1\.pth"),
    ],
)
def test_an_evaluation_is_refused_before_its_work(
    workdir, options, tmp_path, monkeypatch, changed, refusal
):
    """Of the last measure, and of the last average, before the first round; no file is left."""
    monkeypatch.setattr(Job, "round", lambda *_: pytest.fail("a round was made"))
    monkeypatch.setattr(Job, "joint_round", lambda *_: pytest.fail("a round was made"))
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises((OSError, ValueError), match=refusal):
        run_lib.evaluate(small_config(**{**options, **changed}), tmp_path)
    assert not {"config.json", "report.json"} & {p.name for p in (tmp_path / "eval").iterdir()}


def test_a_checkpoint_of_another_network_is_refused_before_the_first_is_measured(
    workdir, options, tmp_path, monkeypatch
):
    monkeypatch.setattr(Job, "joint_round", lambda *_: pytest.fail("a round was made"))
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    contents = read_checkpoint(tmp_path / "checkpoints/checkpoint_2.pth")
    del contents["model"][next(iter(contents["model"]))]
    save_checkpoint(tmp_path / "checkpoints/checkpoint_2.pth", contents)
    with pytest.raises(ValueError, match=r"checkpoint_2\.pth"):
        run_lib.evaluate(small_config(**options), tmp_path)


def test_options_of_other_modes_leave_an_evaluation_as_it_is(workdir, options):
    before = report(workdir / "eval")
    others = {"control__guidance_scale": 9.0, "export__precision": "float16"}
    run_lib.evaluate(small_config(**options, **others), workdir)
    assert report(workdir / "eval") == before


def test_options_that_change_no_figure_may_change_between_rounds(workdir, options):
    """Another number of processes that read data, or a longer training with other snapshots."""
    before = report(workdir / "eval")
    others = {"data__num_workers": 1, "training__n_iters": 100, "training__log_freq": 5}
    others |= {"training__snapshot_freq": 50, "sampling__num_samples": 9}
    run_lib.evaluate(small_config(**options, **others), workdir)
    assert report(workdir / "eval") == before


def test_missing_checkpoints_are_all_named(workdir, options):
    with pytest.raises(FileNotFoundError, match=r"checkpoint_3\.pth, .*checkpoint_4\.pth"):
        run_lib.evaluate(small_config(**{**options, "eval__end_ckpt": 4}), workdir, "missing")


def test_waiting_for_a_checkpoint(workdir, tmp_path, monkeypatch):
    source = workdir / "checkpoints" / "checkpoint_1.pth"
    target = tmp_path / "checkpoints" / "checkpoint_1.pth"
    target.parent.mkdir()
    monkeypatch.setattr(time, "sleep", lambda seconds: target.write_bytes(source.read_bytes()))
    config = small_config(eval__begin_ckpt=1, eval__end_ckpt=1, eval__wait_minutes=1.0)
    assert find_checkpoints(config, tmp_path) == {"1": target}


def test_statistics_of_a_data_set(tmp_path, caplog):
    """The training digits, all of them, and the noise levels that fit."""
    caplog.set_level("INFO")
    path = tmp_path / "stats.npz"
    config = small_config("ve/digits", eval__stats=str(path), eval__suggest_noise_scales=True)
    assert run_lib.fid_stats(config) == path
    made, shipped = load_statistics(path), load_statistics("assets/stats/digits_8_stats.npz")
    assert made.count == 1501 and made.extractor == "digits"
    assert np.allclose(made.pool_3, shipped.pool_3, atol=1e-4)
    assert "model.sigma_max" in caplog.text and "4.814" in caplog.text


def test_noise_levels_fit_the_range_of_the_network(caplog, tmp_path):
    """Black and white are 2 apart in [-1, 1]."""
    caplog.set_level("INFO")
    images = np.zeros((20, 8, 8), dtype=np.uint8)
    images[3] = 255
    np.save(tmp_path / "a.npy", images)
    options = {"data__dataset": "IMAGES", "data__path": str(tmp_path / "a.npy"), "data__levels": 0}
    options |= {"eval__stats": str(tmp_path / "stats.npz"), "eval__suggest_noise_scales": True}
    options["eval__extractor"] = "digits"
    for centered, distance in ((False, 8), (True, 16)):
        run_lib.fid_stats(small_config("ve/digits", **options, data__centered=centered))
        said = f"distance between two images is {distance} with data.centered = {centered}:"
        assert said in caplog.text


def test_statistics_of_a_folder_with_broken_files(tmp_path, caplog):
    """Images of mixed sizes; the broken ones are named and the rest counted, or it stops."""
    from PIL import Image

    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    count = 2000
    for i in range(count):
        size = rng.integers(8, 20, size=2)
        Image.fromarray(rng.integers(0, 255, (*size, 1), dtype=np.uint8)[..., 0]).save(
            folder / f"{i:04}.png"
        )
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    whole = (folder / "0003.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image")
    options = {
        "data__dataset": "IMAGES",
        "data__path": str(folder),
        "data__levels": 0,
        "eval__extractor": "digits",
        "eval__stats": str(tmp_path / "stats.npz"),
    }
    with pytest.raises(ValueError, match=r"(broken|cut)\.png"):
        run_lib.fid_stats(small_config(**options))
    assert not (tmp_path / "stats.npz").exists()
    caplog.clear()
    run_lib.fid_stats(small_config(**options, data__on_error="skip"))
    assert "broken.png" in caplog.text and "cut.png" in caplog.text
    # One in ten of the readable images is held out.
    assert load_statistics(tmp_path / "stats.npz").count == count - count // 10


def own_images(folder, changed=0):
    """Options of an evaluation of 20 gray images, and their array."""
    images = np.random.default_rng(changed).integers(0, 17, (20, 8, 8), dtype=np.uint8)
    np.save(folder / "mine.npy", images)
    return {
        "data__dataset": "IMAGES",
        "data__path": str(folder / "mine.npy"),
        "eval__extractor": "digits",
        "eval__enable_loss": False,
        "eval__enable_bpd": False,
        "eval__enable_sampling": True,
        "eval__num_samples": 4,
        "eval__begin_ckpt": 1,
        "eval__end_ckpt": 1,
    }


def test_statistics_of_own_images_belong_to_a_run(tmp_path):
    config = small_config(**own_images(tmp_path))
    with pytest.raises(ValueError, match=r"give --workdir, or a file as --config.eval.stats"):
        run_lib.fid_stats(config)
    path = run_lib.fid_stats(config, tmp_path / "run")
    assert path.parent == tmp_path / "run/stats" and load_statistics(path).count == 18
    found = load_statistics(path)
    assert (found.place, found.shape, found.dataset) == ("mine.npy", "8 x 8 x 1", "IMAGES")
    config.eval.stats = str(tmp_path / "named.npz")
    assert run_lib.fid_stats(config, tmp_path / "run") == tmp_path / "named.npz"


@pytest.mark.parametrize(
    ("place", "error", "reason"),
    [
        ("folder", ValueError, "is a folder: name a file such as stats.npz"),
        ("s.pkl", ValueError, "has the name of a pickle, which is not read: name a file"),
        ("file/s.npz", OSError, "File exists: .*file"),
    ],
)
def test_a_place_of_no_statistics_is_told_before_they_are_computed(
    place, error, reason, tmp_path, monkeypatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(statistics, "compute_statistics", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(error, match=reason):
        run_lib.fid_stats(small_config(eval__stats=str(tmp_path / place)))


def test_statistics_of_other_images_are_refused(tmp_path, caplog):
    """Images that were replaced since, or are now more; an evaluation of the same ones goes on."""
    caplog.set_level("INFO")
    config, run = small_config(**own_images(tmp_path)), tmp_path / "run"
    run_lib.train(config, run)
    run_lib.fid_stats(config, run)
    (record,) = run_lib.evaluate(config, run)
    assert record["fid"] > 0 and "18 images of IMAGES (mine.npy), 8 x 8 x 1" in caplog.text
    images = np.load(tmp_path / "mine.npy")
    images[0, 0, 0] ^= 1  # another decoder may round so
    np.save(tmp_path / "mine.npy", images)
    run_lib.evaluate(config, run, "rounded")
    own_images(tmp_path, changed=1)
    with pytest.raises(ValueError, match=r"images_.* are of 18 images .* other pixels.*fid_stats"):
        run_lib.evaluate(config, run, "again")
    np.save(tmp_path / "mine.npy", np.load(tmp_path / "mine.npy")[:15])
    with pytest.raises(ValueError, match="now has 14 images"):
        run_lib.evaluate(config, run, "fewer")
    (tmp_path / "mine.npy").unlink()
    run_lib.evaluate(config, run, "gone")
    assert "were not compared with the data: data.path: there is no file" in caplog.text


def test_images_are_compared_by_the_means_of_evenly_spaced_ones():
    images = torch.arange(2500).remainder(16).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).byte()
    found = sampled_pixels(MemorySource(images, levels=17))["means"]
    numbers = (np.arange(1000) * 2.5).astype(int)
    np.testing.assert_allclose(found, np.repeat(numbers[:, None] % 16 * 255 / 16, 3, axis=1))
    assert np.array_equal(sampled_pixels(MemorySource(images[:7]))["means"][:, 0], np.arange(7))


def test_rounds_of_other_data_are_not_reused(tmp_path, caplog, monkeypatch):
    """Data that were replaced since; a folder without a record of its data is read as before."""
    caplog.set_level("INFO")
    numbers, file = np.random.default_rng(0).normal(size=(200, 2)), tmp_path / "x.npy"
    np.save(file, numbers)
    options = {"data__path": str(file), "data__shape": (2,), "eval__batch_size": 8}
    options |= {"eval__bpd_steps": 6, "eval__loss_num_repeats": 1, "eval__bpd_num_repeats": 1}
    options |= {"eval__begin_ckpt": 1, "eval__end_ckpt": 2, "eval__enable_sampling": False}
    config = small_config("vp/vectors", **options, training__snapshot_sampling=False)
    run = tmp_path / "run"
    run_lib.train(config, run)
    digests, text = [], rounds.examples_text
    monkeypatch.setattr(rounds, "examples_text", lambda s: digests.append(text(s)) or digests[-1])
    before = run_lib.evaluate(config, run)
    assert before[0].keys() >= {"loss", "nats"} and len(digests) == 1
    assert run_lib.evaluate(config, run) == before and "do not record" not in caplog.text

    np.save(file, np.concatenate([numbers, numbers + 5]))
    said = (
        r"holds an evaluation of 20 examples \(.*, and the test part of ARRAYS now has 40 examples"
    )
    with pytest.raises(ValueError, match=said):
        run_lib.evaluate(config, run)
    np.save(file, numbers + 5)
    with pytest.raises(
        ValueError, match=r"now has 20 examples \(.*\): choose another --eval_folder"
    ):
        run_lib.evaluate(config, run)
    assert run_lib.evaluate(config, run, "fresh")[0]["nats"] > before[0]["nats"] + 1

    np.save(file, numbers)
    (run / "eval/examples.json").unlink()
    assert run_lib.evaluate(config, run) == before and caplog.text.count("do not record") == 1
    (run / "eval/examples.json").write_text("[3")
    with pytest.raises(ValueError, match=r"examples\.json is damaged"):
        run_lib.evaluate(config, run)


def test_both_parts_of_the_data_are_recorded_before_the_first_round(tmp_path):
    path = tmp_path / "examples.json"
    path.write_text('{"test": "of an evaluation that was refused before its first round"}')
    job = Job(run_lib.setup(small_config()), tmp_path, "1", "")
    for part in ("test", "train", "test"):
        job.check_data(part)
    sources = get_streams(job.run.config, evaluation=True)[2].sources
    assert json.loads(path.read_text()) == {k: examples_text(v) for k, v in sources.items()}


def test_held_out_examples_are_those_of_the_training(tmp_path, caplog):
    """A row in front makes every held-out row one that was trained on.

    The report says so, of that data set alone, also where the run has resumed with these rows.
    """
    numbers, file = np.random.default_rng(0).normal(size=(200, 2)), tmp_path / "x.npy"
    np.save(file, numbers)
    options = {"data__path": str(file), "data__shape": (2,), "eval__begin_ckpt": 1}
    options |= {"eval__end_ckpt": 1, "eval__loss_num_repeats": 1, "eval__enable_bpd": False}
    options |= {"training__n_iters": 6, "training__snapshot_sampling": False}
    options |= {"eval__num_samples": 4, "sampling__num_steps": 2, "eval__enable_sampling": False}
    run, folders = tmp_path / "run", itertools.count()

    def found(**changes):
        config = small_config("vp/vectors", **{**options, **changes})
        (record,) = run_lib.evaluate(config, run, f"eval_{next(folders)}")
        return record.get("held_out")

    run_lib.train(small_config("vp/vectors", **options), run)
    assert found() is None and "may have" not in caplog.text
    assert found(eval__enable_sampling=True) is None
    np.save(file, np.concatenate([numbers[:1] + 9, numbers]))
    assert found() == "other examples than in training"
    assert "some of its 20 examples (digest " in caplog.text
    assert found(eval__enable_loss=False, eval__enable_sampling=True) is not None
    train_only = {"eval__enable_loss": False, "eval__enable_bpd": True, "eval__bpd_steps": 6}
    assert found(**train_only, eval__bpd_dataset="train") is None
    np.save(tmp_path / "y.npy", numbers + 1)
    assert found(data__path=str(tmp_path / "y.npy")) is None
    caplog.clear()
    run_lib.train(small_config("vp/vectors", **{**options, "training__n_iters": 7}), run)
    assert "the test part of ARRAYS has 20 examples (" in caplog.text
    assert "where before step 6 it had 180 examples (" in caplog.text
    assert "from one part" in (run / "stdout.txt").read_text()
    last = {"eval__checkpoint": str(run / "checkpoints/checkpoint_last.pth")}
    assert found(**last) is not None
    np.save(file, numbers)
    assert found(**last) is not None and found() is None

    contents = read_checkpoint(run / "checkpoints/checkpoint_1.pth")
    assert len(contents.pop("examples")) == 1
    np.save(file, numbers[::-1])
    for none in ({}, {"examples": "?"}, {"examples": [3]}):
        save_checkpoint(run / "checkpoints/checkpoint_1.pth", {**contents, **none})
        assert found() is None


class Counted(MemorySource):
    class_to_idx, read_so_far = {"a": 0, "b": 1}, 0

    def read(self, numbers):
        self.read_so_far += len(numbers)
        return super().read(numbers)


def test_few_examples_are_read_for_the_record_of_a_training():
    parts = [Counted(torch.arange(count).reshape(-1, 1).byte()) for count in (50, 3000)]
    assert [text.split(" (")[0] for text in present_examples(*parts).values()] == [
        "50 examples", "3000 examples",
    ]  # fmt: skip
    assert [part.read_so_far for part in parts] == [50, 100]


def test_examples_are_told_apart_by_their_digest():
    values, labels = torch.arange(6000.0).reshape(3000, 2), torch.arange(3000) % 2
    source = Counted(values, labels)
    text = examples_text(source)
    assert text.startswith("3000 examples (digest ") and source.read_so_far == 1000
    assert examples_text(Counted(values.clone(), labels.clone())) == text
    changed, others = values.clone(), labels.clone()
    changed[3, 1] += 1e-3
    others[3] = 0
    renamed = Counted(values, labels)
    renamed.class_to_idx = {"b": 0, "c": 1}
    sources = [Counted(changed, labels), Counted(values, others), renamed, MemorySource(values)]
    assert len({text, *map(examples_text, sources)}) == 5
    assert examples_text(MemorySource(values[:0])).startswith("0 examples")


def test_mean_and_error():
    values = np.random.default_rng(0).normal(3, 2, size=10_000)
    result = mean_and_error("x", values)
    assert result["x"] == pytest.approx(3, abs=0.1)
    assert result["x_standard_error"] == pytest.approx(0.02, rel=0.05)
    assert torch.tensor(mean_and_error("x", values[:1])["x_standard_error"]).isnan()
