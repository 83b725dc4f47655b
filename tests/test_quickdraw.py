"""The drawings of Quick, Draw!, as images and as strokes."""

import json

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config

import datasets
from datasets import DataError
from score_lib.data import quickdraw
from score_lib.data.kinds import kind_of
from score_lib.data.sources import DATASETS
from score_lib.data.strokes import draw, follow, in_unit_box
from score_lib.options import complete

SQUARE = [[[0, 255, 255, 0, 0], [0, 0, 255, 255, 0]]]
TWO_LINES = [[[0, 100], [0, 0]], [[0, 100], [50, 50]]]


def line(drawing, **others) -> str:
    return json.dumps({"word": "x", "recognized": True, **others, "drawing": drawing}) + "\n"


def strokes(drawing):
    return [np.array(stroke[:2], dtype=float).T for stroke in drawing]


def open_strokes(path, length=5):
    config = complete(make_config("QUICKDRAW_STROKES", path=str(path)))
    return DATASETS.build("QUICKDRAW_STROKES", config, (3, length))


def open_images(path, **options):
    config = make_config("QUICKDRAW", path=str(path), num_channels=1, **options)
    return datasets.get_streams(config, evaluation=True)[2]


# --- Images ----------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(38, 38), (38, 58), (76, 38)])
def test_ink_of_a_square(height, width):
    """The square's lines run 1.5/19 of the side from its edges and are 1/19 wide: on a side of 38,
    rows 2 and 3 are white, and the next ones black, within a pixel of the larger image."""
    image = draw(strokes(SQUARE), height, width)
    assert image.dtype == np.uint8 and image.shape == (height, width)
    top, left = (height - 38) // 2, (width - 38) // 2
    square = image[top : top + 38, left : left + 38].astype(float)
    assert square.sum() == image.sum()  # nothing lies beside the largest square
    expected = np.zeros((38, 38))
    expected[2:36, 2:36] = 255
    expected[4:34, 4:34] = 0
    corners = np.zeros((38, 38), dtype=bool)
    corners[np.ix_([2, 35], [2, 35])] = True
    # An edge moved by one of 8 pixels changes 32 grey levels; two meet in a corner.
    assert np.abs(square - expected)[~corners].max() <= 32
    # The corner is a quarter of a disc whose radius is a pixel: pi/4 of it, and two edges.
    assert np.abs(square[corners] / 255 - np.pi / 4).max() < 2 / 8
    assert abs(square.sum() / expected.sum() - 1) < 0.03


def test_raw_drawings_are_placed_as_simplified_ones():
    """Of another size, at another place, and with times."""
    raw = [[[700.5, 955.5, 955.5, 700.5, 700.5], [80, 80, 335, 335, 80], [0, 10, 20, 30, 40]]]
    assert np.array_equal(draw(strokes(raw), 28, 28), draw(strokes(SQUARE), 28, 28))
    larger = [[[4 * value for value in values] for values in raw[0][:2]]]
    assert np.array_equal(draw(strokes(larger), 28, 28), draw(strokes(SQUARE), 28, 28))


def test_a_dot_is_a_disc_in_the_middle():
    for drawing in ([[[9], [7]]], [[[9, 9], [7, 7]]]):
        image = draw(strokes(drawing), 190, 190).astype(float) / 255
        assert abs(image.sum() / (np.pi * 5**2) - 1) < 0.05
        rows, columns = np.nonzero(image)
        assert rows.min() == columns.min() == 90 and rows.max() == columns.max() == 99


def test_thin_drawings_keep_their_aspect_in_the_middle():
    image = draw(strokes([[[0, 100], [50, 50]]]), 19, 19)
    assert (image[:8] == 0).all() and (image[11:] == 0).all()
    assert (image[9, 2:17] > 240).all() and (image[:, [0, 18]] == 0).all()


# --- Strokes ---------------------------------------------------------------------------


