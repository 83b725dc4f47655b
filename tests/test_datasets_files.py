"""The user's own images in folders and zip files."""

import itertools
import logging
import zipfile

import numpy as np
import pytest
import torch
from dataset_helpers import (
    everything,
    make_config,
    open_images,
    random_images,
    save_image,
    smooth_image,
    write_png,
)
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data import files as image_files


@pytest.fixture
def folder(tmp_path):
    """12 images of 8 x 8, in the formats that keep every pixel."""
    images = random_images(12, 8, 8, 3)
    for number, suffix in zip(range(12), itertools.cycle(["png", "bmp", "tiff", "PNG"])):
        save_image(tmp_path / "data", f"{number:02d}.{suffix}", images[number])
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
def test_images_of_the_right_size_are_unchanged(folder, kind, workers):
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
        save_image(tmp_path / "data", name, np.full((8, 8, 3), number, np.uint8))
    path = tmp_path / "data" if kind == "folder" else zipped(tmp_path / "data")
    _, _, info = open_images(path)
    train, test = (everything(source) for source in info.sources.values())
    assert train[0][:, 0, 0, 0].tolist() == [0, 1, 2] and train[1].tolist() == [0, 1, 1]
    assert test[0][:, 0, 0, 0].tolist() == [3] and test[1].tolist() == [1]
    assert info.num_classes == 2


@pytest.mark.parametrize(
    "folders, train, held_out",
    [
        ("train valid", "train", "valid"),
        ("Train Test", "Train", "Test"),
        ("TRAINING VAL", "TRAINING", "VAL"),
        ("training dev other", "training", "dev"),
        ("train heldout", "train", "heldout"),
        ("train valid test", "train", "test"),
        ("train validation holdout", "train", "holdout"),
    ],
)
@pytest.mark.parametrize("place", ["{split}/{kind}", "{kind}/{split}", "data/{split}/{kind}"])
def test_usual_names_of_folders_split_the_data(tmp_path, folders, train, held_out, place, caplog):
    for value, (folder, kind) in enumerate(itertools.product(folders.split(), ("cat", "dog"))):
        name = place.format(split=folder, kind=kind)
        save_image(tmp_path, f"{name}/1.png", np.full((8, 8, 3), value, np.uint8))
    with caplog.at_level(logging.INFO):
        _, _, info = open_images(tmp_path)
    assert info.class_to_idx == {"cat": 0, "dog": 1} and info.num_classes == 2
    for part, folder in (("train", train), ("test", held_out)):
        found, labels = everything(info.sources[part])
        first = 2 * folders.split().index(folder)
        assert sorted(found[:, 0, 0, 0].tolist()) == [first, first + 1]
        assert labels.tolist() == [0, 1]
        assert f"{folder}/ (2 images)" in caplog.text
    for folder in set(folders.split()) - {train, held_out}:
        assert f"{folder}/ (2 images)" in caplog.text.partition("left out")[2]


def test_split_option_names_folders_or_none(tmp_path, caplog):
    for number, folder in enumerate(["a", "b", "test", "train"] * 5):
        save_image(tmp_path, f"{folder}/{number}.png", random_images(8, 8, 3))
    _, _, info = open_images(tmp_path, split="b:a")
    assert info.num_examples == {"train": 5, "test": 5} and info.num_classes == 1
    with caplog.at_level(logging.INFO):
        _, _, info = open_images(tmp_path, split="tenths")
    assert info.num_examples == {"train": 18, "test": 2} and info.num_classes == 4
    assert "every tenth image is held out: 18" in caplog.text
    with pytest.raises(DataError, match=r"data.split='b:c' .* a, b, test, train"):
        open_images(tmp_path, split="b:c")


def test_unclear_folders_of_a_split_are_refused(tmp_path):
    for folder in ("train", "test", "Testing"):
        save_image(tmp_path, f"{folder}/1.png", random_images(8, 8, 3))
    with pytest.raises(DataError, match=r"Testing, test .* data.split=train:Testing"):
        open_images(tmp_path)
    found = datasets.read_inputs(make_config("DIGITS"), str(tmp_path), 3)
    assert len(found.images) == 3 and found.labels is None  # these need no split
    for folder in ("b/images", "b/valid"):
        save_image(tmp_path, f"{folder}/1.png", random_images(8, 8, 3))
    with pytest.raises(DataError, match=r"folder valid, .* data.split=images:valid"):
        open_images(tmp_path / "b")
    assert open_images(tmp_path / "b", split="tenths")[2].num_classes == 2
    np.save(tmp_path / "a.npy", random_images(12, 8, 8, 3))
    with pytest.raises(DataError, match=r"data.split='a:b' names folders"):
        open_images(tmp_path / "a.npy", split="a:b")


