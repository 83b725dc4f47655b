"""The user's own images in folders and zip files."""

import itertools
import logging
import zipfile

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images, save_image, smooth_image
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data import images as image_files


def open_images(path, **options):
    return datasets.get_dataset(make_config("IMAGES", path=str(path), **options), evaluation=True)


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


def test_folders_are_labels_only_if_every_image_is_in_one(tmp_path):
    for name in ("b/x/1.png", "a/2.png", "c/3.png"):
        save_image(tmp_path, name, random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    _, labels = everything(info.sources["train"])
    assert labels.tolist() == [0, 1, 2] and info.num_classes == 3  # a, b, c
    save_image(tmp_path, "4.png", random_images(8, 8, 3))
    _, _, info = open_images(tmp_path)
    assert everything(info.sources["train"])[1].tolist() == [0, 0, 0, 0]


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
    assert "3 left out because they are not images: .hidden.png, linked, notes.txt" in caplog.text
    archive = zipped(path, **{"__MACOSX/data/._00.png": "x", "../../escape.png": "x"})
    with caplog.at_level(logging.WARNING):
        assert sum(open_images(archive)[2].num_examples.values()) == 12
    assert "../../escape.png" in caplog.text and "__MACOSX/data/._00.png" in caplog.text


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


def test_gray_colour_and_transparency(tmp_path):
    rgba = random_images(8, 8, 4)
    save_image(tmp_path, "1.png", rgba)
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        _, _, info = open_images(tmp_path, num_channels=channels)
        expected = np.array(Image.fromarray(rgba).convert(mode)).reshape(8, 8, channels)
        found = info.sources["train"].images([0])[0].permute(1, 2, 0)
        assert np.array_equal(found.numpy(), expected)
    palette = Image.fromarray(rgba).convert("P")
    palette.save(tmp_path / "1.png", transparency=bytes(range(256)))
    found = open_images(tmp_path)[2].sources["train"].images([0])[0].permute(1, 2, 0)
    assert np.array_equal(found.numpy(), np.array(palette.convert("RGB")))


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    found = open_images(tmp_path, num_channels=1)[2].sources["train"].images([0])[0, 0]
    assert np.abs(found.numpy() - levels / 257.0).max() <= 0.5


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
        with pytest.raises(DataError, match=r"1.png in .* too many for an image"):
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
