"""TFRecord files, read by number and without TensorFlow; FFHQ and CelebA-HQ come in them."""

from __future__ import annotations

import functools
import glob
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import image_shape
from score_lib.data.sources import DataError, Source, register_dataset

# A record is: length (uint64), masked CRC of the length (uint32), payload, masked CRC of it.
_HEADER, _FOOTER = 12, 4
# More than an image of 4,700 x 4,700 needs: a damaged or hostile file may claim any length.
MAX_RECORD = 1 << 26
# Values that a message may have: an image needs five.
MAX_VALUES = 1 << 16
# Records whose lengths are verified at once.
_BLOCK = 1 << 13


@register_dataset(name="FFHQ")
@register_dataset(name="CelebAHQ")
def tfrecord_images(config) -> tuple[Source, Source]:
    """The images of `data.tfrecords_path`; as published, they are not split."""
    paths = _expand(config.data.tfrecords_path)
    source = TFRecordSource(RecordFiles(paths), image_shape(config))
    return source, source


def _expand(pattern: str) -> list[str]:
    """Files named by a path, a glob pattern, or several of these between commas."""
    paths = []
    for part in filter(None, map(str.strip, pattern.split(","))):
        part = os.path.expanduser(part)
        found = sorted(filter(os.path.isfile, [part] if os.path.exists(part) else glob.glob(part)))
        if not found:
            raise DataError(f"data.tfrecords_path: there is no file {part!r}")
        paths += found
    if not paths:
        raise DataError("data.tfrecords_path is empty: name the TFRecord file or files")
    return paths


class TFRecordSource(Source):
    """Records with `shape` (int64[3]: C, H, W) and `data` (the bytes of the image)."""

    def __init__(self, records: RecordFiles, shape: tuple[int, int, int]):
        self._records, self.shape = records, shape
        if not len(records):
            raise DataError(f"data.tfrecords_path: there is no record in {records.names()}")
        self._image(0)  # a wrong image size is told at once, not after the start of training

    def __len__(self) -> int:
        return len(self._records)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, None]:
        return torch.from_numpy(np.stack([self._image(number) for number in numbers])), None

    def _image(self, number: int) -> np.ndarray:
        payload, where = self._records[number], self._records.where(number)
        try:
            features = parse_example(payload)
        except ValueError as error:
            raise DataError(f"{where} is not a tf.train.Example: {error}") from error
        if not {"shape", "data"} <= features.keys():
            raise DataError(f"{where} has {sorted(features)[:8]} instead of 'shape' and 'data'")
        if {type(v) for v in features["shape"]} != {int} or {*map(type, features["data"])} != {
            bytes
        }:
            raise DataError(f"{where} should have whole numbers as 'shape' and bytes as 'data'")
        shape, data = tuple(features["shape"]), b"".join(features["data"])
        if shape != self.shape:
            raise DataError(
                f"{where} holds an image of {shape}, but the config asks for {self.shape} "
                f"(data.num_channels, data.image_size)"
            )
        if len(data) != math.prod(shape):
            raise DataError(f"{where} has {len(data)} bytes for an image of {shape}")
        return np.frombuffer(data, np.uint8).reshape(shape)


