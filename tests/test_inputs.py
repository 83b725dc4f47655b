"""Images and masks that users hand in for editing."""

import pathlib
import zipfile

import numpy as np
import pytest
import torch
from dataset_helpers import make_config, numbered_source, random_images, save_image, smooth_image
from PIL import Image

import datasets
from datasets import DataError, read_inputs, read_mask, register_dataset
from score_lib.data import preprocess

SHAPE = (3, 8, 8)


def as_floats(images):
    """(n, h, w, C) uint8 -> (n, C, h, w) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


# Images of the data set.


@pytest.mark.parametrize("split, size", [("train", 1501), ("test", 296)])
def test_first_examples_of_a_split_in_its_order(split, size):
    config = make_config(
        "DIGITS", num_channels=1, random_flip=True, uniform_dequantization=True, seed=7
    )
    images, labels, names = read_inputs(config, "", 20, split)
    source = datasets.get_streams(config)[2].sources[split]
    expected, classes = source.read(np.arange(20))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images * 16, expected.float()) and torch.equal(labels, classes)
    assert names == [str(number) for number in range(20)]
    assert len(read_inputs(config, "", 5000, split).images) == size


def test_default_split_is_the_held_out_one():
    config = make_config("COLOR_DIGITS")
    assert torch.equal(
        read_inputs(config, "", 3).images, read_inputs(config, "", 3, split="test").images
    )


def test_data_without_classes_have_no_labels():
    @register_dataset(name="UNLABELLED")
    def no_labels(shape):
        unlabelled = datasets.MemorySource(numbered_source(5).images(range(5)))
        return unlabelled, unlabelled

    assert read_inputs(make_config("UNLABELLED", image_size=4), "", 2).labels is None


# Images of files.  The data set of the config determines only their shape.


def test_file_of_the_right_size_is_unchanged(tmp_path):
    image = random_images(8, 8, 3)
    path = save_image(tmp_path, "one.png", image)
    save_image(tmp_path, "other.png", random_images(8, 8, 3, seed=1))
    images, labels, names = read_inputs(make_config("COLOR_DIGITS"), path, 4)
    assert torch.equal(images, as_floats(image[None])) and labels is None and names == ["one.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".gif", ".tif"])
def test_file_of_another_size_is_cropped_and_resized(tmp_path, suffix):
    path = save_image(tmp_path, f"photo{suffix}", smooth_image(40, 90))
    stored = np.array(Image.open(path).convert("RGB"))[None]
    expected = preprocess.fit(torch.from_numpy(stored).permute(0, 3, 1, 2), 16, 24) / 255
    config = make_config("CIFAR10", image_size=(16, 24))
    assert torch.equal(read_inputs(config, path, 1).images, expected)
    assert torch.equal(read_inputs(config, str(tmp_path), 1).images, expected)


def test_all_images_of_a_folder_or_zip_in_the_order_of_names(tmp_path):
    """Training would hold out one of these twelve images."""
    pixels = random_images(12, 8, 8, 3)
    for number in np.random.default_rng(0).permutation(12):
        save_image(tmp_path / "data", f"{number:02d}.png", pixels[number])
    (tmp_path / "data" / "notes.txt").write_text("not an image")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in (tmp_path / "data").iterdir():
            archive.write(file, file.name)
    for path in (tmp_path / "data", tmp_path / "data.zip"):
        images, labels, names = read_inputs(make_config("COLOR_DIGITS"), str(path), 50, "train")
        assert torch.equal(images, as_floats(pixels)) and labels is None
        assert names == [f"{number:02d}.png" for number in range(12)]
        few = read_inputs(make_config("COLOR_DIGITS"), str(path), 5)
        assert torch.equal(few.images, images[:5]) and few.names == names[:5]


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_images_and_labels_of_arrays(tmp_path, kind):
    pixels, labels = random_images(12, 8, 8, 3), np.arange(12) % 3
    path = str(tmp_path / f"a.{kind}")
    np.save(path, pixels) if kind == "npy" else np.savez(path, images=pixels, labels=labels)
    found = read_inputs(make_config("COLOR_DIGITS"), path, 11)
    assert torch.equal(found.images, as_floats(pixels[:11]))
    assert (
        found.labels is None if kind == "npy" else found.labels.tolist() == [0, 1, 2] * 3 + [0, 1]
    )
    assert found.names == [str(number) for number in range(11)]


def test_folders_are_classes_also_below_train_and_test(tmp_path):
    paths = ["a/cat/1.png", "a/dog/2.png", "b/test/dog/3.png", "b/train/cat/4.png"]
    for path in paths:
        save_image(tmp_path, path, random_images(8, 8, 3))
    for folder, labels in (("a", [0, 1]), ("b", [1, 0])):
        found = read_inputs(make_config("COLOR_DIGITS"), str(tmp_path / folder), 9)
        assert found.labels.tolist() == labels
        assert [f"{folder}/{name}" for name in found.names] == [p for p in paths if p[0] == folder]


def test_levels_option_applies_to_files_like_the_training_images(tmp_path):
    """Other files have 256 levels."""
    levels = np.arange(16, dtype=np.uint8).repeat(4).reshape(1, 8, 8)
    np.save(tmp_path / "dark.npy", levels)
    path = str(tmp_path / "dark.npy")
    digits = read_inputs(make_config("DIGITS", num_channels=1, levels=17), path, 1).images
    assert torch.equal(digits[0], torch.from_numpy(levels) / 255)
    own = make_config("IMAGES", num_channels=1, levels=16, path=path)
    same = read_inputs(own, path, 1).images
    assert torch.equal(same[0], torch.from_numpy(levels) / 15)
    assert torch.equal(same, read_inputs(own, "", 1).images)


def test_paths_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_image(tmp_path, "one.png", random_images(8, 8, 3))
    np.save(tmp_path / "mask.npy", np.ones((8, 8)))
    assert len(read_inputs(make_config("COLOR_DIGITS"), "~/one.png", 1).images) == 1
    assert read_mask("~/mask.npy", SHAPE).all()


def test_inputs_equal_training_images(tmp_path):
    for number in range(12):
        save_image(tmp_path, f"{number:02d}.png", smooth_image(20, 30, seed=number))
    config = make_config("IMAGES", path=str(tmp_path), batch_size=12)
    splits = [read_inputs(config, "", 12, split).images for split in ("train", "test")]
    everything = read_inputs(config, str(tmp_path), 12).images
    held_out = torch.arange(12) == 9
    assert torch.equal(everything[~held_out], splits[0])
    assert torch.equal(everything[held_out], splits[1])


def test_mistakes_with_inputs(tmp_path):
    config = make_config("COLOR_DIGITS")
    save_image(tmp_path, "good.png", random_images(8, 8, 3))
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "none.npy", random_images(0, 8, 8, 3))
    np.save(tmp_path / "gray.npy", random_images(2, 8, 8))
    for name, message in [
        ("missing.png", r"images to edit: there is no file or folder '.*missing.png'"),
        ("bad.png", r"bad.png in .* is not a readable image"),
        ("text.txt", r"neither a folder nor a .zip, .npy or .npz file, nor an image \(.png, "),
        ("empty", "there is no image in .*empty"),
        ("none.npy", "none.npy holds no images"),
        ("gray.npy", "1 channels, but data.num_channels=3"),
        (".", "bad.png in .* is not a readable image"),
    ]:
        with pytest.raises(DataError, match=message):
            read_inputs(config, str(tmp_path / name), 9)
    for path, count in ((str(tmp_path), 0), ("", -1)):
        with pytest.raises(DataError, match=f"^{count} images were asked for: at least 1"):
            read_inputs(config, path, count)
    with pytest.raises(DataError, match="no split 'validation': known are 'train' and 'test'"):
        read_inputs(config, "", 1, split="validation")
    skipping = make_config("COLOR_DIGITS", on_error="skip")
    assert read_inputs(skipping, str(tmp_path), 9).names == ["good.png"]
    with pytest.raises(DataError, match=r"bad.png in .* is not a readable image"):
        read_inputs(skipping, str(tmp_path / "bad.png"), 9)


# Masks.


LEFT = np.zeros((8, 12), dtype=bool)
LEFT[1:, :5] = True
WIDE = (3, 8, 12)


def black_and_white(mode):
    return Image.fromarray(np.uint8(255 * LEFT)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_white_is_known_and_black_is_open(tmp_path, mode):
    image = black_and_white("L")
    if mode == "I;16":
        image = Image.fromarray(np.uint16(65535 * LEFT))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png")
    mask = read_mask(str(tmp_path / "mask.png"), WIDE)
    assert mask.shape == (1, 8, 12) and mask.dtype == torch.float32
    assert torch.equal(mask[0] == 1, torch.from_numpy(LEFT)) and (mask[0][~LEFT] == 0).all()


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, ">i4", np.float16, np.float64])
@pytest.mark.parametrize("known", [1, 255])
def test_masks_of_arrays(tmp_path, kind, known):
    path = str(tmp_path / "mask.npy")
    channels = np.stack([LEFT, ~LEFT, np.ones_like(LEFT)])
    for stored, expected in ((LEFT, LEFT[None]), (LEFT[None], LEFT[None]), (channels, channels)):
        np.save(path, (known * stored.astype(int)).astype(kind))
        mask = read_mask(path, WIDE)
        assert mask.dtype == torch.float32
        assert np.array_equal(mask.numpy(), expected.astype(np.float32))


def test_masks_may_be_all_known_or_all_open(tmp_path):
    for value in (0, 255):
        path = save_image(tmp_path, "mask.png", np.full((8, 8), value, np.uint8))
        assert torch.equal(read_mask(path, SHAPE), torch.full((1, 8, 8), value / 255))


def test_masks_are_neither_resized_nor_thresholded(tmp_path):
    def refused(path, message, shape=WIDE):
        with pytest.raises(DataError, match=message):
            read_mask(path, shape)

    path = str(tmp_path / "mask.png")
    black_and_white("L").save(path)
    refused(
        path, r"mask.png has the shape \(1, 8, 12\), but the data have \(3, 12, 8\)", (3, 12, 8)
    )
    refused(
        path, r"mask.png has the shape \(1, 8, 12\), but the data have \(3, 16, 24\)", (3, 16, 24)
    )
    for gray in (1, 128, 254):
        save_image(tmp_path, "mask.png", np.uint8(np.where(LEFT, 255, gray)))
        refused(path, f"mask.png holds {gray} beside 0 \\(open\\) and 255 \\(known\\)")
    refused(
        save_image(tmp_path, "mask.png", np.uint8(LEFT)), "mask.png holds 1 beside 0 .* and 255"
    )
    ramp = np.arange(96, dtype=np.uint8).reshape(8, 12)
    refused(save_image(tmp_path, "mask.png", ramp), r"holds 1, 2, 3, \.\.\. beside")
    red = np.uint8(255 * np.stack([LEFT, 0 * LEFT, 0 * LEFT], axis=-1))
    refused(save_image(tmp_path, "mask.png", red), "mask.png is coloured or transparent")
    glass = np.uint8(255 * np.stack([LEFT, LEFT, LEFT, LEFT], axis=-1))
    refused(save_image(tmp_path, "mask.png", glass), "mask.png is coloured or transparent")


def test_arrays_that_are_not_masks_are_refused(tmp_path):
    path = str(tmp_path / "mask.npy")
    for stored, message in [
        (LEFT.T, r"has the shape \(1, 12, 8\), but the data have \(3, 8, 12\)"),
        (LEFT[:, :1], r"\(1, 8, 1\)"),
        (LEFT[0], r"\(12,\)"),
        (np.stack([LEFT] * 2), r"\(2, 8, 12\)"),
        (LEFT[None, None], r"\(1, 1, 8, 12\)"),
        (LEFT[..., None], r"\(8, 12, 1\)"),
        (0.5 * LEFT, r"holds 0.5 beside 0 \(open\) and 1"),
        (LEFT - 1.0, "holds -1.0 beside"),
        (np.where(LEFT, np.nan, 0), "holds nan beside"),
        (np.uint8(LEFT + 254), "holds 254 beside"),
        (LEFT * 255 + ~LEFT, "holds 1 beside 0 .* and 255"),
        (LEFT.astype(complex), "holds complex128"),
        (LEFT.astype(str), "holds <U5"),
        (LEFT.astype(object), "not a readable array"),
    ]:
        np.save(path, stored, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            read_mask(path, WIDE)


def test_files_that_are_not_masks_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"nothing")
    (tmp_path / "a.png").write_bytes(b"nothing")
    np.save(tmp_path / "b.npy", LEFT)
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes() * 2)
    for path, message in [
        (tmp_path / "none.png", "there is no mask file '.*none.png'"),
        (tmp_path, "there is no mask file"),
        (pathlib.Path(), "there is no mask file"),
        (tmp_path / "a.npy", "a.npy is not a readable array"),
        (tmp_path / "b.npy", "b.npy has .* bytes, but its header promises"),
        (tmp_path / "a.png", "a.png in .* is not a readable image"),
    ]:
        with pytest.raises(DataError, match=message):
            read_mask(str(path), SHAPE)


def test_files_like_those_of_the_data_set_have_its_grey_levels(tmp_path):
    grey = np.full((8, 8), 16, np.uint8)
    one = save_image(tmp_path / "data", "1.png", grey)
    np.save(tmp_path / "rows.npy", np.stack([grey] * 20)[:, None])
    options = {"num_channels": 1, "levels": 17}
    for name, path in (("IMAGES", one), ("ARRAYS", str(tmp_path / "rows.npy"))):
        config = make_config(name, path=path, **options)
        own, given = (read_inputs(config, p, 1).images for p in ("", path))
        assert torch.equal(own, given) and (given == 1).all(), name
    for name in ("WEBDATASET", "HUGGINGFACE", "IMAGENET"):
        assert (read_inputs(make_config(name, **options), one, 1).images == 1).all(), name
    # Pictures beside the digits, and beside arrays, have levels of their own.
    for name in ("DIGITS", "ARRAYS"):
        given = read_inputs(make_config(name, path="", **options), one, 1).images
        assert torch.allclose(given, torch.tensor(16 / 255)), name
