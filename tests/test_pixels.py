"""Stored pixels whose meaning is easily mistaken: TIFF's kinds, opacity, few grey levels."""

import logging
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from dataset_helpers import make_config, save_image, write_png
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data import preprocess
from score_lib.data.sources import log_once

BITS, PHOTOMETRIC, PER_PIXEL, PLANAR, EXTRA, FORMAT = 258, 262, 277, 284, 338, 339


def write_tiff(path, values, tags, *, order="<", packed=False):
    """A TIFF of values (C, h, w), a strip for each channel.

    Args:
        tags: number -> values of 16 bits.
        order: of bytes: "<" or ">".
        packed: with zlib.
    """
    channels, height, width = values.shape
    parts = [plane.astype(values.dtype.newbyteorder(order)).tobytes() for plane in values]
    parts = [zlib.compress(part) for part in parts] if packed else parts
    sizes = [len(part) for part in parts]
    places = [8 + sum(sizes[:k]) for k in range(channels)]
    sides = {256: [width], 257: [height], 259: [8 if packed else 1], 278: [height]}
    entries, extra = [], b""
    behind = 8 + sum(sizes)
    for tag, numbers in sorted({273: places, 279: sizes, **sides, **tags}.items()):
        wide = tag in (273, 279)
        content = struct.pack(f"{order}{len(numbers)}{'I' if wide else 'H'}", *numbers)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", behind + len(extra)), extra + content
        entry = struct.pack(f"{order}HHI", tag, 4 if wide else 3, len(numbers))
        entries.append(entry + content.ljust(4, b"\0"))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", behind + len(extra))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(start + b"".join(parts) + extra + directory)
    return path


def pixels(path, channels=1, **options):
    """The first image at a path, (C, H, W)."""
    config = make_config("IMAGES", num_channels=channels, path=str(path), **options)
    return datasets.get_streams(config)[2].sources["train"].images([0])[0].numpy()


def test_planes_of_8_bits_are_read_and_of_16_bits_refused(tmp_path):
    values = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    tags = {PHOTOMETRIC: [2], PER_PIXEL: [3], PLANAR: [2]}
    narrow = write_tiff(tmp_path / "8.tif", values, {**tags, BITS: [8] * 3})
    assert np.array_equal(pixels(narrow, channels=3), values)
    wide = write_tiff(tmp_path / "16.tif", values.astype(np.uint16) * 257, {**tags, BITS: [16] * 3})
    with pytest.raises(DataError, match=r"16.tif in .* more than 8 bits in each of several"):
        pixels(wide, channels=3)


def test_signed_bytes_are_refused(tmp_path):
    values = np.full((1, 8, 8), -3, np.int8)
    tags = {BITS: [8], PHOTOMETRIC: [1], PER_PIXEL: [1], FORMAT: [2]}
    with pytest.raises(DataError, match=r"1.tif in .* signed values of 8 bits"):
        pixels(write_tiff(tmp_path / "1.tif", values, tags))


def test_where_0_is_white_the_range_says_so_too(tmp_path):
    values = np.full((1, 8, 8), 1000, np.uint16)
    tags = {BITS: [16], PHOTOMETRIC: [0], PER_PIXEL: [1]}
    path = write_tiff(tmp_path / "1.tif", values, tags)
    with pytest.raises(DataError, match=r"smallest value is white: set data.range"):
        pixels(path, range=(0, 4095))
    assert (pixels(path, range=(4095, 0)) == round((4095 - 1000) / 4095 * 255)).all()


OLD_PILLOW = int(PIL.__version__.partition(".")[0]) < 13
GREY_BESIDE_OTHER = pytest.param(
    1,
    1,
    marks=pytest.mark.skipif(OLD_PILLOW, reason="Pillow 12, of Python 3.10, opens no such file"),
)


@pytest.mark.parametrize("colours, photometric", [(3, 2), GREY_BESIDE_OTHER])
def test_values_that_are_no_opacity_are_not_read_as_one(tmp_path, colours, photometric):
    values = np.arange(64 * (colours + 1), dtype=np.uint8).reshape(colours + 1, 8, 8)
    count = [colours + 1]
    tags = {BITS: [8] * count[0], PHOTOMETRIC: [photometric], PER_PIXEL: count, PLANAR: [1]}
    rows = values.transpose(1, 2, 0).reshape(1, 8, -1)
    path = write_tiff(tmp_path / "1.tif", rows, {**tags, EXTRA: [0], 256: [8], 257: [8], 278: [8]})
    assert np.array_equal(pixels(path, channels=colours), values[:colours])
    with pytest.raises(DataError, match=rf"1.tif in .* {count[0]} values .*num_channels={colours}"):
        pixels(path, channels=4)


@pytest.mark.parametrize("order, packed", [(">", True), ("<", True), (">", False)])
@pytest.mark.parametrize("kind", ["float32", "int16", "int32", "uint16"])
def test_deep_values_of_either_order_of_bytes_are_read_or_refused(tmp_path, kind, order, packed):
    values = np.arange(0, 6400, 100, dtype=kind).reshape(1, 8, 8)
    number = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {BITS: [8 * values.itemsize], PHOTOMETRIC: [1], PER_PIXEL: [1], FORMAT: [number]}
    path = write_tiff(tmp_path / "1.tif", values, tags, order=order, packed=packed)
    if order == ">" and packed and kind != "uint16":
        with pytest.raises(
            DataError, match=r"1.tif in .* compressed in a way that Pillow misreads"
        ):
            pixels(path, range=(-40_000, 40_000))
    else:
        assert np.array_equal(pixels(path, range=(0, 6300))[0], np.round(values[0] / 6300 * 255))


