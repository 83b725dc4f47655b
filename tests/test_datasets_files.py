"""TFRecord files, and the user's own images in folders, zip files and arrays."""

import io
import itertools
import logging
import os
import pathlib
import struct
import zipfile

import numpy as np
import pytest
import torch
from dataset_helpers import make_config, random_images, smooth_image
from PIL import Image

from score_lib import data as datasets
from score_lib.data import DataError, preprocess, tfrecords


def everything(source):
    return source.read(np.arange(len(source)))


# Checksums.


def test_crc32c_known_answers():
    """The examples of RFC 3720, appendix B.4, and the usual check value."""
    for data, expected in [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
        (b"a", 0xC1D04330),
    ]:
        rows = np.frombuffer(data, np.uint8)[None].repeat(2, axis=0)
        assert tfrecords.crc32c(rows).tolist() == [expected, expected]


def test_crc32c_of_any_length_is_the_bytewise_one():
    def bytewise(data):
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
        return crc ^ 0xFFFFFFFF

    for length in (1, 2, 3, 4, 5, 7, 8, 12, 13, 63, 64, 65, 1000):
        data = random_images(1, length, seed=length)
        assert tfrecords.crc32c(data)[0] == bytewise(data[0].tolist())


# TFRecords, written by TensorBoard's writer and protocol buffers.


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
@pytest.mark.parametrize("pattern", ["{0}/a.tfrecords,{0}/b.tfrecords", "{0}/*.tfrecords"])
def test_tfrecords(records, name, pattern):
    folder, images = records
    config = make_config(name, image_size=6, tfrecords_path=pattern.format(folder))
    train, test, info = datasets.get_dataset(config, evaluation=True)
    assert info.num_examples == {"train": 7, "test": 7} and info.levels == 256
    for stream in (train, test):
        seen = torch.cat([batch["image"] for batch in stream])
        torch.testing.assert_close(seen, torch.from_numpy(images) / 255)


def test_tfrecords_with_workers(records):
    folder, images = records
    config = make_config("FFHQ", image_size=6, tfrecords_path=f"{folder}/*", num_workers=2)
    train, _, info = datasets.get_dataset(config, evaluation=True)
    info.sources["train"].images([0, 6])  # opens the files here, before the workers exist
    seen = torch.cat([batch["image"] for batch in train])
    torch.testing.assert_close(seen, torch.from_numpy(images) / 255)


def test_parsing_examples():
    message = example(shape=[3, 2, 300], data=b"xyz", score=[0.5])
    assert tfrecords.parse_example(message) == {"shape": [3, 2, 300], "data": [b"xyz"]}
    unpacked = b"\x0a\x0d\x0a\x0b\x0a\x01n\x12\x06\x1a\x04\x08\x05\x08\x07"
    assert tfrecords.parse_example(unpacked) == {"n": [5, 7]}
    for length in range(1, len(message) - 1):
        with pytest.raises(ValueError):
            tfrecords.parse_example(message[:length])


def test_every_flipped_bit_is_found(tmp_path):
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


def test_every_cut_is_found(tmp_path):
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


def test_mistakes_with_tfrecords(records, tmp_path):
    folder, _ = records
    (tmp_path / "empty.tfrecords").touch()
    (tmp_path / "text.tfrecords").write_text("This is no TFRecord file, but it is long enough.")
    for path, size, message in [
        ("a.tfrecords", 8, r"holds an image of \(3, 6, 6\), but the config asks for \(3, 8, 8\)"),
        ("none.tfrecords", 6, "there is no file"),
        ("empty.tfrecords", 6, "no record"),
        ("text.tfrecords", 6, "not a TFRecord file"),
    ]:
        config = make_config("FFHQ", image_size=size, tfrecords_path=str(folder / path))
        with pytest.raises(DataError, match=message):
            datasets.get_dataset(config)
    with pytest.raises(DataError, match="empty"):
        datasets.get_dataset(make_config("FFHQ", tfrecords_path=""))


@pytest.mark.parametrize(
    "message, complaint",
    [
        (example(shape=[3, 6, 6], data=b"123"), "3 bytes for an image"),
        (example(image=b"123"), r"has \['image'\] instead of 'shape' and 'data'"),
        (b"\x0a\xff\xff\xff", "not a tf.train.Example"),
    ],
    ids=["size", "names", "bytes"],
)
def test_foreign_records_are_refused(tmp_path, message, complaint):
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(tmp_path / "f", "wb") as file:
        RecordWriter(file).write(message)
    config = make_config("FFHQ", image_size=6, tfrecords_path=str(tmp_path / "f"))
    with pytest.raises(DataError, match=f"record 0 of {tmp_path}/f.*{complaint}"):
        datasets.get_dataset(config)


