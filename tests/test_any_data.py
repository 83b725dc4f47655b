"""Data of any shape and type: arrays on disk, standardisation, streams, and runs on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import GaussianDataOracle
from PIL import Image
from recorder import Recorder
from small_runs import dotted

from configs.defaults import load
from datasets import DataError, MemorySource, Subset
from models.ema import ExponentialMovingAverage
from score_lib.data import standardization
from score_lib.data.kinds import check_options, kind_of
from score_lib.data.loading import get_scaling, get_streams
from score_lib.data.standardization import Standardization, fit
from score_lib.data.stored import open_rows
from score_lib.data.stream import ImageStream
from score_lib.inverse.measurements import Mask
from score_lib.inverse.restoration import STANDARDIZED
from score_lib.options import complete
from score_lib.runs.evaluate import evaluate
from score_lib.runs.image_tasks import _view, restore
from score_lib.runs.measures import likelihood_terms
from score_lib.runs.refusals import CHECKS
from score_lib.runs.rounds import Job
from score_lib.runs.samples import save_samples
from score_lib.runs.setup import setup
from score_lib.runs.start import META
from score_lib.runs.tasks import interval_coverage
from score_lib.runs.train import standardize, train, training_streams
from score_lib.runs.trained import load_trained, restored

SHAPES = {
    "vectors": (3,),
    "series": (2, 8),
    "points": (6, 2),
    "images": (2, 4, 4),
    "volumes": (1, 2, 4, 4),
}
EXPERIMENTS = {"images": "vp/fields"}
# Of a network whose output is meant as published.
EXACT = {"model__parametrization": "", "training__weighting": ""}


def numbers(count, shape, seed=0, dtype="f4"):
    """Random data whose entries differ in mean and deviation."""
    random = np.random.default_rng(seed)
    size = math.prod(shape)
    scales = np.linspace(0.5, 3, size).reshape(shape)
    return (random.normal(size=(count, *shape)) * scales + 10 * scales).astype(dtype)


def config_of(kind, path, **changes):
    """A small config for a kind of data at a path."""
    config = load(EXPERIMENTS.get(kind, f"vp/{kind}"))
    config.data.path, config.data.shape = str(path), SHAPES[kind]
    small = {
        "model.nf": 8 if kind in ("vectors", "points") else 32,
        "model.num_res_blocks": 1,
        "model.num_scales": 20,
        "training.batch_size": 8,
        "training.n_iters": 4,
        "training.snapshot_freq": 4,
        "training.snapshot_freq_for_preemption": 2,
        "training.eval_freq": 2,
        "training.log_freq": 1,
        "sampling.num_samples": 3,
        "sampling.num_steps": 2,
        "eval.num_samples": 6,
        "eval.loss_num_repeats": 1,
    }
    if "ch_mult" in config.model:
        small |= {"model.ch_mult": (1,), "model.attn_resolutions": ()}
    config.update_from_flattened_dict(small | dotted(changes))
    return config


# --- Arrays on disk ------------------------------------------------------------------------------


def write(path, array, how):
    """An array in a file of a format."""
    if how == "npz":
        np.savez(path, other=np.zeros(3), data=array, labels=np.arange(len(array)) % 3)
    elif how == "h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["group/weather"] = array
            file["labels"] = np.arange(len(array)) % 3
    else:
        np.save(path, np.asfortranarray(array) if how == "fortran" else array)
    return path


@pytest.mark.parametrize(
    "how, dtype",
    [("npy", "f4"), ("npy", ">f8"), ("npy", "f2"), ("fortran", "f4"), ("npz", "f8"), ("h5", "f4")],
)
def test_rows_are_read_in_any_order(tmp_path, how, dtype):
    array = numbers(12, (2, 5), dtype=dtype)
    ending = {"fortran": "npy"}.get(how, how)
    rows, labels = open_rows(write(tmp_path / f"a.{ending}", array, how))
    assert rows.shape == (12, 2, 5) and len(rows) == 12
    for chosen in ([3, 4, 5, 0], [11], [7, 2, 7], range(12)):
        assert np.array_equal(rows.read(np.array(chosen)), array[list(chosen)])
    assert (labels is not None) == (how in ("npz", "h5"))
    config = config_of("series", rows.path, data__shape=(2, 5))
    source = get_streams(config)[2].sources["train"]
    expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    assert source.dtype == (torch.float64 if dtype[-1] == "8" else torch.float32)
    assert torch.equal(source.images([0, 9]), expected[[0, 10]].to(source.dtype))
    assert source.num_classes == (3 if how in ("npz", "h5") else 1)


def test_a_folder_has_two_parts_and_labels_beside(tmp_path):
    data, other = numbers(7, (3,)), numbers(4, (3,), seed=1)
    np.save(tmp_path / "train.npy", data)
    np.save(tmp_path / "train_labels.npy", np.arange(7) % 2)
    np.savez(tmp_path / "test.npz", data=other)
    sources = get_streams(config_of("vectors", tmp_path))[2].sources
    assert torch.equal(sources["train"].images(range(7)), torch.from_numpy(data))
    assert torch.equal(sources["test"].images(range(4)), torch.from_numpy(other))
    assert sources["train"].num_classes == 2


def test_labels_of_one_part_alone_are_refused_for_networks_that_learn_them(tmp_path):
    np.save(tmp_path / "train.npy", numbers(7, (3,)))
    np.save(tmp_path / "train_labels.npy", np.arange(7) % 2)
    np.save(tmp_path / "test.npy", numbers(4, (3,), seed=1))
    config = config_of("vectors", tmp_path, data__num_classes=2, training__condition="classes")
    with pytest.raises(ValueError, match="those of the part 'test' of ARRAYS have none"):
        training_streams(setup(config))
    # Of one class, but labelled.
    np.save(tmp_path / "test_labels.npy", np.zeros(4, np.int64))
    training_streams(setup(config))
    (tmp_path / "test_labels.npy").unlink()
    training_streams(setup(config_of("vectors", tmp_path)))


@pytest.mark.parametrize(
    "split, held_out", [("", [9, 19]), ("tenths", [9, 19]), ("last", [18, 19])]
)
def test_parts_of_one_file(tmp_path, split, held_out):
    np.save(tmp_path / "a.npy", data := numbers(20, (3,)))
    sources = get_streams(config_of("vectors", tmp_path / "a.npy", data__split=split))[2].sources
    assert torch.equal(sources["test"].images([0, 1]), torch.from_numpy(data[held_out]))
    assert len(sources["train"]) == 18


@pytest.mark.parametrize("place", ["array", "folder"])
def test_the_last_tenth_of_images(tmp_path, place):
    pixels = np.arange(20, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    path = tmp_path / "a.npy"
    if place == "array":
        np.save(path, pixels)
    else:
        path.mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(path / f"{number:02}.png")
    config = load("vp/images")
    config.data.update(path=str(path), image_size=8, num_channels=1, split="last")
    sources = get_streams(config)[2].sources
    assert sources["test"].images([0, 1])[:, 0, 0, 0].tolist() == [18, 19]
    assert len(sources["train"]) == 18


DATA = numbers(20, (3,))
SEVENTEEN = {"data__levels": 17}
UNUSABLE = {
    "objects": (
        np.array([{}] * 20, dtype=object), {},
        "Python objects, as of rows of unequal shapes.*'POINTS'",
    ),
    "complex": (DATA + 1j, {}, "complex numbers.*np.stack"),
    "integers": (DATA.astype(int), {}, "whole numbers have no density.*data.levels"),
    "floats": (DATA, SEVENTEEN, "data.levels=0 for continuous"),
    "text": (np.full((20, 3), "x"), {}, "holds <U1: save floats of 16, 32 or 64 bits"),
    "levels": (
        np.full((20, 3), 17), SEVENTEEN,
        r"row 0 \(from 0\) .* holds 17, but data.levels=17 allows 0 to 16",
    ),
    "bytes": (
        np.full((20, 3), 17, np.uint8), SEVENTEEN,
        r"row 0 \(from 0\) .* holds 17, but data.levels=17 allows 0 to 16",
    ),
    "shape": (DATA[:, :2], {}, r"rows of shape \(2,\).*set data.shape=2"),
    "scalars": (DATA[:, 0], {}, r"rows of shape \(\).*saving each number as a row"),
    "nan": (
        np.where(np.arange(60).reshape(20, 3) == 40, np.nan, DATA), {},
        r"a.npy: row 13 \(from 0\) holds nan at entry \(1,\)",
    ),
    "folders": (DATA, {"data__split": "a:b"}, "data.split='a:b' names folders"),
    "key": (DATA, {"data__key": "weather"}, "data.key = 'weather' names an array in an .npz"),
}  # fmt: skip
DAMAGED = {
    "cut": (lambda content: content[:-100], r"cut short.*row 11 \(from 0\)"),
    "header": (lambda content: content.replace(b"(20, 3)", b"(20,-3)"), "not a readable array"),
    "huge": (lambda content: content.replace(b"(20, 3), }", b"(2000000, 3), }"), "cut short"),
    "empty": (lambda content: b"", "not a readable array"),
    "longer": (lambda content: content + content, "has 736 bytes, .* promises 368, .* a single"),
}


def assert_refused(path, message, **changes):
    with pytest.raises(DataError, match=message) as caught:
        for stream in get_streams(config_of("vectors", path, **changes), evaluation=True)[:2]:
            list(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array, changes, message", UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, array, changes, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert_refused(tmp_path / "a.npy", message, **changes)


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage, message):
    np.save(path := tmp_path / "a.npy", DATA)
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(path, message)


@pytest.mark.parametrize("rows, message", [
    ((8,), r"channel axis is missing, save array\[:, None\] and set data.shape=1,8; else .*=8$"),
    ((2, 8), r"but the config's data have \(1, 64\): set data.shape=2,8$"),
    ((8, 2), r"counts channels, save np.moveaxis\(array, -1, 1\) and .*=2,8; else .*=8,2$"),
])  # fmt: skip
@pytest.mark.quick_cases(3)
def test_a_missing_channel_axis_is_told(tmp_path, rows, message):
    """With data.shape=8 alone, the network of the config would be refused next."""
    np.save(tmp_path / "a.npy", numbers(20, rows))
    with pytest.raises(DataError, match=message):
        get_streams(config_of("series", tmp_path / "a.npy", data__shape=(1, 64)))


@pytest.mark.parametrize("what, message", [
    ("ambiguous", "holds one, two: name the array of data with data.key"),
    ("missing", "data.key = 'three' is not in .*which holds one, two"),
    ("labels", "labels must be one integer .* not int64 of shape"),
    ("names", "labels must be one integer .* not <U3 of shape .* np.unique"),
    ("column", r"labels must be .* not int64 of shape \(20, 1\): save labels.ravel\(\)"),
    ("damaged", "damaged or not an .npz"),
    ("text", "not a readable HDF5 file"),
    ("suffix", "should be an array: .npy, .npz, .h5"),
    ("nothing", "there is no file"),
    ("part", r"should hold one file train .*there is none\..*in a file each.*'POINTS'"),
])  # fmt: skip
def test_files_that_do_not_say_what_they_hold(tmp_path, what, message):
    path, changes = tmp_path / "a.npz", {}
    if what in ("ambiguous", "missing"):
        np.savez(path, one=numbers(20, (3,)), two=numbers(20, (3,)))
        changes = {"data__key": "three"} if what == "missing" else {}
    elif what in ("labels", "names"):
        np.savez(path, data=numbers(20, (3,)), labels=np.full(20, {"labels": -1}.get(what, "cat")))
    elif what == "column":
        np.savez(path, data=numbers(20, (3,)), labels=np.zeros((20, 1), dtype=int))
    elif what == "damaged":
        path.write_bytes(b"PK\3\4 and nothing more")
    elif what in ("text", "suffix"):
        pytest.importorskip("h5py")
        path = tmp_path / {"text": "a.h5", "suffix": "a.csv"}[what]
        path.write_text("1,2,3")
    elif what == "part":
        path = tmp_path
    with pytest.raises(DataError, match=message):
        get_streams(config_of("vectors", path, **changes))


# --- Kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["ARRAYS", "IMAGES"])
def test_arrays_that_are_not_read_are_told(tmp_path, dataset, caplog):
    """Examples saved one by one, as by np.savez(path, *examples), are not one array."""
    np.savez(tmp_path / "a.npz", *np.zeros((3, 20, 8, 8), np.uint8), labels=np.arange(20) % 2)
    changes = {"data__dataset": dataset, "data__levels": 256, "data__shape": (8, 8)}
    if dataset == "IMAGES":
        changes |= {"data__shape": (), "data__image_size": 8, "data__num_channels": 1}
    with caplog.at_level("INFO"):
        get_streams(config_of("vectors", tmp_path / "a.npz", **changes))
    assert "the data are the array 'arr_0'; not read: arr_1, arr_2" in caplog.text


def test_two_grey_levels_are_enough(tmp_path):
    rows = np.arange(24).reshape(12, 2) % 3 % 2
    np.save(tmp_path / "a.npy", rows)
    config = config_of("vectors", tmp_path / "a.npy", data__levels=2, data__shape=(2,))
    test = get_streams(config, evaluation=True)[1]
    assert next(iter(test))["image"].tolist() == rows[9:10].tolist()


@pytest.mark.parametrize("kind", ["series", "points"])
def test_only_images_are_mirrored(kind, tmp_path):
    """Whatever the option says, whose default is to mirror: a series would run backwards."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(20, *SHAPES[kind])))
    options = {"data__dataset": "ARRAYS", "data__random_flip": True}
    config = config_of(kind, tmp_path / "a.npy", **options)
    assert not get_streams(config)[0].random_flip


