"""WEBDATASET: samples of .tar files are found, read by their place, and refused in one sentence."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images
from PIL import Image

import datasets
from datasets import DataError
from score_lib.data import tars
from score_lib.data.shards import expand


def encoded(image, kind="png"):
    content = io.BytesIO()
    Image.fromarray(image).save(content, {"jpg": "jpeg"}.get(kind, kind))
    return content.getvalue()


def write_tar(path, files, **options):
    """A .tar file of (name, contents)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


IMAGES = random_images(24, 8, 8, 3)
PIXELS = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


def samples(numbers, label=lambda n: {"cls": str(n % 3).encode()}):
    """The files of samples; a label is {"cls": ...} or {"json": ...}."""
    for n in numbers:
        yield f"{n:04d}.png", encoded(IMAGES[n])
        yield from ((f"{n:04d}.{kind}", content) for kind, content in label(n).items())


def opened(path, **options):
    config = make_config("WEBDATASET", path=str(path), **options)
    return datasets.get_streams(config, evaluation=True)


@pytest.mark.parametrize(
    "form, workers",
    [(tarfile.USTAR_FORMAT, 0), (tarfile.PAX_FORMAT, 2), (tarfile.GNU_FORMAT, 0)],
)
def test_images_and_labels_are_those_of_the_files(tmp_path, form, workers):
    longest = "é" * 80 + "/" + "x" * 90  # needs extended headers
    for shard in range(3):
        files = list(samples(range(8 * shard, 8 * shard + 8)))
        if form != tarfile.USTAR_FORMAT:
            files = [(f"{longest}/{name}", content) for name, content in files]
        write_tar(tmp_path / f"s-{shard:02d}.tar", files, format=form)
    for path in (tmp_path, tmp_path / "s-{00..02}.tar"):
        train, _, info = opened(path, num_workers=workers)
        kept = [n for n in range(24) if n % 10 != 9]
        images = torch.cat([batch["image"] for batch in train])
        assert torch.equal(images, PIXELS[kept] / 255) and info.num_classes == 3
        images, labels = everything(info.sources["test"])
        assert torch.equal(images, PIXELS[[9, 19]]) and labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "names, split, train, held_out",
    [
        (["a-train-0", "a-train-1", "a-val-0"], "", [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]),
        (["train/0", "test/0", "val/0"], "", [0, 1, 2, 3], [4, 5, 6, 7]),
        (["train/0", "test/0", "val/0"], "train:val", [0, 1, 2, 3], [8, 9, 10, 11]),
        (["one-0", "two-0", "one-1"], "one:two", [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7]),
        (["train-0", "val-0"], "tenths", [0, 1, 2, 3, 4, 5, 6, 7], []),
    ],
)
def test_names_of_shards_decide_the_split(tmp_path, names, split, train, held_out):
    numbers = {}
    for k, name in enumerate(names):
        write_tar(tmp_path / f"{name}.tar", samples(range(4 * k, 4 * k + 4)))
        numbers[f"{name}.tar"] = list(range(4 * k, 4 * k + 4))
    order = [n for name in sorted(numbers) for n in numbers[name]]
    _, _, info = opened(tmp_path, split=split)
    for part, expected in (("train", train), ("test", held_out or train)):
        expected = [n for n in order if n in expected]
        images, labels = everything(info.sources[part])
        assert torch.equal(images, PIXELS[expected])
        assert labels.tolist() == [n % 3 for n in expected]


def test_json_labels_no_labels_and_other_files(tmp_path):
    record = {"json": b'{"label": 2, "text": "x"}', "txt": b"a caption", "cls.txt": b"4"}
    write_tar(tmp_path / "a.tar", samples(range(3), lambda n: record))
    assert everything(opened(tmp_path)[2].sources["train"])[1].tolist() == [2, 2, 2]
    both = {"json": b'{"label": 2}', "cls": b" 1\n"}
    write_tar(tmp_path / "a.tar", samples(range(3), lambda n: both))
    assert everything(opened(tmp_path)[2].sources["train"])[1].tolist() == [1, 1, 1]
    write_tar(tmp_path / "a.tar", samples(range(3), lambda n: {"json": b'{"width": 2}'}))
    assert opened(tmp_path)[2].num_classes == 1


def test_images_are_cropped_resized_and_converted_as_in_a_folder(tmp_path):
    image = random_images(20, 30, 4)
    write_tar(tmp_path / "tars" / "a.tar", [("0.WEBP", encoded(image, "webp"))])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "0.webp").write_bytes(encoded(image, "webp"))
    options = {"background": "white", "image_size": 12, "range": (0, 200)}
    with pytest.raises(DataError, match=r"0.WEBP \(byte 512 of a.tar\) in .*transparent"):
        opened(tmp_path / "tars", image_size=12)
    options["range"] = (0, 255)
    expected = datasets.get_streams(make_config("IMAGES", path=str(tmp_path / "files"), **options))
    found = opened(tmp_path / "tars", **options)
    assert torch.equal(
        found[2].sources["train"].images([0]), expected[2].sources["train"].images([0])
    )


