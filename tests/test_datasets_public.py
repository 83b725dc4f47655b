"""CIFAR10, SVHN, CELEBA and LSUN through tensorflow-datasets."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from dataset_helpers import ROOT, make_config, random_images, run_python
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data.sources import log_once

MOCKED = [
    ("CIFAR10", 32, {}, 10),
    ("SVHN", 32, {}, 10),
    ("CELEBA", 64, {}, 1),
    ("LSUN", 128, {"category": "church_outdoor"}, 1),
    ("LSUN", 256, {"category": "bedroom"}, 1),
]


def mocked():
    return pytest.importorskip("tensorflow_datasets").testing.mock_data(num_examples=6)


@pytest.mark.parametrize("name, size, data, classes", MOCKED)
def test_mocked_data_sets(name, size, data, classes):
    with mocked():
        config = make_config(name, image_size=size, **data)
        train, test, info = datasets.get_streams(config, evaluation=True)
        assert info.num_examples == {"train": 6, "test": 6}
        assert (info.shape, info.levels, info.num_classes) == ((3, size, size), 256, classes)
        for stream in (train, test):
            batches = list(stream)
            assert [tuple(b["image"].shape) for b in batches] == [
                (n, 3, size, size) for n in (4, 2)
            ]
            assert all((b["image"] >= 0).all() and (b["image"] <= 1).all() for b in batches)
            assert all(b["label"].dtype == torch.int64 for b in batches)


def test_mocked_images_equal_the_stored_ones():
    with mocked():
        import tensorflow_datasets as tfds

        stored = tfds.builder("cifar10").as_data_source("train")[3]
        source = datasets.get_streams(make_config("CIFAR10", image_size=32))[2].sources["train"]
        for _ in range(2):  # decoded, then cached
            image, label = source.read(np.array([3]))
            assert np.array_equal(image[0].permute(1, 2, 0).numpy(), stored["image"])
            assert label.item() == stored["label"]


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
@pytest.mark.parametrize("size", [16, 48])
def test_small_images_are_resized_with_a_note(name, size, caplog):
    log_once.cache_clear()
    with mocked(), caplog.at_level("INFO"):
        whole, resized = (
            datasets.get_streams(make_config(name, image_size=side))[2].sources["train"]
            for side in (32, size)
        )
        (stored, labels), (found, same) = (source.read(np.arange(6)) for source in (whole, resized))
    assert found.shape == (6, 3, size, size) and torch.equal(labels, same)
    assert f"{name}: images of 32 px are resized to {size} px, antialiased" in caplog.text
    if size == 16:  # the triangle filter of a reduction by two: weights 1, 3, 3, 1
        weights = torch.tensor([1.0, 3, 3, 1]) / 8
        block = stored[:, :, 13:17, 7:11].float()
        expected = torch.einsum("nchw,h,w->nc", block, weights, weights)
        assert (found[:, :, 7, 4] - expected).abs().max() <= 0.51


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_classes_have_the_names_that_the_data_set_records(name, monkeypatch):
    with mocked():
        from tensorflow_datasets.core.features import ClassLabel

        info = datasets.get_streams(make_config(name, image_size=32))[2]
        assert info.class_to_idx == {str(digit): digit for digit in range(10)}
        monkeypatch.setattr(ClassLabel, "names", list("abcdefghij"))
        info = datasets.get_streams(make_config(name, image_size=32))[2]
        assert info.class_to_idx == {letter: k for k, letter in enumerate("abcdefghij")}


@pytest.mark.parametrize(
    "config, message",
    [
        (make_config("CIFAR10", image_size=(32, 16)), "one number as data.image_size"),
        (make_config("SVHN", image_size=32, num_channels=1), "set data.num_channels=3"),
        (make_config("CELEBA", image_size=(64, 32)), "square colour images"),
        (make_config("LSUN", image_size=64, num_channels=1, category="bridge"), "square"),
        (make_config("LSUN", image_size=64, category="bedrom"), "no 'lsun/bedrom'"),
    ],
)
def test_mistakes_in_the_config(config, message):
    with mocked(), pytest.raises(DataError, match=message):
        datasets.get_streams(config)


@pytest.mark.parametrize("name, part", [("CIFAR10", "cifar10"), ("LSUN", "lsun/bridge")])
def test_data_dir_and_category_options(name, part, monkeypatch):
    tfds, asked = pytest.importorskip("tensorflow_datasets"), []

    def builder(name, data_dir):
        asked.append((name, data_dir))
        raise ValueError("stop")

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setenv("HOME", "/home/me")
    for folder, expected in (("~/data", "/home/me/data"), ("", None)):
        config = make_config(name, image_size=32, category="bridge", data_dir=folder)
        with pytest.raises(DataError, match=f"no '{part}'"):
            datasets.get_streams(config)
        assert asked.pop() == (part, expected)


# Data sets prepared by hand, with the files that tensorflow-datasets would write.


def prepare_cifar10(folder, file_format, sizes=(5, 3)):
    """A little CIFAR-10 in a data directory of tensorflow-datasets; returns images and labels."""
    features = pytest.importorskip("tensorflow_datasets.core.features")
    place = folder / "cifar10" / "3.0.2"
    place.mkdir(parents=True)
    spec = features.FeaturesDict(
        {
            "id": features.Text(),
            "image": features.Image(shape=(32, 32, 3)),
            "label": features.ClassLabel(num_classes=10),
        }
    )
    spec.save_metadata(place, feature_name=None)
    (place / "features.json").write_text(json.dumps(spec.to_json()))
    template, splits, images = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", [], {}
    for split, size in zip(("train", "test"), sizes, strict=True):
        images[split] = random_images(size, 32, 32, 3, seed=size)
        records = [_record(image, k) for k, image in enumerate(images[split])]
        _write(place / f"cifar10-{split}.{file_format}-00000-of-00001", file_format, records)
        splits.append({"name": split, "shardLengths": [str(size)], "filepathTemplate": template})
    info = {
        "name": "cifar10",
        "version": "3.0.2",
        "fileFormat": file_format,
        "moduleName": "tensorflow_datasets.image_classification.cifar",
        "splits": splits,
    }
    (place / "dataset_info.json").write_text(json.dumps(info))
    return images


def _record(image, label):
    from tensorflow_datasets.proto import tf_example_pb2

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    message = tf_example_pb2.Example()
    message.features.feature["id"].bytes_list.value.append(b"x")
    message.features.feature["image"].bytes_list.value.append(encoded.getvalue())
    message.features.feature["label"].int64_list.value.append(label)
    return message.SerializeToString()


def _write(path, file_format, records):
    if file_format == "tfrecord":
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(path, "wb") as file:
            for record in records:
                RecordWriter(file).write(record)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()


def check_cifar10(folder, images, **data):
    config = make_config("CIFAR10", image_size=32, data_dir=str(folder), **data)
    train, test, _ = datasets.get_streams(config, evaluation=True)
    for stream, split in ((train, "train"), (test, "test")):
        batches = list(stream)
        seen = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1)
        assert torch.equal(seen, torch.from_numpy(images[split]) / 255)
        labels = torch.cat([batch["label"] for batch in batches])
        assert labels.tolist() == list(range(len(images[split])))


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.slow
def test_prepared_data_are_read_in_both_formats(tmp_path, file_format):
    check_cifar10(tmp_path, prepare_cifar10(tmp_path, file_format))


@pytest.mark.slow
def test_workers_read_after_this_process_has_read(tmp_path):
    """The reader of ArrayRecord files does not survive a fork."""
    images = prepare_cifar10(tmp_path, "array_record")
    check_cifar10(tmp_path, images)
    check_cifar10(tmp_path, images, num_workers=2)


@pytest.mark.slow
def test_damaged_prepared_data_are_named(tmp_path):
    prepare_cifar10(tmp_path, "tfrecord")
    (path,) = tmp_path.rglob("*train*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    config = make_config("CIFAR10", image_size=32, data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"record 2 of .*cifar10-train.* fails its checksum"):
        list(datasets.get_streams(config, evaluation=True)[0])
    path.unlink()
    with pytest.raises(DataError, match=r"cifar10-train.* cannot be read: No such file"):
        datasets.get_streams(config)


def test_prepared_files_with_too_few_records_are_named(tmp_path):
    prepare_cifar10(tmp_path, "tfrecord")
    (path,) = tmp_path.rglob("*train*")
    whole = path.read_bytes()
    first = int.from_bytes(whole[:8], "little") + 16
    config = make_config("CIFAR10", image_size=32, data_dir=str(tmp_path))
    for size, count in ((0, 0), (first, 1)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"-train.* has {count} records.* says 5"):
            datasets.get_streams(config)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_missing_split_is_named(tmp_path, file_format):
    prepare_cifar10(tmp_path, file_format)
    (path,) = tmp_path.rglob("dataset_info.json")
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "splits": info["splits"][:1]}))
    with pytest.raises(DataError, match=r"has the splits \['train'\], not 'test'"):
        datasets.get_streams(make_config("CIFAR10", image_size=32, data_dir=str(tmp_path)))


def unreachable(*args, **options):
    raise urllib.error.URLError("no network")


def reachable(page, timeout):
    return contextlib.nullcontext()


def test_missing_data_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(subprocess, "run", unreachable)
    config = make_config("CIFAR10", image_size=32, data_dir=str(tmp_path))
    expected = (
        rf"^cifar10 is not in {tmp_path}/cifar10/3.0.2, .* cannot be reached: run "
        rf"`python -m score_lib.data.prepare cifar10 {tmp_path} --tfds` .* set data.data_dir"
    )
    with pytest.raises(DataError, match=expected):
        datasets.get_streams(config)


@pytest.mark.slow
def test_missing_data_are_prepared_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", reachable)
    prepared = {}

    def run(command, cwd):
        assert command == [
            sys.executable,
            "-m",
            "score_lib.data.prepare",
            "cifar10",
            str(tmp_path),
            "--tfds",
        ]
        assert pathlib.Path(cwd) == ROOT
        prepared.update(prepare_cifar10(tmp_path, "array_record"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    config = make_config("CIFAR10", image_size=32, data_dir=str(tmp_path))
    datasets.get_streams(config)
    check_cifar10(tmp_path, prepared)


def test_failed_preparation_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", reachable)
    monkeypatch.setattr(
        subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 1)
    )
    config = make_config("SVHN", image_size=32, data_dir=str(tmp_path))
    with pytest.raises(
        DataError, match=r"could not be prepared in .*python -m score_lib.data.prepare svhn"
    ):
        datasets.get_streams(config)


def test_missing_tensorflow_datasets_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="pip install tensorflow-datasets"):
        datasets.get_streams(make_config("CIFAR10", image_size=32))


@pytest.mark.slow
def test_reading_imports_no_tensorflow(tmp_path):
    prepare_cifar10(tmp_path / "a", "array_record")
    prepare_cifar10(tmp_path / "t", "tfrecord")
    program = f"""