def test_kinds_follow_shapes_and_names(tmp_path):
    for kind, shape in SHAPES.items():
        config = config_of(kind, tmp_path)
        assert kind_of(config) == kind
        config.data.kind = ""
        assert kind_of(config) == {"points": "series"}.get(kind, kind)
        config.data.shape = (*shape, 1, 1, 1, 1, 1)
        assert kind_of(config) == "vectors"
    config.data.update(shape=(3,), kind="points")
    with pytest.raises(DataError, match=r"'points' does not suit .*\(3,\).* vectors or series"):
        kind_of(config)


@pytest.mark.parametrize(
    "change",
    [
        {"data__uniform_dequantization": True},
        {"eval__enable_vlb": True},
        {"eval__dequantizer": "run"},
        {"sampling__clip": True, "sampling__method": "chain"},
    ],
)
def test_options_of_grey_levels_are_refused(tmp_path, change):
    config = complete(config_of("images", tmp_path, **change))
    with pytest.raises(DataError, match=next(iter(change)).replace("__", r"\.") + ".*continuous"):
        check_options(config)


def test_images_need_the_shape_of_images():
    config = load("vp/digits")
    config.data.shape = (3,)
    with pytest.raises(ValueError, match=r"images are needed.*data.shape is \(3,\)"):
        get_streams(config)