@pytest.mark.parametrize(
    "files, message",
    [
        (
            [*samples(range(2)), ("0009.cls", b"1")],
            r"0009 \(byte 4096 of a.tar\).* no image .*skip",
        ),
        (samples(range(2), lambda n: {"cls": b"dog"}), r"0000.cls in .*a.tar \(byte 1024\).*'dog'"),
        (samples(range(2), lambda n: {"cls": b"-1"}), "the label '-1', which is no whole number"),
        (samples(range(2), lambda n: {"json": b'{"label": 1.5}'}), "the label '1.5', which"),
        (samples(range(2), lambda n: {"json": b'{"label": true}'}), "the label 'true', which"),
        (samples(range(2), lambda n: {"json": b"{"}), r"0000.json in .*\(byte 1024\) is no JSON"),
        (samples(range(2), lambda n: {"cls": b"99999999"}), "must be below 16777216"),
        (
            samples(range(4), lambda n: {"cls": b"1"} if n else {}),
            r"0000.png \(byte 512 of a.tar\).* has no label, and 3 of 4 samples have one",
        ),
        ([*samples(range(2)), ("0001.jpg", b"")], r"0001.jpg in .*second image .*0001.png"),
        ([*samples(range(2)), ("0001.CLS", b"2")], r"0001.CLS in .* is a second label"),
        ([("README", b"")], "there is no sample in the 1 .tar files"),
        ([("0.png", b"no image")], r"0.png \(byte 512 of a.tar\) in .* is not a readable image"),
    ],
)
def test_bad_samples_are_refused_with_their_place(tmp_path, files, message):
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_unreadable_samples_are_left_out_on_demand(tmp_path, caplog):
    bad = [("0008.png", b"no image"), ("0009.cls", b"1"), ("0008.cls", b"1")]
    write_tar(tmp_path / "a.tar", [*samples(range(3)), *bad])
    train = opened(tmp_path, on_error="skip")[2].sources["train"]
    assert torch.equal(everything(train)[0], PIXELS[:3])
    assert "1 left out because they have no image: 0009 (byte" in caplog.text
    assert "1 left out because they cannot be read: 0008.png (byte" in caplog.text


# Samples of 2,048 bytes: two files, each with a header and up to 512 bytes.
@pytest.mark.parametrize("size", [0, 700, 1024, 1200, 1536, 1600, 2048, 2500, 8191, 8192, 8300])
def test_a_file_that_is_cut_off_is_refused_wherever_that_is(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    os.truncate(path, size)
    with pytest.raises(DataError, match=r"a.tar \(byte \d+\) is (damaged or )?cut off"):
        opened(tmp_path)


def test_a_file_that_is_cut_off_later_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    source = opened(tmp_path)[2].sources["train"]
    os.truncate(path, 6700)
    assert torch.equal(source.images([2]), PIXELS[[2]])
    with pytest.raises(DataError, match=r"0003.png \(byte 6656 of a.tar\).*ends after 44 of \d+"):
        source.images([3])


# Files whose contents are not, or not all, where they are in a .tar file.
ELSEWHERE = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE]


@pytest.mark.parametrize("kind", ELSEWHERE)
@pytest.mark.parametrize(
    "name, message",
    [
        ("0000.cls", r"0000.cls in .*a.tar \(byte 2048\) is a link or a sparse file"),
        ("0001.png", r"0001 \(byte 2048 of a.tar\) in .* has no image .* nor a sparse file"),
    ],
)
def test_links_and_sparse_files_are_refused(tmp_path, kind, name, message):
    """Labels would be lost, and all samples be of class 0; images would be lost or damaged."""
    path = write_tar(tmp_path / "a.tar", [*samples([0], lambda n: {}), ("one", b"1")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, "one"
        archive.addfile(link)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_folders_and_links_of_other_kinds_are_no_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(2)))
    with tarfile.open(path, "a") as archive:
        for name, kind in (("photos.png", tarfile.DIRTYPE), ("notes.txt", tarfile.SYMTYPE)):
            other = tarfile.TarInfo(name)
            other.type, other.linkname = kind, "x"
            archive.addfile(other)
    assert torch.equal(everything(opened(tmp_path)[2].sources["train"])[0], PIXELS[:2])


@pytest.mark.parametrize("kind", ["a link", "of three"])
def test_shards_that_are_not_there_are_missed(tmp_path, kind):
    if kind == "a link":
        write_tar(tmp_path / "0.tar", samples(range(2)))
        (tmp_path / "1.tar").symlink_to("nowhere.tar")
        message = "1.tar is a broken link"
    else:
        write_tar(tmp_path / "a-00000-of-00003.tar", samples(range(2)))
        message = r"has 1 of the files a-...-of-00003: get the others, or name .* by a pattern"
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    """But for those that systems make beside the data."""
    for name in ("a", "b", "lost+found", ".Trashes"):
        write_tar(tmp_path / name / "0.tar", samples(range(2)))
    scan, closed = os.scandir, ["lost+found", ".Trashes"]

    def refusing(path):
        if os.path.basename(path) in closed:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert opened(tmp_path)[2].num_examples["train"] == 4
    closed.append("b")
    with pytest.raises(DataError, match=r"the folder .*/b cannot be listed: Permission denied"):
        opened(tmp_path)