# Folders and zip files.


def save(folder, name, image):
    path = pathlib.Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def open_images(path, **options):
    return datasets.get_dataset(make_config("IMAGES", path=str(path), **options), evaluation=True)


@pytest.fixture
def folder(tmp_path):
    """12 images of 8 x 8, in the formats that keep every pixel."""
    images = random_images(12, 8, 8, 3)
    for number, suffix in zip(range(12), itertools.cycle(["png", "bmp", "tiff", "PNG"])):
        save(tmp_path / "data", f"{number:02d}.{suffix}", images[number])
    return tmp_path / "data", torch.from_numpy(images).permute(0, 3, 1, 2)


def zipped(folder, **extra):
    path = folder.parent / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for image in folder.rglob("*"):
            file.write(image, image.relative_to(folder.parent))
        for name, content in extra.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_the_right_size_come_back_as_they_are(folder, kind, workers):
    path, images = folder
    where = path if kind == "folder" else zipped(path)
    train, _, info = open_images(where, num_workers=workers)
    assert info.num_examples == {"train": 11, "test": 1} and info.num_classes == 1
    assert torch.equal(info.sources["test"].images([0])[0], images[9])
    expected = images[[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11]] / 255
    assert torch.equal(torch.cat([batch["image"] for batch in train]), expected)


