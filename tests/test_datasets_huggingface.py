"""HUGGINGFACE: Arrow and Parquet files as the package `datasets` writes them, and the Hub."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data import hub
from score_lib.data.public import only_prepared
from score_lib.data.sources import MissingDataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGES = random_images(30, 8, 8, 3)
PIXELS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
CLASSES = {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]}
FEATURES = {"image": {"_type": "Image"}, "label": CLASSES}
NUMBERS = {"train": range(24), "test": range(24, 30)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache folder that is not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "score_lib"


def png(number):
    content = io.BytesIO()
    Image.fromarray(IMAGES[number]).save(content, "PNG")
    return content.getvalue()


def table(numbers, features=FEATURES, **columns):
    """A table with images and labels of these numbers; columns replace or join them."""
    usual = {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers],
        "label": [n % 3 for n in numbers],
    }
    found = pyarrow.table({k: v for k, v in (usual | columns).items() if v is not None})
    record = {"info": {"features": features}} if features else None
    return found.replace_schema_metadata(record and {"huggingface": json.dumps(record)})


def write(path, rows):
    """A table in the format that the name says, in several batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(rows, path, row_group_size=5)
    else:
        with pyarrow.ipc.new_stream(str(path), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=5)
    return path


def opened(path, **options):
    config = make_config("HUGGINGFACE", path=str(path), **options)
    return datasets.get_streams(config, evaluation=True)


def check(source, numbers):
    images, labels = everything(source)
    assert torch.equal(images, PIXELS[list(numbers)])
    assert labels.tolist() == [n % 3 for n in numbers]


