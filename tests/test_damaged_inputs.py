"""Damaged and hostile files are refused in one line; a full disk leaves earlier files alone."""

import io
import json
import os
import resource
import zipfile

import numpy as np
import pytest
import torch
from faults import bad_checkpoints, bad_records, bad_zips, cases, damaged_inputs
from faults.forked import call
from PIL import Image

from datasets import DataError
from score_lib.data import arrays, images, sources, tfrecords
from score_lib.disk import arrays as npz
from score_lib.disk import files
from score_lib.disk.checkpoints import CheckpointError, restore_checkpoint, save_checkpoint
from score_lib.disk.pictures import save_grid
from score_lib.disk.reports import save_histogram, write_report
from score_lib.metrics import stats

EVERY = list(damaged_inputs.all_cases())
KINDS = sorted({case.kind for case in EVERY})
# One of each kind, and in `test_every_fourth_case` a quarter; `make faults` runs all of them.
FIRST = {case.kind: case for case in reversed(EVERY)}


@pytest.mark.slow
def test_cases_are_many_and_reproducible():
    again = list(damaged_inputs.all_cases())
    assert [(c.kind, c.name) for c in again] == [(c.kind, c.name) for c in EVERY]
    assert len(EVERY) == len(set((c.kind, c.name) for c in EVERY)) > 500
    assert all(case.expect == "refused" for case in EVERY if "programs" in case.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_case_of_each_kind(kind):
    assert damaged_inputs.run(FIRST[kind]).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_fourth_case(kind):
    results = [damaged_inputs.run(c) for c in [c for c in EVERY if c.kind == kind][1::4]]
    assert {r.case.name: r.problems for r in results if r.problems} == {}


# --- The harness -----------------------------------------------------------------------


def problems(read, expect="refused", make=None):
    make = make or cases.written("x.bin", b"x")
    return damaged_inputs.run(cases.Case("kind", "name", make, read, expect, make)).problems


def refuse(text):
    def read(path):
        raise ValueError(text.format(path=path))

    return read


def run_program(path):
    (path.parent / cases.CANARY).mkdir()
    raise ValueError(f"{path} is refused, but too late")


def write_outside(path):
    (path.parent.parent / "escaped").touch()
    raise ValueError(f"{path} is refused, but too late")


def fill_memory(path):
    kept = np.ones(50_000_000)
    raise ValueError(f"{path} is refused, but too late{kept[0]}")


def raise_key_error(path):
    raise KeyError(str(path))


@pytest.mark.parametrize(
    "read, complaint",
    [
        (refuse("{path} is damaged"), None),
        (refuse("it is damaged, whatever it is"), "does not name the file"),
        (refuse("{path} is\ndamaged"), "not one line"),
        (refuse("{path} is \x1b[31mdamaged"), "not one line"),
        (refuse("{path} is damaged" * 99), "not one line"),
        (raise_key_error, "KeyError"),
        (str, "it was read"),
        (run_program, "code was run"),
        (write_outside, "outside of its folder"),
        (fill_memory, "MiB"),
        (lambda path: os._exit(3), "died: exit code 3"),
    ],
)
def test_problems_are_found(read, complaint):
    found = problems(read)
    assert (found == []) if complaint is None else complaint in "; ".join(found)


def test_hanging_reads_are_ended():
    outcome = call(lambda: io.FileIO(os.pipe()[0]).read(), seconds=0.3, growth=100)
    assert outcome.error == "took too long" and 0.3 <= outcome.seconds < 5


def test_reading_other_contents_than_the_original_is_found():
    def make(folder):
        (folder / "x.bin").write_bytes(b"changed" if folder.name == "input" else b"whole")
        return folder / "x.bin"

    def read(path):
        return path.read_bytes().decode()

    assert problems(read, "refused or same", make) == ["it was read as something else than it was"]
    assert problems(read, "refused or valid", make) == []
    assert problems(lambda path: path.name, "refused or same", make) == []


# --- Files ----------------------------------------------------------------------------------------


def test_text_from_files_is_shown_on_one_line():
    assert files.printable("a\n\x1b[31mb\udcff") == "a\\n\\x1b[31mb\\udcff"
    assert files.printable("Größe 東京") == "Größe 東京"
    assert len(files.printable("a" * 10**6)) == 300
    assert str(DataError("a\nb")) == "a\\nb" and str(CheckpointError("a\nb")) == "a\\nb"


def test_arrays_of_every_dtype_round_trip(tmp_path):
    values = {
        "scalar": np.array(3.0),
        "text": np.array("words"),
        "empty": np.zeros((0, 5)),
        "nothing": np.array(""),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "half": np.ones((2, 3), np.float16),
        "flags": np.array([True, False]),
        "big-endian": np.arange(4, dtype=">i4"),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **values)
        found = npz.load_arrays(tmp_path / "a.npz")
        assert list(found) == list(values)
        for name, value in values.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype
    assert list(npz.load_arrays(tmp_path / "a.npz", ["half"])) == ["half"]
    assert npz.array_sizes(tmp_path / "a.npz").keys() == values.keys()


def test_only_requested_arrays_are_unpacked(tmp_path):
    good = io.BytesIO()
    np.save(good, cases.images(3))
    bomb = bad_zips.Entry("other.npy", bad_zips.deflated_zeros(1 << 30), 1 << 30)
    whole = bad_zips.Entry(
        "images.npy", good.getvalue(), len(good.getvalue()), 0, 0, zipfile.crc32(good.getvalue())
    )
    path = tmp_path / "x.npz"
    path.write_bytes(bad_zips.archive_of(whole, bomb))
    outcome = call(lambda: cases.read_training_images(path), seconds=10, growth=100)
    assert not outcome.error and outcome.growth < 100, outcome


def test_arrays_above_half_of_the_memory_are_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", a=np.zeros(1000))
    monkeypatch.setattr(npz, "total_memory", lambda: 16_255)
    with pytest.raises(ValueError, match=r"a\.npz .*over half of the memory"):
        npz.load_arrays(tmp_path / "a.npz")
    monkeypatch.setattr(npz, "total_memory", lambda: 16_256)  # 8,000 bytes behind 128
    assert len(npz.load_arrays(tmp_path / "a.npz")["a"]) == 1000


def test_images_above_the_limit_of_pixels_are_refused(tmp_path, monkeypatch):
    Image.fromarray(cases.images(1, 12)[0]).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", cases.images(1, 12))
    for module, path in ((images, "x.png"), (arrays, "x.npy")):
        monkeypatch.setattr(module, "MAX_PIXELS", 144)
        cases.read_images(tmp_path / path)
        monkeypatch.setattr(module, "MAX_PIXELS", 143)
        with pytest.raises(DataError, match=rf"{path} .*12 x 12, above the limit of 143 pixels"):
            cases.read_images(tmp_path / path)


def test_labels_above_the_limit_of_classes_are_refused(tmp_path):
    for highest, fits in ((sources.MAX_CLASSES - 1, True), (sources.MAX_CLASSES, False)):
        np.savez(tmp_path / "a.npz", images=cases.images(2), labels=np.array([0, highest]))
        if fits:
            cases.read_training_images(tmp_path / "a.npz")
        else:
            with pytest.raises(DataError, match="labels must be"):
                cases.read_training_images(tmp_path / "a.npz")


def test_records_above_the_limit_are_refused(tmp_path, monkeypatch):
    small, large = (bad_records.record(bytes(size)) for size in (100, 101))
    count = 70_000
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(small * count + large)
    monkeypatch.setattr(tfrecords, "MAX_RECORD", 101)
    assert len(tfrecords.RecordFiles([tmp_path / "x"])) == count + 1
    monkeypatch.setattr(tfrecords, "MAX_RECORD", 100)
    place = rf"record {count} of .*\(byte {116 * count}\)"
    with pytest.raises(DataError, match=rf"{place} claims 101 bytes"):
        tfrecords.RecordFiles([tmp_path / "y"])


def test_links_out_of_a_folder_are_refused(tmp_path):
    inside = tmp_path / "data"
    inside.mkdir()
    Image.fromarray(cases.images(1)[0]).save(inside / "a.png")
    Image.fromarray(cases.images(1)[0]).save(tmp_path / "outside.png")
    (inside / "b.png").symlink_to(inside / "a.png")
    (tmp_path / "way in").symlink_to(inside)
    for place in (inside, tmp_path / "way in"):
        cases.read_images(place)
    (inside / "c.png").symlink_to("../outside.png")
    for place in (inside, tmp_path / "way in"):
        with pytest.raises(DataError, match=r"c\.png .* link that leads out of the folder"):
            cases.read_images(place)


def test_backslashes_between_the_folders_of_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("train\\cat.png", "test\\cat.png"):
            file.writestr(name, b"any")
    with pytest.raises(DataError, match=r"'test\\\\cat.png', whose folders are separated by back"):
        cases.read_images(tmp_path / "a.zip")


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (torch.float64, torch.float16, torch.bfloat16))
def test_weights_of_any_precision_load(tmp_path, kind):
    contents = bad_checkpoints.contents()
    contents["model"] = {key: value.to(kind) for key, value in contents["model"].items()}
    torch.save(contents, tmp_path / "c.pth")
    restored = restore_checkpoint(tmp_path / "c.pth", bad_checkpoints.state(1), "cpu")
    for key, value in restored["model"].state_dict().items():
        torch.testing.assert_close(value, contents["model"][key].to(value), rtol=0, atol=0)