# --- Standardisation -----------------------------------------------------------------------------

AXES = {
    ("channel", "series"): (0, 2),
    ("channel", "points"): (0, 1),
    ("channel", "images"): (0, 2, 3),
    ("channel", "vectors"): (0,),
    ("entry", "series"): (0,),
    ("all", "volumes"): (0, 1, 2, 3, 4),
}


@pytest.mark.parametrize("how, kind", AXES)
def test_mean_and_deviation_are_those_of_the_data(monkeypatch, how, kind):
    data = numbers(50, SHAPES[kind], dtype="f8")
    monkeypatch.setattr(standardization, "_CHUNK", 7 * data[0].size)  # several parts, one short
    scaler = Standardization(SHAPES[kind])
    scaler.load_state_dict(fit(MemorySource(torch.from_numpy(data)), how, kind))
    mean = data.mean(AXES[how, kind], keepdims=True)
    std = data.std(AXES[how, kind], keepdims=True)
    x = torch.from_numpy(data)
    expected = torch.from_numpy((data - mean) / std)
    torch.testing.assert_close(scaler(x).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scaler.inverse(scaler(x)), x, rtol=1e-6, atol=1e-6)
    logs = np.log(np.broadcast_to(std, data[:1].shape))
    assert scaler.log_volume == pytest.approx(logs.sum(), rel=1e-12)


