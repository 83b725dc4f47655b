"""The benchmarks run, and their measurements are right."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import types

import numpy as np
import pytest
import torch
from small_runs import small_config
from torch import nn

from benchmarks import (
    adm,
    arrays,
    checkpoints,
    data,
    folders,
    group_norm,
    kernels,
    likelihood,
    measure,
    objectives,
    reference_statistics,
    samplers,
    sampling,
    train,
    variants,
)
from benchmarks.measure import growth, in_turns, matrix_product, nbytes, operations
from benchmarks.variants import PLAIN, Comparison, Variant, Work
from models.layers import RepeatedConv2d
from run_lib import setup
from run_lib import train as train_run

pytestmark = pytest.mark.slow  # whole runs

CPU = torch.device("cpu")
MB = 1 << 18  # float32 numbers in a megabyte
SMALL = ["--config", "vp/digits", "--set", "model.nf=8", "--batch_size", "4", "--rounds", "2"]
COMPARED = {"variant", "peak MB", "ms", "median ms", "images/s", "speed-up", "memory"}
TIMES = COMPARED | {"GFLOP/s", "of matmul"}


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Some processors take seconds for a large product in bfloat16."""
    monkeypatch.setattr(variants, "matrix_product", functools.partial(matrix_product, size=64))


def report(capsys):
    """The JSON that a command printed below its table, with rows by name of the variant."""
    printed = capsys.readouterr().out
    title, _, header, _, *lines, _, found = printed.rstrip("\n").split("\n")
    found = json.loads(found)
    assert title == f"{found['benchmark']} on {found['hardware']}"
    assert len(lines) == len(found["results"])
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    assert set(columns) == {key for row in found["results"] for key in row}
    found["rows"] = {row.get("variant"): row for row in found["results"]}
    return found


@pytest.mark.parametrize("requires_grad, passes", ((False, 2), (True, 3)))
def test_operations_of_a_convolution_and_its_backward_pass(requires_grad, passes):
    layer, expected = nn.Conv2d(3, 8, 3, padding=1), 2 * (2 * 5 * 7) * 8 * 3 * 9
    x = torch.randn(2, 3, 5, 7, requires_grad=requires_grad)
    assert operations(lambda: layer(x)) == expected
    assert operations(lambda: layer(x).sum().backward()) == passes * expected


def test_operations_of_attention_are_those_of_its_two_products():
    query = torch.randn(2, 1, 6, 4)
    attend = nn.functional.scaled_dot_product_attention
    assert operations(lambda: attend(query, query, query)) == 2 * (2 * 2 * 6 * 6 * 4)
    layers = [torch.randn(2, 1, 6, 4, requires_grad=True) for _ in range(3)]
    assert operations(lambda: attend(*layers).sum().backward()) == 6 * (2 * 2 * 6 * 6 * 4)


def test_growth_is_the_largest_sum_of_tensors_at_one_time():
    def together():
        return torch.ones(MB) + torch.ones(MB)

    def one_by_one():
        for _ in range(5):
            torch.ones(MB)

    kept = {"gradient": torch.ones(MB)}

    def replaced():
        kept["gradient"] = None
        kept["gradient"] = torch.ones(MB)

    assert growth(together, CPU) == pytest.approx(3 << 20, rel=0.01)
    assert growth(one_by_one, CPU) == pytest.approx(1 << 20, rel=0.01)
    assert growth(replaced, CPU) < 1 << 16


def test_shared_memory_counts_once():
    x = torch.zeros(4, 6)
    assert nbytes([x, x[1:], x.t(), torch.zeros(3)]) == 4 * (24 + 3)


def test_works_are_timed_in_turns():
    calls = []
    timings = in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, CPU, 3)
    assert calls == list("abc" * 3)
    assert all(0 <= timing.best <= timing.median for timing in timings.values())


def test_ratios_of_pairs_are_free_of_drift(monkeypatch):
    """One call takes twice as long as the other on a machine that gets slower and slower."""
    times = {"slow": 2.0, "fast": 1.0}
    count = itertools.count(1)
    monkeypatch.setattr(measure, "busy_seconds", lambda work, device: times[work] * next(count))
    found = measure.ratio_in_pairs("slow", "fast", CPU, rounds=40)
    assert found.value == pytest.approx(2, rel=0.02) and 0 < found.standard_error < 0.1


