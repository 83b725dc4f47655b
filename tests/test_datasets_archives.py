"""Public data sets from their authors' files, and data sets written as image files."""

import gzip
import hashlib
import importlib.util
import io
import itertools
import os
import pathlib
import pickle
import re
import struct
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from dataset_helpers import everything, make_config, random_images

import datasets
from datasets import DataError
from score_lib.data import archives, export, formats, lmdbs

COUNTS = 10, 3


# Files in the published formats.


def text(content):
    return b"U" + bytes([len(content)]) + content


def python_batch(images, labels, key=b"labels"):
    """The pickle that Python 2 writes for a batch of CIFAR: images (n, 3, 32, 32)."""
    n = struct.pack("<H", len(images))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01M"
        + n
        + b"M\x00\x0c\x86cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", images.size)
        + images.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + numbers + b"u."


def binary_batch(images, labels, coarse=b""):
    return b"".join(
        coarse + bytes([label]) + image.tobytes()
        for image, label in zip(images, labels, strict=True)
    )


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def mat(images, labels, compressed=True, **others):
    io_module = pytest.importorskip("scipy.io")
    ones = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
    stream = io.BytesIO()
    arrays = {"X": images.transpose(2, 3, 1, 0), "y": ones, **others}
    io_module.savemat(stream, arrays, do_compression=compressed)
    return stream.getvalue()


def examples(side=32, channels=3, classes=10):
    """Images (n, C, h, w) and labels of both splits."""
    return [
        (random_images(n, channels, side, side, seed=n), np.arange(1, n + 1, dtype=np.uint8) * 7)
        for n in COUNTS
    ], classes


def files_of(form):
    """Name of a data set, its files in a format, and the examples in them."""
    kind, form = form.split(" ")
    gray = "MNIST" in kind
    (train, test), classes = examples(*((28, 1) if gray else (32, 3)), 100 if "100" in kind else 10)
    train, test = ((images, labels % classes) for images, labels in (train, test))
    name = kind.split("/")[-1]
    key = b"fine_labels" if classes == 100 else b"labels"
    if kind == "SVHN":
        packed = form == "packed"
        return {
            "train_32x32.mat": mat(*train, packed),
            "test_32x32.mat": mat(*test, packed),
        }, (train, test)
    if gray:
        packed = gzip.compress if form == "gz" else bytes
        end = ".gz" if form == "gz" else ""
        return {
            f"{part}-{what}-ubyte{end}": packed(idx(array))
            for part, (images, labels) in (("train", train), ("t10k", test))
            for what, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels))
        }, (train, test)
    write = python_batch if form == "python" else binary_batch
    end = "" if form == "python" else ".bin"
    if name == "CIFAR100":
        options = {"key": key} if form == "python" else {"coarse": b"\x05"}
        return {
            f"train{end}": write(*train, **options),
            f"test{end}": write(*test, **options),
        }, (train, test)
    parts = [(train[0][k : k + 2], train[1][k : k + 2]) for k in range(0, 10, 2)]
    written = {f"data_batch_{k}{end}": write(*part) for k, part in enumerate(parts, start=1)}
    return written | {f"test_batch{end}": write(*test)}, (train, test)


def publish(monkeypatch, name, contents):
    """Let these files be the published ones."""

    def md5(file, known):
        content = contents.get(file, b"")
        if packed := contents.get(file + ".gz"):
            content = gzip.decompress(packed)
        return hashlib.md5(content).hexdigest() if known else ""

    forms = []
    for archive in archives.ARCHIVES[name]:
        parts = [
            archives.Files(count, tuple((file, md5(file, known)) for file, known in part.md5))
            for count, part in zip(COUNTS, archive.splits, strict=True)
        ]
        forms.append(archive._replace(splits=tuple(parts)))
    monkeypatch.setitem(archives.ARCHIVES, name, tuple(forms))