LAYOUTS = {
    "save_to_disk": {
        "train/data-00000-of-00002.arrow": range(11),
        "train/data-00001-of-00002.arrow": range(11, 24),
        "train/cache-7f3a.arrow": range(5),
        "test/data-00000-of-00001.arrow": range(24, 30),
    },
    "parquet": {
        "data/train-00000-of-00001-0a1b2c.parquet": range(24),
        "data/validation-00000-of-00001-0a1b2c.parquet": range(24, 30),
        "data/unsupervised-00000-of-00001-0a1b2c.parquet": range(3),
    },
    "converted": {
        "plain/train/0000.parquet": range(13),
        "plain/train/0001.parquet": range(13, 24),
        "plain/test/0000.parquet": range(24, 30),
    },
    "load_dataset": {"x/1.0/x-train.arrow": range(24), "x/1.0/x-test.arrow": range(24, 30)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_rows_in_order(tmp_path, layout, cache):
    for name, numbers in LAYOUTS[layout].items():
        write(tmp_path / name, table(numbers))
    for _ in range(2):
        info = opened(tmp_path)[2]
        for part, numbers in NUMBERS.items():
            check(info.sources[part], numbers)
        assert info.class_to_idx == {"cat": 0, "dog": 1, "eel": 2} and info.num_classes == 3
    packed = sum(name.endswith("parquet") and "unsup" not in name for name in LAYOUTS[layout])
    assert len(list(cache.glob("rows_*.arrow"))) == packed


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_workers_open_files_of_their_own(tmp_path, suffix):
    train, _, _ = opened(write(tmp_path / f"a.{suffix}", table(range(20))), num_workers=2)
    kept = [n for n in range(20) if n % 10 != 9]
    assert torch.equal(torch.cat([batch["image"] for batch in train]), PIXELS[kept] / 255)


def test_files_called_like_results_of_the_package_are_told(tmp_path, caplog):
    path = write(tmp_path / "tmp_faces.arrow", table(range(20)))
    check(opened(path)[2].sources["train"], [n for n in range(20) if n % 10 != 9])
    with pytest.raises(DataError, match=r"has only tmp_faces.arrow, .* set data.path to one"):
        opened(tmp_path)
    write(tmp_path / "a.arrow", table(range(5)))
    with caplog.at_level("INFO"):
        check(opened(tmp_path)[2].sources["train"], range(5))
    assert "as results of the package datasets are called so: tmp_faces.arrow" in caplog.text


def test_a_changed_parquet_file_is_unpacked_again(tmp_path):
    for numbers in (range(3), range(3, 8)):
        check(opened(write(tmp_path / "a.parquet", table(numbers)))[2].sources["train"], numbers)


WRITER = """
import io, sys
import numpy, pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.table import InMemoryTable

content = numpy.load(sys.argv[1])
features = Features(image=Image(), label=ClassLabel(names=["cat", "dog", "eel"]))
def part(numbers):
    images = [{"bytes": content[f"{n}"].tobytes(), "path": None} for n in numbers]
    rows = {"image": images, "label": [n % 3 for n in numbers]}
    rows = InMemoryTable.from_pydict(rows, schema=features.arrow_schema)
    # A given fingerprint, since hashes of tables fail with some versions of pyarrow.
    return Dataset(rows, fingerprint=f"{len(numbers)}")
both = DatasetDict(train=part(range(24)), test=part(range(24, 30)))
both.save_to_disk(sys.argv[2], num_shards={"train": 3, "test": 1})
for name, rows in both.items():
    rows.to_parquet(f"{sys.argv[3]}/{name}-00000-of-00001.parquet")
"""


@pytest.mark.slow
def test_what_the_package_writes_is_read_back(tmp_path):
    try:
        importlib.metadata.distribution("datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package datasets is missing")
    np.savez(tmp_path / "in.npz", **{str(n): np.frombuffer(png(n), np.uint8) for n in range(30)})
    (tmp_path / "parquet").mkdir()
    # In a folder without the project's own module of that name.
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = [p for p in paths if not os.path.exists(os.path.join(p, "datasets.py"))]
    command = [sys.executable, "-c", WRITER, "in.npz", "disk", "parquet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(tmp_path)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    for place in ("disk", "parquet"):
        info = opened(tmp_path / place)[2]
        for part, numbers in NUMBERS.items():
            check(info.sources[part], numbers)
        assert info.class_to_idx == {"cat": 0, "dog": 1, "eel": 2}


def pictures(numbers):
    return [{"bytes": png(n), "path": None} for n in numbers]


@pytest.mark.parametrize(
    "features, columns, labels",
    [
        (FEATURES, {"id": list(range(4))}, [0, 1, 2, 0]),
        # The only column of each kind, whatever it is called.
        (
            {"picture": {"_type": "Image"}, "kind": CLASSES},
            {"image": None, "label": None, "picture": pictures(range(4)), "kind": [2, 2, 0, 1]},
            [2, 2, 0, 1],
        ),
        # The usual name, where there are several.
        (
            FEATURES | {"other": {"_type": "Image"}, "coarse": CLASSES},
            {"other": pictures([9] * 4), "coarse": [1, 1, 1, 1]},
            [0, 1, 2, 0],
        ),
        (
            {"img": {"_type": "Image"}, "coarse_label": CLASSES, "fine_label": CLASSES},
            {
                **{"image": None, "label": None, "img": pictures(range(4))},
                **{"coarse_label": [1, 1, 1, 1], "fine_label": [0, 1, 0, 1]},
            },
            [0, 1, 0, 1],
        ),
        # Without a description.
        (None, {}, [0, 1, 2, 0]),
        (None, {"image": [png(n) for n in range(4)], "label": None, "size": [5] * 4}, [0] * 4),
    ],
)
def test_columns_are_found_by_kind_and_name(tmp_path, features, columns, labels):
    write(tmp_path / "a.arrow", table(range(4), features, **columns))
    info = opened(tmp_path)[2]
    images, found = everything(info.sources["train"])
    assert torch.equal(images, PIXELS[:4]) and found.tolist() == labels
    assert info.num_classes == (3 if features else max(labels) + 1)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize(
    "column, labels, names",
    [
        (["eel", "cat", "eel", "dog"], [2, 0, 2, 1], ["cat", "dog", "eel"]),
        (pyarrow.array(["eel", "cat", "eel", "cat"]).dictionary_encode(), [1, 0, 1, 0], None),
        ([True, False, False, True], [1, 0, 0, 1], []),
    ],
)
def test_classes_by_name_and_by_yes_or_no(tmp_path, suffix, column, labels, names):
    write(tmp_path / f"a.{suffix}", table(range(4), None, label=column))
    info = opened(tmp_path)[2]
    assert everything(info.sources["train"])[1].tolist() == labels
    names = ["cat", "eel"] if names is None else names
    assert info.class_to_idx == {name: number for number, name in enumerate(names)}
    assert info.num_classes == len(set(labels))


def test_other_columns_of_a_usual_name_are_told_to_be_no_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path / "a.arrow", table(range(4), None, label=[0.5, 1.0, 2.0, 0.0]))
    assert opened(tmp_path)[2].num_classes == 1
    assert "the column 'label' holds double, so it is not read as classes" in caplog.text
    write(tmp_path / "b.arrow", table(range(4), None, label=["a", None, "b", "a"]))
    with pytest.raises(DataError, match=r"row 1 \(from 0\) of b.arrow in .* has no label"):
        opened(tmp_path / "b.arrow")


def test_the_split_and_images_that_cannot_be_read(tmp_path, caplog):
    broken = pictures(range(12))
    broken[3], broken[5] = {"bytes": b"none", "path": None}, {"bytes": None, "path": "5.png"}
    write(tmp_path / "train-a.arrow", table(range(12), image=broken))
    write(tmp_path / "validation-a.arrow", table(range(24, 30)))
    write(tmp_path / "test-a.arrow", table(range(3), label=[-1, -1, -1]))
    with pytest.raises(DataError, match=r"row 0 \(from 0\) of test-a.arrow .* has no label: .*=tr"):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"row 3 .*train-a.arrow in .* is not a readable image"):
        list(opened(tmp_path, split="train:validation")[0])
    info = opened(tmp_path, split="train:validation", on_error="skip")[2]
    check(info.sources["train"], [0, 1, 2, 4, 6, 7, 8, 9, 10, 11])
    check(info.sources["test"], range(24, 30))
    assert "2 left out because they cannot be read: row 3" in caplog.text


def test_files_of_an_earlier_save_are_left_out(tmp_path, caplog):
    """Saving once more into the same folder leaves files with another total."""
    caplog.set_level("INFO")
    write(tmp_path / "data-00000-of-00002.arrow", table(range(20, 25)))
    write(tmp_path / "data-00001-of-00002.arrow", table(range(25, 30)))
    write(tmp_path / "data-00000-of-00001.arrow", table(range(20)))
    with pytest.raises(DataError, match="two versions of the same data: remove one"):
        opened(tmp_path)
    listed = [{"filename": "data-00000-of-00001.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    train, test = opened(tmp_path)[2].sources.values()
    check(test, [9, 19])
    assert len(train) == 18 and "not read, as" in caplog.text
    listed.append({"filename": "data-00001-of-00001.arrow"})
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    with pytest.raises(DataError, match=r"lists data-00001-of-00001.arrow, which is not there"):
        opened(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state.json lists no data files"):
        opened(tmp_path)


TWO = {"x": {"_type": "Image"}, "y": {"_type": "Image"}}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"there is no file in .* that ends in .arrow or .parquet"),
        ({"a.arrow": table(range(2), image=[1, 2])}, "row 0 .* readable image: it is no bytes"),
        (
            {"a.arrow": table(range(2), None, image=[1, 2], n=[1, 2])},
            "a.arrow has no column of images: its columns are image, label, n",
        ),
        (
            {"a.arrow": table(range(2), TWO, image=None, x=pictures(range(2)), y=[None, None])},
            "a.arrow has several columns of images: x, y: rename the one that is meant to image",
        ),
        (
            {"a.arrow": table(range(2)), "b.arrow": table(range(2), label=[0, 3])},
            r"row 1 \(from 0\) of b.arrow in .* has the label 3 of 3 classes",
        ),
        ({"a.arrow": table(range(2), label=["0", "x"])}, "column label holds other than whole"),
        ({"a.arrow": b"none"}, "a.arrow is not a readable .arrow file"),
        ({"a.parquet": b"none"}, "a.parquet is not a readable .parquet file"),
        (
            {"a-00000-of-00003.arrow": table(range(2)), "a-00002-of-00003.arrow": table(range(2))},
            r"has 2 of the files a-...-of-00003: get the others",
        ),
        (
            {"x/train-a.arrow": table(range(2)), "y/train-a.arrow": table(range(2))},
            "holds several data sets: x, y: add one of these folders to data.path",
        ),
        (
            {"a.arrow": table(range(2)), "b.arrow": table(range(2), label=None)},
            "b.arrow has not the same column 'label' as .*a.arrow",
        ),
        (
            {"a.arrow": table(range(2), image=[{"bytes": None, "path": "1.png"}] * 2)},
            "is only the path '1.png': save_to_disk writes the images too",
        ),
    ],
)
def test_faults_are_refused_in_one_sentence(tmp_path, files, message):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_files_that_are_cut_off_are_refused(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", table(range(20)))
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(DataError, match=rf"a.{suffix} is (damaged or cut off|not a readable)"):
        opened(path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.arrow", table(range(2)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"need the package pyarrow: pip install pyarrow==\d"):
        opened(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"'a/b', .* package huggingface_hub: pip install hugg.*=="):
        opened("a/b")


class FakeHub:
    """Takes the place of huggingface_hub: notes what is asked for, has some revisions."""

    def __init__(self, revisions):
        self.revisions, self.calls = revisions, []

    def snapshot_download(self, name, **keywords):
        self.calls.append((name, keywords))
        if name == "gone/gone" or keywords["local_files_only"]:
            raise RuntimeError("not here\nmore")
        return str(self.revisions[keywords["revision"]])


def test_names_on_the_hub(tmp_path, monkeypatch):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    for name, numbers in LAYOUTS["converted"].items():
        write(full / name, table(numbers))
    fake = FakeHub({None: empty, "refs/convert/parquet": full})
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        types.SimpleNamespace(snapshot_download=fake.snapshot_download),
    )
    monkeypatch.chdir(tmp_path)
    info = opened("me/set/plain")[2]
    check(info.sources["train"], range(24))
    usual = {"repo_type": "dataset", "allow_patterns": ["plain/*.parquet"]}
    usual["local_files_only"] = False
    assert fake.calls == [("me/set", usual | {"revision": name}) for name in hub.REVISIONS]
    with pytest.raises(DataError, match=r"'gone/gone', .* Hub cannot be had: not here$"):
        opened("gone/gone")
    with only_prepared(), pytest.raises(MissingDataError, match=r"'me/set', .*not here$"):
        opened("me/set")
    assert fake.calls[-1][1]["local_files_only"] and fake.calls[-1][1]["revision"] is None
    fake.revisions["refs/convert/parquet"] = empty
    with pytest.raises(DataError, match="me/set on the Hugging Face Hub has no Parquet files"):
        opened("me/set")
    before = len(fake.calls)
    for path in ("/no/where", "./me/set", "a.parquet", "~me/x", "x-{0..1}.arrow"):
        with pytest.raises(DataError, match="there is no file or folder"):
            opened(path)
    assert len(fake.calls) == before
