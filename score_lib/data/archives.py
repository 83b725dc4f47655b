"""CIFAR-10, CIFAR-100, SVHN, MNIST and Fashion-MNIST from the files that their authors publish.

The pickles of CIFAR are read because they are what most people have.  Two things keep them from
running code: a file is read only if its hash is the published one, and the reader knows no class.
"""

import functools
import gzip
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from score_lib.data import formats
from score_lib.data.sources import DataError, MemorySource
from score_lib.disk.files import file_state

# Limit on a file, packed and unpacked; the largest, of SVHN, has 182 MB.
MAX_BYTES = 1 << 28


class Files(NamedTuple):
    """The files of a split in one format.

    Attributes:
        count: images in them.
        md5: name -> published hash of the (unpacked) file; "" where only its size is known.
    """

    count: int
    md5: tuple[tuple[str, str], ...]


class Archive(NamedTuple):
    """A data set in one format.

    Attributes:
        folders: where the files may be, below the folder that the user names.
        splits: training and held-out part.
        read: contents of the files of a split and number of images -> images, labels.
    """

    folders: tuple[str, ...]
    splits: tuple[Files, Files]
    read: Callable[[list[bytes], int], formats.Examples]


def _cifar10(name: str, md5: str) -> tuple[Files, Files]:
    """Five files to train on; hashes are separated by spaces, that of the test file is last."""
    hashes = md5.split() or [""] * 6
    training = tuple((name.format(f"data_batch_{k}"), hashes[k - 1]) for k in range(1, 6))
    return Files(50_000, training), Files(10_000, ((name.format("test_batch"), hashes[5]),))


def _cifar100(name: str, train: str, test: str) -> tuple[Files, Files]:
    files = ((name.format("train"), train),), ((name.format("test"), test),)
    return Files(50_000, files[0]), Files(10_000, files[1])


def _idx(train: tuple[str, str], test: tuple[str, str]) -> tuple[Files, Files]:
    names = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
    first, second = (
        tuple((name.format(part), md5) for name, md5 in zip(names, hashes, strict=True))
        for part, hashes in (("train", train), ("t10k", test))
    )
    return Files(60_000, first), Files(10_000, second)