def test_numbers_in_other_forms_load(tmp_path):
    contents = bad_checkpoints.contents()
    contents["step"] = torch.tensor(7)
    group = contents["optimizer"]["param_groups"][0]
    group["lr"], group["eps"] = np.float64(0.5), np.float32(1e-8)
    group["betas"] = (torch.tensor(0.5), 0.999)
    contents["optimizer"]["state"][0]["step"] = 3
    torch.save(contents, tmp_path / "c.pth")
    restored = restore_checkpoint(tmp_path / "c.pth", bad_checkpoints.state(1), "cpu")
    assert restored["step"] == 7 and type(restored["step"]) is int
    (group,) = restored["optimizer"].param_groups
    assert group["lr"] == 0.5 and group["betas"] == (0.5, 0.999)
    assert type(group["betas"][0]) is float


def test_steps_go_on_as_this_program_and_machine_compute_them(tmp_path):
    """After those of a captured graph on a GPU, which read the learning rate from a tensor."""
    contents = bad_checkpoints.contents()
    group = contents["optimizer"]["param_groups"][0]
    group |= {"lr": torch.tensor(0.5), "capturable": True, "fused": None, "foreach": True}
    group |= {"maximize": True, "decoupled_weight_decay": True}  # as of AdamW
    torch.save(contents, tmp_path / "c.pth")
    state = bad_checkpoints.state(1)
    parameters = list(state["model"].parameters())
    state["optimizer"] = torch.optim.Adam(parameters, lr=0.1, fused=True)
    (group,) = restore_checkpoint(tmp_path / "c.pth", state, "cpu")["optimizer"].param_groups
    assert (group["fused"], group["foreach"], group["capturable"]) == (True, None, False)
    assert not (group["maximize"] or group["decoupled_weight_decay"])
    assert group["lr"] == 0.5 and type(group["lr"]) is float
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    state["optimizer"].step()