def write(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def sources(name, path, **data):
    gray = "MNIST" in name
    shape = {"image_size": 28 if gray else 32, "num_channels": 1 if gray else 3}
    info = datasets.get_streams(make_config(name, path=str(path), **{**shape, **data}))[2]
    return info.sources["train"], info.sources["test"], info


FORMS = {
    "CIFAR10 python": "cifar-10-batches-py",
    "CIFAR10 binary": "cifar-10-batches-bin",
    "CIFAR100 python": "cifar-100-python",
    "CIFAR100 binary": "cifar-100-binary",
    "SVHN packed": "SVHN",
    "SVHN plain": "",
    "MNIST plain": "MNIST/raw",
    "MNIST gz": "raw",
    "FASHION_MNIST plain": "",
    "FASHION_MNIST gz": "FashionMNIST/raw",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [True, False])
def test_files_are_read_as_they_are(form, nested, tmp_path, monkeypatch):
    name = form.split()[0]
    contents, expected = files_of(form)
    publish(monkeypatch, name, contents)
    write(tmp_path / (FORMS[form] if nested else ""), contents)
    *found, info = sources(name, tmp_path)
    for source, (images, labels) in zip(found, expected, strict=True):
        read, told = everything(source)
        assert np.array_equal(read.numpy(), images) and np.array_equal(told.numpy(), labels)
        assert (read.dtype, told.dtype) == (torch.uint8, torch.int64)
    assert info.num_classes == len(info.class_to_idx) == (100 if name == "CIFAR100" else 10)


def test_the_python_batch_is_what_numpy_reads():
    """The writer above, and with it the reader, agree with NumPy's own unpickling."""
    images = random_images(4, 3, 32, 32)
    content = python_batch(images, range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is called numpy._core today
        batch = pickle.loads(content, encoding="bytes")
    assert np.array_equal(batch[b"data"], images.reshape(4, -1))
    read, labels = formats.cifar_pickle([content], 4)
    assert np.array_equal(read, images) and labels.tolist() == batch[b"labels"] == [0, 1, 2, 3]


def test_hashes_and_sizes_are_the_published_ones():
    package = importlib.util.find_spec("torchvision")  # whose import needs a matching PyTorch
    if package is None:
        pytest.skip("torchvision is missing")
    folder = pathlib.Path(package.origin).parent / "datasets"
    for name, module in (("CIFAR10", "cifar"), ("CIFAR100", "cifar"), ("SVHN", "svhn")):
        lists = (folder / f"{module}.py").read_text()
        for file, md5 in itertools.chain(*(s.md5 for s in archives.ARCHIVES[name][0].splits)):
            assert re.search(rf"[\"/]{file}[\"'],\s*[\"']{md5}[\"']", lists), file
    sizes = {name: [s.count for s in forms[0].splits] for name, forms in archives.ARCHIVES.items()}
    assert sizes == {
        "CIFAR10": [50_000, 10_000],
        "CIFAR100": [50_000, 10_000],
        "SVHN": [73_257, 26_032],
        "MNIST": [60_000, 10_000],
        "FASHION_MNIST": [60_000, 10_000],
    }


def test_fine_classes_are_in_the_order_of_their_labels():
    names = archives.CLASSES["CIFAR100"].split(", ")
    assert len(set(names)) == 100 and names == sorted(names)
    assert (names[0], names[53], names[99]) == ("apple", "orange", "worm")


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.slow
def test_the_same_images_as_in_tensorflow_datasets(size, tmp_path, monkeypatch):
    from test_datasets_public import prepare_cifar10

    stored = prepare_cifar10(tmp_path / "tfds", "array_record", sizes=(10, 3))
    images = [stored[split].transpose(0, 3, 1, 2) for split in ("train", "test")]
    contents = {
        f"data_batch_{k + 1}": python_batch(images[0][2 * k : 2 * k + 2], [2 * k, 2 * k + 1])
        for k in range(5)
    } | {"test_batch": python_batch(images[1], range(3))}
    publish(monkeypatch, "CIFAR10", contents)
    write(tmp_path, contents)
    config = make_config("CIFAR10", image_size=size, data_dir=str(tmp_path / "tfds"))
    prepared = datasets.get_streams(config)[2].sources.values()
    for found, other in zip(
        sources("CIFAR10", tmp_path, image_size=size)[:2], prepared, strict=True
    ):
        assert found.shape == other.shape == (3, size, size)
        for values, others in zip(everything(found), everything(other), strict=True):
            assert torch.equal(values, others)


@pytest.mark.parametrize(
    "name, part, classes",
    [("CIFAR100", "cifar100", 100), ("MNIST", "mnist", 10), ("FASHION_MNIST", "fashion_mnist", 10)],
)
def test_new_names_come_from_tensorflow_datasets_without_a_path(name, part, classes):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        stored = tfds.builder(part).as_data_source("test")[2]
        _, test, info = sources(name, "")
        image, label = test.read(np.array([2]))
    assert np.array_equal(image[0].permute(1, 2, 0).numpy(), stored["image"])
    assert (label.item(), info.num_classes) == (stored["label"], classes)
    if name == "FASHION_MNIST":
        assert list(info.class_to_idx) == archives.CLASSES[name].split(", ")


def test_files_are_read_again_only_if_they_change(tmp_path, monkeypatch):
    contents, _ = files_of("CIFAR10 binary")
    publish(monkeypatch, "CIFAR10", contents)
    write(tmp_path, contents)
    reads, real = [], archives._contents
    monkeypatch.setattr(archives, "_contents", lambda path: reads.append(path) or real(path))
    before = [everything(sources("CIFAR10", tmp_path)[1])[0] for _ in range(2)]
    assert torch.equal(*before) and len(reads) == 6
    write(tmp_path, {"test_batch.bin": binary_batch(255 - before[0].numpy(), [1, 2, 3])})
    os.utime(tmp_path / "test_batch.bin", (1, 1))
    after, labels = everything(sources("CIFAR10", tmp_path)[1])
    assert torch.equal(after, 255 - before[0]) and labels.tolist() == [1, 2, 3]


# Files that are missing, damaged or hostile.


def assert_refused(name, path, match, **data):
    with pytest.raises(DataError, match=match) as caught:
        sources(name, path, **data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["CIFAR10 python", "CIFAR100 python", "SVHN plain", "MNIST gz"])
def test_other_files_than_the_published_are_refused(form, tmp_path):
    write(tmp_path, files_of(form)[0])
    name = form.split()[0]
    assert_refused(name, tmp_path, r"its MD5 is [0-9a-f]{32}, .* download it again$")


@pytest.mark.parametrize("trusted", [True, False])
def test_pickles_run_no_code(trusted, tmp_path, monkeypatch):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    contents, _ = files_of("CIFAR10 python")
    if not trusted:
        publish(monkeypatch, "CIFAR10", contents)
    contents["data_batch_3"] = pickle.dumps({"data": Code()}, protocol=2)
    if trusted:
        publish(monkeypatch, "CIFAR10", contents)
    write(tmp_path, contents)
    match = "the pickle asks for posix.mkdir" if trusted else "data_batch_3 is damaged or another"
    assert_refused("CIFAR10", tmp_path, match)
    assert not (tmp_path / "ran").exists()


def batch_with(**changes):
    good = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    changed = {**good, **{key.encode(): value for key, value in changes.items()}}
    return pickle.dumps(changed, protocol=4)


IMAGES = random_images(2, 3, 32, 32)
BATCH = python_batch(IMAGES, [0, 1])
PICKLES = {
    "new classes": (batch_with(), "asks for numpy.*, which CIFAR does not need"),
    "a persistent id": (b"\x80\x02K\x01Q.", "refers to objects outside"),
    "no dictionary": (pickle.dumps([1]), "not a pickled dictionary"),
    "data of bytes": (pickle.dumps({b"data": b"123"}, 4), "not a pickled dictionary"),
    "cut off": (BATCH[:-9], "."),
    "other numbers": (BATCH.replace(b"u1", b"i1"), "not an array of uint8"),
    "objects": (BATCH.replace(b"u1", b"O8"), "not an array of uint8"),
    "another width": (BATCH.replace(b"M\x00\x0c\x86", b"M\x01\x0c\x86"), "not an array of uint8"),
    "no array": (BATCH.replace(b"(K\x01M", b"(NK\x01M"), "not an array of uint8"),
    "no labels": (BATCH.replace(b"labels", b"labelz"), "one label for each"),
    "too few labels": (python_batch(IMAGES, [0]), "one label for each"),
    "too many": (python_batch(random_images(3, 3, 32, 32), [0, 1, 2]), "holds 3 images, not 2"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles(case):
    content, match = PICKLES[case]
    with pytest.raises(Exception, match=match) as caught:  # the caller names the file
        formats.cifar_pickle([content], 2)
    assert isinstance(caught.value, ValueError | pickle.UnpicklingError | EOFError | TypeError)


def absurd(array):
    return struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + array.tobytes()


GRAY = random_images(2, 28, 28)
LABELS = np.array([3, 4], np.uint8)
IDX = {
    "absurd sizes": (absurd(GRAY), "does not start as an IDX file"),
    "another count": (idx(GRAY[:1]), "does not start as an IDX file"),
    "other numbers": (idx(GRAY).replace(b"\0\0\x08", b"\0\0\x0d", 1), "does not start"),
    "cut off": (idx(GRAY)[:-1], "not 1584 bytes"),
    "too long": (idx(GRAY) + b"0", "not 1584 bytes"),
    "empty": (b"", "does not start"),
}


@pytest.mark.parametrize("case", IDX)
def test_damaged_idx_files(case):
    assert np.array_equal(formats.idx([idx(GRAY), idx(LABELS)], 2)[0][:, 0], GRAY)
    with pytest.raises(ValueError, match=IDX[case][1]):
        formats.idx([IDX[case][0], idx(LABELS)], 2)


def test_damaged_binary_batches():
    content = binary_batch(IMAGES, [0, 1])
    for contents in ([content[:-1]], [content + b"0"], [content[:-1], b"0"], [], [content] * 2):
        with pytest.raises(ValueError, match="2 records of 3073 bytes"):
            formats.cifar_binary(contents, 2)


def test_damaged_gzip_files(tmp_path, monkeypatch):
    contents, _ = files_of("MNIST gz")
    publish(monkeypatch, "MNIST", contents)
    first = "train-images-idx3-ubyte.gz"
    write(tmp_path, {**contents, first: contents[first][:-20]})
    assert_refused(
        "MNIST", tmp_path, "train-images-idx3-ubyte.gz cannot be read: Compressed file ended"
    )
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 20)
    write(tmp_path, {first: gzip.compress(bytes(50 << 20))})
    tracemalloc.start()
    assert_refused("MNIST", tmp_path, "has more than 1048576 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def test_damaged_matlab_files():
    labels = np.array([3, 0], np.uint8)
    good = mat(IMAGES, labels)
    assert formats.mat([good], 2)[1].tolist() == [3, 0]
    start = good[:128]
    huge = element(6, bytes([9, 0, 0, 0] + [0] * 4)) + element(5, struct.pack("<2i", 1 << 30, 1))
    huge = element(14, huge + element(1, b"X") + element(2, bytes(8)))
    cases = {
        "other than arrays of uint8": mat(IMAGES, labels, X=np.array([{}], dtype=object)),
        "array of shape": start + huge,
        "of shape": mat(IMAGES[:1], labels),
        "lacks X or y": start,
        "not a MATLAB file": b"\x89HDF" + good[4:],
        "is cut off": good[:-40],
        "type 1, not an array": start + element(1, bytes(8)),
        "not from 1 to 10": mat(IMAGES, labels, y=np.array([[11], [1]], np.uint8)),
        "incorrect header check": start + element(15, b"no stream"),
        "unpacks to more than": start + element(15, zlib.compress(bytes(50 << 20))),
    }
    tracemalloc.start()
    for match, content in cases.items():
        with pytest.raises((ValueError, zlib.error), match=match):
            formats.mat([content], 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_missing_files_are_named(tmp_path, monkeypatch):
    assert_refused("MNIST", tmp_path / "none", "read from a folder, and '.*none' is none")
    assert_refused("SVHN", tmp_path, r"there is no .*train_32x32.mat nor any other file of SVHN")
    contents, _ = files_of("CIFAR10 python")
    del contents["data_batch_4"]
    write(tmp_path / "cifar-10-batches-py", contents)
    assert_refused("CIFAR10", tmp_path, r"there is no \S*cifar-10-batches-py/data_batch_4: unpack")
    assert_refused("CIFAR10", tmp_path, "set data.num_channels=3", num_channels=1)
    assert_refused(
        "MNIST", tmp_path, "gray images.*set data.num_channels=1.*best 28", num_channels=3
    )


def test_labels_above_the_classes_are_refused(tmp_path, monkeypatch):
    contents, (_, test) = files_of("CIFAR10 binary")
    publish(monkeypatch, "CIFAR10", contents)
    write(tmp_path, {**contents, "test_batch.bin": binary_batch(test[0], [0, 1, 10])})
    assert_refused("CIFAR10", tmp_path, "has the label 10: it has 10 classes")


# LSUN.


def database(folder, files):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(folder), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, content in files.items():
            transaction.put(key, content)


def encoded(image, kind):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


@pytest.fixture
def scenes(tmp_path):
    """Images (8, 8, 3) by key, in the databases of a category; keys can be any bytes."""
    images = {bytes([9 * k, 255 - k, 0]): random_images(8, 8, 3, seed=k) for k in range(6)}
    files = {key: encoded(image, "WEBP") for key, image in images.items()}
    database(tmp_path / "bridge_train_lmdb", files)
    database(tmp_path / "bridge_val_lmdb", dict([*files.items()][:2]))
    return tmp_path, np.stack([images[key] for key in sorted(images)])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_images_of_lsun_are_in_the_order_of_keys(scenes, workers):
    path, images = scenes
    config = make_config("LSUN", path=str(path), category="bridge", num_workers=workers)
    train, test, info = datasets.get_streams(config, evaluation=True)
    again = datasets.get_streams(config, evaluation=True)[0]  # beside the first
    assert info.num_examples == {"train": 6, "test": 2} and info.num_classes == 1
    for stream, expected in ((train, images), (test, images[:2]), (again, images)):
        read = torch.cat([batch["image"] for batch in stream]).permute(0, 2, 3, 1)
        assert torch.equal(read, torch.from_numpy(expected) / 255)


def test_damaged_databases(scenes):
    path, _ = scenes
    config = make_config("LSUN", path=str(path), category="bridge")
    file = path / "bridge_train_lmdb" / "data.mdb"
    content = file.read_bytes()
    for size, match in (
        (len(content) - 1, rf"is cut off: it has {len(content) - 1} of {len(content)} bytes"),
        (10_000, "is cut off: it has 10000 of"),
        (4096, "is not a readable LMDB database"),
        (0, "is not a readable LMDB database"),
    ):
        file.write_bytes(content[:size])
        with pytest.raises(DataError, match=match):
            datasets.get_streams(config)
    database(path / "tower_train_lmdb", {b"a": b"no image"})
    database(path / "tower_val_lmdb", {})
    with pytest.raises(DataError, match=r"a in .*tower_train_lmdb is not a readable image"):
        datasets.get_streams(make_config("LSUN", path=str(path), category="tower"))
    with pytest.raises(DataError, match=r"there is no image in .*tower_val_lmdb"):
        lmdbs.LmdbImages(path / "tower_val_lmdb", (3, 8, 8))


def test_missing_databases_and_a_missing_package(tmp_path, monkeypatch):
    config = make_config("LSUN", path=str(tmp_path), category="bridge")
    write(tmp_path / "bridge_train_lmdb", {"data.mdb": b""})
    with pytest.raises(DataError, match=r"no .*val_lmdb/data.mdb: unpack bridge_val_lmdb.zip"):
        datasets.get_streams(config)
    write(tmp_path / "bridge_val_lmdb", {"data.mdb": b""})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="needs lmdb, which is missing: pip install lmdb"):
        datasets.get_streams(config)


# Export.


def run_export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


def sorted_images(source):
    """Labels and pixels of all images, in an order of their own."""
    images, labels = everything(source)
    return sorted(
        (label, image.numpy().tobytes())
        for image, label in zip(images, labels.tolist(), strict=True)
    )


@pytest.mark.parametrize("form", ["CIFAR100 binary", "FASHION_MNIST plain"])
def test_exported_images_are_read_back(form, tmp_path, monkeypatch, capsys):
    name = form.split()[0]
    contents, expected = files_of(form)
    if name == "CIFAR100":  # all classes must be there: ten of them
        monkeypatch.setitem(archives.CLASSES, name, "a, train, b/c, d, e, f, g, h, i, j, k, l")
        train = expected[0][0], np.arange(10, dtype=np.uint8)
        test = expected[1][0], np.array([10, 0, 11], np.uint8)
        contents = {
            "train.bin": binary_batch(*train, coarse=b"\0"),
            "test.bin": binary_batch(*test, coarse=b"\0"),
        }
    publish(monkeypatch, name, contents)
    write(tmp_path, contents)
    run_export(monkeypatch, name, tmp_path / "out", "--path", tmp_path)
    assert f"{tmp_path}/out/train: 10 images, 10 of them new" in capsys.readouterr().out
    shape = {"image_size": 32 if name == "CIFAR100" else 28}
    shape["num_channels"] = 3 if name == "CIFAR100" else 1
    config = make_config("IMAGES", path=str(tmp_path / "out"), **shape)
    info = datasets.get_streams(config)[2]
    for source, other in zip(sources(name, tmp_path)[:2], info.sources.values(), strict=True):
        assert sorted_images(source) == sorted_images(other)
    if name == "CIFAR100":
        assert list(info.class_to_idx)[:3] == ["0_a", "1_train", "2_b-c"]
    else:
        assert next(iter(info.class_to_idx)) == "0_T-shirt-top"


def test_an_export_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    contents, (train, _) = files_of("MNIST plain")
    publish(monkeypatch, "MNIST", contents)
    write(tmp_path, contents)
    arguments = "MNIST", tmp_path / "out", "--path", tmp_path, "--split", "train"
    written, real = [], export.atomic_write

    def full(path):
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        return real(path)

    monkeypatch.setattr(export, "atomic_write", full)
    with pytest.raises(SystemExit, match=r"MNIST was not exported: .*No space left"):
        run_export(monkeypatch, *arguments)
    left = written[0].parent / ".3.png.abc.tmp"
    left.write_bytes(b"")
    monkeypatch.setattr(export, "atomic_write", real)
    run_export(monkeypatch, *arguments)
    assert "train: 10 images, 6 of them new" in capsys.readouterr().out
    assert not left.exists() and not (tmp_path / "out" / "test").exists()
    first = tmp_path / "out" / "train" / str(train[1][0]) / "0.png"
    first.write_bytes(encoded(255 - train[0][0, 0], "PNG"))
    with pytest.raises(SystemExit, match=r"0.png holds another image: choose another folder"):
        run_export(monkeypatch, *arguments)
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(SystemExit, match=r"0.png in .* is not a readable image"):
        run_export(monkeypatch, *arguments)
    with pytest.raises(SystemExit, match=r"LSUN has no size of its own: .* --image_size 64"):
        run_export(monkeypatch, "LSUN", tmp_path)
