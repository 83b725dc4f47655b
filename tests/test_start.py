"""Runs that start from other weights: `model.weights`."""

import json
import shutil

import pytest
import torch
from small_runs import small_config

import run_lib
from score_lib.disk.checkpoints import CheckpointError, read_checkpoint
from score_lib.disk.safetensors_files import write_safetensors
from score_lib.runs.start import META, is_own

pytestmark = pytest.mark.slow  # whole runs

QUIET = {"training__snapshot_sampling": False, "training__eval_freq": 50, "training__log_freq": 50}


def config(weights="", **changes):
    return small_config(**{**QUIET, "model__weights": str(weights), **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a run whose average differs from its weights."""
    folder = tmp_path_factory.mktemp("source")
    run_lib.train(config(training__n_iters=3, optim__lr=0.05, optim__warmup=0), folder)
    return folder


@pytest.fixture(scope="module")
def expected(source):
    """The average of that run by name, and its samples."""
    run = run_lib.restored(config(), source)
    run.state["ema"].copy_to(run.state["model"].parameters())
    return run.state["model"].state_dict(), run.draw(range(2))


def wrapped(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


LAYOUTS = {
    "checkpoint": lambda contents, named: contents,
    "published": lambda contents, named: {k: contents[k] for k in ("model", "ema", "step")},
    "average": lambda contents, named: {"ema": contents["ema"]},
    "shadow_params": lambda contents, named: contents["ema"],
    "named average": lambda contents, named: {"ema": wrapped(named, "module.")},
    "bare": lambda contents, named: named,
    "compiled": lambda contents, named: wrapped(named, "_orig_mod."),
    "both": lambda contents, named: wrapped(named, "module._orig_mod."),
    "both turned": lambda contents, named: wrapped(named, "_orig_mod.module."),
    "half": lambda contents, named: {k: v.half() for k, v in named.items()},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors"])
def test_every_layout_gives_the_average(layout, source, expected, tmp_path):
    named, samples = expected
    contents = read_checkpoint(source / META)
    path = tmp_path / "weights.pth"
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        write_safetensors(path, wrapped(named, "module."), {"step": "3"})
    else:
        torch.save(LAYOUTS[layout](contents, named), path)
    run = run_lib.restored(config(path), tmp_path / "empty")
    found = dict(run.state["model"].state_dict())
    tolerances = {"rtol": 1e-3, "atol": 1e-7} if layout == "half" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, dict(named), **tolerances)
    if layout in ("checkpoint", "safetensors"):
        assert torch.equal(run.draw(range(2)), samples)
    assert run.state["step"] == (3 if layout in ("checkpoint", "published", "safetensors") else 0)


def test_training_and_all_averages_start_there(source, expected, tmp_path):
    """The file's average, with steps so small that they change nothing in float32."""
    named, _ = expected
    changes = {"training__n_iters": 1, "optim__lr": 1e-12, "model__ema_rates": (0.5,)}
    weights = source / META
    run_lib.train(config(weights, **changes), tmp_path)
    contents = read_checkpoint(tmp_path / META)
    assert contents["step"] == 1 and contents["ema"]["num_updates"] == 1
    assert contents["optimizer"]["state"][0]["step"] == 1
    trained = {name.removeprefix("module."): v for name, v in contents["model"].items()}
    torch.testing.assert_close(trained, dict(named), rtol=0, atol=1e-8)
    averaged = [named[name] for name in named if name != "sigmas"]
    for average in (contents["ema"], contents["averages"]["0.5"]):
        torch.testing.assert_close(average["shadow_params"], averaged, rtol=0, atol=1e-8)
    (first,) = map(json.loads, (tmp_path / "config_history.jsonl").open())
    assert first["start"] == contents["start"]
    assert first["start"]["weights"] == str(weights) and len(first["start"]["digest"]) == 16
    assert "weights" not in first["config"]["model"]


def test_a_checkpoint_of_the_run_comes_first(source, tmp_path, caplog):
    """Also after the weights are gone; they may not even change what a resumed run says."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes((source / META).read_bytes())
    run_lib.train(config(weights, training__n_iters=2), tmp_path / "a")
    weights.unlink()
    caplog.set_level("INFO")
    run_lib.train(config(weights, training__n_iters=3), tmp_path / "a")
    assert "this run started from other weights" in caplog.text and "instead of" not in caplog.text
    first = json.loads((tmp_path / "a" / "config_history.jsonl").open().readline())
    assert read_checkpoint(tmp_path / "a" / META)["start"] == first["start"]
    assert run_lib.restored(config(weights), tmp_path / "a").state["step"] == 3
    chosen = config(source / META, eval__checkpoint=str(tmp_path / "a" / META))
    found = run_lib.restored(chosen, tmp_path / "none").state
    assert found["start"]["weights"] == str(weights)
    assert "start" not in run_lib.restored(config(), source).state


def test_weights_are_evaluated_where_a_run_has_none(source, tmp_path):
    options = {"eval__enable_bpd": False, "eval__enable_sampling": False, "eval__end_ckpt": 0}
    options |= {"eval__begin_ckpt": 0, "eval__loss_num_repeats": 1}
    (own,) = run_lib.evaluate(config(**options), source)
    (given,) = run_lib.evaluate(config(source / META, **options), tmp_path)
    assert given.pop("checkpoint") == "checkpoint" and own.pop("checkpoint") == "0"
    assert given == own and given["step"] == 3


def test_weights_do_not_pass_for_a_run_that_has_numbered_checkpoints(source, tmp_path):
    """Where that at which training resumes was removed, to save space, or was not copied."""
    options = config(source / META, training__n_iters=1)
    run_lib.train(options, tmp_path)
    shutil.rmtree((tmp_path / META).parent)
    with pytest.raises(FileNotFoundError, match=r"set eval.checkpoint to a file"):
        run_lib.sample(options, tmp_path)
    assert not is_own(config(source / META), tmp_path / "none") and is_own(options, tmp_path)


@pytest.mark.parametrize(
    "excepted, message",
    [
        ((), r"1 missing \(all_modules.2.weight\).*1 not in the network \(extra\).*1 of another "
             r"shape \(all_modules.0.weight \(3,\).*weights_except"),
        (("extra", "*.2.weight"), r"of its weights, 1 of another shape"),
        (("extra", "all_modules.[02].weight", "nothing.*"), "'nothing.*', which matches no"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(excepted, message, expected, tmp_path):
    path = tmp_path / "weights.pth"
    named = {**expected[0], "extra": torch.ones(1), "all_modules.0.weight": torch.ones(3)}
    del named["all_modules.2.weight"]
    torch.save(named, path)
    with pytest.raises(CheckpointError, match=message):
        run_lib.restored(config(path, model__weights_except=excepted), tmp_path / "empty")


def test_excepted_weights_stay_as_initialised(source, expected, tmp_path):
    """An average, whose list has no names, is assigned by the names of the file."""
    contents = read_checkpoint(source / META)
    del contents["model"]["module.all_modules.0.weight"], contents["ema"]["shadow_params"][0]
    save_path = tmp_path / "weights.pth"
    torch.save(contents, save_path)
    fresh = run_lib.setup(config()).state["model"].state_dict()
    options = {"model__weights_except": ("all_modules.0.*",)}
    found = run_lib.restored(config(save_path, **options), tmp_path).state["model"].state_dict()
    for name, value in found.items():
        source_of = fresh if name.startswith("all_modules.0.") else expected[0]
        assert torch.equal(value, source_of[name]), name


def test_weights_of_another_config_are_refused(source, expected, tmp_path):
    path = tmp_path / "weights.safetensors"
    trained = config(training__continuous=False).to_json_best_effort()
    write_safetensors(path, expected[0], {"config": trained})
    with pytest.raises(CheckpointError, match=r"training\.continuous = True instead of False"):
        run_lib.restored(config(path), tmp_path)
    with pytest.raises(ValueError, match=r"eval\.ema = '0.5'"):
        run_lib.restored(config(path, eval__ema="0.5"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at model"):
        run_lib.restored(config(tmp_path / "none"), tmp_path)


TINY = {"model__ch_mult": (1,), "model__attn_resolutions": ()}
# Networks that are told numbers of the levels, and some that are told sigma, or a time.
BY_NUMBER = {"ve/cifar10_ncsnpp": TINY, "ve/cifar10_ddpm": TINY, "ve/ncsnv2/cifar10": {}}
OTHERS = {"ve/cifar10_ncsnpp_continuous": TINY, "vp/digits": {}}


def of_levels(name, sigma_max, **changes):
    own = {**BY_NUMBER, **OTHERS}[name]
    options = {"data__image_size": 8, "device": "cpu", "data__dataset": "IMAGES", **own, **changes}
    return small_config(name, model__sigma_max=sigma_max, **options)


@pytest.mark.parametrize("door", ["weights.pth", "weights.safetensors", "checkpoint"])
@pytest.mark.parametrize("name", BY_NUMBER)
def test_weights_of_other_noise_levels_are_refused(name, door, tmp_path):
    """The output is divided by the stored ones, and is 1.8 times what the config means."""
    state = run_lib.setup(of_levels(name, 50.0)).state
    weights, path = state["model"].state_dict(), tmp_path / door
    option = "eval__checkpoint" if door == "checkpoint" else "model__weights"

    def load(weights, sigma_max):
        if path.suffix == ".safetensors":
            write_safetensors(path, weights)
        else:
            whole = {"model": weights, "ema": state["ema"].state_dict(), "step": 5}
            torch.save(whole if door == "checkpoint" else weights, path)
        run_lib.restored(of_levels(name, sigma_max, **{option: str(path)}), tmp_path)

    load(weights, 50.0)
    # Published tables are rounded otherwise than ours.
    load({key: value.to(torch.bfloat16) for key, value in weights.items()}, 50.0)
    message = r"noise levels: model\.sigma_max = 50 there and 90 in the config\. "
    with pytest.raises(CheckpointError, match=message):
        load(weights, 90.0)
    bent = weights["sigmas"].clone()
    bent[2] *= 1.01
    with pytest.raises(CheckpointError, match="other levels between"):
        load({**weights, "sigmas": bent}, 50.0)


@pytest.mark.parametrize("name", OTHERS)
def test_noise_levels_that_no_label_counts_mean_nothing(name, tmp_path):
    path = tmp_path / "w.pth"
    weights = run_lib.setup(of_levels(name, 50.0)).state["model"].state_dict()
    torch.save(weights, path)
    run = run_lib.restored(of_levels(name, 90.0, model__weights=str(path)), tmp_path)
    assert all(torch.equal(weights[k], p) for k, p in run.state["model"].named_parameters())


def test_a_table_of_averages_has_no_gaps(source, expected, tmp_path):
    """Only what is not trained may come from the weights beside it."""
    contents, path = read_checkpoint(source / META), tmp_path / "a.pth"
    trained = {name: value for name, value in expected[0].items() if name != "sigmas"}
    for count in (len(trained), len(trained) - 1, 0):
        table = wrapped(dict(list(trained.items())[:count]), "module.")
        torch.save({"model": contents["model"], "ema": table}, path)
        if count == len(trained):
            found = run_lib.restored(config(path), tmp_path).state["model"].state_dict()
            torch.testing.assert_close(dict(found), dict(expected[0]), rtol=0, atol=0)
            continue
        with pytest.raises(CheckpointError, match=rf"averages {count} of {len(trained)} weights"):
            run_lib.restored(config(path), tmp_path)
    torch.save({"ema": {k: v for k, v in trained.items() if ".0." not in k}}, path)
    excepted = {"model__weights_except": ("*.0.*",)}
    run_lib.restored(config(path, **excepted), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("option", ["model__weights", "eval__checkpoint"])
def test_weights_that_are_not_finite_are_refused(option, value, source, tmp_path):
    """In what is loaded: the average of a checkpoint, and weights alone."""
    path, contents = tmp_path / "a.pth", read_checkpoint(source / META)
    weights = {k.removeprefix("module."): v.clone() for k, v in contents["model"].items()}
    last = list(weights)[-1]
    weights[last].view(-1)[-1] = value
    averages = [v.clone() for v in contents["ema"]["shadow_params"]]
    averages[-1].view(-1)[-1] = value
    damaged = {**contents["ema"], "shadow_params": averages}
    for stored in (weights, {**contents, "ema": damaged}):
        torch.save(stored, path)
        with pytest.raises(
            CheckpointError, match=r"holds nan or inf in ('\S+'|averaged parameter)"
        ):
            run_lib.restored(config(**{option: str(path)}), tmp_path)


def test_none_is_the_weights_themselves_and_no_average(source, tmp_path):
    stored = read_checkpoint(source / META)["model"]
    own = {name.removeprefix("module."): weight for name, weight in stored.items()}
    for option in ("model__weights", "eval__checkpoint"):
        chosen = small_config(**QUIET, eval__ema="none", **{option: str(source / META)})
        run = run_lib.restored(chosen, tmp_path)
        torch.testing.assert_close(dict(run.state["model"].state_dict()), own, rtol=0, atol=0)
        parameters = [p for p in run.state["model"].parameters() if p.requires_grad]
        assert all(map(torch.equal, run.state["ema"].shadow_params, parameters))
    torch.save(read_checkpoint(source / META)["ema"], tmp_path / "average.pth")
    with pytest.raises(CheckpointError, match="holds an average alone"):
        run_lib.restored(config(tmp_path / "average.pth", eval__ema="none"), tmp_path)


def test_averages_are_in_the_order_of_the_network_whatever_that_of_the_file(
    source, expected, tmp_path
):
    contents = read_checkpoint(source / META)
    names, shapes = list(contents["model"]), {}
    for name in names:
        shapes.setdefault(contents["model"][name].shape, []).append(name)
    one, two, *_ = next(same for same in shapes.values() if len(same) > 1)
    swapped = [{one: two, two: one}.get(name, name) for name in names]
    contents["model"] = {name: contents["model"][name] for name in swapped}
    torch.save(contents, tmp_path / "a.pth")
    run = run_lib.restored(config(tmp_path / "a.pth"), tmp_path)
    torch.testing.assert_close(
        dict(run.state["model"].state_dict()), dict(expected[0]), rtol=0, atol=0
    )


def test_random_frequencies_of_the_input_come_from_the_file(tmp_path):
    """They are no table of the config: another seed draws others."""
    net = {"model__name": "mlp", "model__num_res_blocks": 1, "model__input_fourier_scale": 1.0}
    run = run_lib.setup(config(**net, seed=1))
    named = run.state["model"].state_dict()
    tables = {"bare": dict(named), "without": dict(named), "average": run.state["ema"].state_dict()}
    frequencies = tables["without"].pop("stem.frequencies")
    for name, table in tables.items():
        torch.save(table, tmp_path / f"{name}.pth")
        start = config(tmp_path / f"{name}.pth", **net, seed=2)
        if name == "bare":
            again = run_lib.restored(start, tmp_path).state["model"]
            assert torch.equal(again.stem.frequencies, frequencies)
        else:
            with pytest.raises(CheckpointError, match=r"1 missing \(stem\.frequencies\)"):
                run_lib.restored(start, tmp_path)


def test_averages_have_names_also_beside_weights_without_noise_levels(source, expected, tmp_path):
    contents = read_checkpoint(source / META)
    contents["model"] = {k: contents["model"][k] for k in sorted(contents["model"])}
    del contents["model"]["module.sigmas"]
    torch.save(contents, tmp_path / "a.pth")
    run = run_lib.restored(config(tmp_path / "a.pth"), tmp_path)
    torch.testing.assert_close(
        dict(run.state["model"].state_dict()), dict(expected[0]), rtol=0, atol=0
    )


@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_rounded_frequencies_are_told(embedding, tmp_path, caplog):
    net = {"model__embedding_type": embedding, "model__fourier_log": False}
    run = run_lib.setup(config(**net))
    named = run.state["model"].state_dict()
    frozen = {k for k, p in run.state["model"].named_parameters() if not p.requires_grad}
    halves = {name: value.half() for name, value in named.items()}
    for name, table in {"all": halves, "weights": halves | {k: named[k] for k in frozen}}.items():
        caplog.clear()
        torch.save(table, tmp_path / f"{name}.pth")
        run_lib.restored(config(tmp_path / f"{name}.pth", **net), tmp_path)
        is_told = "all_modules.0.W in float16: rounded frequencies" in caplog.text
        assert is_told == (name == "all" and embedding == "fourier")