@pytest.mark.parametrize("colours, opacity", [(1, [2]), (3, None), (3, [2])])
def test_packed_planes_with_an_opacity_are_read_or_refused(tmp_path, colours, opacity):
    values = np.full((colours + 1, 8, 8), 100, np.uint8)
    tags = {BITS: [8] * len(values), PHOTOMETRIC: [2 if colours == 3 else 1]}
    tags |= {PER_PIXEL: [len(values)], PLANAR: [2]} | ({EXTRA: opacity} if opacity else {})
    path = write_tiff(tmp_path / "1.tif", values, tags, packed=True)
    if colours == 3 and opacity:
        assert np.array_equal(pixels(path, channels=4), values)
    else:
        with pytest.raises(
            DataError, match=r"1.tif in .* compressed in a way that Pillow misreads"
        ):
            pixels(path, channels=4)


@pytest.mark.parametrize("bits, level", [(2, 3), (4, 15), (1, 1), (8, 255)])
def test_the_transparent_level_of_a_gray_png_is_of_its_bits(tmp_path, bits, level):
    """White is transparent, and black is not."""
    width = 64 // bits
    chunk = b"tRNS", struct.pack(">H", level)
    write_png(tmp_path / "1.png", [[0] * 4 + [255] * 4] * width, width, bits, 0, chunk)
    found = pixels(tmp_path, channels=4, image_size=width)
    black = np.arange(width) < width // 2
    assert np.array_equal(found[0, 0], np.where(black, 0, 255))
    assert np.array_equal(found[3, 0], np.where(black, 255, 0))
    with pytest.raises(DataError, match=r"1.png in .* has transparent pixels"):
        pixels(tmp_path, image_size=width)


def test_other_entries_of_exif_do_not_matter(tmp_path):
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    entries = (274, 3, 1, 6), (282, 2, 4, 0x636261)  # turned; a resolution that is text
    exif = b"II*\0" + struct.pack("<IH", 8, len(entries))
    exif += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    Image.fromarray(image).save(tmp_path / "1.png", exif=exif)
    assert np.array_equal(pixels(tmp_path)[0], np.rot90(image, -1))


def test_bmp_of_16_bits_a_pixel_is_read(tmp_path):
    """Five bits of red, six of green, five of blue."""
    colours = np.full((8, 8), 31 << 11 | 21 << 5, "<u2").tobytes()
    masks = struct.pack("<III", 31 << 11, 63 << 5, 31)
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, len(colours), 0, 0, 0, 0)
    start = struct.pack("<IHHI", 66 + len(colours), 0, 0, 66)
    (tmp_path / "1.bmp").write_bytes(b"BM" + start + header + masks + colours)
    assert pixels(tmp_path, channels=3)[:, 0, 0].tolist() == [255, 85, 0]


def test_pages_that_are_not_read_are_told(tmp_path, caplog):
    log_once.cache_clear()
    caplog.set_level(logging.INFO)
    first, *others = (Image.fromarray(np.full((8, 8), k, np.uint8)) for k in (50, 100, 200))
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    assert (pixels(tmp_path / "stack.tif") == 50).all()
    assert "several pages the first is read" in caplog.text


def test_the_range_is_of_colours_and_not_of_the_opacity(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[...] = 10, 20, 30, 255
    save_image(tmp_path, "1.png", rgba)
    found = pixels(tmp_path, channels=4, range=(255, 0))
    assert found[:, 0, 0].tolist() == [245, 235, 225, 255]


@pytest.mark.parametrize("side", [16, 100])
def test_hidden_colours_do_not_show_after_resizing(side):
    """A white disc on transparent black stays white, and its opacity is resized like grey."""
    y, x = np.mgrid[:64, :64] - 31.5
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[x**2 + y**2 < 20**2] = 255
    found = preprocess.fit(torch.from_numpy(rgba).permute(2, 0, 1)[None], side, side)[0].numpy()
    seen = found[3] > 0
    assert (found[:3, seen] == 255).all() and (found[:3, ~seen] == 0).all()
    alone = preprocess.fit(torch.from_numpy(rgba[None, None, ..., 3]), side, side)[0, 0]
    assert np.array_equal(found[3], alone.numpy()) and found[3].max() == 255


@pytest.mark.parametrize("kind", ["IMAGES", "array"])
def test_resizing_keeps_within_few_grey_levels(tmp_path, kind):
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 16
    path = save_image(tmp_path, "1.png", square)
    if kind == "array":
        path = str(tmp_path / "1.npy")
        np.save(path, square[None])
    found = pixels(path, levels=17, image_size=16)
    assert found.max() == 16 and found.min() == 0
    square[0, 0] = 17
    save_image(tmp_path / "more", "1.png", square)
    with pytest.raises(DataError, match=r"holds 17, but data.levels=17 allows 0 to 16"):
        pixels(tmp_path / "more", levels=17, image_size=16)