import sys
finders = list(sys.meta_path)
class WithoutTensorFlow:  # as if it were not installed
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next(filter(None, found), None)
sys.meta_path[:] = [WithoutTensorFlow]
import tensorflow_datasets as tfds
import datasets
from dataset_helpers import make_config
for folder in ("a", "t"):
    config = make_config("CIFAR10", image_size=32, data_dir={str(tmp_path)!r} + "/" + folder)
    print(len(list(datasets.get_streams(config, evaluation=True)[0])))
with tfds.testing.mock_data(num_examples=2):
    for name, size, data, _ in {MOCKED!r}:
        config = make_config(name, image_size=size, **data)
        print(next(iter(datasets.get_streams(config)[0]))["image"].shape[1:])
"""
    run = run_python(program)
    assert run.returncode == 0, run.stderr
    sizes = [f"torch.Size([3, {size}, {size}])" for _, size, _, _ in MOCKED]
    assert run.stdout.split("\n")[:-1] == ["2", "2", *sizes]


@pytest.mark.slow
def test_records_of_tensorflow_are_read(tf, tmp_path):
    images = random_images(3, 3, 8, 8)
    path = str(tmp_path / "r08.tfrecords")
    with tf.io.TFRecordWriter(path) as writer:
        for image in images:
            feature = {
                "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=image.shape)),
                "data": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    config = make_config("CelebAHQ", image_size=8, tfrecords_path=path)
    _, _, info = datasets.get_streams(config)
    assert np.array_equal(info.sources["train"].images(range(3)).numpy(), images)


@pytest.mark.slow
def test_prepare_downloads_the_published_archive(tmp_path):
    """The command starts to download the data set's own archive."""
    program = (
        "import sys, unittest.mock as mock, score_lib.data.prepare as prepare\n"
        "def stop(self, url): sys.exit('would download ' + str(url))\n"
        "manager = 'tensorflow_datasets.core.download.DownloadManager.download_and_extract'\n"
        f"sys.argv = ['prepare', 'cifar10', {str(tmp_path)!r}]\n"
        "import tensorflow_datasets as tfds\n"
        "with mock.patch(manager, stop): prepare.main()\n"
    )
    pytest.importorskip("importlib_resources")  # which tensorflow-datasets needs to prepare
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "would download https://www.cs.toronto.edu/~kriz/cifar-10-binary" in run.stderr