@pytest.mark.parametrize("kind", ("SGD", "Adamax", "RMSprop"))
def test_the_state_of_another_optimiser_is_refused(tmp_path, kind):
    """Its settings or what it keeps of a parameter would be missing at the next step."""
    contents = bad_checkpoints.contents()
    parameters = list(bad_checkpoints.state()["model"].parameters())
    other = getattr(torch.optim, kind)(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    torch.save({**contents, "optimizer": other.state_dict()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"another optimiser than Adam, .* by model\.weights"):
        restore_checkpoint(tmp_path / "c.pth", bad_checkpoints.state(1), "cpu")


def test_a_checkpoint_before_the_first_step_loads(tmp_path):
    state = bad_checkpoints.state()
    state["optimizer"] = torch.optim.Adam(state["model"].parameters())
    save_checkpoint(tmp_path / "c.pth", {**state, "step": 0})
    assert restore_checkpoint(tmp_path / "c.pth", bad_checkpoints.state(1), "cpu")["step"] == 0


# --- A full disk ----------------------------------------------------------------------------------

LARGE = np.random.default_rng(0).random(100_000)


def write_array(path, values):
    with files.atomic_write(path) as file:
        np.save(file, values, allow_pickle=False)


WRITERS = {
    "c.pth": lambda path: save_checkpoint(
        path, {**bad_checkpoints.state(), "more": LARGE.tolist()}
    ),
    "a.npz": lambda path: npz.save_arrays(path, values=LARGE),
    "s.npz": lambda path: stats.save_statistics(
        path, stats.Statistics(pool_3=LARGE.reshape(-1, 10))
    ),
    "sample.np": lambda path: write_array(path, LARGE),
    "report.json": lambda path: write_report(path.parent, [{"a": 1.0}] * 5000),
    "samples.png": lambda path: save_grid(path, torch.rand(4, 3, 64, 64)),
    "bpd.png": lambda path: save_histogram(path, LARGE, "bits/dim"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", (0, 5_000))
@pytest.mark.quick_cases(4)
def test_a_full_disk_keeps_the_previous_file(name, limit, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"previous")

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        WRITERS[name](path)

    outcome = call(write, seconds=30, growth=500)
    assert outcome.error == "OSError" and str(path) in outcome.message, outcome
    assert outcome.message.isprintable() and "None" not in outcome.message, outcome
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == [name]


def test_a_damaged_config_is_replaced(tmp_path):
    from configs.defaults import load

    for damage in (b"\xff\xfe", b"", b"[" * 10**6):
        (tmp_path / "config.json").write_bytes(damage)
        files.open_folder(tmp_path, load("vp/digits"))
        assert json.loads((tmp_path / "config.json").read_text())["seed"] == 42
    assert os.listdir(tmp_path) == ["config.json"]
