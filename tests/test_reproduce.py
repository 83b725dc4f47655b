"""Weights that come with the project, and figures beside the published ones."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import numpy as np
import pytest
import torch
from small_runs import ROOT, run_forked

import run_lib
from benchmarks import digits_figures, jackknife
from benchmarks.published import printed, requirements, sampler_evaluations
from configs.defaults import base, experiments, load
from score_lib.base.tensors import SampleNoise
from score_lib.disk.checkpoints import CheckpointError
from score_lib.likelihood import get_log_likelihood_fn
from score_lib.metrics import distances
from score_lib.metrics.jackknife import _moments_without, jackknife_error, sampling_errors
from score_lib.metrics.stats import Statistics
from score_lib.option_kinds import figures as allowed
from score_lib.options import flatten
from score_lib.runs import measures, reproduce
from score_lib.runs.heldout import HeldOut
from score_lib.runs.nearest import Nearest
from score_lib.runs.published import KINDS, ROWS, Figure, Row

WEIGHTS = ROOT / "assets" / "weights" / "digits.safetensors"
Z = statistics.NormalDist().inv_cdf(0.995)


@pytest.mark.slow
def test_weights_of_digits_give_the_recorded_bits_per_dim():
    run = run_lib.from_checkpoint(WEIGHTS, "cpu")
    assert run.state["step"] == 2000 and run.config.model.weights == ""
    data = HeldOut(run, "test", dequantize=True, seed=0)
    images = data.read(0)[0][:8]
    log_likelihood = get_log_likelihood_fn(run.sde, rtol=1e-2, atol=1e-2, **run.reading)
    found = log_likelihood(run.state["model"], images, noise=SampleNoise(0, range(8), "cpu"))
    bpd = run.unit.of(found.total, data.levels)
    assert torch.mean(bpd).item() == pytest.approx(1.9664, abs=1e-3)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=40)
    without = [np.delete(x, k).mean() for k in range(40)]
    error = jackknife_error(x.mean(), without, [1] * 40)
    assert error == pytest.approx(x.std(ddof=1) / 40**0.5)


def test_errors_of_unequal_groups_are_those_of_other_samples():
    """60 samples are 10 groups of two and 40 of one, and the FID of fewer samples is larger."""
    rng = np.random.default_rng(0)
    scales = np.linspace(1, 0.05, 128)
    known = distances.moments(scales * rng.normal(size=(2000, 128)))
    real = Statistics(mu=known[0].numpy(), sigma=known[1].numpy())
    drawn = [Statistics(pool_3=scales * rng.normal(size=(60, 128))) for _ in range(100)]
    spread = np.std([distances.frechet_distance(known, one.moments()) for one in drawn])
    found = [sampling_errors(real, one)["fid_standard_error"] for one in drawn[:3]]
    # The jackknife itself is too large by about a fifth for so few samples.
    assert np.mean(found) == pytest.approx(1.2 * spread, rel=0.25)


def test_moments_without_a_group():
    x = torch.randn(23, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k, found in enumerate(_moments_without(x, 5)):
        for value, expected in zip(
            found, distances.moments(x[np.arange(23) % 5 != k]), strict=True
        ):
            torch.testing.assert_close(value, expected)


def test_errors_are_of_all_samples_and_of_those_without_each_group():
    """In float64, though features far from 0 come in float32."""
    rng = np.random.default_rng(0)
    known = torch.zeros(2).double() + 1000, torch.eye(2).double()
    pool_3 = (1000 + 2 * rng.normal(size=(6, 2))).astype(np.float32)
    logits = rng.normal(size=(6, 3)).astype(np.float32)
    real = Statistics(mu=known[0].numpy(), sigma=known[1].numpy())
    found = sampling_errors(real, Statistics(pool_3=pool_3, logits=logits), groups=3)
    left = [np.arange(6) % 3 != k for k in range(3)]
    for name, values in {
        "fid": [distances.frechet_distance(known, distances.moments(pool_3[k])) for k in left],
        "inception_score": [distances.inception_score(logits[k])[0] for k in left],
    }.items():
        # sqrt((G - 1) / G sum (value - mean)^2) of G = 3 equal groups.
        assert found[f"{name}_standard_error"] == pytest.approx(2**0.5 * np.std(values), rel=1e-6)


def test_errors_are_those_of_other_samples():
    """Beside the spread of the same distances of 200 other sets of samples."""
    rng = np.random.default_rng(0)
    real = Statistics(pool_3=rng.normal(size=(1000, 2)))

    def samples():
        pool_3 = 0.5 + 1.3 * rng.normal(size=(300, 2))
        return Statistics(pool_3=pool_3, logits=rng.normal(size=(300, 4)))

    drawn, known = [samples() for _ in range(200)], real.moments()
    found = [sampling_errors(real, samples()) for _ in range(5)]
    for name, values in {
        "fid": [distances.frechet_distance(known, one.moments()) for one in drawn],
        "inception_score": [distances.inception_score(one.logits)[0] for one in drawn],
    }.items():
        mean = np.mean([one[f"{name}_standard_error"] for one in found])
        assert mean == pytest.approx(np.std(values), rel=0.15)
    with pytest.raises(ValueError, match="4 or more samples, not 3"):
        sampling_errors(real, Statistics(pool_3=np.eye(3)))


def test_noise_of_bits_per_dim(monkeypatch):
    """Two passes over two images: variances 2 and 0 of a pass, so 1 and 0 of the mean."""
    passes = np.array([[1.0, 2.0], [3.0, 2.0]])
    rounds = [{"bpd": values} for values in passes]
    monkeypatch.setattr(measures, "_rounds", lambda job, kind, repeats, terms: rounds[:repeats])
    monkeypatch.setattr(measures, "save_histogram", lambda path, values, title: None)
    run = run_lib.setup(load("vp/digits"))
    job = measures.Job(run, ROOT, "1", "")
    run.config.eval.bpd_num_repeats = 2
    found = measures.evaluate_bpd(job, errors=True)
    assert found["num_images"] == 2 and found["bpd"] == 2.0
    assert found["bpd_noise_error"] == pytest.approx((1 / 2 / 2) ** 0.5)
    assert not {"bpd_noise_error", "num_images"} & measures.evaluate_bpd(job).keys()
    assert "bpd_step_error" not in found
    for terms, change in zip(rounds, ([0.5], [0.1]), strict=True):
        terms["step_error"] = np.array(change)
    assert measures.evaluate_bpd(job)["bpd_step_error"] == pytest.approx(0.3)
    run.config.eval.bpd_num_repeats = 1
    assert "bpd_noise_error" not in measures.evaluate_bpd(job, errors=True)


@pytest.mark.parametrize(
    ("figure", "error", "width"),
    [
        # Two draws, and rounding.
        (Figure("fid", "2.20", "Table 3"), 0.02, Z * 0.02 * 2**0.5 + 0.005),
        (Figure("fid", "2.2", "Table 3"), 0.0, 0.05),
        # One draw and a mean of five, of a spread known from them.
        (Figure("fid", "3.24", "Table 1", 5, 0.03), 0.02, 4.604 * 0.03 * 1.2**0.5 + 0.005),
        (Figure("fid", "3.24", "Table 1", 5, 0.03), 0.06, Z * 0.06 * 1.2**0.5 + 0.005),
    ],
)
def test_width_of_the_band(figure, error, width):
    assert reproduce.half_width(figure, error) == pytest.approx(width, rel=0.01)


ROW = Row("a row", (), num_samples=100, num_images=50)
SAMPLED = {"fid": 2.0, "fid_standard_error": 0.1, "num_samples": 100}
NOISE = {"bpd": 2.01, "bpd_standard_error": 0.1, "num_images": 50}
SEVERAL = Figure("bpd", "2.00", "here", 5, 0.001)


@pytest.mark.parametrize(
    ("figure", "record", "verdict"),
    [
        (Figure("fid", "2.36", "Table 3"), SAMPLED, "within"),  # 0.1 sqrt(2) 2.576 = 0.364
        (Figure("fid", "2.38", "Table 3"), SAMPLED, "outside"),
        (Figure("fid_ode", "1.62", "Table 2"), SAMPLED, "outside"),
        (Figure("fid", "2.00", "Table 3"), {**SAMPLED, "num_samples": 99}, "not compared: 99 samp"),
        (Figure("inception_score", "9.0", "Table 3"), SAMPLED, "not compared: these features"),
        (Figure("bpd", "2.00", "Table 2"), {**NOISE, "bpd_noise_error": 0.001}, "outside"),
        (Figure("bpd", "2.00", "Table 2"), {**NOISE, "bpd_noise_error": 0.002}, "within"),
        # The error over images does not count where the spread over runs is known.
        (Figure("bpd", "2.00", "Table 2"), NOISE, "within"),
        (SEVERAL, {**NOISE, "bpd": 2.02}, "outside"),
        (SEVERAL, NOISE, "within"),
        (SEVERAL, {**NOISE, "num_images": 49}, "not compared: 49 images, published with 50"),
    ],
)
def test_verdicts(figure, record, verdict):
    found = reproduce.compare(ROW, figure, record)
    assert found["verdict"].startswith(verdict) and found["published"] == figure.text
    assert bool(found["band"]) == (verdict in ("within", "outside"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": "2,20"}, "needs a number"),
        ({"text": "nan"}, "needs a number"),
        ({"kind": "FID"}, "'FID' is no kind of figure: there are fid"),
        ({"spread": 0.1}, "two runs"),
        ({"runs": 5, "spread": -0.1}, "needs a number"),
    ],
)
def test_a_corrupted_row_is_told(changes, problem):
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(Figure("fid", "2.20", "Table 3"), **changes)


def test_rows_are_those_of_the_tables_in_the_docs():
    page = (ROOT / "docs" / "experiments.md").read_text()
    words = {"fid": r"FID ([\d.]+)", "inception_score": r"IS ([\d.]+)", "bpd": r"([\d.]+) bits"}
    assert set(ROWS) <= set(experiments())
    assert all(allowed.accepts(kind) for kind in KINDS) and not allowed.accepts("kid")
    for line in re.findall(r"^\| `(?:vp|ve|subvp)/.*cifar10.*$", page, flags=re.MULTILINE):
        _, name, *_, cell, _ = (part.strip().strip("`") for part in line.split("|"))
        told = {k: found[1] for k, words in words.items() if (found := re.search(words, cell))}
        known = {f.kind: f.text for f in ROWS[name].figures} if name in ROWS else {}
        assert told.items() <= known.items(), name
    page = (ROOT / "docs" / "published.md").read_text()
    for name in ROWS:
        assert f"| {' | '.join(printed(name).values())} |" in page, name


# By the names there: figures of Table 2 (bits/dim, FID), and of Table 3 (FID, IS).
TABLE_2 = """
DDPM 3.28 3.37
DDPM cont. (VP) 3.21 3.69
DDPM cont. (sub-VP) 3.05 3.56
DDPM++ cont. (VP) 3.16 3.93
DDPM++ cont. (sub-VP) 3.02 3.16
DDPM++ cont. (deep, VP) 3.13 3.08
DDPM++ cont. (deep, sub-VP) 2.99 2.92
"""
TABLE_3 = """
NCSN 25.32 8.87
NCSNv2 10.87 8.40
DDPM++ 2.78 9.64
DDPM++ cont. (VP) 2.55 9.58
DDPM++ cont. (sub-VP) 2.61 9.56
DDPM++ cont. (deep, VP) 2.41 9.68
DDPM++ cont. (deep, sub-VP) 2.41 9.57
NCSN++ 2.45 9.73
NCSN++ cont. (VE) 2.38 9.83
NCSN++ cont. (deep, VE) 2.20 9.89
"""


@pytest.mark.parametrize(
    ("table", "text", "kinds"),
    [("Table 2", TABLE_2, ("bpd", "fid_ode")), ("Table 3", TABLE_3, ("fid", "inception_score"))],
)
def test_rows_are_those_of_the_paper(table, text, kinds):
    """Table 3 quotes the FID of DDPM, whose own checkpoint is in Table 1."""
    found = {
        row.name: tuple(
            f.text for k in kinds for f in row.figures if (f.kind, f.place) == (k, table)
        )
        for row in ROWS.values()
    }
    lines = [line.rsplit(" ", 2) for line in text.split("\n") if line]
    quoted = {"DDPM": ("9.46",)} if table == "Table 3" else {}
    expected = {name: tuple(figures) for name, *figures in lines} | quoted
    assert {name: figures for name, figures in found.items() if figures} == expected


@pytest.mark.slow
def test_cost_of_a_row():
    """Hours at a rate of one evaluation of the network a second.

    It is known of DDPM's network that it has 6.05 billion multiplications, each with an addition.
    """
    found = requirements("vp/ddpm/cifar10", rate=12.1e9)
    assert float(found["GFLOP"]) == pytest.approx(12.1, rel=0.02)
    assert found["evaluations"] == "1000"
    hours = {"samples": 1000 * 50000, "ODE": 200 * 50000, "bits/dim": 3 * 400 * 5 * 10000}
    for kind, evaluations in hours.items():
        assert float(found[f"h, {kind}"]) == pytest.approx(evaluations / 3600, rel=0.02)
    corrected = run_lib.setup(load("ve/cifar10_ncsnpp_continuous"))
    assert sampler_evaluations(corrected) == 2000


@pytest.mark.parametrize("last", ["within", "outside"])
def test_seeds_of_digits(last, tmp_path, monkeypatch, capsys):
    """Those without a checkpoint are trained; the spread is that of single seeds."""
    trained, asked = [], []

    def found(config, folder):
        asked.append((config.seed, config.eval.figures, folder.name))
        verdict = last if config.seed == 3 else "within"
        return [{"figure": "bpd", "ours": float(config.seed), "verdict": verdict}]

    monkeypatch.setattr(run_lib, "train", lambda config, folder: trained.append(config.seed))
    monkeypatch.setattr(run_lib, "reproduce", found)
    path = tmp_path / "seed_2" / "checkpoints" / "checkpoint_1.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    arguments = ["--workdir", str(tmp_path), "--seeds", "1", "2", "3", "--figures", "bpd"]
    if last == "within":
        digits_figures.main(arguments)
    else:
        with pytest.raises(SystemExit, match="1"):
            digits_figures.main(arguments)
    assert trained == [1, 3] and asked == [(k, "bpd", f"seed_{k}") for k in (1, 2, 3)]
    assert "|    bpd |     3 | 2.0000 | 1.0000 |" in capsys.readouterr().out


def test_sets_of_samples(monkeypatch, capsys):
    """The sets are of different samples; the spread is that of the printed figures."""

    def draw(run, indices):
        generator = torch.Generator().manual_seed(indices[0])
        return torch.rand(len(indices), 1, 8, 8, generator=generator)

    monkeypatch.setattr(run_lib.Run, "draw", draw)
    jackknife.main(["--sets", "2", "--size", "20"])
    table, _, told = capsys.readouterr().out.partition("fid: ")
    values = [float(row.split()[1]) for row in table.splitlines()[2:4]]
    spread = float(re.match(r"spread ([\d.]+),", told)[1])
    assert spread == pytest.approx(np.std(values, ddof=1), abs=2e-4) and spread > 0


def test_differences_that_count():
    nearest = Nearest(
        "vp/digits",
        [("seed", 1, 42), ("eval.num_samples", 64, 512), ("sampling.num_steps", 9, 500)],
    )
    assert reproduce.matters(nearest, KINDS["fid"]).differences == nearest.differences[2:]
    assert not reproduce.matters(nearest, KINDS["bpd"]).differences
    assert flatten(base()).keys() >= reproduce._FREE | reproduce._NOT_FREE
    averaged = Nearest("vp/digits", [("eval.ema", "none", ""), ("model.nf", 8, 16)])
    assert reproduce.matters(averaged, KINDS["bpd"]) == averaged


@pytest.mark.parametrize(
    ("record", "remarks"),
    [
        ({"step": 2}, []),  # a published file, which does not tell
        ({"step": 2000, "trained_with": {"seed": 7}}, []),
        ({"step": 2, "trained_with": {}}, ["step 2 of 2000"]),
        (
            {"step": 2000, "trained_with": {"optim.lr": 0.001, "seed": 7}},
            ["trained by this config, but optim.lr = 0.001 (not 0.004)"],
        ),
    ],
)
def test_how_the_weights_were_trained(record, remarks):
    kind, run = KINDS["bpd"], run_lib.setup(load("vp/digits"))
    assert list(reproduce._of_training(run, kind, {kind.folder: record})) == remarks


@pytest.fixture
def asked(monkeypatch):
    """The options of each evaluation that is asked for, none of which is made."""
    found = []

    def evaluate(config, workdir, folder, measures):
        found.append((folder, config))
        errors = {"fid_standard_error": 0.01, "inception_score_standard_error": 0.01}
        return [SAMPLED | NOISE | errors | {"inception_score": 9.58}]

    monkeypatch.setattr(reproduce, "evaluate", evaluate)
    return found


def test_evaluations_of_a_row(asked, tmp_path):
    config = load("vp/cifar10_ddpmpp_continuous")
    config.sampling.update(method="heun", churn=40.0)
    for option in ("checkpoint", "stats"):
        path = tmp_path / f"{option}_8.npz"
        path.touch()
        config.eval[option] = str(path)
    records = run_lib.reproduce(config, tmp_path)
    assert [record["figure"] for record in records] == ["fid", "inception_score", "fid_ode", "bpd"]
    found = {
        folder: (
            *(c.eval.enable_sampling, c.eval.enable_bpd, c.eval.enable_loss),
            *(c.sampling.method, c.sampling.churn),  # the solver of the flow refuses any churn
        )
        for folder, c in asked
    }
    assert found == {
        "reproduce/samples": (True, False, False, "heun", 40.0),
        "reproduce/ode": (True, False, False, "ode", 0.0),
        "reproduce/bpd": (False, True, False, "heun", 40.0),
    }
    assert all(c.eval.num_samples == 50000 and c.eval.bpd_dataset == "test" for _, c in asked)
    assert "features of inception, published with inception_tfgan" in records[0]["verdict"]
    config.eval.figures = "bpd"
    assert [record["figure"] for record in run_lib.reproduce(config, tmp_path)] == ["bpd"]


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("ve/cifar10_classifier", {}, "no published figures of ve/cifar10_classifier.*ve/ncsn/"),
        ("ve/cifar10_ncsnpp", {}, "one checkpoint: name its file as --config.eval.checkpoint"),
        ("ve/cifar10_ncsnpp", {"checkpoint": "none.pth"}, "no checkpoints none.pth"),
        (
            "ve/cifar10_ncsnpp",
            {"figures": "bpd"},
            "bpd of NCSN.. is not published: choose from fid",
        ),
        ("ve/cifar10_ncsnpp", {"figures": "kid"}, "eval.figures"),
        ("ve/cifar10_ncsnpp", {"checkpoint": str(WEIGHTS)}, "no statistics of CIFAR10 at"),
        ("vp/digits", {}, "no checkpoints .*checkpoint_1.pth"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(asked, name, changes, problem, tmp_path):
    config = load(name)
    config.eval.update(changes)
    with pytest.raises((ValueError, OSError), match=problem):
        run_lib.reproduce(config, tmp_path)
    assert not asked and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_project_s_weights(tmp_path, monkeypatch):
    """Few samples; the row is then replaced by their figures, and shifted."""
    changes = {
        "model.weights": str(WEIGHTS),
        "eval.figures": "fid,inception_score",
        "eval.num_samples": 64,
        "sampling.method": "dpmpp_3m",
        "sampling.num_steps": 25,
    }
    config, folder = load("vp/digits"), tmp_path / "reproduce"
    config.update_from_flattened_dict(changes)
    first = run_lib.reproduce(config, tmp_path)
    assert first == json.loads((folder / "report.json").read_text())
    assert [record["figure"] for record in first] == ["fid", "inception_score"]
    few = "not compared: 64 samples, published with 512; another config: vp/digits, but"
    assert all(record["verdict"].startswith(few) for record in first)
    assert "sampling.method = 'dpmpp_3m'" in first[0]["verdict"]
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*_0.npz")}
    fid, error = first[0]["ours"], first[0]["ours_standard_error"]

    def publish(shift):
        moved = Figure("fid", f"{fid + shift * error:.4f}", "Table 3")
        monkeypatch.setitem(ROWS, "vp/digits", Row("moved", (moved,), num_samples=64))

    publish(1)
    config.eval.figures = ""
    (record,) = run_lib.reproduce(config, tmp_path)
    assert record["verdict"].startswith("within")
    publish(6)
    options = [f"--config.{key}={value}" for key, value in changes.items() if "figures" not in key]
    file = f"--config={ROOT / 'configs/vp/digits.py'}"
    code, output = run_forked([file, f"--workdir={tmp_path}", "--mode=reproduce", *options])
    (record,) = json.loads((folder / "report.json").read_text())
    assert code == 1 and record["verdict"].startswith("outside") and record["verdict"] in output
    assert "outside" in (folder / "report.md").read_text()
    assert made and made == {path: path.stat().st_mtime_ns for path in made}


def test_another_network_s_weights_are_refused(tmp_path):
    config = load("vp/digits")
    config.model.update(weights=str(WEIGHTS), nf=8)
    config.eval.figures = "fid"
    with pytest.raises(CheckpointError, match=r"digits\.safetensors"):
        run_lib.reproduce(config, tmp_path)
    assert not list(tmp_path.rglob("*.npz"))
