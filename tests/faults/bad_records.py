"""TFRecord files: damaged, or whole with contents that no image has."""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Callable, Iterator

import numpy as np

from score_lib.data.tfrecords import masked_crc32c

from .cases import SIDE, Case, flips_and_cuts, images, read_records, written


def cases() -> Iterator[Case]:
    """All of them."""
    good = written("x.tfrecords", b"".join(map(record, map(image, images(5)))))
    # A file that ends where a record does is whole.
    yield from flips_and_cuts("TFRecord", good, read_records, 20, 8, "refused", "refused or valid")
    for name, data in _lengths().items():
        yield Case("TFRecord: lengths", name, written("x.tfrecords", data), read_records)
    for name, (start, size) in _SPARSE.items():
        make = _sparse(start, size)
        yield Case("TFRecord: lengths", name, make, read_records)
    for name, message in _messages().items():
        data = record(image(images(1)[0])) + record(message)
        yield Case("TFRecord: messages", name, written("x.tfrecords", data), read_records)


def checksum(data: bytes) -> bytes:
    """The masked CRC-32C of some bytes."""
    return masked_crc32c(data).to_bytes(4, "little")


def header(length: int) -> bytes:
    """Header of a payload of that length."""
    number = struct.pack("<Q", length)
    return number + checksum(number)


def record(payload: bytes) -> bytes:
    """A whole record."""
    return header(len(payload)) + payload + checksum(payload)


def varint(value: int) -> bytes:
    """A number as protocol buffers write it."""
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def field(number: int, data: bytes) -> bytes:
    """A field that is a string of bytes or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(name: bytes, value: bytes) -> bytes:
    """One feature of a tf.train.Example."""
    return field(1, field(1, name) + field(2, value))


def numbers(*values: int) -> bytes:
    """A feature of whole numbers."""
    return field(3, field(1, b"".join(map(varint, values))))


def example(**features: bytes) -> bytes:
    """A tf.train.Example."""
    return field(1, b"".join(feature(name.encode(), value) for name, value in features.items()))


def image(pixels: np.ndarray) -> bytes:
    """An image (H, W, C) as the published files hold it."""
    planes = pixels.transpose(2, 0, 1)
    return example(shape=numbers(*planes.shape), data=field(1, field(1, planes.tobytes())))


def _lengths() -> dict[str, bytes]:
    good = record(image(images(1)[0]))
    return {
        "2^60": good + header(2**60) + bytes(100),
        "2^64 - 1": good + header(2**64 - 1) + bytes(100),
        "2^64 - 16, which leads back": good + header(2**64 - 16) + bytes(100),
        "0, and nothing in it": record(b""),
        "no record": b"",
        "zeros": bytes(1 << 20),
        "text": b"not a TFRecord file\n" * 100,
        "100,000 records of nothing": record(b"") * 100_000,
    }


def _sparse(start: bytes, size: int) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / "x.tfrecords"
        path.write_bytes(start)
        os.truncate(path, size)
        return path

    return make


_SPARSE = {
    "50 GB of zeros": (b"", 50 << 30),
    "50 GB of zeros behind a record": (record(image(images(1)[0])), 50 << 30),
    "one record of 50 GB": (header((50 << 30) - 16), 50 << 30),
    "one record of 60 MB, of zeros": (header(60 << 20), (60 << 20) + 16),
}


def _messages() -> dict[str, bytes]:
    shape = numbers(3, SIDE, SIDE)
    data = field(1, field(1, bytes(3 * SIDE * SIDE)))
    return {
        "no data": example(shape=shape),
        "no shape": example(data=data),
        "nothing": b"",
        "text": b"not an example",
        "data of numbers": example(shape=shape, data=numbers(1, 2)),
        "shape of bytes": example(shape=data, data=data),
        "another shape": example(shape=numbers(3, 16, 16), data=data),
        "a shape of 2^63": example(shape=numbers(2**63, 2**63, 2**63), data=data),
        "too few bytes": example(shape=shape, data=field(1, field(1, b"123"))),
        "too many bytes": example(shape=shape, data=field(1, field(1, bytes(10**6)))),
        "a name that is no text": field(1, feature(b"\xff\xfe", data)),
        "names of control characters": field(1, feature(b"a\n\x1b[2J", data)),
        "a number without end": field(1, b"\xff" * 50),
        "a field that ends late": b"\x0a\xff\xff\xff\x0f",
        "wire type 7": b"\x0f",
        "10 million numbers": example(shape=field(3, field(1, b"\1" * 10**7)), data=data),
        "5 million strings": example(shape=shape, data=field(1, b"\x0a\x00" * 5 * 10**6)),
        "5 million features": field(1, b"\x0a\x00" * 5 * 10**6),
    }