def test_adm_is_the_network_that_it_is_compared_with(capsys):
    given = ["--sides", "16", "--width", "32", "--batch_size", "2", "--rounds", "1"]
    adm.main(given)
    rows = report(capsys)["results"]
    assert [(row["precision"], row["step"]) for row in rows] == list(
        itertools.product(adm.PRECISIONS, adm.STEPS)
    )
    for row in rows:
        assert row["difference"] < (1e-5 if row["precision"] == "float32" else 0.05)
        assert row["times as fast"] > 0
    ours, plain = adm.networks(16, 32, "float32", CPU)
    assert {type(layer) for layer in ours.modules()}.isdisjoint(adm._PLAIN.values())
    assert {type(layer) for layer in plain.modules()}.isdisjoint(adm._PLAIN)


def test_group_norm_is_compared_where_it_is_exact_and_where_the_kernel_is_not(capsys):
    group_norm.main(["--batch_size", "2", "--rounds", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    features = ["2 x 32 x 28 x 28", "2 x 64 x 14 x 14", "2 x 96 x 7 x 7"]
    assert [row["features"] for row in rows] == features
    for row in rows:
        assert row["forward"] > 0 and row["with backward"] > 0
        assert 0 < row["1e6 error of ours, mean 0"] < 10
        assert 0 < row["1e6 error of ours, mean 100"] < 100 < row["1e6 error of kernel, mean 100"]


def test_kernels_are_compared_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setenv("OP_BACKEND", "plain")
    monkeypatch.setattr(kernels, "RUNS", 1)
    monkeypatch.setattr(kernels, "rate_of_a_copy", lambda device: 2e9)
    rescaled_sum, used = kernels.rescaled_sum, set()

    def noted(*given):
        used.add(os.environ["OP_BACKEND"])
        return rescaled_sum(*given)

    monkeypatch.setattr(kernels, "rescaled_sum", noted)
    kernels.main(["--config", "vp/digits", "--batch_size", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    names = 2 * ["group norm, SiLU", "with backward", "rescaled sum"] + ["repeated conv"]
    assert [row["operation"] for row in rows] == 2 * names
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert row["of a copy's"] == pytest.approx(row["GB/s"] / 2)
        fastest = row["kernel, us"] or row["plain, us"]
        assert row["MB moved"] / fastest * 1e3 == pytest.approx(row["GB/s"])
        assert not row["faster"] or row["faster"] == pytest.approx(row["plain, us"] / fastest)
    assert used == ({"plain", "cpu"} if rows[0]["faster"] else {"plain"})


def test_operations_of_a_matrix_product():
    for precision in ("float32", "bfloat16"):
        work, count = matrix_product(CPU, precision, size=16)
        assert operations(work) == count == 2 * 16**3


def test_graphs_count_as_memory_of_their_network(monkeypatch):
    held, own = iter([700, 1040]), iter([200, 300])  # before; with the network's gradients
    monkeypatch.setattr(variants, "allocated", lambda _: next(held))
    monkeypatch.setattr(Work, "kept", lambda _: next(own))
    work = Work(types.SimpleNamespace(device=CPU), lambda: "result")
    assert work.first_call() == ("result", (1040 - 700) - (300 - 200))


def test_names_of_variants():
    assert Variant.named("float32") == Variant()
    assert Variant.named("bfloat16+compile") == Variant("bfloat16", "default")
    assert Variant.named("tf32+graphs+checkpoint") == Variant("tf32", "reduce-overhead", True)
    with pytest.raises(ValueError, match=r"float32\+fast.*compile, graphs, cudagraphs, checkpoint"):
        Variant.named("float32+fast")


def test_ratios_are_to_the_plain_network():
    rows = {
        PLAIN: {"ms": 20.0, "peak MB": 100.0},
        "bfloat16": {"ms": 5.0, "peak MB": 60.0},
        "tf32": {"note": "fails"},
    }
    found = Comparison(rows, {}, {"float32": 1e12, "bfloat16": 2e12})
    found.add_ratios()
    found.add_rates(operations=10**9)
    assert rows["bfloat16"] == {
        "ms": 5.0,
        "peak MB": 60.0,
        "speed-up": 4.0,
        "memory": 0.6,
        "GFLOP/s": pytest.approx(200),
        "of matmul": pytest.approx(0.1),
    }
    assert rows[PLAIN]["of matmul"] == pytest.approx(0.05)
    assert rows["tf32"] == {"note": "fails"}


def test_training_in_bfloat16_and_with_checkpoints_takes_less_memory(capsys):
    train.main([*SMALL, "--variants", "bfloat16", "bfloat16+checkpoint", "tf32"])
    rows = report(capsys)["rows"]
    assert list(rows) == ["float32", "bfloat16", "bfloat16+checkpoint"]  # TF32 needs a GPU
    assert all(row.keys() >= TIMES for row in rows.values())
    assert rows["float32"]["speed-up"] == rows["float32"]["memory"] == 1
    memory = [row["memory"] for row in rows.values()]
    assert sorted(memory, reverse=True) == memory and memory[-1] < 0.9
    for row in rows.values():
        assert row["images/s"] == pytest.approx(4e3 / row["ms"])


def test_operations_are_those_of_the_plain_step(capsys, monkeypatch):
    """Splitting the batch, recomputing activations or sharing products does not count."""
    layer, x = RepeatedConv2d(3, 3, 3, padding=1), torch.randn(1, 3, 4, 4)
    monkeypatch.setenv("OP_BACKEND", "cpu")
    assert operations(lambda: layer(x)) == 2 * 8 * 8 * 3 * 3 * 9
    monkeypatch.undo()
    counts = []
    for changes in ("seed=1", "training.grad_accumulation=2", "model.checkpoint_activations=True"):
        train.main([*SMALL, "--rounds", "1", "--set", changes, "--variants"])
        counts.append(report(capsys)["gflop_per_step"])
    assert counts[0] == counts[1] == counts[2]
    sampling.main([*SMALL, "--rounds", "1", "--variants", "--steps", "20"])
    # One forward pass, and twice as much backwards, without the gradient of the images.
    assert 2.9 < counts[0] / report(capsys)["gflop_per_evaluation"] < 3


def test_only_the_variants_with_kernels_have_them(capsys, monkeypatch):
    monkeypatch.delenv("OP_BACKEND", raising=False)
    used = []

    class Step(Work):
        def kept(self):
            return 1

    def build(config, workdir="", name="float32"):
        run = types.SimpleNamespace(device=CPU)
        return Step(run, lambda: used.append((name, os.environ.get("OP_BACKEND"))))

    monkeypatch.setattr(train, "training", build)
    monkeypatch.setattr(train, "operations", lambda call: 1)
    train.main([*SMALL, "--variants", "bfloat16+kernels"])
    assert set(used) == {("float32", None), ("bfloat16+kernels", "cpu")}
    assert report(capsys)["rows"].keys() == {"float32", "bfloat16+kernels"}


def test_failures_are_rows_with_a_note(capsys, monkeypatch):
    def no_compiler(*_, **__):
        def call(*_):
            raise torch._dynamo.exc.Unsupported("there is no compiler\nin this test")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    train.main([*SMALL, "--variants", "float32+compile", "float16"])
    rows = report(capsys)["rows"]
    assert rows["float32"].keys() >= TIMES
    assert rows["float32+compile"].keys() == rows["float16"].keys() == {"variant", "note"}
    assert "there is no compiler" in rows["float32+compile"]["note"]
    assert "float16" in rows["float16"]["note"]


def test_compiled_variants_are_compiled(capsys, monkeypatch):
    modes, compile = [], torch.compile

    def traced(function, mode):
        modes.append(mode)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    train.main([*SMALL, "--variants", "bfloat16+compile"])
    assert report(capsys)["rows"]["bfloat16+compile"].keys() >= TIMES and modes == ["default"]


def test_sampling_measures_steps_and_the_effect_of_precision(capsys):
    sampling.main([*SMALL, "--config", "ve/digits", "--variants", "bfloat16", "--steps", "3"])
    found = report(capsys)
    assert found["evaluations"] == 6  # corrector and predictor
    rows = found["rows"]
    assert all(row.keys() >= TIMES for row in rows.values())
    assert rows["float32"]["difference"] == 0 < rows["bfloat16"]["difference"] < 0.05
    for row in rows.values():
        assert row["ms/step"] == pytest.approx(row["ms"] / 3)
        assert row["us/step/image"] == pytest.approx(1e3 * row["ms"] / 3 / 4)
        rate = 6 * found["gflop_per_evaluation"] / row["ms"] * 1e3
        assert row["GFLOP/s"] == pytest.approx(rate)


def test_sampling_with_guidance_evaluates_each_sample_twice_a_step(capsys):
    settings = ["model.nf=8", "sampling.method=ddim", "sampling.guidance_scale=2.0"]
    settings = [part for setting in settings for part in ("--set", setting)]
    sampling.main(
        ["--config", "vp/digits_conditional", *settings, "--batch_size", "4", "--rounds", "1"]
        + ["--variants", "--steps", "3"]
    )
    found = report(capsys)
    assert found["evaluations"] == 2 * (3 + 1)  # steps, and denoising
    assert found["rows"]["float32"].keys() >= TIMES


def test_one_pass_on_the_device_agrees_with_separate_passes_on_the_host(capsys):
    small = [*SMALL, "--config", "ve/digits", "--rounds", "1", "--variants"]
    likelihood.main([*small, "--tolerance", "0.1"])
    rows = report(capsys)["rows"]
    host, device = rows[likelihood.HOST], rows["float32"]
    assert device.keys() >= COMPARED | {"against host", "evaluations", "bits/dim", "off by"}
    assert host["evaluations"] == device["evaluations"] > 10
    assert device["off by"] < 1e-4 and math.isfinite(device["bits/dim"])
    assert device["against host"] == pytest.approx(host["ms"] / device["ms"])


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"vp/digits has no option 'model.nff'"):
        train.main([*SMALL, "--set", "model.nff=3"])
    with pytest.raises(ValueError, match=r"--set model.nf=wide"):
        train.main([*SMALL, "--set", "model.nf=wide"])


def test_data_are_measured_from_memory_and_from_files(capsys):
    small = ["--batch_size", "4", "--batches", "2", "--files", "12", "--rounds", "1"]
    data.main([*small, "--workers", "0", "1", "--step_time", "0.1"])
    found = report(capsys)
    rows = {(row["data"].split(",")[0], row["workers"]) for row in found["results"]}
    assert rows == {(name, n) for name in ("digits", "PNG files") for n in (0, 1)}
    assert len(found["results"]) == 6
    for row in found["results"]:
        assert row["images/s"] == pytest.approx(4e3 / row["ms/batch"])
        assert row["of the need"] == pytest.approx(100 / row["ms/batch"])


def test_starts_with_a_folder_are_measured(tmp_path):
    folders.make_files(str(tmp_path), 30, 3)
    assert [len(list(tmp_path.glob(f"class_000{k}/*.png"))) for k in range(3)] == [10, 10, 10]
    row = folders.start(str(tmp_path))
    text = sum(len(str(path.relative_to(tmp_path))) for path in tmp_path.glob("*/*.png"))
    inside = 3 * len("class_0000")
    # Two numbers for each name, and four for the state of each of the four folders.
    assert row["listing MB"] == (text + 30 * 16 + inside + 4 * 16 + 4 * 32) / 1e6
    assert row["s"] > 0 and row["peak MB"] >= 0 and row["worker MB"] < 10


def test_reference_statistics_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_statistics, "WIDTH", 8)
    monkeypatch.setattr(reference_statistics, "SPATIAL", 5)
    reference_statistics.make_file(tmp_path / "v.npz", 2)
    with np.load(tmp_path / "v.npz") as file:
        assert file["arr_0"].shape == (2, 256, 256, 3) and file["arr_0"].dtype == np.uint8
        assert file["mu"].shape == (8,) and file["sigma_s"].shape == (5, 5)
    row = reference_statistics.read(str(tmp_path / "v.npz"))
    assert row["s"] > 0 and row["peak MB"] >= row["imports MB"]


def test_checkpoints_are_measured_with_the_whole_training_state(capsys):
    checkpoints.main([*SMALL, "--rounds", "1"])
    (row,) = report(capsys)["results"]
    given = variants.arguments("").parse_args(SMALL)
    work = train.training(variants.configured(given, 1)[0])
    parameters = sum(p.numel() for p in work.run.state["model"].parameters())
    assert 4 * 4 * parameters < 1e6 * row["file MB"] < 1.5 * (4 * 4 * parameters) + 2e5
    assert row["stall / file"] == pytest.approx(row["stall, s"] / row["file alone, s"])


def test_cost_of_a_checkpoint_is_its_stall_and_the_slowdown_of_steps():
    rounds = [checkpoints.Round(4.0, 10.0, 0.5, 10.25), checkpoints.Round(4.0, 12.0, 0.5, 12.25)]
    row = checkpoints.summary(rounds, first=1.0, size=10**9, steps=7)
    assert row["stall / file"] == 0.125 and row["lost to training / file"] == 0.75 / 4
    assert row["file MB"] == 1000 and row["first stall, s"] == 1.0 and row["steps"] == 7


@pytest.mark.parametrize("experiment", ("vp/digits_conditional", "vp/digits_superres"))
def test_the_training_step_of_a_conditional_network_is_told_its_condition(experiment):
    work = train.training(small_config(experiment))
    assert work.call().isfinite() and work.run.state["step"] == 1


def test_samplers_make_the_evaluations_that_were_asked_for():
    run = setup(small_config("vp/digits"))
    cases = samplers.cases(beta_max=20)
    few = [case for case in cases if case[1]["num_steps"] in (5, 10)]
    assert {name for name, _ in cases} == {*samplers.SAMPLERS, *samplers.ADAPTIVE}
    for name, options in few:
        run.config.sampling.update(options)
        images, evaluations = samplers.draw(run, 2)
        assert images.shape == (2, *run.shape)
        wanted = options["num_steps"] * samplers.SAMPLERS[name][1]
        assert abs(evaluations - wanted) <= 1, name


def test_some_samplers_are_measured_alone(monkeypatch, capsys, tmp_path):
    run = setup(small_config("vp/digits"))
    drawn = []

    def draw(run, count):
        drawn.append((run.config.sampling.method, run.config.sampling.num_steps, count))
        return torch.zeros(count, *run.shape), 7.5

    stand_ins = {"restored": lambda *_: run, "load_dataset_stats": lambda *_: None, "draw": draw}
    stand_ins |= {"fid": lambda *_: 0.5, "plot": lambda *_: None}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(samplers, name, stand_in)
    given = ["--workdir", str(tmp_path), "--num_samples", "3", "--evaluations", "10", "20"]
    samplers.main([*given, "--samplers", "RK45", "Heun"])
    assert drawn == [("heun", 5, 3), ("heun", 10, 3), ("ode", 0, 3)]
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert rows[-1] == {"sampler": "RK45", "evaluations": 7.5, "fid": 0.5}
    with pytest.raises(SystemExit):
        samplers.main([*given, "--samplers", "Euler"])
    assert "'Euler' (choose from" in capsys.readouterr().err


def test_samplers_draw_the_classes_of_a_conditional_network():
    """As the run itself does, on the config's grid of times."""
    changes = {"sampling__method": "ddim", "sampling__guidance_scale": 2.0}
    run = setup(small_config("vp/digits_conditional", **changes))
    for average in run.state["ema"].shadow_params:  # the last layer is 0 at first
        average += 0.1 * torch.randn_like(average)
    (options,) = (o for name, o in samplers.cases(20, (5,), (), "edm") if name == "DDIM")
    run.config.sampling.update(options)
    images, _ = samplers.draw(run, 3)
    torch.testing.assert_close(images, run.draw(range(3)), rtol=0, atol=0)
    grids = {o["method"]: o.get("time_grid") for _, o in samplers.cases(20, (80,), (), "edm")}
    assert grids["pc"] == grids["ode"] == "" and grids["dpmpp_3m"] == "edm"


def test_share_of_a_variance_has_the_error_of_a_paired_ratio():
    part, whole = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 5.0, 5.0, 12.0])
    assert objectives.share(part, whole).mean() == pytest.approx(0.5)
    assert objectives.share(whole / 4, whole) == pytest.approx(np.full(4, 0.25))
    # The first two moments of the differences from the line through the origin.
    expected = (part - 0.5 * whole).std() / whole.mean()
    assert objectives.share(part, whole).std() == pytest.approx(expected)


def test_objectives_are_compared_for_a_mixture_and_for_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(objectives, "AT_ONCE", 6)
    config = small_config(training__n_iters=1, training__snapshot_sampling=False)
    train_run(config, tmp_path)
    capsys.readouterr()
    objectives.main([str(tmp_path), "--num_data", "3", "--draws", "4"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    cases = [*(f"mixture, {name}" for name in objectives.PROCESSES), "digits, vpsde"]
    pairs = [(case, times) for case in cases for times in ("uniform", "likelihood")]
    assert [(row["case"], row["times"]) for row in found] == pairs
    assert all(math.isfinite(row["loss"]) and row["variance"] > 0 for row in found)
    assert all(("of uniform" in row) == (row["times"] == "likelihood") for row in found)


def test_training_on_an_array_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SHAPE", (1, 4, 4))
    arrays.make_array(tmp_path / "a.npy", 40)
    assert np.load(tmp_path / "a.npy").std() == pytest.approx(1, abs=0.1)
    row = arrays.measure(str(tmp_path / "a.npy"), 2)
    assert 0 < row["imports MB"] <= row["peak MB"] and row["pass s"] > 0 and row["training s"] > 0