def test_data_far_from_zero_keep_their_digits():
    data = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    far = data * 1e-3 + 1.7e9
    scaler = Standardization((2,))
    scaler.load_state_dict(fit(MemorySource(far), "channel", "vectors"))
    back = scaler.inverse(scaler(far))
    assert back.dtype == torch.float64 and (back - far).abs().max() < 1e-6
    assert (scaler(far).std(0) - 1).abs().max() < 0.01


def test_none_leaves_data_as_they_are():
    data = torch.from_numpy(numbers(20, (3,)))
    scaler = Standardization((3,))
    scaler.load_state_dict(fit(MemorySource(data), "none", "vectors"))
    assert torch.equal(scaler(data), data) and scaler.log_volume == 0


@pytest.mark.parametrize("how, bounds", [("channel", STANDARDIZED), ("none", None)])
def test_estimates_of_standardized_data_are_bounded(tmp_path, how, bounds):
    """Data in units of their own may be anywhere."""
    np.save(tmp_path / "data.npy", numbers(20, SHAPES["series"]))
    run = setup(config_of("series", tmp_path / "data.npy", data__standardize=how))
    assert _view(run, Mask.half(run.shape)).bounds == bounds


def test_constant_entries_are_refused():
    data = torch.from_numpy(numbers(20, (3,)))
    data[:, 1] = 5.1
    with pytest.raises(DataError, match=r"constant \(5.1\) at \(1,\) of the entry means"):
        fit(MemorySource(data), "entry", "vectors")


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-160])
def test_values_whose_squares_are_out_of_range_are_refused(scale):
    """The last would give a deviation that is wrong by 3e-5."""
    data = torch.from_numpy(numbers(20, (3,))).double()
    data[:, 1] *= scale
    with pytest.raises(DataError, match=r"squares .* out of float64's range, at \(1,\) .* units$"):
        fit(MemorySource(data), "entry", "vectors")


def test_constant_channels_are_refused_and_not_their_entries():
    """As docs/arrays.md says of the default."""
    data = torch.from_numpy(numbers(20, (2, 6)))
    data[:, 0, 3] = 5.1
    found = fit(MemorySource(data), "channel", "series")
    mean, std = data[:, 0].double().mean(), data[:, 0].double().std(correction=0)
    torch.testing.assert_close(found["mean"][0, 0], mean)
    torch.testing.assert_close(found["std"][0, 0], std)
    data[:, 0] = 5.1
    with pytest.raises(DataError, match=r"constant \(5.1\) at \(0, 0\) of the channel means"):
        fit(MemorySource(data), "channel", "series")


