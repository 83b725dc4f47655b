"""Checkpoints: published layouts load; mismatched and damaged files are refused."""

import copy
import fractions
import gzip
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from small_runs import small_config

import run_lib
from models.precision import InBfloat16
from score_lib.disk.checkpoints import (
    CheckpointError,
    glance,
    read_checkpoint,
    restore_checkpoint,
    restore_latest,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def state():
    """A trained state, after a few steps."""
    run = run_lib.setup(small_config())
    run.add_optimizer()
    train_step, _ = run.step_fns()
    torch.manual_seed(0)
    for _ in range(3):
        train_step(run.state, torch.rand(4, *run.shape))
    return run.state


@pytest.fixture
def fresh():
    run = run_lib.setup(small_config(seed=1))
    run.add_optimizer()
    return run.state


def assert_same(one, other):
    torch.testing.assert_close(
        dict(one["model"].state_dict()), dict(other["model"].state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(one["ema"].state_dict(), other["ema"].state_dict(), rtol=0, atol=0)
    if "optimizer" in one:
        torch.testing.assert_close(
            one["optimizer"].state_dict(), other["optimizer"].state_dict(), rtol=0, atol=0
        )
    assert one["step"] == other["step"]


def published(state, old_numpy=True):
    """The state as published files hold it: wrapped names, and a NumPy learning rate."""
    optimizer = copy.deepcopy(state["optimizer"].state_dict())
    optimizer["param_groups"][0]["lr"] = np.float64(2e-4)
    for values in optimizer["state"].values():
        values["step"] = int(values["step"])  # older PyTorch counted with plain numbers
    for key in ("foreach", "maximize", "capturable", "differentiable", "fused"):
        optimizer["param_groups"][0].pop(key, None)  # and had fewer options
    return {
        "optimizer": optimizer,
        "model": {f"module.{k}": v for k, v in state["model"].state_dict().items()},
        "ema": state["ema"].state_dict(),
        "step": state["step"],
    }


def test_round_trip(state, fresh, tmp_path):
    path = tmp_path / "deep" / "checkpoint.pth"
    save_checkpoint(path, {**state, "position": 48})
    restored = restore_checkpoint(path, {**fresh, "position": 0}, "auto")
    assert_same(restored, state)
    assert restored["position"] == 48
    assert os.listdir(path.parent) == ["checkpoint.pth"]


def test_written_names_are_the_published_ones(state, tmp_path):
    """The published code wraps its network, then loads with strict=False: other names are lost."""
    wrappers = {
        "plain": lambda model: model,
        "parallel": torch.nn.DataParallel,
        "compiled": torch.compile,
        "bfloat16": InBfloat16,
    }
    for name, wrap in wrappers.items():
        save_checkpoint(tmp_path / name, {**state, "model": wrap(state["model"])})
        written = torch.load(tmp_path / name, weights_only=True)["model"]
        assert list(written) == [f"module.{key}" for key in state["model"].state_dict()], name
        fits = torch.nn.DataParallel(state["model"]).load_state_dict(written, strict=False)
        assert not fits.missing_keys and not fits.unexpected_keys


@pytest.mark.parametrize("prefix", ("", "module.", "_orig_mod.", "module._orig_mod.", "net."))
def test_weights_of_wrapped_networks_load(prefix, state, fresh, tmp_path):
    contents = published(state)
    plain = {key.removeprefix("module."): value for key, value in contents["model"].items()}
    contents["model"] = {prefix + key: value for key, value in plain.items()}
    torch.save(contents, tmp_path / "c.pth")
    loaded = restore_checkpoint(tmp_path / "c.pth", fresh, "cpu")["model"].state_dict()
    torch.testing.assert_close(dict(loaded), dict(state["model"].state_dict()), rtol=0, atol=0)


def test_restored_state_is_independent_of_the_file(state, fresh, tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, state)
    restored = restore_checkpoint(path, fresh, "cpu")
    size = path.stat().st_size
    path.write_bytes(bytes(size))  # in place
    assert_same(restored, state)


def test_resuming_loads_each_file_once(state, fresh, tmp_path, monkeypatch):
    path, loaded, load = tmp_path / "checkpoint.pth", [], torch.load

    def counted(path, **options):
        loaded.append(path.name)
        return load(path, **options)

    for step in (1, 2):
        save_checkpoint(path, {**state, "step": step}, keep=1)
    monkeypatch.setattr(torch, "load", counted)
    assert restore_latest(path, fresh, "cpu") == path and fresh["step"] == 2
    assert loaded == ["checkpoint.pth"]


def test_a_glance_tells_plain_values_and_reads_no_tensor(state, tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {**state, "config": "{}", "best": {"step": 2}})
    contents = bytearray(path.read_bytes())
    weights = max(state["model"].state_dict().values(), key=torch.numel)
    contents[contents.index(weights.contiguous().numpy().tobytes())] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    found = glance(path)
    assert (found["step"], found["config"], found["best"]) == (3, "{}", {"step": 2})
    assert not {"model", "ema", "optimizer"} & found.keys()
    for damaged in (contents[:1000], b"", b"text", pickle.dumps(print)):
        path.write_bytes(damaged)
        assert glance(path) == {}
    assert glance(tmp_path / "none.pth") == glance(tmp_path) == {}


@pytest.mark.parametrize("legacy", (False, True), ids=("zip", "legacy"))
def test_published_layouts_load(state, fresh, tmp_path, legacy):
    path = tmp_path / "checkpoint_8.pth"
    torch.save(published(state), path, _use_new_zipfile_serialization=not legacy)
    restored = restore_checkpoint(path, fresh, "cpu", must_exist=True)
    torch.testing.assert_close(
        dict(restored["model"].state_dict()), dict(state["model"].state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(
        restored["ema"].shadow_params, state["ema"].shadow_params, rtol=0, atol=0
    )
    assert restored["step"] == 3
    assert restored["optimizer"].param_groups[0]["lr"] == 2e-4
    assert type(restored["optimizer"].param_groups[0]["lr"]) is float
    # The optimiser can continue.
    for parameter in restored["model"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    restored["optimizer"].step()


def test_numpy_scalars_load_under_their_old_name(state, fresh, tmp_path):
    """Published files were written when NumPy's core was numpy.core."""
    path, renamed = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(published(state), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                assert b"numpy._core" not in data
            target.writestr(name, data)
    assert restore_checkpoint(renamed, fresh, "cpu")["step"] == 3


@pytest.mark.parametrize(
    "kind", (float, np.float64, np.int64, torch.tensor), ids=lambda kind: kind.__name__
)
def test_steps_may_be_any_whole_numbers(state, fresh, tmp_path, kind):
    """Files that other frameworks' were converted to hold 3.0, or NumPy's."""
    contents = published(state) | {"step": kind(3)}
    contents["ema"]["num_updates"] = kind(3)
    torch.save(contents, tmp_path / "c.pth")
    restored = restore_checkpoint(tmp_path / "c.pth", fresh, "cpu")
    for number in (restored["step"], restored["ema"].num_updates):
        assert number == 3 and type(number) is int


def test_evaluation_needs_no_optimizer(state, fresh, tmp_path):
    torch.save(published(state), tmp_path / "c.pth")
    del fresh["optimizer"]
    assert restore_checkpoint(tmp_path / "c.pth", fresh, "cpu")["step"] == 3


@pytest.mark.parametrize("prefix", ("", "module.", "score_model."))
@pytest.mark.parametrize("bare", (True, False))
def test_weights_alone_are_their_own_average(prefix, bare, state, fresh, tmp_path, caplog):
    """For evaluation and sampling; the step of an earlier file does not stay."""
    weights = {prefix + key: value for key, value in state["model"].state_dict().items()}
    torch.save(weights if bare else {"model": weights}, tmp_path / "c.pth")
    del fresh["optimizer"]
    restored = restore_checkpoint(tmp_path / "c.pth", {**fresh, "step": 7}, "cpu")
    assert restored["step"] == 0
    assert "no 'ema' and no 'step'" in caplog.text and "own average" in caplog.text
    for name, own in restored["model"].state_dict().items():
        torch.testing.assert_close(own, state["model"].state_dict()[name], rtol=0, atol=0)
    trained = [p for p in state["model"].parameters() if p.requires_grad]
    torch.testing.assert_close(restored["ema"].shadow_params, trained, rtol=0, atol=0)
    torch.save({prefix + "sigmas": torch.zeros(5)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"does not fit this network: .*missing"):
        restore_checkpoint(tmp_path / "c.pth", fresh, "cpu")


def test_samples_are_drawn_from_weights_alone(state, tmp_path):
    torch.save(state["model"].state_dict(), tmp_path / "c.pth")
    config = small_config(eval__checkpoint=str(tmp_path / "c.pth"), sampling__num_samples=1)
    run_lib.sample(config, tmp_path)
    assert list(tmp_path.rglob("sample*.png"))


# --- Other members of a state -------------------------------------------------------------------


class Unloadable:
    """A live object without a state."""


def scheduled(state):
    optimizer = copy.deepcopy(state["optimizer"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    return {**state, "optimizer": optimizer, "scheduler": scheduler}


def test_live_objects_load(state, fresh, tmp_path):
    path, saved = tmp_path / "c.pth", scheduled(state)
    for _ in range(3):
        saved["optimizer"].step()
        saved["scheduler"].step()
    save_checkpoint(path, {**saved, "best": 0.5, "history": [1.0, 2.0]})
    scheduler = scheduled(fresh)["scheduler"]
    restored = restore_checkpoint(path, {**fresh, "scheduler": scheduler, "best": None}, "cpu")
    assert restored["scheduler"] is scheduler and scheduler.last_epoch == 3
    assert scheduler.state_dict() == saved["scheduler"].state_dict()
    assert restored["best"] == 0.5 and "history" not in restored


def test_other_objects_stay_and_are_named(state, fresh, tmp_path, caplog):
    save_checkpoint(tmp_path / "c.pth", {**state, "config": "{}"})
    scheduler, mine = scheduled(fresh)["scheduler"], Unloadable()
    before = scheduler.state_dict()
    state = {**fresh, "config": mine, "scheduler": scheduler, "other": Unloadable()}
    restored = restore_checkpoint(tmp_path / "c.pth", state, "cpu")
    assert restored["config"] is mine and scheduler.state_dict() == before
    assert "'config' stays as it is" in caplog.text and "'scheduler' stays" in caplog.text
    assert "'other'" not in caplog.text


@pytest.mark.parametrize("wrong", (3, {"scheduler": 1}))
def test_a_state_that_does_not_fit_changes_nothing(wrong, state, fresh, tmp_path):
    other = torch.nn.Linear(1, 1)
    contents = {**published(state), "other": other.state_dict(), "scheduler": wrong}
    torch.save(contents, tmp_path / "c.pth")
    mine = {**fresh, "other": torch.nn.Linear(1, 1), "scheduler": torch.nn.Linear(1, 1)}
    before, weight = copy.deepcopy(fresh), mine["other"].weight.clone()
    with pytest.raises(CheckpointError, match="'scheduler' that does not fit"):
        restore_checkpoint(tmp_path / "c.pth", mine, "cpu")
    assert_same(fresh, before)
    assert torch.equal(mine["other"].weight, weight)


# --- Files and mismatches -----------------------------------------------------------------------


@pytest.mark.parametrize("restore", (restore_checkpoint, restore_latest))
def test_a_missing_file_is_logged_or_an_error(restore, fresh, tmp_path, caplog):
    caplog.set_level("INFO")
    before = copy.deepcopy(fresh["model"].state_dict())
    path = tmp_path / "none.pth"
    restore(path, fresh, "cpu")
    assert str(path) in caplog.text
    torch.testing.assert_close(dict(fresh["model"].state_dict()), dict(before))
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        restore(path, fresh, "cpu", must_exist=True)


class Malicious:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("touch /dev/null/never",)


def wrong_shape(contents):
    key = next(k for k in contents["model"] if k.endswith("Conv_0.weight"))
    contents["model"][key] = contents["model"][key][:1]


def removed(*keys):
    def change(contents):
        target = contents
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


def one_less_average(contents):
    contents["ema"]["shadow_params"] = contents["ema"]["shadow_params"][:-1]


def replaced(key, value):
    return lambda contents: contents.update({key: value})


MISMATCHES = {
    "wrong shape": (wrong_shape, r"of another shape .*Conv_0\.weight"),
    "missing weight": (removed("model", "module.all_modules.0.weight"), "1 missing"),
    "no model": (removed("model"), "'model'"),
    "no averages": (removed("ema", "shadow_params"), "shadow_params"),
    "fewer averages": (one_less_average, "averages"),
    "weights of another network": (
        replaced("model", {"conv.weight": torch.zeros(3)}),
        r"missing .*not in the network \(conv.weight\)",
    ),
    "weights that are a number": (replaced("model", 3), "holds no weights"),
    "another optimiser": (
        replaced("optimizer", {"state": {}, "param_groups": [{"params": [0]}]}),
        "optimiser of 1",
    ),
    "no optimiser": (removed("optimizer"), "no 'optimizer', .*cannot resume"),
    "weights alone": (
        lambda contents: [contents.pop(key) for key in ("ema", "optimizer", "step")],
        "no 'ema' and no 'step' and no 'optimizer', .*cannot resume",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches_are_named_and_leave_the_state_unchanged(case, state, fresh, tmp_path):
    change, message = MISMATCHES[case]
    contents = published(state)
    change(contents)
    path = tmp_path / "c.pth"
    torch.save(contents, path)
    before = copy.deepcopy(fresh)
    with pytest.raises(CheckpointError, match=message) as error:
        restore_checkpoint(path, fresh, "cpu")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert_same(fresh, before)


def test_foreign_and_damaged_files_are_refused(state, tmp_path):
    good = tmp_path / "good.pth"
    save_checkpoint(good, state)
    data = good.read_bytes()
    files = {
        "empty": b"",
        "text": b"not a checkpoint\n" * 99,
        "truncated": data[: len(data) // 2],
        "headless": data[1000:],
        "pickle": pickle.dumps({"model": Malicious(), "ema": {}, "step": 0}),
        "image": b"\x89PNG\r\n\x1a\n" + bytes(500),
    }
    for name, contents in files.items():
        path = tmp_path / name
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint") as error:
            read_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), name
    torch.save({"model": Malicious(), "ema": {}, "step": 0}, tmp_path / "malicious.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "malicious.pth")
    for classes in ([], {"cat": "0"}):
        contents = {"model": {}, "ema": {}, "step": 0, "class_to_idx": classes}
        torch.save(contents, tmp_path / "classes.pth")
        with pytest.raises(CheckpointError, match="class_to_idx"):
            read_checkpoint(tmp_path / "classes.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="not list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="state_dict"):
        read_checkpoint(tmp_path / "other.pth")


def saved(path, write, **arrays):
    with path.open("wb") as file:
        write(file, **arrays)


def zipped(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"contents")


FOREIGN = {
    "an array of NumPy (.npy)": lambda path: saved(path, np.save, arr=np.zeros(3)),
    "an archive of NumPy's arrays (.npz)": lambda path: saved(path, np.savez, a=np.zeros(3)),
    "a .zip of other files": lambda path: zipped(path, ["a.txt", "b.npy"]),
    "a program of TorchScript": lambda path: zipped(path, ["a/data.pkl", "a/constants.pkl"]),
    "a picture (.png)": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)),
    "packed by gzip": lambda path: path.write_bytes(gzip.compress(bytes(100))),
    "text": lambda path: path.write_text('{"model": {}}\n'),
    "empty": pathlib.Path.touch,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_called_so(kind, tmp_path):
    path = tmp_path / "c.pth"
    FOREIGN[kind](path)
    with pytest.raises(CheckpointError, match=f"a checkpoint: it is {re.escape(kind)}$"):
        read_checkpoint(path)


@pytest.mark.parametrize("zip_file", (True, False))
def test_the_advice_to_run_code_is_not_passed_on(zip_file, tmp_path):
    """PyTorch's: to load a file without `weights_only`, or to allow what it holds."""
    path = tmp_path / "c.pth"
    for contents in ({"model": Malicious()}, {"model": fractions.Fraction(1)}):
        torch.save(contents, path, _use_new_zipfile_serialization=zip_file)
        with pytest.raises(CheckpointError, match=r"other than tensors and .*GLOBAL \w+") as error:
            read_checkpoint(path)
        assert not re.search(r"weights_only|safe_globals|Re-running|\n", str(error.value))
    path.write_bytes(pickle.dumps({"model": 1}, protocol=4))
    with pytest.raises(CheckpointError, match=r"plain values \(Unsupported operand 149\)$"):
        read_checkpoint(path)
