"""Point clouds and vertices of meshes in the user's own files."""

import io
import pathlib
import zipfile

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config
from point_helpers import ENCODINGS, VERTEX, off, ply, some_points

import datasets
from datasets import DataError
from score_lib.data.kinds import is_continuous, kind_of
from score_lib.data.point_files import read_points
from score_lib.data.points import chosen_rows
from score_lib.data.sources import DATASETS
from score_lib.options import complete


def open_points(path, shape=(4, 3), **options):
    config = complete(make_config("POINTS", path=str(path), **options))
    return DATASETS.build("POINTS", config, shape)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


POINTS = some_points(50)
ROWS = POINTS.tolist()
FACES = ("face", "list uchar int vertex_indices", [((0, 1, 2),), ((3, 2, 1, 0),)])
EDGES = ("edge", "short a, double b", [(1, 2.5), (3, 4.5)])
OTHERS = "uchar red, float nx, double y, float32 x, int label, double z, short s"
LAYOUTS = {
    "plain": [("vertex", VERTEX, ROWS)],
    "faces before": [FACES, ("vertex", VERTEX, ROWS)],
    "fixed rows before": [EDGES, ("vertex", VERTEX, ROWS), FACES],
    "other properties": [("vertex", OTHERS, [(7, 0.5, y, x, -3, z, 2) for x, y, z in ROWS]), FACES],
    "lists of vertices": [
        (
            "vertex",
            "float z, list uchar short more, float x, float y",
            [(z, (5,) * (k % 3), x, y) for k, (x, y, z) in enumerate(ROWS)],
        )
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encodings_of_ply_hold_the_same_points(layout):
    for encoding in ENCODINGS:
        content = ply(encoding, *LAYOUTS[layout])
        assert np.array_equal(read_points("a/b.PLY", content), POINTS), encoding
        header, end, rows = content.partition(b"\nend_header\n")
        windows = (header + end).replace(b"\n", b"\r\n") + rows
        assert np.array_equal(read_points("b.ply", windows), POINTS), encoding


@pytest.mark.parametrize(
    "content",
    [
        off(POINTS),
        off(POINTS, start="OFF"),
        off(POINTS, start="# made by hand\nOFF # counts\n\n", between="  # a vertex\r\n"),
        off(POINTS, faces=0),
        off(POINTS).rstrip(),
    ],
    ids=["usual", "glued, as in ModelNet", "comments", "no faces", "no last break"],
)
def test_vertices_of_off(content):
    assert np.array_equal(read_points("a.off", content), POINTS)


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<f2", "i2", "u1"])
def test_arrays_of_numbers(kind):
    values = (POINTS * 10).astype(kind) if kind != "u1" else np.abs(POINTS * 10).astype(kind)
    for order in "CF":
        found = read_points("a.npy", npy(np.asarray(values, order=order)))
        assert found.dtype == np.float32 and np.array_equal(found, values.astype(np.float32))


def test_long_text_is_read_in_parts():
    points = some_points(9_000)
    assert len(off(points)) > 4 * (1 << 16)
    assert np.array_equal(read_points("a.off", off(points)), points)
    spaced = off(points[:100], between=" " * 70_000 + "\n")
    assert np.array_equal(read_points("a.off", spaced), points[:100])


ENCODE = {
    ".off": off,
    ".npy": npy,
    ".ply": lambda points: ply("ascii", ("vertex", VERTEX, points.tolist())),
}


# --- Data sets -------------------------------------------------------------------------


@pytest.fixture
def model_net(tmp_path):
    """CLASS/train and CLASS/test, as in ModelNet, with all formats."""
    made = {}
    names = ["chair/train/1.off", "chair/test/2.ply", "bed/train/10.npy", "bed/train/9.off"]
    for seed, name in enumerate([*names, "bed/test/11.off"]):
        made[name] = some_points(4, seed)
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(ENCODE[file.suffix](made[name]))
    (tmp_path / "data" / "README.txt").write_text("nothing")
    return tmp_path / "data", made


@pytest.mark.parametrize("kind", ["folder", "zip", "splits first"])
def test_folders_are_classes_and_splits(model_net, kind):
    path, made = model_net
    if kind == "zip":
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            for file in path.rglob("*"):
                archive.write(file, file.relative_to(path.parent))
        path = path.with_suffix(".zip")
    if kind == "splits first":
        for name in made:
            title, part, file = name.split("/")
            (path / part / title).mkdir(parents=True, exist_ok=True)
            (path / name).rename(path / part / title / file)
    train, test = open_points(path)
    assert train.class_to_idx == {"bed": 0, "chair": 1} and train.num_classes == 2
    found, labels = everything(train)
    expected = [made[name] for name in ("bed/train/10.npy", "bed/train/9.off", "chair/train/1.off")]
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), np.stack(expected))
    assert labels.tolist() == [0, 0, 1]
    found, labels = everything(test)
    expected = [made[name] for name in ("bed/test/11.off", "chair/test/2.ply")]
    assert np.array_equal(found.numpy(), np.stack(expected)) and labels.tolist() == [0, 1]


