"""TFRecord files, written by TensorBoard's writer and protocol buffers."""

import os
import sys

import pytest
import torch
from dataset_helpers import make_config, random_images

import datasets
from datasets import DataError
from score_lib.data import tfrecords


def write_records(path, images):
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for image in images:
            writer.write(example(shape=list(image.shape), data=image.tobytes()))


def example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for name, value in features.items():
        feature = message.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value[0], float):
            feature.float_list.value.extend(value)
        else:
            feature.int64_list.value.extend(value)
    return message.SerializeToString()


@pytest.fixture
def records(tmp_path):
    images = random_images(7, 3, 6, 6)
    write_records(tmp_path / "a.tfrecords", images[:4])
    write_records(tmp_path / "b.tfrecords", images[4:])
    return tmp_path, images


@pytest.mark.parametrize("name", ["FFHQ", "CelebAHQ"])
@pytest.mark.parametrize(
    "pattern", ["{0}/a.tfrecords,{0}/b.tfrecords", "{0}/a.tfrecords,{0}/*.tfrecords"]
)
def test_images_of_tfrecords(records, name, pattern):
    folder, images = records
    config = make_config(name, image_size=6, tfrecords_path=pattern.format(folder))
    train, test, info = datasets.get_streams(config, evaluation=True)
    assert info.num_examples == {"train": 7, "test": 7} and info.levels == 256
    for stream in (train, test):
        seen = torch.cat([batch["image"] for batch in stream])
        torch.testing.assert_close(seen, torch.from_numpy(images) / 255)


def test_tfrecords_with_workers(records):
    folder, images = records
    config = make_config("FFHQ", image_size=6, tfrecords_path=f"{folder}/*", num_workers=2)
    train, _, info = datasets.get_streams(config, evaluation=True)
    info.sources["train"].images([0, 6])  # opens the files before the workers start
    seen = torch.cat([batch["image"] for batch in train])
    torch.testing.assert_close(seen, torch.from_numpy(images) / 255)


def test_parsing_examples():
    message = example(shape=[3, 128, 300], data=b"xyz", score=[0.5])
    assert tfrecords.parse_example(message) == {"shape": [3, 128, 300], "data": [b"xyz"]}
    unpacked = b"\x0a\x0d\x0a\x0b\x0a\x01n\x12\x06\x1a\x04\x08\x05\x08\x07"
    assert tfrecords.parse_example(unpacked) == {"n": [5, 7]}
    for length in range(1, len(message) - 1):
        with pytest.raises(ValueError):
            tfrecords.parse_example(message[:length])


def test_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "r.tfrecords"
    write_records(path, random_images(3, 3, 2, 2))
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        os.utime(path, ns=(position, position))
        record = position * 3 // len(whole)
        start = record * len(whole) // 3
        with pytest.raises(DataError, match=rf"record {record} of {path} \(byte {start}\)"):
            list(tfrecords.RecordFiles([path]))


def test_any_truncation_is_found(tmp_path):
    path = tmp_path / "r.tfrecords"
    write_records(path, random_images(3, 3, 2, 2))
    whole = path.read_bytes()
    size = len(whole) // 3
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length % size == 0:
            assert len(tfrecords.RecordFiles([path])) == length // size
            continue
        record = length // size
        with pytest.raises(DataError, match=rf"within record {record} \(byte {record * size}\)"):
            tfrecords.RecordFiles([path])


def test_a_record_may_not_claim_any_length(tmp_path):
    length = (tfrecords.MAX_RECORD + 1).to_bytes(8, "little")
    with open(tmp_path / "r", "wb") as file:
        file.write(length + tfrecords.masked_crc32c(length).to_bytes(4, "little"))
        file.truncate(12 + tfrecords.MAX_RECORD + 1 + 4)
    with pytest.raises(DataError, match=r"record 0 of .*\(byte 0\) claims 67108865 bytes"):
        tfrecords.RecordFiles([tmp_path / "r"])


def test_mistakes_with_tfrecords(records, tmp_path):
    folder, _ = records
    (tmp_path / "empty.tfrecords").touch()
    (tmp_path / "text.tfrecords").write_text("This is no TFRecord file, but it is long enough.")
    (tmp_path / "again.link").symlink_to("nowhere.tfrecords")
    for path, size, message in [
        ("a.tfrecords", 8, r"holds an image of \(3, 6, 6\), but the config asks for \(3, 8, 8\)"),
        ("none.tfrecords", 6, "there is no file"),
        ("[ae]*.tfrecords", 6, "no record in .*empty.tfrecords"),
        ("a*", 6, "again.link is a broken link"),
        ("text.tfrecords", 6, "not a TFRecord file"),
    ]:
        config = make_config("FFHQ", image_size=size, tfrecords_path=str(folder / path))
        with pytest.raises(DataError, match=message):
            datasets.get_streams(config)
    with pytest.raises(DataError, match="empty"):
        datasets.get_streams(make_config("FFHQ", tfrecords_path=""))


@pytest.mark.parametrize(
    "message, complaint",
    [
        (example(shape=[3, 6, 6], data=b"123"), "3 bytes for an image"),
        (example(image=b"123"), r"has \['image'\] instead of 'shape' and 'data'"),
        (b"\x0a\xff\xff\xff", "not a tf.train.Example"),
    ],
    ids=["size", "names", "bytes"],
)
def test_records_without_an_image_are_refused(tmp_path, message, complaint):
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(tmp_path / "f", "wb") as file:
        RecordWriter(file).write(message)
    config = make_config("FFHQ", image_size=6, tfrecords_path=str(tmp_path / "f"))
    with pytest.raises(DataError, match=f"record 0 of {tmp_path}/f.*{complaint}"):
        datasets.get_streams(config)


def test_missing_checksum_package_is_named(records, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    tfrecords.crc32c.cache_clear()
    config = make_config("FFHQ", image_size=6, tfrecords_path=f"{records[0]}/*")
    with pytest.raises(DataError, match="pip install google-crc32c"):
        datasets.get_streams(config)