# The hashes of CIFAR and SVHN are those that torchvision checks.
ARCHIVES = {
    "CIFAR10": (
        Archive(
            ("cifar-10-batches-py", ""),
            _cifar10(
                "{}",
                "c99cafc152244af753f735de768cd75f d4bba439e000b95fd0a9bffe97cbabec "
                "54ebc095f3ab1f0389bbae665268c751 634d18415352ddfa80567beed471001a "
                "482c414d41f54cd18b22e5b47cb7c3cb 40351d587109b95175f43aff81a1287e",
            ),
            formats.cifar_pickle,
        ),
        Archive(("cifar-10-batches-bin", ""), _cifar10("{}.bin", ""), formats.cifar_binary),
    ),
    "CIFAR100": (
        Archive(
            ("cifar-100-python", ""),
            _cifar100("{}", "16019d7e3df5f24257cddd939b257f8d", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
            functools.partial(formats.cifar_pickle, key=b"fine_labels"),
        ),
        Archive(
            ("cifar-100-binary", ""),
            _cifar100("{}.bin", "", ""),
            functools.partial(formats.cifar_binary, labels=2),
        ),
    ),
    "SVHN": (
        Archive(
            ("", "SVHN", "svhn"),
            (
                Files(73_257, (("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),)),
                Files(26_032, (("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),)),
            ),
            formats.mat,
        ),
    ),
    "MNIST": (
        Archive(
            ("MNIST/raw", "raw", ""),
            _idx(
                ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
                ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
            ),
            formats.idx,
        ),
    ),
    "FASHION_MNIST": (
        Archive(
            ("FashionMNIST/raw", "raw", ""),
            _idx(
                ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
                ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
            ),
            formats.idx,
        ),
    ),
}
# Folders of the network that hold the packed files of a data set, one by one.
ADDRESSES = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FASHION_MNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
DIGITS = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
# Names of classes in the order of labels, as in tensorflow-datasets.
CLASSES = {
    "CIFAR10": "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
    "SVHN": DIGITS,
    "MNIST": DIGITS,
    "FASHION_MNIST": (
        "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
    ),
    "CIFAR100": (
        "apple, aquarium_fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, "
        "boy, bridge, bus, butterfly, camel, can, castle, caterpillar, cattle, chair, "
        "chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, "
        "elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, "
        "lawn_mower, leopard, lion, lizard, lobster, man, maple_tree, motorcycle, mountain, "
        "mouse, mushroom, oak_tree, orange, orchid, otter, palm_tree, pear, pickup_truck, "
        "pine_tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket, "
        "rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, "
        "streetcar, sunflower, sweet_pepper, table, tank, telephone, television, tiger, "
        "tractor, train, trout, tulip, turtle, wardrobe, whale, willow_tree, wolf, woman, worm"
    ),
}


def open_archive(name: str, path: str) -> tuple[MemorySource, MemorySource]:
    """Training and held-out images of a data set, in the order of the files.

    Args:
        name: of `ARCHIVES`.
        path: the folder of the files, or one that holds it under its published name.
    Raises:
        DataError: files are missing, damaged, or not the published ones.
    """
    archive, places = _find(name, pathlib.Path(os.path.expanduser(path)))
    marks = tuple(tuple((str(file), file_state(file)) for file in files) for files in places)
    titles = {title: label for label, title in enumerate(CLASSES[name].split(", "))}
    sources = []
    for images, labels in _load(archive, marks):
        if int(labels.max()) >= len(titles):
            raise DataError(
                f"{name} in {path} has the label {int(labels.max())}: it has {len(titles)} classes"
            )
        source = MemorySource(images, labels)
        source.num_classes, source.class_to_idx = len(titles), titles
        sources.append(source)
    return tuple(sources)


def has_archive(name: str, path: str | os.PathLike) -> bool:
    """Whether all files of a data set are in a folder; they may be damaged."""
    try:
        _find(name, pathlib.Path(path))
    except DataError:
        return False
    return True


def _find(name: str, root: pathlib.Path) -> tuple[Archive, list[list[pathlib.Path]]]:
    """The first format whose files are all there, and the files of each split."""
    if not root.is_dir():
        getting = f"python -m score_lib.data.prepare {name.lower()}"
        advice = (
            f": `{getting}` puts the files into data/{name.lower()}" if name in ADDRESSES else ""
        )
        raise DataError(
            f"data.path: {name} is read from a folder, and {str(root)!r} is none{advice}"
        )
    missing = []
    for archive in ARCHIVES[name]:
        for folder in archive.folders:
            place = root / folder
            splits = [[_stored(place / file) for file, _ in part.md5] for part in archive.splits]
            files = [file for split in splits for file in split]
            absent = [file for file in files if not file.is_file()]
            if not absent:
                return archive, splits
            missing.append((len(absent) == len(files), absent[0]))
    nothing_there, first = min(missing, key=lambda entry: entry[0])
    others = "" if not nothing_there else f" nor any other file of {name} as its authors publish it"
    raise DataError(
        f"data.path: there is no {first}{others}: unpack the published archive in {root}, or "
        f"leave data.path empty for tensorflow-datasets"
    )


def _stored(path: pathlib.Path) -> pathlib.Path:
    """A file, or the same packed by gzip."""
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.is_file() else path


@functools.lru_cache(maxsize=1)  # a run opens its data several times
def _load(archive: Archive, marks: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of each split; cached until a file changes."""
    return [
        _load_split(archive.read, part, [path for path, _ in files])
        for part, files in zip(archive.splits, marks, strict=True)
    ]


def _load_split(read: Callable, part: Files, paths: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    contents = list(_verified(part, paths))
    try:
        images, labels = read(contents, part.count)
    except Exception as error:  # damaged files make readers raise errors of nearly any type
        names = ", ".join(map(os.path.basename, paths))
        where = f"{names} in {os.path.dirname(paths[0])}"
        raise DataError(f"{where} cannot be read: {error}") from error
    images = np.require(images, requirements=("C", "W"))  # views of bytes are read-only
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _verified(part: Files, paths: list[str]) -> Iterator[bytes]:
    """The contents of files whose hashes are the published ones."""
    for path, (_, md5) in zip(paths, part.md5, strict=True):
        content = _contents(path)
        verify(content, md5, path)
        yield content


def verify(content: bytes, md5: str, name: str) -> None:
    """Raise `DataError` for contents of a file whose MD5 is not the published one; "" is any."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 and found != md5:
        raise DataError(
            f"{name} is damaged or another file: its MD5 is {found}, and that of the published "
            f"file is {md5}: download it again"
        )


def _contents(path: str) -> bytes:
    """A whole file, unpacked if its name ends in .gz."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except Exception as error:  # damaged files make gzip raise errors of several types
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES} bytes, which none of these files has")
    return content