def test_streams_of_points_are_continuous_and_permuted(model_net):
    path, made = model_net
    config = make_config("POINTS", path=str(path), shape=(4, 3), batch_size=3)
    assert kind_of(config) == "points" and is_continuous(config)
    train, _, info = datasets.get_streams(config)
    batch = next(iter(train))["image"]
    assert batch.dtype == torch.float32 and info.num_examples == {"train": 3, "test": 2}
    stored = {tuple(map(tuple, sorted(points.tolist()))) for points in made.values()}
    assert {tuple(map(tuple, sorted(points.tolist()))) for points in batch} <= stored
    assert not all(any(np.array_equal(x, points) for points in made.values()) for x in batch)
    ordered = next(iter(datasets.get_streams(config, evaluation=True)[1]))["image"]
    assert np.array_equal(ordered[0].numpy(), made["bed/test/11.off"])


def test_every_tenth_of_other_folders_is_held_out(tmp_path):
    for number in range(20):
        np.save(tmp_path / f"{number:02d}.npy", np.full((4, 2), number))
    train, test = open_points(tmp_path, (4, 2))
    assert everything(test)[0][:, 0, 0].tolist() == [9, 19] and len(train) == 18


def test_the_name_alone_chooses_points(tmp_path):
    for name in ("a/1.npy", "b/1.npy", "b/2.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, POINTS)
    chosen = everything(open_points(tmp_path, (20, 3))[0])[0].numpy()
    assert np.array_equal(chosen[0], chosen[1]) and not np.array_equal(chosen[1], chosen[2])
    for points, name in zip(chosen, ("1.npy", "1.npy", "2.npy"), strict=True):
        assert np.array_equal(points, POINTS[chosen_rows(name, 50, 20)])
    # Known numbers, which other machines and versions of NumPy have to give.
    assert chosen_rows("airplane_0001.off", 1000, 5).tolist() == [9, 25, 41, 353, 387]
    assert chosen_rows("x.npy", 3, 3).tolist() == [0, 1, 2]


def test_choices_are_uniform():
    counts = np.zeros(10)
    for number in range(2_000):
        rows = chosen_rows(f"{number}.npy", 10, 4)
        assert len(set(rows.tolist())) == 4 and (np.diff(rows) > 0).all()
        counts[rows] += 1
    # Each count is binomial with mean 800 and standard deviation 21.9.
    assert np.abs(counts - 800).max() < 4 * 21.9


def test_small_and_damaged_files_are_left_out(tmp_path, caplog):
    for number, count in enumerate([4, 3, 5]):
        np.save(tmp_path / f"{number}.npy", some_points(count, number))
    (tmp_path / "3.ply").write_bytes(b"ply\n")
    with pytest.raises(
        DataError, match=r"1.npy in .* has 3 points, fewer than the 4 of data.shape"
    ):
        everything(open_points(tmp_path)[0])
    train, _ = open_points(tmp_path, on_error="skip")
    assert len(train) == 2 and "2 left out because they cannot be read: 1.npy, 3.ply" in caplog.text
    with pytest.raises(DataError, match=r"coordinates.*data.shape=\(4, 3\)"):
        open_points(tmp_path, (4, 2), on_error="skip")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "nowhere"}, "neither a folder nor a .zip"),
        ({"shape": (3, 8, 8)}, r"as in data.shape=\(2048, 3\)"),
        ({"split": "a:b"}, "names folders that do not lie side by side"),
        ({"path": "empty"}, "there is no point file .* names of point files end in .npy, .ply"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty").mkdir()
    pathlib.Path("data").mkdir()
    np.save("data/1.npy", POINTS)
    with pytest.raises(DataError, match=said):
        open_points(**{"path": "data", **options})


# --- Damage ----------------------------------------------------------------------------

ASCII, BINARY = ply("ascii", *LAYOUTS["plain"], FACES), ply(ENCODINGS[1], *LAYOUTS["plain"])
OFF = off(POINTS)
LISTS = ply(ENCODINGS[1], FACES, ("vertex", VERTEX, ROWS))
NAN = POINTS.copy()
NAN[7, 1] = np.nan
DAMAGED = {
    "cut vertices": ("ply", ASCII[:700], r"ends at byte 700, within the rows of 'vertex'"),
    "cut binary": ("ply", BINARY[:-1], rf"ends at byte {len(BINARY) - 1}, within the rows"),
    "cut before faces": ("ply", ASCII[: ASCII.index(b"\n3 0 1 2")], "ends at byte .* its vertices"),
    "cut header": ("ply", ASCII[:60], "no header from 'ply' to 'end_header'"),
    "cut off": ("off", OFF[:300], "ends at byte 300, within the vertices"),
    "off without faces": ("off", OFF.replace(b"3 0 1 2\n", b""), "ends at byte .* its 1 faces"),
    "vertices below 0": ("off", OFF.replace(b"50 1 0", b"-5 1 0"), "header claims -5 vertices"),
    "10^18 vertices": ("off", OFF.replace(b"50 1", b"1" + b"0" * 18 + b" 1"), "header claims 10*"),
    "10^9000 faces": ("off", OFF.replace(b" 1 0", b" 1" + b"0" * 9000 + b" 0"), "claims .* faces"),
    "more than fit": ("off", OFF.replace(b"50 1", b"500 1"), "within the vertices"),
    "a word": ("off", OFF.replace(b"1 0\n", b"1 0\nx"), r"byte 11, in the vertices, begins 'x"),
    "a word after a comment": ("off", b"OFF # one\n1 0 0\n0 0 one", "byte 20, in the vertices"),
    "colours": ("off", b"OFF\n2 0 0\n0 0 0 9 9 9\n1 1 1 9 9 9\n", "first vertex has 6 numbers"),
    "other off": ("off", b"NOFF" + OFF[3:], "does not begin with OFF"),
    "binary off": ("off", b"OFF BINARY\n" + bytes(99), "does not begin with OFF"),
    "long number": ("off", b"OFF\n1 0 0\n" + b"1" * 200 + b" 2 3\n" + b" " * 400, "no number at"),
    "rows below 0": ("ply", BINARY.replace(b"vertex 50", b"vertex -1"), "claims -1 rows of 'vert"),
    "10^12 rows": ("ply", BINARY.replace(b"vertex 50", b"vertex 1" + b"0" * 12), "claims 1000"),
    "300 rows": ("ply", BINARY.replace(b"vertex 50", b"vertex 300"), "ends at byte 748, within"),
    "a list of length -1": (
        "ply",
        ply("ascii", ("face", "list short int i", [((),)]), LAYOUTS["plain"][0]).replace(
            b"\n0\n", b"\n-1\n"
        ),
        "a list of length -1",
    ),
    "a list over the end": ("ply", LISTS[: LISTS.rindex(b"end_h") + 11] + b"\xff", "ends at byte"),
    "unknown type": (
        "ply",
        BINARY.replace(b"float y", b"half y"),
        "line that is not known: 'property half y'",
    ),
    "lists of fractions": (
        "ply",
        LISTS.replace(b"list uchar", b"list float"),
        "line that is not known",
    ),
    "no x": ("ply", BINARY.replace(b"float x", b"float r"), "have r, y, z instead of x, y, z"),
    "x twice": ("ply", BINARY.replace(b"float z", b"float x"), "have x, y, x instead"),
    "no vertices": ("ply", ply("ascii", FACES), "no element 'vertex'"),
    "no format": ("ply", BINARY.replace(b"format", b"comment"), "no line 'format'"),
    "another format": ("ply", BINARY.replace(b"1.0", b"2.0"), "not known: 'format .* 2.0'"),
    "a word in ply": ("ply", ASCII[:-30].replace(b"\n-", b"\nminus ", 1), "begins 'minus', no"),
    "nan": ("npy", npy(NAN), r"point 7 \(from 0\) is not finite .*nan"),
    "nan as text": ("off", off(NAN), r"point 7 \(from 0\) is not finite"),
    "beyond float32": ("npy", npy(np.full((9, 3), 1e39)), r"point 0 \(from 0\) is not finite"),
    "objects": ("npy", npy(np.array([[{}]], dtype=object)), "holds Python objects"),
    "complex": ("npy", npy(POINTS * 1j), "holds complex64 of shape"),
    "one dimension": ("npy", npy(POINTS[0]), r"holds float32 of shape \(3,\)"),
    "cut array": ("npy", npy(POINTS)[:-1], r"should be float32 of shape \(50, 3\)"),
    "no array": ("npy", b"text", "magic"),
    "empty": ("ply", b"", "no header"),
    "no points": ("npy", npy(POINTS[:0]), "has 0 points, fewer than the 4"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.quick_cases(6)
def test_damaged_files_are_refused_in_a_sentence(tmp_path, name):
    suffix, content, said = DAMAGED[name]
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        open_points(tmp_path)
    assert f"x.{suffix} in {tmp_path}" in str(error.value) and str(error.value).isprintable()


def test_points_that_float32_cannot_tell_apart_are_refused(tmp_path):
    """A cube of a metre in metres from the equator."""
    cube = np.random.default_rng(0).random((50, 3))
    np.save(tmp_path / "far.npy", cube + [500_000, 4_500_000, 200])
    with pytest.raises(DataError, match=r"far.npy in .* float32 rounds its coordinates by 0.2"):
        open_points(tmp_path)
    np.save(tmp_path / "far.npy", cube + 20)  # a flat one, too
    np.save(tmp_path / "flat.npy", cube * [1, 1, 0] + 0.1)
    open_points(tmp_path)