@pytest.mark.parametrize("place", ["test/{kind}", "photos/Test", "{kind}/test", "a/test/{kind}"])
def test_images_that_are_all_held_out_are_not_trained_on(tmp_path, place):
    for number, kind in enumerate(["cat", "dog"] * 6):
        name = f"{place.format(kind=kind)}/{number}.png"
        save_image(tmp_path / "data", name, random_images(8, 8, 3))
    with pytest.raises(DataError, match=r"(?i)folder test, as if .* data.split=TRAIN:test"):
        open_images(tmp_path / "data")
    found = open_images(tmp_path / "data", split="tenths")[2]
    assert found.num_examples == {"train": 11, "test": 1}
    if place.startswith("test"):  # which is named by the user then
        assert open_images(tmp_path / "data/test")[2].num_classes == 2


@pytest.mark.parametrize(
    "folders",
    ["cat/photos cat/val dog/photos dog/val", "train2017 any2017 val2017", "a/photos a/b/val"],
)
def test_held_out_images_below_the_first_folders_are_not_trained_on(tmp_path, folders):
    for folder in folders.split():
        save_image(tmp_path, f"{folder}/1.png", random_images(8, 8, 3))
    with pytest.raises(
        DataError, match=r"folder val\w*, as if .* data.split=(photos|train2017|TRAIN):val"
    ):
        open_images(tmp_path)


def test_classes_are_numbered_in_natural_order(tmp_path):
    names = [*map(str, range(12)), "a9", "a10", "a10-9", "a10-10", "b"]
    for name in names:
        save_image(tmp_path, f"{name}/x.png", np.full((8, 8, 3), names.index(name), np.uint8))
    _, _, info = open_images(tmp_path)
    assert info.class_to_idx == {name: label for label, name in enumerate(names)}
    for source in info.sources.values():
        found, labels = everything(source)
        assert found[:, 0, 0, 0].tolist() == labels.tolist()


def test_a_class_in_two_spellings_of_unicode_is_refused(tmp_path):
    for name in ("train/caf\u00e9", "train/tea", "test/cafe\u0301"):
        save_image(tmp_path, f"{name}/1.png", random_images(8, 8, 3))
    with pytest.raises(DataError, match="two folders of classes are called caf\u00e9, in composed"):
        open_images(tmp_path)


def test_names_that_another_machine_reads_otherwise_are_refused(folder, monkeypatch):
    """The points that were chosen from a cloud, by its name, depended on the locale."""
    path, _ = folder
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "iso8859-1")
    assert open_images(path)[2].num_examples["test"] == 1
    save_image(path, "Ã©/1.png", random_images(8, 8, 3))  # é, as Latin-1 reads it
    with pytest.raises(
        DataError, match=r"data holds names .* Ã©/1.png, .* iso8859-1.*PYTHONUTF8=1"
    ):
        open_images(path)


