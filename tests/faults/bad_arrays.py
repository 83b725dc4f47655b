"""Arrays: .npy and .npz whose headers lie, that hold pickles, or unpack to more than there is."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from evaluation import Statistics, load_statistics, save_statistics
from score_lib.disk.arrays import load_arrays, save_arrays
from score_lib.metrics.classifiers import DigitsExtractor

from .bad_zips import GIB, Entry, archive_of, deflated_zeros, zipped
from .cases import (
    SIDE,
    Case,
    Command,
    digest,
    flips_and_cuts,
    images,
    read_mask,
    read_training_images,
    written,
)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _image_arrays()
    yield from _statistics()
    yield from _others()


def npy(header: object, data: bytes = b"", version: int = 1) -> bytes:
    """An .npy file with any header: text, or a dictionary of changes to the usual one."""
    if isinstance(header, dict):
        usual = {"descr": "|u1", "fortran_order": False, "shape": (len(data),)}
        header = repr({**usual, **header})
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin1") + data


HEADERS = {
    "10^12 images": npy({"shape": (10**12, SIDE, SIDE, 3)}, bytes(192)),
    "10^40 images": npy({"shape": (10**40, SIDE, SIDE, 3)}, bytes(192)),
    "-1 images": npy({"shape": (-1, SIDE, SIDE, 3)}, bytes(192)),
    "10^30 images of nothing": npy({"shape": (10**30, 0, SIDE, 3)}),
    "True images": npy({"shape": (True, "a")}, bytes(192)),
    "items of no size": npy({"descr": "|V0", "shape": (10**12,)}),
    "items of 2 GB": npy({"descr": "|V2000000000", "shape": (1,)}, bytes(192)),
    "text of 8 GB": npy({"descr": "<U2000000000", "shape": (1,)}, bytes(192)),
    "brackets": npy("(" * 9_000),
    "minus signs": npy("-" * 9_000 + "1"),
    "no header": npy(""),
    "a list": npy("[1, 2]"),
    "a call": npy("__import__('os').mkdir('canary')"),
    "types of 10,000": npy({"descr": [(f"f{k}", "<i4") for k in range(900)], "shape": (1,)}),
    "a type that is a number": npy({"descr": 7}),
    "header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    "version 9": npy({}, bytes(192), version=9),
    "only the mark": b"\x93NUMPY",
    "empty": b"",
    "text": b"not an array\n" * 100,
    "a pickle": b"",  # of something that would run a command; see `_maker`
    "an array of objects": b"",
}


def _maker(name: str, suffix: str, data: bytes) -> Callable[[pathlib.Path], pathlib.Path]:
    """Writes one of `HEADERS` as .npy, or as the only member of an .npz."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        contents, path = data, folder / f"x.{suffix}"
        if name == "a pickle":
            contents = pickle.dumps(Command(folder))
        if name == "an array of objects":
            file = io.BytesIO()
            np.save(file, np.array([Command(folder)], dtype=object), allow_pickle=True)
            contents = file.getvalue()
        path.write_bytes(contents if suffix == "npy" else zipped({"images.npy": contents}))
        return path

    return make


def _image_arrays() -> Iterator[Case]:
    def whole(folder: pathlib.Path) -> pathlib.Path:
        np.save(folder / "x.npy", images(20))
        return folder / "x.npy"

    def packed(folder: pathlib.Path) -> pathlib.Path:
        np.savez_compressed(folder / "x.npz", images=images(20), labels=np.arange(20))
        return folder / "x.npz"

    read = read_training_images
    yield from flips_and_cuts("images .npy", whole, read, 8, 4, "refused or valid")
    yield from flips_and_cuts("images .npz", packed, read, 8, 4, "refused or same")
    for name, data in HEADERS.items():
        yield Case("images .npy: headers", name, _maker(name, "npy", data), read)
        yield Case("images .npz: headers", name, _maker(name, "npz", data), read)
    for name, data in _npz_bombs().items():
        yield Case("images .npz: bombs", name, written("x.npz", data), read)
    for name, arrays in _LABELS.items():
        yield Case("images .npz: labels", name, _saved(arrays), read)
    yield Case("images .npy: headers", "30 GB that are there", _sparse, read)
    yield Case("images .npy: headers", "a zip inside", written("x.npy", zipped({"a": b""})), read)