def test_samples_behind_the_end_of_a_file_are_refused(tmp_path):
    first, second = (write_tar(tmp_path / f"{k}.tar", samples([k])) for k in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(DataError, match=r"0.tar goes on after its end \(byte 2048\), as files jo"):
        opened(first)


def test_a_size_below_0_is_no_way_back(tmp_path):
    """It would lead to the first file again, without end."""
    path = write_tar(tmp_path / "a.tar", [("0.png", b""), ("1.png", b"")])
    content = bytearray(path.read_bytes())
    content[512 + 124 : 512 + 136] = (-1024).to_bytes(12, "big", signed=True)
    content[512 + 148 : 512 + 156] = b" " * 8
    content[512 + 148 : 512 + 155] = b"%06o\0" % sum(content[512:1024])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar \(byte 512\) is damaged .* a size is wrong"):
        opened(tmp_path)


def test_damaged_headers_and_packed_files_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(4)))
    content = bytearray(path.read_bytes())
    content[2048 + 148] ^= 1  # of the second sample: its checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar \(byte 2048\) is damaged or cut off: its end"):
        opened(tmp_path)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(DataError, match=r"a.tar is packed, .* unpack it to a .tar"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "path, split, message",
    [
        ("", "", "there is no file in .* that ends in .tar"),
        ("x-{0..2}.tar", "", "there is no file or folder '.*x-0.tar'"),
        ("x-{0..999999999}.tar", "", "stands for more than 131072 files"),
        ("x-{3..0}.tar", "", r"x-\{3..0\}.tar' stands for no file: ranges go up"),
        ("notes.txt", "", "must end in .tar"),
        ("val", "", "a part called val, as if to hold out, .*TRAIN:val, or data.split=tenths"),
        ("val", "a:b", "data.split='a:b' names parts .* are called val"),
        (
            "val",
            "val",
            "data.split='val' should name the part to train on and the part to hold out",
        ),
        ("val", "a:b:val", "data.split='a:b:val' should name the part"),
        ("both", "", "train-test-0.tar in .* is called both train and test"),
        ("several", "", "the parts test, testing all have names of one part"),
    ],
)
def test_paths_and_splits_that_are_not_there_are_refused(tmp_path, path, split, message):
    (tmp_path / "notes.txt").touch()
    if names := {"both": ["train-test-0"], "several": ["train", "test", "testing"]}.get(path):
        for name in names:
            write_tar(tmp_path / path / f"{name}.tar", samples(range(2)))
    if path == "val":
        write_tar(tmp_path / path / "val.tar", samples(range(2)))
    with pytest.raises(DataError, match=message):
        opened(tmp_path / path if path else tmp_path, split=split)


def test_patterns():
    assert list(expand("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand("{x,y}{9..10}")) == ["x9", "x10", "y9", "y10"]


def test_later_starts_go_through_new_and_changed_files_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tars, "SMALL", 1)
    scanned, scan = [], tars._scanned
    monkeypatch.setattr(tars, "_scanned", lambda file: scanned.append(file.name) or scan(file))
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", samples(range(4 * shard, 4 * shard + 4)))

    def look(expected, numbers, path=tmp_path):
        scanned.clear()
        source = opened(path, split="tenths")[2].sources["train"]._source
        images, labels = source.read(np.array(sorted(range(len(source)))))
        assert scanned == expected and torch.equal(images, PIXELS[numbers])
        assert labels.tolist() == [n % 3 for n in numbers]

    look(["0.tar", "1.tar", "2.tar"], range(12))
    look([], range(12))
    look([], range(4, 12), tmp_path / "{1..2}.tar")
    write_tar(tmp_path / "3.tar", samples(range(12, 16)))
    look(["3.tar"], range(16))
    write_tar(tmp_path / "1.tar", samples(range(16, 21)))
    look(["1.tar"], [0, 1, 2, 3, 16, 17, 18, 19, 20, *range(8, 16)])
    write_tar(tmp_path / "2.tar", samples(range(8, 11)))
    look(["2.tar"], [16, 17, 18, 19, 20, 8, 9, 10], tmp_path / "{1..2}.tar")
    write_tar(tmp_path / "2.tar", samples(range(8, 12)))
    look(["2.tar"], [0, 1, 2, 3, 16, 17, 18, 19, 20, *range(8, 16)])
    (tmp_path / ".score_lib_shards.npz").write_bytes(b"damaged")
    look(["0.tar", "1.tar", "2.tar", "3.tar"], [0, 1, 2, 3, 16, 17, 18, 19, 20, *range(8, 16)])
    assert "is gone through again: the index" in caplog.text