def test_zip_files_are_not_unpacked(folder):
    path = zipped(folder[0])
    before = sorted(path.parent.rglob("*"))
    list(open_images(path)[0])
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_and_held_out_folders(tmp_path, kind):
    for number, name in enumerate(
        ["train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "val/dog/4.png", "extra/5.png"]
    ):
        save(tmp_path / "data", name, np.full((8, 8, 3), number, np.uint8))
    path = tmp_path / "data" if kind == "folder" else zipped(tmp_path / "data")
    _, _, info = open_images(path)
    train, test = (everything(source) for source in info.sources.values())
    assert train[0][:, 0, 0, 0].tolist() == [0, 1, 2] and train[1].tolist() == [0, 1, 1]
    assert test[0][:, 0, 0, 0].tolist() == [3] and test[1].tolist() == [1]
    assert info.num_classes == 2


def test_labels_are_the_folders_only_if_every_image_is_in_one(tmp_path):
    for name in ("b/x/1.png", "a/2.png", "c/3.png"):
        save(tmp_path, name, random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    _, labels = everything(info.sources["train"])
    assert labels.tolist() == [0, 1, 2] and info.num_classes == 3  # a, b, c
    save(tmp_path, "4.png", random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    assert everything(info.sources["train"])[1].tolist() == [0, 0, 0, 0]


def test_few_images_are_in_both_parts(tmp_path):
    save(tmp_path, "only.png", random_images(8, 8, 3))
    assert open_images(tmp_path)[2].num_examples == {"train": 1, "test": 1}


def test_what_is_left_out_is_counted_and_named(folder, caplog):
    path, _ = folder
    (path / "notes.txt").write_text("x")
    (path / ".hidden.png").write_bytes(b"x")
    (path / "linked").symlink_to(path.parent)
    with caplog.at_level(logging.WARNING):
        _, _, info = open_images(path)
    assert sum(info.num_examples.values()) == 12
    assert "3 left out because they are not images: .hidden.png, linked, notes.txt" in caplog.text
    archive = zipped(path, **{"__MACOSX/data/._00.png": "x", "../../escape.png": "x"})
    with caplog.at_level(logging.WARNING):
        assert sum(open_images(archive)[2].num_examples.values()) == 12
    assert "../../escape.png" in caplog.text and "__MACOSX/data/._00.png" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_broken_images_stop_or_are_left_out(folder, kind, caplog):
    path, images = folder
    whole = (path / "00.png").read_bytes()
    (path / "03.PNG").write_bytes(whole[: len(whole) // 2])
    (path / "05.bmp").write_bytes(b"nothing like an image")
    where = path if kind == "folder" else zipped(path)
    with pytest.raises(DataError, match=r"03.PNG in .* is not a readable image"):
        list(open_images(where)[0])
    with caplog.at_level(logging.WARNING):
        train, _, info = open_images(where, on_error="skip")
    assert "2 left out because they cannot be read" in caplog.text
    assert "03.PNG" in caplog.text and "05.bmp" in caplog.text
    assert info.num_examples == {"train": 9, "test": 1}
    kept = [0, 1, 2, 4, 6, 7, 8, 9, 10]
    assert torch.equal(torch.cat([batch["image"] for batch in train]), images[kept] / 255)


def test_gray_colour_and_transparency(tmp_path):
    rgba = random_images(8, 8, 4)
    save(tmp_path, "1.png", rgba)
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        _, _, info = open_images(tmp_path, num_channels=channels)
        expected = np.array(Image.fromarray(rgba).convert(mode)).reshape(8, 8, channels)
        found = info.sources["train"].images([0])[0].permute(1, 2, 0)
        assert np.array_equal(found.numpy(), expected)
    palette = Image.fromarray(rgba).convert("P")
    palette.save(tmp_path / "1.png", transparency=bytes(range(256)))
    found = open_images(tmp_path)[2].sources["train"].images([0])[0].permute(1, 2, 0)
    assert np.array_equal(found.numpy(), np.array(palette.convert("RGB")))


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    found = open_images(tmp_path, num_channels=1)[2].sources["train"].images([0])[0, 0]
    assert np.abs(found.numpy() - levels / 257.0).max() <= 0.5


def test_orientation_of_photographs_is_obeyed(tmp_path):
    image = random_images(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to view
    Image.fromarray(image).save(tmp_path / "photo.png", exif=exif)
    found = open_images(tmp_path)[2].sources["train"].images([0])[0].permute(1, 2, 0)
    assert np.array_equal(found.numpy(), np.rot90(image, -1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), k, np.uint8)) for k in (50, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (open_images(tmp_path)[2].sources["train"].images([0]) == 50).all()


def test_sizes_that_differ_are_cropped_and_resized(tmp_path):
    wide, tall = smooth_image(40, 90), smooth_image(70, 32)
    save(tmp_path, "1.png", wide)
    save(tmp_path, "2.png", tall)
    _, _, info = open_images(tmp_path, image_size=(16, 24))
    found = info.sources["train"].images([0, 1]).permute(0, 2, 3, 1).numpy().astype(int)
    for image, part in zip(found, (wide[:, 15:75], tall[24:45]), strict=True):
        expected = Image.fromarray(part).resize((24, 16), Image.Resampling.BICUBIC)
        assert np.abs(image - np.array(expected)).max() <= 1


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    save(tmp_path, "1.png", random_images(8, 8, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # twice that is an error
    with pytest.raises(DataError, match=r"1.png in .* is not a readable image: Image size \(64"):
        list(open_images(tmp_path)[0])
    monkeypatch.undo()
    monkeypatch.setattr("datasets.images.MAX_BYTES", 50)
    for path in (tmp_path, zipped(tmp_path)):
        with pytest.raises(DataError, match=r"1.png in .* too many for an image"):
            list(open_images(path)[0])


def test_mistakes_with_images(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.zip").write_bytes(b"not a zip file")
    for options, message in [
        ({"path": ""}, "data.dataset='IMAGES' reads data.path"),
        ({"path": str(tmp_path / "none")}, "there is no file or folder '.*none'"),
        ({"path": str(tmp_path / "empty")}, "there is no image in .*empty"),
        ({"path": str(tmp_path / "a.txt")}, "neither a folder nor a .zip, .npy or .npz"),
        ({"path": str(tmp_path / "b.zip")}, "b.zip is not a readable zip file"),
        ({"path": str(folder[0]), "num_channels": 2}, "data.num_channels=2"),
        ({"path": str(folder[0]), "on_error": "ignore"}, "data.on_error='ignore'"),
    ]:
        with pytest.raises(DataError, match=message):
            open_images(**options)
    for image in folder[0].iterdir():
        image.write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 12 images"):
        open_images(folder[0], on_error="skip")


def test_a_damaged_zip_names_the_image(folder):
    path = zipped(folder[0])
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # within the first image
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data/\d\d\.\w+ in .*zip is not a readable image"):
        for source in open_images(path)[2].sources.values():
            everything(source)


# Arrays.


@pytest.mark.parametrize("layout", ["channels last", "channels first", "gray", "gray last"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_of_every_layout(tmp_path, layout, kind):
    channels = 1 if "gray" in layout else 3
    images = random_images(20, channels, 8, 8)
    stored = {
        "channels last": images.transpose(0, 2, 3, 1),
        "channels first": images,
        "gray": images[:, 0],
        "gray last": images[:, 0, :, :, None],
    }[layout]
    path = tmp_path / f"images.{kind}"
    np.save(path, stored) if kind == "npy" else np.savez_compressed(path, stored)
    _, _, info = open_images(path, num_channels=channels)
    assert info.num_examples == {"train": 18, "test": 2}
    held_out = np.arange(20) % 10 == 9
    for part, expected in (("train", images[~held_out]), ("test", images[held_out])):
        assert np.array_equal(everything(info.sources[part])[0].numpy(), expected)


def test_npy_files_are_read_in_place_also_by_workers(tmp_path):
    np.save(tmp_path / "a.npy", random_images(20, 8, 8, 3))
    train, _, info = open_images(tmp_path / "a.npy", num_workers=2)
    assert isinstance(info.sources["train"]._source._array(), np.memmap)
    assert sum(len(batch["label"]) for batch in train) == 18


def test_images_of_three_pixels_are_read_as_the_config_says(tmp_path):
    """(N, 3, 3, 3) can be read both ways: channels first, where that is the size asked for."""
    images = random_images(4, 3, 3, 3)
    np.save(tmp_path / "a.npy", images)
    _, _, info = open_images(tmp_path / "a.npy", image_size=3)
    assert np.array_equal(info.sources["train"].images(range(4)).numpy(), images)


@pytest.mark.parametrize("name", ["images", "samples", "arr_0", "anything"])
def test_npz_names_and_labels(tmp_path, name):
    images, labels = random_images(20, 8, 8, 3), np.arange(20) % 4
    np.savez(tmp_path / "a.npz", **{name: images, "labels": labels})
    _, _, info = open_images(tmp_path / "a.npz")
    assert info.num_classes == 4
    assert everything(info.sources["test"])[1].tolist() == [1, 3]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_become_256_levels(tmp_path, kind):
    images = random_images(4, 8, 8, 3)
    np.save(tmp_path / "a.npy", (images / 255).astype(kind))
    _, _, info = open_images(tmp_path / "a.npy")
    found = info.sources["train"].images(range(4)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, images) and info.levels == 256


def test_arrays_are_resized_and_levels_kept(tmp_path):
    images = np.stack([smooth_image(20, 30, seed) for seed in range(3)])
    np.save(tmp_path / "a.npy", images)
    found = open_images(tmp_path / "a.npy")[2].sources["train"].images(range(3))
    expected = preprocess.fit(torch.from_numpy(images).permute(0, 3, 1, 2), 8, 8)
    assert torch.equal(found, expected)
    np.save(tmp_path / "b.npy", images[:, :8, :8] // 16)
    assert open_images(tmp_path / "b.npy", levels=16)[2].levels == 16
    with pytest.raises(DataError, match=r"data.levels=15 allows 0 to 14"):
        list(open_images(tmp_path / "b.npy", levels=15)[0])


def test_mistakes_with_arrays(tmp_path, monkeypatch):
    class Danger:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    images = random_images(4, 8, 8, 3)
    for stored, message in [
        (images.astype(np.int64), "holds int64"),
        (images[0], "data.num_channels=3"),
        (images[0, 0], r"shape \(8, 3\)"),
        (images[:0], "no images"),
        (images[..., :2], r"shape \(4, 8, 8, 2\)"),
        (images[..., :1], "1 channels, but data.num_channels=3"),
        (images * 2.0 - 1, "floats outside"),
        (images * np.nan, "floats outside"),
        (np.array([Danger()], dtype=object), "not a readable array"),
    ]:
        np.save(tmp_path / "a.npy", stored, allow_pickle=True)
        np.savez(tmp_path / "a.npz", stored)
        for name in ("a.npy", "a.npz"):
            with pytest.raises(DataError, match=message):
                list(open_images(tmp_path / name)[0])
    assert not (tmp_path / "pwned").exists()
    for arrays, message in [
        ({"x": images, "y": images}, "call the array of images 'images'"),
        ({"images": images, "labels": np.arange(3)}, "labels"),
        ({"images": images, "labels": np.arange(4.0)}, "labels"),
        ({"images": images, "labels": np.arange(4) - 1}, "labels"),
    ]:
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(b"nothing")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 99, 99)}"
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    (tmp_path / "e.npz").write_bytes(b"nothing")
    for name in ("c.npy", "d.npy", "e.npz"):
        with pytest.raises(DataError, match=f"{name} is not a readable array"):
            open_images(tmp_path / name)
    monkeypatch.setattr("datasets.arrays.total_memory", lambda: 1000)
    with pytest.raises(DataError, match="more than half of the memory"):
        open_images(tmp_path / "b.npz")


def test_a_npz_that_is_cut_off(tmp_path):
    content = io.BytesIO()
    np.savez_compressed(content, images=random_images(4, 8, 8, 3))
    for length in (10, 300, len(content.getvalue()) - 5):
        (tmp_path / "a.npz").write_bytes(content.getvalue()[:length])
        with pytest.raises(DataError, match="not a readable array"):
            open_images(tmp_path / "a.npz")
