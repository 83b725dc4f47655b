"""TFRecord files, read by number and without TensorFlow; FFHQ and CelebA-HQ come in them."""

import functools
import glob
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from score_lib.data.files import refuse_broken
from score_lib.data.sources import DataError, MissingDataError, Source, needed, register_dataset
from score_lib.disk.files import file_state

# A record: length (uint64), masked CRC of the length (uint32), payload, masked CRC of the payload.
_HEADER, _FOOTER = 12, 4
# Larger than an image of 4,700 x 4,700: a damaged or hostile file may claim any length.
MAX_RECORD = 1 << 26
# Limit on the number of values in a message; an image has five.
MAX_VALUES = 1 << 16


@register_dataset(name="FFHQ", options={"paths": "data.tfrecords_path"})
@register_dataset(name="CelebAHQ", options={"paths": "data.tfrecords_path"})
def tfrecord_images(shape: tuple[int, int, int], paths: str) -> tuple[Source, Source]:
    """The images of TFRecord files; both splits are the whole set, as in the published code.

    Args:
        paths: a path, a glob pattern, or several of these separated by commas; a file that several
            of them mean is read once.
    """
    files = []
    for part in filter(None, map(str.strip, paths.split(","))):
        part = os.path.expanduser(part)
        found = [part] if os.path.exists(part) else sorted(glob.glob(part))
        for file in found:
            refuse_broken(file)
        found = list(filter(os.path.isfile, found))
        if not found:
            raise MissingDataError(f"data.tfrecords_path: there is no file {part!r}")
        files += [file for file in found if file not in files]
    if not files:
        raise DataError("data.tfrecords_path is empty: set it to the TFRecord file or files")
    source = TFRecordSource(RecordFiles(files), shape)
    return source, source


class TFRecordSource(Source):
    """Records with `shape` (int64[3]: C, H, W) and `data` (the bytes of the image)."""

    def __init__(self, records: "RecordFiles", shape: tuple[int, int, int]):
        self._records, self.shape = records, shape
        for path, count in zip(records.paths, records.counts, strict=True):
            if not count:  # as a copy may be that was stopped
                raise DataError(f"data.tfrecords_path: there is no record in {path}")
        self._image(0)  # a wrong image size is an error here, before training starts

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
        kinds = [{type(value) for value in features[name]} for name in ("shape", "data")]
        if kinds != [{int}, {bytes}]:
            raise DataError(f"{where} must have integers as 'shape' and bytes as 'data'")
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
    """The payloads of the records in TFRecord files, by number.

    Lengths are verified when the files are opened, payloads when they are first read.

    Attributes:
        paths: of the files.
        counts: the number of records in each.
    Raises:
        DataError: a record is damaged; names the file, the record's number and its byte offset.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = [str(path) for path in paths]
        tables = []
        for path in self.paths:
            try:
                tables.append(_scan(path, file_state(path)))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
        self.counts = [len(table) for table in tables]
        self._starts = np.cumsum([0, *self.counts])
        self._table = np.concatenate(tables) if tables else np.zeros((0, 2), np.int64)
        self._verified = np.zeros(len(self._table), dtype=bool)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> bytes:
        offset, length = map(int, self._table[number])
        with open(self.paths[self._file(number)], "rb") as file:
            file.seek(offset + _HEADER)
            payload, footer = file.read(length), file.read(_FOOTER)
        if not self._verified[number]:
            if masked_crc32c(payload) != int.from_bytes(footer, "little"):
                raise DataError(f"{self.where(number)} is damaged: it fails its checksum")
            self._verified[number] = True
        return payload

    def where(self, number: int) -> str:
        """For messages: record 3 of FILE (byte 590124)."""
        file = self._file(number)
        place = f"{self.paths[file]} (byte {self._table[number, 0]})"
        return f"record {number - self._starts[file]} of {place}"

    def _file(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


@functools.cache
def _scan(path: str, state: tuple[int, int]) -> np.ndarray:
    """Offset and payload length of each record, (n, 2) int64; cached until the file changes."""
    (size, _), table, offset = state, [], 0
    with open(path, "rb", 0) as file:
        while offset + _HEADER <= size:
            file.seek(offset)
            header = file.read(_HEADER)
            length = int.from_bytes(header[:8], "little")
            if masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                raise DataError(
                    f"record {len(table)} of {path} (byte {offset}) is damaged, or this is not a "
                    f"TFRecord file: the length of the record fails its checksum"
                )
            if length > MAX_RECORD:
                raise DataError(
                    f"record {len(table)} of {path} (byte {offset}) claims {length} bytes, above "
                    f"the limit of {MAX_RECORD}"
                )
            table.append((offset, length))
            offset += _HEADER + length + _FOOTER
    if offset != size:
        number, at = (len(table) - 1, table[-1][0]) if offset > size else (len(table), offset)
        raise DataError(f"{path} ends within record {number} (byte {at}): the file is cut off")
    return np.array(table, dtype=np.int64).reshape(-1, 2)


def parse_example(message: bytes) -> dict[str, list]:
    """A serialised tf.train.Example: name -> list of bytes, or of ints.

    Features of floats are left out, since the image formats here have none.

    Raises:
        ValueError: not a well-formed message.
    """
    features = {}
    for example in _fields(memoryview(message), 1):
        for entry in _fields(example, 1):
            name = b"".join(_fields(entry, 1)).decode()
            for feature in _fields(entry, 2):
                if values := _values(feature):
                    features[name] = values
    return features


def _values(feature: memoryview) -> list:
    """The values of a Feature: field 1 holds a list of bytes, field 3 one of integers."""
    values: list = [bytes(v) for items in _fields(feature, 1) for v in _fields(items, 1)]
    for items in _fields(feature, 3):
        for value in _fields(items, 1, numbers=True):
            packed = [value] if isinstance(value, int) else _packed(value)
            values += itertools.islice(packed, MAX_VALUES + 1)
            if len(values) > MAX_VALUES:
                raise ValueError("it has too many values")
    return values


def _packed(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _fields(data: memoryview, wanted: int, numbers: bool = False) -> Iterator[int | memoryview]:
    """The fields numbered `wanted` in a protocol buffer message: views of bytes, or numbers."""
    position = 0
    for _ in range(MAX_VALUES):
        if position >= len(data):
            return
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
        else:
            if wire != 2:
                raise ValueError(f"unknown wire type {wire}")
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError("it ends within a field")
        if number == wanted and wire == 0 and not numbers:
            raise ValueError(f"field {wanted} is a number")
        if number == wanted:
            yield value
    raise ValueError("it has too many values")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number stored in groups of seven bits, and the position after it."""
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


def masked_crc32c(data: bytes) -> int:
    """The checksum in TFRecord files: CRC-32C, rotated by 15 bits and shifted.

    Raises:
        DataError: the package google-crc32c is missing.
    """
    crc = crc32c()(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def crc32c() -> Callable[[bytes], int]:
    """The function for CRC-32C of the package google-crc32c."""
    missing = "TFRecord files need google-crc32c, which is missing: pip install google-crc32c"
    return needed("google_crc32c", missing).value