def test_folders_are_labels_only_if_every_image_is_in_one(tmp_path):
    for name in ("b/x/1.png", "a/2.png", "c/3.png"):
        save_image(tmp_path, name, random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    _, labels = everything(info.sources["train"])
    assert labels.tolist() == [0, 1, 2] and info.num_classes == 3  # a, b, c
    save_image(tmp_path, "4.png", random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    assert everything(info.sources["train"])[1].tolist() == [0, 0, 0, 0] and not info.class_to_idx


def test_few_images_are_in_both_splits(tmp_path):
    save_image(tmp_path, "only.png", random_images(8, 8, 3))
    assert open_images(tmp_path)[2].num_examples == {"train": 1, "test": 1}


def test_files_that_are_left_out_are_counted_and_named(folder, caplog):
    path, _ = folder
    (path / "notes.txt").write_text("x")
    (path / ".hidden.png").write_bytes(b"x")
    (path / "linked").symlink_to(path.parent)
    with caplog.at_level(logging.WARNING):
        _, _, info = open_images(path)
    assert sum(info.num_examples.values()) == 12
    assert "2 left out because they are not images: .hidden.png, notes.txt" in caplog.text
    assert "1 left out because they are each a link to a folder" in caplog.text
    archive = zipped(path, **{"__MACOSX/data/._00.png": "x", "../../escape.png": "x"})
    with caplog.at_level(logging.WARNING):
        assert sum(open_images(archive)[2].num_examples.values()) == 12
    assert "../../escape.png" in caplog.text and "__MACOSX/data/._00.png" in caplog.text


@pytest.mark.parametrize(
    "name, target, said",
    [
        ("bad.png", "nowhere.png", "a broken link"),
        ("cats", "../gone", "a broken link"),
        ("bad.png", "../outside.png", "a link that leads out of the folder"),
    ],
)
def test_bad_links_are_named_when_the_data_are_opened(folder, name, target, said, caplog):
    path, _ = folder
    save_image(path.parent, "outside.png", random_images(8, 8, 3))
    (path / name).symlink_to(target)
    with pytest.raises(DataError, match=f"{name} in .* is {said}.*data.on_error=skip"):
        open_images(path)
    with caplog.at_level(logging.WARNING):
        assert sum(open_images(path, on_error="skip")[2].num_examples.values()) == 12
    assert f"1 left out because they are each {said}: {name}" in caplog.text


def test_links_in_zip_files_are_named(folder):
    path = zipped(folder[0])
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("data/linked.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "00.png")
    with pytest.raises(DataError, match=r"data/linked.png in .*zip is a link"):
        open_images(path)
    assert sum(open_images(path, on_error="skip")[2].num_examples.values()) == 12


def test_links_inside_the_folder_are_read(folder):
    path, _ = folder
    (path / "linked.png").symlink_to("00.png")
    assert sum(open_images(path)[2].num_examples.values()) == 13


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_on_error_option_raises_or_skips_broken_images(folder, kind, caplog):
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


def pixels(path, **options):
    """The first image of a folder, (H, W, C)."""
    source = open_images(path, **options)[2].sources["train"]
    return source.images([0])[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("background, behind", [("white", 255), ("#000000", 0), ("Gray", 128)])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_are_composited_over_the_background(
    tmp_path, background, behind, channels
):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3] = 200  # the hidden colour where opacity is 0
    rgba[:, 2:4, 3], rgba[:, 4:, 3] = 51, 255
    save_image(tmp_path, "1.png", rgba)
    found = pixels(tmp_path, num_channels=channels, background=background).astype(int)
    opacity = rgba[..., 3:] / 255
    assert np.abs(found - (opacity * 200 + (1 - opacity) * behind)).max() <= 1
    assert (found[:, :2] == behind).all() and (found[:, 4:] == 200).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "L"])
def test_transparency_without_a_background_is_refused(tmp_path, mode):
    image, options = Image.fromarray(random_images(8, 8, 4)).convert(mode), {}
    if mode == "L":
        options = {"transparency": image.getpixel((3, 3))}
    image.save(tmp_path / ("1.tif" if mode == "PA" else "1.png"), **options)
    for skipping in ("raise", "skip"):
        with pytest.raises(DataError, match=r"1\.\w+ in .* data\.background=white.*num_channels=4"):
            open_images(tmp_path, on_error=skipping)
    assert pixels(tmp_path, background="red").shape == (8, 8, 3)


def test_opaque_images_need_no_background_and_four_channels_keep_transparency(tmp_path):
    rgba = random_images(8, 8, 4)
    save_image(tmp_path / "a", "1.png", rgba)
    assert np.array_equal(pixels(tmp_path / "a", num_channels=4), rgba)
    rgba[..., 3] = 255
    save_image(tmp_path / "b", "1.png", rgba)
    for channels, mode in ((1, "L"), (3, "RGB")):
        expected = np.array(Image.fromarray(rgba).convert(mode)).reshape(8, 8, channels)
        assert np.array_equal(pixels(tmp_path / "b", num_channels=channels), expected)


@pytest.mark.parametrize("side", [8, 4])
def test_values_of_256_levels_are_refused_where_there_are_fewer(tmp_path, side):
    """Resized ones would be clamped to the largest of the levels, which is white."""
    save_image(tmp_path / "a", "1.png", random_images(8, 8) // 16)
    with pytest.raises(DataError, match=r"data.range=\(0, 15\) scales .* 256 .*set data.levels=0"):
        pixels(tmp_path / "a", num_channels=1, image_size=side, levels=16, range=(0, 15))
    save_image(tmp_path / "b", "1.png", random_images(8, 8, 4) // 16)
    with pytest.raises(
        DataError, match=r"an opacity of 256 levels.*data.levels=16.*num_channels=3"
    ):
        pixels(tmp_path / "b", num_channels=4, image_size=side, levels=16)
    found = pixels(tmp_path / "a", num_channels=1, image_size=8, levels=256, range=(0, 15))
    assert np.array_equal(found[..., 0], random_images(8, 8) // 16 * 17)


def test_palettes_and_bilevel_images_are_read_as_ever(tmp_path):
    rgb = Image.fromarray(random_images(8, 8, 3))
    for number, image in enumerate([rgb.convert("P"), rgb.convert("1"), rgb.convert("L")]):
        image.save(tmp_path / f"{number}.png")
    found = everything(open_images(tmp_path)[2].sources["train"])[0].permute(0, 2, 3, 1)
    for number, image in enumerate(found):
        expected = Image.open(tmp_path / f"{number}.png").convert("RGB")
        assert np.array_equal(image.numpy(), np.array(expected))


DEEP = {
    "uint16": np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16),
    "int32": np.linspace(-3, 90000, 64).reshape(8, 8).astype(np.int32),
    "float32": np.linspace(0, 0.5, 64).reshape(8, 8).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_images_are_scaled_by_the_range_and_refused_without(tmp_path, kind, channels):
    values = DEEP[kind]
    Image.fromarray(values).save(tmp_path / "deep.tif")
    high = "0.5" if kind == "float32" else str(values.max())
    white = {"uint16": "4095", "int32": "131071", "float32": "0.5"}[kind]
    with pytest.raises(
        DataError, match=rf"deep.tif in .* {kind} .* {high}, .* data.range=0,{white}"
    ):
        open_images(tmp_path, num_channels=channels)
    low, high = values.min().item(), values.max().item()
    found = pixels(tmp_path, num_channels=channels, range=(low, high))
    expected = (values - low) / (high - low) * 255
    assert np.abs(found - expected[..., None]).max() <= 0.51
    assert np.array_equal(pixels(tmp_path, num_channels=channels, range=(high, low)), 255 - found)
    with pytest.raises(DataError, match=rf"deep.tif in .* holds .* outside of data.range.*{kind}"):
        open_images(tmp_path, range=(low, (low + high) / 2))


def test_colour_of_16_bits_is_refused(tmp_path):
    """Pillow reads only the upper half of each value."""
    write_png(tmp_path / "deep.png", [[15, 255] * 24] * 8, 8, 16, 2)
    with pytest.raises(DataError, match=r"deep.png in .* more than 8 bits .* data.range"):
        open_images(tmp_path)


def test_range_applies_to_8_bits_as_well(tmp_path):
    save_image(tmp_path, "1.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    found = pixels(tmp_path, num_channels=1, range=(0, 63))
    assert np.array_equal(found[..., 0], np.round(np.arange(64).reshape(8, 8) / 63 * 255))
    with pytest.raises(DataError, match=r"1\.png in .* uint8, but .*\(0, 4095\).*as many"):
        open_images(tmp_path, num_channels=1, range=(0, 4095))


def test_exif_orientation_is_applied(tmp_path):
    image = random_images(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise for display
    Image.fromarray(image).save(tmp_path / "photo.png", exif=exif)
    found = open_images(tmp_path)[2].sources["train"].images([0])[0].permute(1, 2, 0)
    assert np.array_equal(found.numpy(), np.rot90(image, -1))


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), k, np.uint8)) for k in (50, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (open_images(tmp_path)[2].sources["train"].images([0]) == 50).all()


def test_images_of_other_sizes_are_cropped_and_resized(tmp_path):
    wide, tall = smooth_image(40, 90), smooth_image(70, 32)
    save_image(tmp_path, "1.png", wide)
    save_image(tmp_path, "2.png", tall)
    _, _, info = open_images(tmp_path, image_size=(16, 24))
    found = info.sources["train"].images([0, 1]).permute(0, 2, 3, 1).numpy().astype(int)
    for image, part in zip(found, (wide[:, 15:75], tall[24:45]), strict=True):
        expected = Image.fromarray(part).resize((24, 16), Image.Resampling.BICUBIC)
        assert np.abs(image - np.array(expected)).max() <= 1


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    save_image(tmp_path, "1.png", random_images(8, 8, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # twice that is an error
    with pytest.raises(DataError, match=r"1.png in .* is not a readable image: Image size \(64"):
        list(open_images(tmp_path)[0])
    monkeypatch.undo()
    monkeypatch.setattr(image_files, "MAX_BYTES", 50)
    for path in (tmp_path, zipped(tmp_path)):
        with pytest.raises(DataError, match=r"1.png in .* too many for one file"):
            list(open_images(path)[0])


def test_mistakes_with_images(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.zip").write_bytes(b"not a zip file")
    for options, message in [
        ({"path": ""}, "data.path is empty"),
        ({"path": str(tmp_path / "none")}, "there is no file or folder '.*none'"),
        ({"path": str(tmp_path / "empty")}, "there is no image in .*empty"),
        ({"path": str(tmp_path / "a.txt")}, "neither a folder nor a .zip, .npy or .npz"),
        ({"path": str(tmp_path / "b.zip")}, "b.zip is not a readable zip file"),
        ({"path": str(folder[0]), "num_channels": 2}, "data.num_channels=2"),
        ({"path": str(folder[0]), "on_error": "ignore"}, "data.on_error='ignore'"),
        ({"path": str(folder[0]), "background": "whitish"}, "data.background='whitish'"),
        ({"path": str(folder[0]), "background": "#fff0"}, "data.background='#fff0'"),
        ({"path": str(folder[0]), "range": (3, 3)}, r"data.range=\(3, 3\)"),
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