def _saved(arrays: dict) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return make


_LABELS = {
    "too few": {"images": images(4), "labels": np.arange(3)},
    "fractions": {"images": images(4), "labels": np.arange(4) / 2},
    "below 0": {"images": images(4), "labels": np.arange(4) - 1},
    "2^64 - 1": {"images": images(4), "labels": np.full(4, 2**64 - 1, np.uint64)},
    "2^40": {"images": images(4), "labels": np.full(4, 2**40)},
    "texts": {"images": images(4), "labels": np.array(list("abcd"))},
    "whose name is which": {"a": images(4), "b": images(4)},
}


def _sparse(folder: pathlib.Path) -> pathlib.Path:
    """One image of 100,000 x 100,000, all of which is in the file, and nowhere on the disk."""
    shape = (1, 100_000, 100_000, 3)
    (folder / "x.npy").write_bytes(npy({"shape": shape}))
    size = (folder / "x.npy").stat().st_size
    os.truncate(folder / "x.npy", size + 3 * 10**10)
    return folder / "x.npy"


def _npz_bombs() -> dict[str, bytes]:
    stream = deflated_zeros(GIB)
    shape = {"shape": (GIB // 192, SIDE, SIDE, 3)}
    start = Entry("images.npy", stream, GIB)
    header = zlib_stored(npy(shape)) + stream
    return {
        "zeros that are no array": archive_of(start),
        "claims to be small": archive_of(Entry("images.npy", header, 1_000)),
        "header of 1 GB": archive_of(
            Entry("images.npy", zlib_stored(b"\x93NUMPY\2\0\0\0\0\x40") + stream, GIB)
        ),
        "not named .npy": archive_of(Entry("images", stream, GIB)),
        "bzip2": zipped(
            {"images.npy": npy({"shape": (1, 8, 8, 3)}, bytes(192))}, zipfile.ZIP_BZIP2
        ),
        "3 GB that claim to be images of 1 GB": archive_of(
            Entry("images.npy", header + stream * 2, GIB)
        ),
    }


def zlib_stored(data: bytes) -> bytes:
    """Bytes as the start of a deflate stream, as they are."""
    return struct.pack("<BHH", 0, len(data), 0xFFFF - len(data)) + data


def _load(path: pathlib.Path) -> str:
    arrays = load_arrays(path)
    return digest(*(value for name in sorted(arrays) for value in (name, arrays[name])))


def _load_statistics(path: pathlib.Path) -> str:
    stats = load_statistics(path)
    return digest(stats.pool_3, stats.logits, stats.mu, stats.sigma, stats.made_by(), stats.count)


def _statistics() -> Iterator[Case]:
    values = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)

    def good(folder: pathlib.Path) -> pathlib.Path:
        save_statistics(folder / "x.npz", Statistics(pool_3=values, logits=values, extractor="a"))
        return folder / "x.npz"

    yield from flips_and_cuts("statistics", good, _load_statistics, 12, 5, "refused or same")
    wrong = {
        "one row": {"pool_3": values[:1]},
        "one dimension": {"pool_3": values[0]},
        "no features": {"pool_3": values[:, :0]},
        "whole numbers": {"pool_3": values.astype(int)},
        "texts": {"pool_3": values.astype(str)},
        "complex": {"pool_3": values.astype(complex)},
        "nan": {"pool_3": values * np.nan},
        "infinite": {"pool_3": values, "logits": values / 0.0 if False else values + np.inf},
        "fewer logits": {"pool_3": values, "logits": values[1:]},
        "only logits": {"logits": values},
        "sigma that is no square": {"mu": values[0], "sigma": values[:6, :5]},
        "sigma of nan": {"mu": values[0], "sigma": values[:6] * np.nan},
        "mu alone": {"mu": values[0]},
        "mu of nothing": {"mu": values[0, :0], "sigma": values[:0, :0]},
        "another hash": {"pool_3": values, "hash": np.array("0")},
        "count of nan": {"mu": values[0], "sigma": values[:6], "count": np.nan},
        "count of infinity": {"mu": values[0], "sigma": values[:6], "count": np.inf},
        "several counts": {"mu": values[0], "sigma": values[:6], "count": values},
        "nothing": {},
    }
    for name, arrays in wrong.items():
        yield Case("statistics: wrong contents", name, _saved(arrays), _load_statistics)
    for name in ("an array of objects", "a pickle", "10^12 images"):
        make = _maker(name, "npz", HEADERS[name])
        yield Case("statistics: wrong contents", name, make, _load_statistics)
    huge = archive_of(Entry("pool_3.npy", deflated_zeros(GIB), GIB), copies=200, suffix=".npy")
    yield Case("statistics: wrong contents", "200 GB", written("x.npz", huge), _load_statistics)


def _others() -> Iterator[Case]:
    """Rounds of an evaluation, masks, and the weights of the digits classifier."""

    def a_round(folder: pathlib.Path) -> pathlib.Path:
        save_arrays(folder / "r.npz", fingerprint=np.array("ab"), all_losses=np.arange(50.0))
        return folder / "r.npz"

    yield from flips_and_cuts("evaluation rounds", a_round, _load, 10, 4, "refused or same")
    for name in ("an array of objects", "a pickle", "10^12 images", "brackets", "items of 2 GB"):
        make = _maker(name, "npz", HEADERS[name])
        yield Case("evaluation rounds: wrong contents", name, make, _load)
    pipe = Case("evaluation rounds: wrong contents", "a pipe", _pipe, _load)
    yield pipe

    def mask(folder: pathlib.Path) -> pathlib.Path:
        np.save(folder / "m.npy", np.eye(SIDE))
        return folder / "m.npy"

    yield from flips_and_cuts("mask .npy", mask, read_mask, 6, 3, "refused or valid")
    for name in (
        "10^12 images",
        "a pickle",
        "an array of objects",
        "-1 images",
        "empty",
        "brackets",
    ):
        make = _maker(name, "npy", HEADERS[name])
        yield Case("mask .npy: headers", name, make, read_mask)
    yield Case(
        "mask .npy: headers", "a zip inside", written("m.npy", zipped({"a": b""})), read_mask
    )
    yield Case("mask .npy: headers", "30 GB that are there", _sparse, read_mask)
    yield from flips_and_cuts(
        "extractor weights",
        written("w.npz", DigitsExtractor.own_weights().read_bytes()),
        _extract,
        5,
        3,
        "refused or same",
    )
    with np.load(DigitsExtractor.own_weights()) as arrays:
        weights = dict(arrays)
    first = next(iter(weights))
    for name, value in {
        "nan": weights[first] * np.nan,
        "whole numbers": weights[first].astype(int),
        "another shape": weights[first][:1],
        "texts": weights[first].astype(str),
        "another byte order": weights[first].astype(">f4"),
    }.items():
        make = _saved({**weights, first: value})
        yield Case("extractor weights: wrong contents", name, make, _extract)


def _pipe(folder: pathlib.Path) -> pathlib.Path:
    os.mkfifo(folder / "r.npz")
    return folder / "r.npz"


def _extract(path: pathlib.Path) -> str:
    extractor = DigitsExtractor(str(path))
    return digest(*extractor(np.zeros((2, 8, 8, 1), np.uint8)).values())