class RecordFiles(Sequence):
    """The payloads of the records in some TFRecord files, by number.

    Lengths are verified when the files are opened, a payload when it is first read here.

    Raises:
        DataError: a record is damaged; names the file, the record's number in it and its byte.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = [str(path) for path in paths]
        tables = [_table(path) for path in self._paths]
        self._starts = np.cumsum([0] + [len(table) for table in tables])
        self._table = np.concatenate(tables) if tables else np.zeros((0, 2), np.int64)
        self._verified = np.zeros(len(self._table), dtype=bool)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> bytes:
        offset, length = map(int, self._table[number])
        with open(self._paths[self._file(number)], "rb") as file:
            file.seek(offset + _HEADER)
            payload, footer = file.read(length), file.read(_FOOTER)
        if not self._verified[number]:
            checksum = masked_crc32c(np.frombuffer(payload, np.uint8)[None])
            if checksum.astype("<u4").tobytes() != footer:
                raise DataError(f"{self.where(number)} is damaged: it fails its checksum")
            self._verified[number] = True
        return payload

    def names(self) -> str:
        """The files, for messages."""
        return ", ".join(self._paths)

    def where(self, number: int) -> str:
        """For messages: record 3 of FILE (byte 590124)."""
        file = self._file(number)
        return (
            f"record {number - self._starts[file]} of {self._paths[file]} "
            f"(byte {self._table[number, 0]})"
        )

    def _file(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def _table(path: str) -> np.ndarray:
    try:
        status = os.stat(path)
        return _scan(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


@functools.cache
def _scan(path: str, size: int, modified: int) -> np.ndarray:
    """Offset and payload length of each record, (n, 2) int64; remembered while the file stays."""
    table, offset = [], 0
    with open(path, "rb", 0) as file:
        while offset + _HEADER <= size:
            headers, first = [], len(table)
            while offset + _HEADER <= size and len(headers) < _BLOCK:
                file.seek(offset)
                headers.append(file.read(_HEADER))
                length = int.from_bytes(headers[-1][:8], "little")
                table.append((offset, length))
                offset += _HEADER + length + _FOOTER
            _check_lengths(path, table[first:], first, headers)
    if offset != size:
        number, at = (len(table) - 1, table[-1][0]) if offset > size else (len(table), offset)
        raise DataError(f"{path} ends within record {number} (byte {at}): the file is cut off")
    return np.array(table, dtype=np.int64).reshape(-1, 2)


def _check_lengths(
    path: str, table: list[tuple[int, int]], first: int, headers: list[bytes]
) -> None:
    """Check some records at once, which is fast; `first` is the number of the first of them.

    A wrong length can only have led astray after itself: the first failure is the cause.
    """
    parts = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _HEADER)
    expected = np.ascontiguousarray(parts[:, 8:]).view("<u4")[:, 0]
    wrong = masked_crc32c(parts[:, :8]) != expected
    for number, (offset, length) in enumerate(table):
        where = f"record {first + number} of {path} (byte {offset})"
        if wrong[number]:
            raise DataError(
                f"{where} is damaged, or this is not a TFRecord file: the length of the record "
                f"fails its checksum"
            )
        if length > MAX_RECORD:
            raise DataError(f"{where} claims {length} bytes, above the limit of {MAX_RECORD}")


def parse_example(message: bytes) -> dict[str, list]:
    """A serialised tf.train.Example: name -> list of bytes, or of ints.

    Features of floats are left out: no image format here has them.

    Raises:
        ValueError: not a well-formed message.
    """
    features = {}
    for example in _messages(memoryview(message), 1):
        for entry in _messages(example, 1):
            name = b"".join(_messages(entry, 1)).decode()
            for feature in _messages(entry, 2):
                if values := _values(feature):
                    features[name] = values
    return features


def _values(feature: memoryview) -> list:
    """The values of a Feature: field 1 holds a list of bytes, field 3 one of integers."""
    values: list = [bytes(v) for items in _messages(feature, 1) for v in _messages(items, 1)]
    for items in _messages(feature, 3):
        for value in _fields(items, 1):
            values += [value] if isinstance(value, int) else _packed(value)
            if len(values) > MAX_VALUES:
                raise ValueError("it has too many values")
    return values


def _packed(data: memoryview) -> Iterator[int]:
    position = 0
    for _ in range(MAX_VALUES):
        if position >= len(data):
            return
        value, position = _varint(data, position)
        yield value
    raise ValueError("it has too many values")


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Those fields of a message, which must be strings or messages themselves."""
    for value in _fields(data, wanted):
        if isinstance(value, int):
            raise ValueError(f"field {wanted} is a number")
        yield value


def _fields(data: memoryview, wanted: int) -> Iterator[int | memoryview]:
    """The fields of that number in a protocol buffer message: ints, or stretches of bytes."""
    position = 0
    for _ in range(MAX_VALUES):
        if position >= len(data):
            return
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
        else:
            if wire == 2:
                length, position = _varint(data, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError(f"unknown wire type {wire}")
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError("it ends within a field")
        if number == wanted:
            yield value
    raise ValueError("it has too many values")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("it has a broken number")


def masked_crc32c(data: np.ndarray) -> np.ndarray:
    """The checksums that TFRecord files hold: CRC-32C, rotated and shifted.  (k, n) -> (k,)."""
    crc = crc32c(data)
    return (crc >> np.uint32(15) | crc << np.uint32(17)) + np.uint32(0xA282EAD8)


def crc32c(data: np.ndarray) -> np.ndarray:
    """CRC-32C (Castagnoli) of each row: (k, n) uint8 -> (k,) uint32.

    The checksum is linear over the bits, so neighbouring words can be folded into one, all pairs
    at a time: the left one is advanced over the length of the right one and added (xor) to it.
    Zeros in front change nothing, which makes any length a whole number of words.
    """
    rows, length = data.shape
    padded = np.zeros((rows, -length % 4 + 4 + length), dtype=np.uint8)
    padded[:, -length % 4 : -length % 4 + 4] = _ALL_ONES
    padded[:, -length % 4 + 4 :] = data
    words, level = padded.view("<u4"), 0
    while words.shape[1] > 1:
        if words.shape[1] % 2:
            words = np.pad(words, ((0, 0), (1, 0)))
        words = _advance(_zeros(level), words[:, 0::2]) ^ words[:, 1::2]
        level += 1
    return ~_advance(_zeros(0), words[:, 0])


# Four bytes that bring the register from 0 to all ones, its value before the first byte.
_ALL_ONES = np.frombuffer((0x641F6454).to_bytes(4, "little"), np.uint8)


@functools.cache
def _zeros(level: int) -> np.ndarray:
    """Table of what 4 * 2^level zero bytes make of each byte of the register: (4, 256) uint32."""
    if level:
        return _advance(_zeros(level - 1), _zeros(level - 1))
    register = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(32):
        register = (register >> np.uint32(1)) ^ (register & np.uint32(1)) * np.uint32(0x82F63B78)
    return register


def _advance(table: np.ndarray, register: np.ndarray) -> np.ndarray:
    result = np.zeros_like(register)
    for byte, column in enumerate(table):
        result ^= column[(register >> np.uint32(8 * byte)) & np.uint32(255)]
    return result