def test_points_follow_a_square_at_even_steps():
    x, y, pen = follow(strokes(SQUARE), 9)
    np.testing.assert_allclose(x, [0, 0.5, 1, 1, 1, 0.5, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(y, [0, 0, 0, 0.5, 1, 1, 1, 0.5, 0], atol=1e-6)
    assert pen.tolist() == [1] * 8 + [0]


def test_the_pen_is_up_where_a_stroke_ends():
    # Lines of length 1 at y = 1/4 and 3/4; steps of 2/5, so that no step ends with a stroke.
    x, y, pen = follow(strokes(TWO_LINES), 6)
    np.testing.assert_allclose(x, [0, 0.4, 0.8, 0.2, 0.6, 1], atol=1e-6)
    np.testing.assert_allclose(y, [0.25] * 3 + [0.75] * 3, atol=1e-6)
    assert pen.tolist() == [1, 1, 0, 1, 1, 0]
    # A point where one stroke ends and the next begins is on the first.
    assert follow(strokes(TWO_LINES), 5)[:, 2].tolist() == [1, 0.25, 0]


def test_the_way_between_strokes_has_no_length():
    rng = np.random.default_rng(0)
    drawing = [rng.normal(size=(n, 2)) for n in (5, 1, 9, 2)]
    length = 400
    points = follow(drawing, length).astype(float)
    boxed = in_unit_box(drawing)
    sizes = [np.hypot(*np.diff(stroke, axis=0).T).sum() for stroke in boxed]
    step = sum(sizes) / (length - 1)
    # Chords are as long as the arc, or shorter where they cut a corner.
    chords = np.hypot(*np.diff(points[:2]))[points[2, :-1] == 1]
    assert (chords < step + 1e-6).all() and np.isclose(np.median(chords), step, rtol=1e-4)
    ends = np.flatnonzero(points[2] == 0)
    np.testing.assert_array_equal(ends, np.floor(np.cumsum([sizes[0], *sizes[2:]]) / step + 1e-9))
    np.testing.assert_allclose(points[:2, 0], boxed[0][0], atol=1e-6)
    np.testing.assert_allclose(points[:2, -1], boxed[3][-1], atol=1e-6)
    assert points[:2].min() >= 0 and points[:2].max() <= 1


def test_dots_alone_are_the_first_of_them():
    assert follow(strokes([[[3, 3], [4, 4]]]), 3).tolist() == [[0.5] * 3, [0.5] * 3, [1, 1, 0]]
    assert follow(strokes([[[0], [0]], [[2], [2]]]), 2).tolist() == [[0, 0], [0, 0], [1, 0]]


# --- Files -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three categories of lines of lengths that tell them apart; 21 drawings in all."""
    for category, count, slope in (("cat 2", 10, 1.0), ("cat 10", 1, 0.5), ("bus", 10, 0.0)):
        rows = [line([[[0, 10], [0, 10 * slope]]], key_id=k) for k in range(count)]
        (tmp_path / f"{category}.ndjson").write_text("\n".join(rows))  # with empty lines
    (tmp_path / ".hidden.ndjson").write_text("no drawing")
    (tmp_path / "notes.txt").write_text("no drawing")
    return tmp_path


def test_files_are_classes_in_natural_order(folder):
    train, test = open_strokes(folder, 2)
    assert train.class_to_idx == {"bus": 0, "cat 2": 1, "cat 10": 2} and train.num_classes == 3
    assert len(train) == 19 and len(test) == 2
    found, labels = everything(test)
    assert found.dtype == torch.float32 and labels.tolist() == [0, 1]
    found, labels = everything(train)
    assert labels.tolist() == [0] * 9 + [1] * 9 + [2]
    # y at the first point, with the shorter side in the middle.
    assert found[:, 1, 0].tolist() == [0.5] * 9 + [0.0] * 9 + [0.25]
    found, labels = train.read(np.array([18, 0, 9]))
    assert found[:, 1, 0].tolist() == [0.25, 0.5, 0.0] and labels.tolist() == [2, 0, 1]


def test_streams_of_strokes_are_series(folder):
    config = make_config("QUICKDRAW_STROKES", path=str(folder), shape=(3, 7))
    assert kind_of(config) == "series"
    batch = next(iter(datasets.get_streams(config)[0]))
    assert batch["image"].shape == (4, 3, 7) and batch["image"].dtype == torch.float32
    assert batch["image"][:, 2].tolist() == [[1.0] * 6 + [0.0]] * 4


def test_images_of_files(folder):
    info = open_images(folder)
    images, labels = everything(info.sources["train"])
    assert images.shape == (19, 1, 8, 8) and images.dtype == torch.uint8
    assert np.array_equal(images[9, 0].numpy(), draw([np.array([[0.0, 0], [10, 10]])], 8, 8))
    assert labels[9] == 1 and info.class_to_idx["cat 10"] == 2 and info.levels == 256


def test_one_file_and_windows_line_ends(folder):
    (folder / "bus.ndjson").write_bytes(b"\r\n".join([line(SQUARE).encode().strip()] * 3 + [b""]))
    train, _ = open_strokes(folder / "bus.ndjson", 9)
    found, _ = everything(train)
    assert len(train) == 3 and torch.equal(found[2], torch.from_numpy(follow(strokes(SQUARE), 9)))


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_lines_are_found_across_blocks(folder, monkeypatch, block):
    monkeypatch.setattr(quickdraw, "_BLOCK", block)
    quickdraw.find_lines.cache_clear()
    assert len(open_strokes(folder)[0]) == 19
    with open(folder / "bus.ndjson", "a") as file:
        file.write("\n{}")
    with pytest.raises(DataError, match=r"line 21 of .*bus.ndjson is not a drawing"):
        everything(open_strokes(folder / "bus.ndjson")[0])


DAMAGED = {
    "cut": (line(SQUARE)[:40], "is not a drawing"),
    "text": ("text", "Expecting value"),
    "a list": ("[1, 2]", "no strokes as 'drawing'"),
    "no drawing": ('{"word": "cat"}', "no strokes as 'drawing'"),
    "no strokes": (line([]), "no strokes as 'drawing'"),
    "a number as a stroke": (line([3]), r"stroke 0 \(from 0\) is not a list of x, y"),
    "x alone": (line([SQUARE[0], [[1, 2]]]), r"stroke 1 \(from 0\) is not a list of x, y"),
    "four lists": (line([[[1], [1], [1], [1]]]), "is not a list of x, y"),
    "fewer y": (line([[[1, 2], [1]]]), "inhomogeneous|as many of each"),
    "no points": (line([[[], []]]), "no numbers x and y"),
    "texts": (line([[["1"], ["2"]]]), "no numbers x and y"),
    "null": (line([[[None], [1]]]), "no numbers x and y"),
    "truths": (line([[[True], [False]]]), "no numbers x and y"),
    "lists in lists": (line([[[[1]], [[1]]]]), "no numbers x and y"),
    "nan": (line([[[float("nan")], [1]]]), r"farther than 1e\+09"),
    "infinite": (line([[[1], [-1e999]]]), "farther than"),
    "10^12": (line([[[10**12], [1]]]), "farther than"),
    "10^400": (line([[[10**400], [1]]]), "no numbers x and y"),
    "10^9000": (line([[[1], [1]]]).replace("1", "1" * 9000), "is not a drawing"),
    "brackets": ("[" * 100_000, "is not a drawing"),
    "bytes": (b"\xff\xfe\x00", "is not a drawing"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.quick_cases(5)
def test_damaged_lines_are_named(tmp_path, name):
    content, said = DAMAGED[name]
    content = content if isinstance(content, bytes) else content.encode()
    file = tmp_path / "cat.ndjson"
    file.write_bytes(line(SQUARE).encode() * 2 + content.strip() + b"\n" + line(SQUARE).encode())
    with pytest.raises(DataError, match=said) as error:
        everything(open_strokes(tmp_path)[0])
    assert str(error.value).startswith(f"line 3 of {file} is not a drawing: ")
    assert str(error.value).isprintable()


def test_endless_lines_are_refused(tmp_path):
    with open(tmp_path / "cat.ndjson", "wb") as file:
        file.write(line(SQUARE).encode())
        file.truncate(1 << 26)
    with pytest.raises(DataError, match=r"line 2 of .*cat.ndjson is longer than 16777216 bytes"):
        open_strokes(tmp_path)


@pytest.mark.parametrize(
    "opener, options, said",
    [
        (open_images, {"num_channels": 3}, r"asks for \(3, 8, 8\): set data.num_channels=1"),
        (open_images, {"path": ""}, "data.path is empty"),
        (open_images, {"path": "nowhere"}, "there is no file CATEGORY.ndjson in"),
        (open_images, {"path": "empty.ndjson"}, "there is no drawing in empty.ndjson"),
        (open_images, {"path": "links"}, "links/ant.ndjson is a broken link"),
        (open_strokes, {"length": 1}, r"data.shape=\(3, 128\)"),
    ],
)
def test_wrong_options_are_named(folder, monkeypatch, opener, options, said):
    monkeypatch.chdir(folder)
    (folder / "empty.ndjson").write_text("\n\n")
    (folder / "links").mkdir()
    (folder / "links" / "ant.ndjson").symlink_to("nowhere")
    (folder / "links" / "bee.ndjson").symlink_to(folder / "bus.ndjson")
    if opener is open_images and "num_channels" in options:
        config = make_config("QUICKDRAW", path="bus.ndjson", **options)
        with pytest.raises(DataError, match=said):
            datasets.get_streams(config)
        return
    with pytest.raises(DataError, match=said):
        opener(**{"path": "bus.ndjson", **options})