# --- Streams -------------------------------------------------------------------------------------


def test_points_are_permuted_in_training_only():
    data = torch.arange(5 * 6 * 2).reshape(5, 6, 2).float()
    options = {"seed": 3, "permute": True}
    whole = ImageStream(MemorySource(data), 4, **options)
    batches = [next(iter(whole)) for _ in range(3)]
    seen = torch.cat([batch["image"] for batch in batches])
    order = seen[:, :, 0].argsort(1)
    back = seen.gather(1, order[:, :, None].expand_as(seen))
    assert all((back[k] == data).flatten(1).all(1).any() for k in range(len(back)))
    assert len({tuple(row.tolist()) for row in order}) > 8  # each set has an order of its own
    shares = [ImageStream(MemorySource(data), 4, rank=r, world=2, **options) for r in range(2)]
    for batch in batches:
        parts = [next(iter(share))["image"] for share in shares]
        assert torch.equal(torch.cat(parts), batch["image"])


def test_values_come_as_they_are_stored():
    data = torch.from_numpy(numbers(6, (2, 3), dtype="f8"))
    (batch,) = ImageStream(Subset(MemorySource(data), np.arange(4)), 9, evaluation=True)
    assert torch.equal(batch["image"], data[:4])
    with pytest.raises(DataError, match="no grey levels"):
        ImageStream(MemorySource(data), 2, dequantize=True)


# --- Runs ----------------------------------------------------------------------------------------


def told_run(path, operator, how):
    """A run on images whose network only notes the condition: a measurement."""
    changes = {"data__standardize": how, "model__name": "recorder", "control__path": str(path)}
    changes |= {"training__condition": "image", "training__condition_operator": operator}
    changes |= {"control__method": "none", "control__noise_std": 5.0, "control__num_results": 1}
    run = setup(config_of("images", path, **changes))
    run.scaler.load_state_dict(fit(MemorySource(torch.from_numpy(np.load(path))), how, "images"))
    return run


@pytest.mark.parametrize(
    ("operator", "how"), [("super_resolution", "all"), ("gray", "all"), ("half", "channel")]
)
def test_a_network_is_told_noise_of_the_users_units(tmp_path, operator, how):
    """A noisy measurement of the data, as a measurement of the network's range."""
    np.save(tmp_path / "data.npy", numbers(5, SHAPES["images"]))
    run = told_run(tmp_path / "data.npy", operator, how)
    Recorder.calls.clear()
    outcome = restore(run)
    y, mean = outcome.arrays["y"], run.conditions.operator.apply(run.scaler.mean.expand(1, 2, 4, 4))
    assert (y - run.conditions.operator.apply(outcome.columns["input"])).std() > 3
    expected = ((y - mean) / run.scaler.std).float().expand_as(Recorder.calls[0].condition["image"])
    torch.testing.assert_close(Recorder.calls[0].condition["image"], expected)


def test_noise_without_one_unit_is_refused(tmp_path):
    """The lower resolution of entries with units of their own has none."""
    np.save(tmp_path / "data.npy", numbers(5, SHAPES["images"]))
    run = told_run(tmp_path / "data.npy", "super_resolution", "entry")
    with pytest.raises(ValueError, match=r"units of their own.*data.standardize = 'all'"):
        restore(run)


