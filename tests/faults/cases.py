"""Damaged inputs, the readers they are given to, and damage to files of every kind."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict

import datasets

SIDE = 8
CANARY = "canary"


class Case(NamedTuple):
    """A damaged input.

    Attributes:
        kind: row of the table of results.
        name: which of its kind.
        make: writes it into an empty folder and returns the reader's argument.
        read: returns a digest of the values read.
        expect: "refused"; "refused or same", where a reader may ignore the damage but then has to
            read what `original` gives; "refused or valid"; or "read".
        original: writes the undamaged input.
        mebibytes: by how much resident memory may grow.
    """

    kind: str
    name: str
    make: Callable[[pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path], str]
    expect: str = "refused"
    original: Callable[[pathlib.Path], pathlib.Path] | None = None
    mebibytes: float = 300.0


class Command:
    """Unpickled, it makes a folder beside the input: a sign that code was run."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / CANARY),)


def written(name: str, data: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    """A maker of a file of these contents."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def flips_and_cuts(
    kind: str, make, read, flips: int, cuts: int, expect: str, expect_cut: str = "refused"
) -> Iterator[Case]:
    """A file with single bits flipped and a file cut short, at places that look random."""
    for number in range(flips + cuts):
        is_flip, draws = number < flips, random.Random(f"{kind} {number}")
        damage = flip if is_flip else cut
        yield Case(
            f"{kind}: {'bit flips' if is_flip else 'truncations'}",
            str(number),
            lambda folder, damage=damage, draws=draws: damage(make(folder), draws),
            read,
            expect if is_flip else expect_cut,
            make,
        )


def flip(path: pathlib.Path, draws: random.Random) -> pathlib.Path:
    """Flip a random bit of a file."""
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)
    return path


def cut(path: pathlib.Path, draws: random.Random) -> pathlib.Path:
    """Cut a file short at a random place."""
    data = path.read_bytes()
    path.write_bytes(data[: draws.randrange(len(data) - 1)])
    return path


def make_config(**data) -> ConfigDict:
    """The options of a config that `datasets` reads, for colour images of 8 x 8."""
    options = {
        "dataset": "IMAGES",
        "image_size": SIDE,
        "num_channels": 3,
        "random_flip": False,
        "centered": False,
        "num_workers": 0,
        **data,
    }
    return ConfigDict(
        {"seed": 0, "data": options, "training": {"batch_size": 4}, "eval": {"batch_size": 4}}
    )


def digest(*values: object) -> str:
    """A hash of tensors, arrays and plain values."""
    result = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, torch.Tensor | np.ndarray):
            array = np.ascontiguousarray(value)
            result.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            result.update(repr(value).encode())
    return result.hexdigest()


def read_images(path: pathlib.Path) -> str:
    """All images at a path, as `--mode control` reads them."""
    found = datasets.read_inputs(make_config(), str(path), 100)
    assert found.images.shape == (len(found.names), 3, SIDE, SIDE)
    assert found.images.min() >= 0 and found.images.max() <= 1
    return digest(found.images, found.labels, found.names)


def read_training_images(path: pathlib.Path) -> str:
    """All images at a path, as training reads them."""
    _, _, info = datasets.get_streams(make_config(path=str(path)), evaluation=True)
    parts = [info.sources[part].read(np.arange(n)) for part, n in info.num_examples.items()]
    assert all(images.shape[1:] == (3, SIDE, SIDE) for images, _ in parts)
    return digest(*(value for part in parts for value in part))


def read_mask(path: pathlib.Path) -> str:
    """A mask for inpainting."""
    mask = datasets.read_mask(str(path), (3, SIDE, SIDE))
    assert mask.shape in ((1, SIDE, SIDE), (3, SIDE, SIDE))
    return digest(mask)


def read_records(path: pathlib.Path) -> str:
    """All images of a TFRecord file."""
    config = make_config(dataset="FFHQ", tfrecords_path=str(path))
    _, _, info = datasets.get_streams(config, evaluation=True)
    images = info.sources["train"].images(range(info.num_examples["train"]))
    assert images.shape[1:] == (3, SIDE, SIDE)
    return digest(images)


def images(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Images (count, side, side, 3) of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
