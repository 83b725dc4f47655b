"""The user's own images in .npy and .npz files."""

import io
import logging
import os
import struct

import numpy as np
import pytest
import torch
from dataset_helpers import everything, open_images, random_images, smooth_image

from datasets import DataError
from score_lib.data import arrays as array_files
from score_lib.data import preprocess
from score_lib.data import stored as stored_files


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


@pytest.mark.parametrize("workers", [0, 2])
def test_npy_files_larger_than_memory_are_read(tmp_path, workers):
    count = 1 << 22
    path, shape = tmp_path / "a.npy", (count, 128, 128, 3)
    images = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint8, shape=shape
    )  # 200 GB, sparse
    images[9] = 50
    del images
    _, test, _ = open_images(path, image_size=128, num_workers=workers)
    first = next(iter(test))["image"] * 255
    assert (first[0] == 50).all() and (first[1:] == 0).all()


def test_ambiguous_layout_follows_the_configured_shape(tmp_path):
    """(N, 3, 3, 3) may have channels first or last; it is channels first if that is the shape."""
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
def test_floats_are_rounded_to_256_levels(tmp_path, kind):
    images = random_images(4, 8, 8, 3)
    np.save(tmp_path / "a.npy", (images / 255).astype(kind))
    _, _, info = open_images(tmp_path / "a.npy")
    found = info.sources["train"].images(range(4)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, images) and info.levels == 256


@pytest.mark.parametrize("kind", [np.uint16, np.int32, bool, np.float32, np.uint8])
def test_values_are_scaled_by_the_range_and_integers_refused_without(tmp_path, kind):
    high = 1 if kind is bool else 200
    values = random_images(20, 8, 8) % (high + 1)
    np.save(tmp_path / "a.npy", values.astype(kind))
    if kind not in (np.uint8, np.float32):
        said = f"a.npy holds {np.dtype(kind)} .* data.range=0,{1 if kind is bool else 255}"
        with pytest.raises(DataError, match=said):
            open_images(tmp_path / "a.npy", num_channels=1)
    _, _, info = open_images(tmp_path / "a.npy", num_channels=1, range=(0, high))
    found = everything(info.sources["train"])
    expected = np.round(np.delete(values, [9, 19], axis=0) * 255.0 / high)
    assert np.array_equal(found[0][:, 0].numpy(), expected)


@pytest.mark.parametrize(
    "values, bad, options, said",
    [
        (np.zeros((40, 8, 8)), np.nan, {}, "holds nan"),
        (np.zeros((40, 8, 8), np.float16), 1.5, {}, r"holds 1.5, .*data.range=-1,1"),
        (np.zeros((40, 8, 8), np.uint16), 300, {"range": (0, 255)}, "holds 300, outside of data.r"),
        (np.ones((40, 8, 8), np.float32), -0.5, {"range": (0, 1)}, "holds -0.5, outside"),
        (np.zeros((40, 8, 8), np.uint8), 17, {"levels": 17}, "holds 17, but data.levels=17"),
    ],
)
@pytest.mark.parametrize("size", ["npy", "npz"])
def test_bad_row_is_named_at_once(tmp_path, monkeypatch, values, bad, options, said, size):
    monkeypatch.setattr(array_files, "CHUNK", 3 * 64)  # rows 36 to 38 are one part
    values = values.copy()
    values[37, 5, 1] = bad
    path = tmp_path / f"a.{size}"
    np.save(path, values) if size == "npy" else np.savez(path, images=values)
    with pytest.raises(DataError, match=rf"row 37 \(from 0\) of .*a.{size} {said}"):
        open_images(path, num_channels=1, **options)


def test_rounding_of_floats_is_said_once(tmp_path, caplog):
    np.save(tmp_path / "a.npy", np.zeros((20, 8, 8)))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            open_images(tmp_path / "a.npy", num_channels=1)
    assert caplog.text.count("a.npy holds float64: values are rounded to 256 grey levels") == 1


def test_arrays_are_resized_and_levels_kept(tmp_path):
    images = np.stack([smooth_image(20, 30, seed) for seed in range(3)])
    np.save(tmp_path / "a.npy", images)
    found = open_images(tmp_path / "a.npy")[2].sources["train"].images(range(3))
    expected = preprocess.fit(torch.from_numpy(images).permute(0, 3, 1, 2), 8, 8)
    assert torch.equal(found, expected)
    np.save(tmp_path / "white.npy", np.full((3, 20, 30, 3), 255, np.uint8))
    assert (open_images(tmp_path / "white.npy")[2].sources["train"].images(range(3)) == 255).all()
    np.save(tmp_path / "b.npy", images[:, :8, :8] // 16)
    assert open_images(tmp_path / "b.npy", levels=16)[2].levels == 16
    with pytest.raises(DataError, match=r"data.levels=15 allows 0 to 14"):
        list(open_images(tmp_path / "b.npy", levels=15)[0])


@pytest.mark.parametrize("side", [8, 4])
def test_arrays_that_are_rounded_to_256_levels_have_no_fewer(tmp_path, side):
    np.save(tmp_path / "a.npy", np.ones((20, 8, 8), dtype="f4"))
    with pytest.raises(DataError, match=r"256 grey levels, but data.levels=16: save .* as uint8"):
        open_images(tmp_path / "a.npy", num_channels=1, image_size=side, levels=16)


def test_mistakes_with_arrays(tmp_path, monkeypatch):
    class Danger:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    images = random_images(4, 8, 8, 3)
    for stored, message in [
        (images.astype(np.int64), r"holds int64 .*data.range=0,\d+"),
        (images[0], "data.num_channels=3"),
        (images[0, 0], r"shape \(8, 3\)"),
        (images[:0], "no images"),
        (images[..., :2], r"shape \(4, 8, 8, 2\)"),
        (images[..., :1], "1 channels, but data.num_channels=3"),
        (images * 2.0 - 1, "row 0 .* floats outside"),
        (images * np.nan, "row 0 .* holds nan, .*floats outside"),
        (np.array([Danger()], dtype=object), "not a readable array"),
    ]:
        np.save(tmp_path / "a.npy", stored, allow_pickle=True)
        np.savez(tmp_path / "a.npz", stored)
        for name in ("a.npy", "a.npz"):
            with pytest.raises(DataError, match=message):
                list(open_images(tmp_path / name)[0])
    assert not (tmp_path / "pwned").exists()
    for arrays, message in [
        ({"x": images, "y": images}, "name the array of images 'images'"),
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
    monkeypatch.setattr(stored_files, "total_memory", lambda: 1000)
    with pytest.raises(DataError, match="more than half of the memory"):
        open_images(tmp_path / "b.npz")


def test_an_array_behind_another_is_not_left_out(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        for seed in range(2):
            np.save(file, random_images(4, 8, 8, 3, seed=seed))
    with pytest.raises(DataError, match="as if another array had been saved behind the first"):
        open_images(tmp_path / "a.npy")


def test_truncated_npz_is_refused(tmp_path):
    content = io.BytesIO()
    np.savez_compressed(content, images=random_images(4, 8, 8, 3))
    for length in (10, 300, len(content.getvalue()) - 5):
        (tmp_path / "a.npz").write_bytes(content.getvalue()[:length])
        with pytest.raises(DataError, match="not a readable array"):
            open_images(tmp_path / "a.npz")