def no_matplotlib(*arguments):
    """A picture on a machine without Matplotlib."""
    raise ImportError("No module named 'matplotlib'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Arrays of every kind, and a trained run of each that a test asks for."""
    place = tmp_path_factory.mktemp("any")
    for kind, shape in SHAPES.items():
        np.savez(place / f"{kind}.npz", data=numbers(40, shape), labels=np.arange(40) % 2)
    return place


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "volumes")) for k in SHAPES]
)
def test_every_kind_trains_resumes_and_is_evaluated(folder, kind, monkeypatch):
    config, drawn = config_of(kind, folder / f"{kind}.npz"), kind == "points"
    if not drawn:  # which takes longer than all else here
        monkeypatch.setattr("score_lib.runs.samples.save_samples_picture", no_matplotlib)
    train(config, whole := folder / f"{kind}_whole")
    first = config.copy_and_resolve_references()
    first.training.update(n_iters=2, snapshot_freq=2)
    train(first, parts := folder / f"{kind}_parts")
    train(config, parts)
    ends = [torch.load(w / "checkpoints/checkpoint_1.pth") for w in (whole, parts)]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    assert torch.equal(ends[0]["standardization"]["std"], ends[1]["standardization"]["std"])
    part = np.load(folder / f"{kind}.npz")["data"][np.arange(40) % 10 != 9]
    axes = tuple(k for k in range(part.ndim) if k != (part.ndim - 1 if kind == "points" else 1))
    axes = {"points": None}.get(kind, axes)  # whose config shares one deviation among all
    mean = ends[0]["standardization"]["mean"].numpy()
    np.testing.assert_allclose(mean.ravel(), np.mean(part, axes, "f8").ravel(), rtol=1e-6)
    samples = [np.load(w / "samples/iter_4/sample.npy") for w in (whole, parts)]
    assert np.array_equal(*samples) and samples[0].shape == (3, *SHAPES[kind])
    assert (whole / "samples/iter_4/sample.png").is_file() == drawn
    (record,) = evaluate(config, whole)
    assert record["nats"] == pytest.approx(record["nats_per_dim"] * math.prod(SHAPES[kind]))
    named = {"points": "coverage", "series": "log_spectral_distance"}.get(kind, "sliced_w1")
    assert record["num_samples"] == 6 and record["num_data"] == 4 and record[named] >= 0
    assert (whole / "eval/ckpt_1/held_out.png").is_file() == drawn


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"sampling__classes": ("cat",)}, "names 'cat', but the classes are numbers"),
        ({"eval__num_samples": 3}, "eval.num_samples = 3 should be 4 or more for distances of vec"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused_before_any_work(tmp_path, changes, refusal):
    np.savez(tmp_path / "a.npz", data=numbers(40, (3,)), labels=np.arange(40) % 2)
    classes = {"data__num_classes": 2, "training__condition": "classes"}
    config = config_of("vectors", tmp_path / "a.npz", **classes, **changes)
    with pytest.raises(ValueError, match=refusal):
        CHECKS["enable_sampling"](Job(setup(config), tmp_path, "1", ""))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_density_of_the_users_units_integrates_to_one(dimensions):
    """Of a Gaussian it is also known: the network is exact in the network's range."""
    config = config_of("vectors", "", data__shape=(dimensions,), **EXACT)
    run = setup(config)
    std, mean = torch.tensor([7.0, 0.2])[:dimensions], torch.tensor([40.0, -3.0])[:dimensions]
    run.scaler.load_state_dict({"mean": mean, "std": std, "dtype": "float32"})
    inner = torch.tensor([[0.8, 0.3], [0.3, 0.5]])[:dimensions, :dimensions]
    centre = torch.tensor([0.4, -0.2])[:dimensions]
    run.state["model"] = GaussianDataOracle(run.sde, centre, inner)
    axis = torch.linspace(-5, 5, 121 if dimensions == 1 else 41)
    grid = torch.cartesian_prod(*[axis] * dimensions).reshape(-1, dimensions) * std + mean
    found = likelihood_terms(run, run.scaler(grid), 0, torch.randn_like)
    cell = math.prod((float(axis[1] - axis[0]) * std).tolist())
    assert np.exp(-found["nats"]).sum() * cell == pytest.approx(1, abs=1e-3)
    covariance = std[:, None] * inner * std
    exact = torch.distributions.MultivariateNormal(mean + std * centre, covariance)
    expected = -exact.log_prob(grid).numpy()
    assert np.abs(found["nats"] - expected).max() < 2e-3 * expected.max()


def test_bytes_of_any_shape_have_bits_per_dim(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "v.npy", random.integers(0, 256, (20, *SHAPES["volumes"]), dtype=np.uint8))
    config = config_of("volumes", tmp_path / "v.npy", data__levels=256)
    config.training.n_iters = config.training.snapshot_freq = 1
    config.training.snapshot_freq_for_preemption = config.training.eval_freq = 1
    config.eval.update(enable_sampling=False, enable_loss=False)
    train(config, tmp_path)
    samples = np.load(tmp_path / "samples/iter_1/sample.np")
    assert samples.dtype == np.uint8 and samples.shape == (3, 2, 4, 4, 1)
    (record,) = evaluate(config, tmp_path)
    assert record["bpd"] > 8 - 1e-3 and "nats" not in record  # noise of 256 levels has 8 bits


@pytest.mark.parametrize("kind, moved", [("points", False), ("series", True)])
def test_bytes_are_written_with_the_channels_last(kind, moved, tmp_path):
    run = setup(config_of(kind, "", data__shape=(6, 2), data__levels=256))
    values = torch.arange(36.0).reshape(3, 6, 2)
    save_samples(tmp_path, (values + 0.5) / 255, run)
    written = torch.from_numpy(np.load(tmp_path / "sample.np"))
    assert torch.equal(written.float(), values.movedim(1, -1) if moved else values)


def load_after_another(config, first, second):
    """Load two checkpoints into one run, as an evaluation does."""
    run = setup(config)
    for path in (first, second):
        load_trained(run, path)


def test_a_checkpoint_without_standardization_is_refused(folder, tmp_path):
    config = config_of("vectors", folder / "vectors.npz")
    train(config, tmp_path)
    path = tmp_path / "checkpoints/checkpoint_1.pth"
    contents = torch.load(path)
    del contents["standardization"]
    torch.save(contents, path)
    with pytest.raises(ValueError, match="holds no 'standardization'"):
        evaluate(config, tmp_path)
    with pytest.raises(ValueError, match="holds no 'standardization'"):
        load_after_another(config, tmp_path / META, path)
    contents["standardization"] = {
        "mean": torch.zeros(3),
        "std": -torch.ones(3),
        "dtype": "float32",
    }
    torch.save(contents, path)
    with pytest.raises(ValueError, match="std above 0"):
        evaluate(config, tmp_path)


def test_scalers_of_images_are_unchanged():
    scaler, inverse = get_scaling(load("vp/digits"))
    assert scaler(torch.tensor(0.75)) == 0.5 and inverse(torch.tensor(0.5)) == 0.75


# --- The wiring ----------------------------------------------------------------------------------


def test_training_sees_its_own_part_standardised(folder):
    config = config_of("series", folder / "series.npz")
    run = setup(config)
    streams = training_streams(run)
    standardize(run, streams[0].source)
    data = np.load(folder / "series.npz")["data"][np.arange(40) % 10 != 9].astype("f8")
    mean, std = (f(data, axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    batch = next(iter(streams[0]))
    rows = [int(np.argmin(np.abs(data - x.numpy()).sum((1, 2)))) for x in batch["image"]]
    seen = run.arguments(batch)[0]
    expected = torch.from_numpy((data[rows] - mean) / std).float()
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_only_training_permutes_points(folder):
    run = setup(config_of("points", folder / "points.npz"))
    data = torch.from_numpy(np.load(folder / "points.npz")["data"])
    batch = next(iter(training_streams(run)[0]))["image"]
    sets = {tuple(sorted(map(tuple, points.tolist()))): points for points in data}
    assert all(tuple(sorted(map(tuple, points.tolist()))) in sets for points in batch)
    assert not any((points == data).flatten(1).all(1).any() for points in batch)
    held_out = get_streams(run.config, evaluation=True)[1]
    assert torch.equal(next(iter(held_out))["image"], data[9::10])


def test_a_checkpoint_of_continuous_values_is_refused_for_grey_levels(folder, tmp_path):
    config = config_of("vectors", folder / "vectors.npz")
    train(config, tmp_path / "run")
    np.save(tmp_path / "grey.npy", np.arange(60, dtype=np.uint8).reshape(20, 3))
    grey = config_of("vectors", tmp_path / "grey.npy", data__levels=256)
    said = "trained on continuous values, .* 'ARRAYS' with data.levels = 256 means grey levels"
    with pytest.raises(ValueError, match=said):  # of the run itself
        restored(grey, tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        train(grey, tmp_path / "run")
    path = str(tmp_path / "run" / META)
    for option in ("eval.checkpoint", "model.weights"):
        other = grey.copy_and_resolve_references()
        other.update_from_flattened_dict({option: path})
        with pytest.raises(ValueError, match=said):
            restored(other, tmp_path / "new")
    # Training starts from any weights.
    other.training.n_iters = 1
    train(other, tmp_path / "new")
    assert "standardization" not in torch.load(tmp_path / "new" / META)


def gaussian_run(**changes):
    """A run whose network has learned N(mean, covariance) of the user's units, and these two."""
    changes |= EXACT | {"data__shape": (2,), "sampling__num_steps": 40}
    config = config_of("vectors", "", **changes)
    run = setup(config)
    std, mean = torch.tensor([7.0, 0.2]), torch.tensor([40.0, -3.0])
    run.scaler.load_state_dict({"mean": mean, "std": std, "dtype": "float32"})
    inner, centre = torch.tensor([[0.8, 0.5], [0.5, 0.6]]), torch.tensor([0.4, -0.2])
    run.state["model"] = GaussianDataOracle(run.sde, centre, inner)
    run.state["model"].weight = torch.nn.Parameter(torch.zeros(()))
    run.state["ema"] = ExponentialMovingAverage(run.state["model"].parameters(), 0.0)
    return run, mean + std * centre, std[:, None] * inner * std


def test_samples_are_in_the_users_units():
    run, mean, covariance = gaussian_run()
    drawn = run.draw(range(1000))
    deviation = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() < 0.12 * deviation).all()
    correlation = torch.corrcoef(drawn.T)[0, 1]
    exact = covariance[0, 1] / deviation.prod()
    assert correlation == pytest.approx(float(exact), abs=0.06)
    assert (drawn.std(0) / deviation - 1).abs().max() < 0.08


@pytest.mark.parametrize(
    ("operator", "row"), [("half", [1.0, 0.0]), ("super_resolution", [0.5, 0.5])]
)
def test_a_measurement_is_one_of_the_users_units(tmp_path, operator, row):
    """The posterior of a Gaussian is known: y is row x, with noise of deviation 3."""
    noise_std, count = 3.0, 300
    truth = np.array([[52.0, -2.9], [31.0, -3.2]], dtype="f4")
    np.save(tmp_path / "truth.npy", truth)
    changes = {
        "control__path": str(tmp_path / "truth.npy"),
        "control__noise_std": noise_std,
        "control__method": "tweedie",
        "control__num_results": count,
        "sampling__method": "heun",
        "training__batch_size": 300,
    }
    run, mean, covariance = gaussian_run(**changes)
    outcome = restore(run, operator=operator)
    y, row = outcome.arrays["y"][:, 0].cpu(), torch.tensor(row)
    assert (y - torch.from_numpy(truth) @ row).abs().max() < 3.5 * noise_std
    gain = covariance @ row / (row @ covariance @ row + noise_std**2)
    expected = mean + (y - mean @ row)[:, None] * gain
    spread = (covariance - gain[:, None] * (row @ covariance)).diagonal().sqrt()
    results = outcome.columns["result"]
    assert ((results.mean(1) - expected).abs() < 4 * spread / count**0.5).all()
    assert (results.std(1) / spread - 1).abs().max() < 0.15
    (figures,) = outcome.figures
    assert figures["rmse"] > figures["rmse_of_mean"] > 0
    assert 0 <= figures["inside_90_interval"] <= 1


@pytest.mark.parametrize("count", [2, 4, 20, 100])
def test_coverage_of_the_posterior_is_its_name_whatever_the_number_of_results(count):
    """Every place of the truth among the results is as likely: each of them once."""
    results = torch.arange(count).expand(count + 1, count)[..., None].float()
    truth = torch.arange(count + 1)[:, None] - 0.5
    figures = interval_coverage(results, truth, torch.tensor([False]))
    assert figures["inside_90_interval"] == pytest.approx(0.9)
    wide = interval_coverage(results, torch.full_like(truth, count / 2 - 0.25), torch.zeros(1) > 0)
    assert wide["inside_90_interval"] == (1 if count > 2 else pytest.approx(1))
    far = interval_coverage(results, torch.full_like(truth, 1e3), torch.zeros(1) > 0)
    assert far["inside_90_interval"] == pytest.approx(max(0, 1 - 0.05 * (count + 1)))


def test_coverage_is_that_of_the_open_entries():
    """Equal results are neither inside nor outside, and known entries have no posterior."""
    results, truth = torch.zeros(3, 5, 2), torch.zeros(3, 2)
    results[:, :, 1] += torch.arange(5)
    truth[:, 0], truth[:, 1] = 1e-7, 2.5
    figures = interval_coverage(results, truth, torch.tensor([True, False]))
    assert figures["inside_90_interval"] == 1
    assert interval_coverage(results, truth, torch.tensor([True, True])) == {}
    assert interval_coverage(results[:, :1], truth, torch.tensor([True, False])) == {}
    alike = interval_coverage(results * 0, truth * 0, torch.tensor([False, False]))
    assert alike["inside_90_interval"] == pytest.approx(0.9)


@pytest.mark.parametrize(("noise_std", "open_entries"), [(0.0, 1), (3.0, 2)])
def test_figures_of_a_mask_are_of_the_entries_that_they_concern(tmp_path, noise_std, open_entries):
    """The residual is of measured entries, and the coverage of those that are not known."""
    truth = np.array([[52.0, -2.9], [31.0, -3.2], [41.0, -3.0]], dtype="f4")
    np.save(tmp_path / "truth.npy", truth)
    changes = {"control__path": str(tmp_path / "truth.npy"), "control__noise_std": noise_std}
    run, _, _ = gaussian_run(control__method="tweedie", sampling__method="heun", **changes)
    outcome = restore(run, operator="half")
    (figures,), results = outcome.figures, outcome.columns["result"]
    residual = results[..., 0] - outcome.arrays["y"][:, None, 0]
    assert figures["residual"] == pytest.approx(residual.square().mean().sqrt().item(), abs=1e-4)
    known = torch.arange(2) >= open_entries
    inside = interval_coverage(results, outcome.columns["input"], known.flip(0))
    assert inside.items() <= figures.items()
