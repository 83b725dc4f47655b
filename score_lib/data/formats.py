"""Readers of the formats of CIFAR, MNIST and SVHN: bytes in, images and labels out.

They build arrays of bytes and nothing else, and take memory in proportion to the number of images
that is expected, whatever a file claims.  All raise ValueError for other contents.
"""

import io
import math
import pickle
import struct
import zlib
from collections.abc import Sequence

import numpy as np

CIFAR = (3, 32, 32)
# Of MATLAB's format, version 5: types of elements, and the class of an array of uint8.
_BYTES, _MATRIX, _COMPRESSED, _UINT8 = 2, 14, 15, 9
# Above the headers of an array: its flags, dimensions and name.
_HEADERS = 1 << 10

Examples = tuple[np.ndarray, np.ndarray]


def cifar_binary(contents: Sequence[bytes], count: int, *, labels: int = 1) -> Examples:
    """Records of labels, a byte each, and an image (3, 32, 32).  The last label is the class.

    Args:
        contents: of the files of a split, in order.
        count: images in all of them.
    Returns:
        images (count, 3, 32, 32) and labels (count,), uint8.
    """
    size = labels + math.prod(CIFAR)
    if sum(map(len, contents)) != count * size or any(len(part) % size for part in contents):
        raise ValueError(f"it should hold {count} records of {size} bytes")
    records = np.concatenate([np.frombuffer(part, np.uint8) for part in contents])
    records = records.reshape(count, size)
    return records[:, labels:].reshape(count, *CIFAR), records[:, labels - 1]


def cifar_pickle(contents: Sequence[bytes], count: int, *, key: bytes = b"labels") -> Examples:
    """Pickled dictionaries of images, an array (n, 3072) as `data`, and a list of labels as `key`.

    Returns:
        images (count, 3, 32, 32) and labels (count,), uint8.
    """
    batches = [_batch(part, key) for part in contents]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if len(images) != count:
        raise ValueError(f"it holds {len(images)} images, not {count}")
    return images, labels


def _batch(content: bytes, key: bytes) -> Examples:
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict) or not isinstance(batch.get(b"data"), _Recorded):
        raise ValueError("it is not a pickled dictionary with an array as 'data'")
    images, labels = batch[b"data"].array(), batch.get(key)
    if images.ndim != 2 or images.shape[1] != math.prod(CIFAR):
        raise ValueError(f"its 'data' are of shape {images.shape}, not (n, {math.prod(CIFAR)})")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise ValueError(f"its {key.decode()!r} are not a list of one label for each image")
    return images.reshape(-1, *CIFAR), np.frombuffer(bytes(labels), np.uint8)


class _Recorded:
    """Takes the place of NumPy's classes in a pickle: keeps their arguments, runs nothing."""

    def __init__(self, *given):
        self.given, self.state = given, None

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        """The array of uint8 that is meant, read-only."""
        try:
            _, shape, kind, fortran, data = self.state
            sound = kind.given[0] == b"u1" and fortran is False and math.prod(shape) == len(data)
        except (AttributeError, IndexError, TypeError, ValueError):
            sound = False
        if not sound or not isinstance(data, bytes):
            raise ValueError("its 'data' are not an array of uint8")
        return np.frombuffer(data, np.uint8).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Reads containers, numbers and bytes; of all classes, only stand-ins for NumPy's arrays."""

    _KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self._KNOWN:
            raise ValueError(f"the pickle asks for {module}.{name}, which CIFAR does not need")
        return _Recorded

    def persistent_load(self, pid):
        raise ValueError("the pickle refers to objects outside of it")


def idx(contents: Sequence[bytes], count: int) -> Examples:
    """IDX files of images (count, 28, 28) and of labels (count,).

    Returns:
        images (count, 1, 28, 28) and labels (count,), uint8.
    """
    images, labels = contents
    return _idx(images, (count, 28, 28))[:, None], _idx(labels, (count,))


def _idx(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8: unsigned bytes
    size = len(header) + math.prod(shape)
    if content[: len(header)] != header:
        raise ValueError(f"it does not start as an IDX file of bytes of shape {shape}")
    if len(content) != size:
        raise ValueError(f"its contents are not {size} bytes, as its header demands")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def mat(contents: Sequence[bytes], count: int) -> Examples:
    """A MATLAB file of version 5 with X (32, 32, 3, count) and y (count, 1); digit 0 is 10 there.

    Returns:
        images (count, 3, 32, 32) and labels (count,), uint8.
    """
    (content,) = contents
    if content[:6] != b"MATLAB" or content[124:128] != b"\x00\x01IM":
        raise ValueError("it is not a MATLAB file of version 5 in little-endian order")
    shapes, arrays = {b"X": (32, 32, 3, count), b"y": (count, 1)}, {}
    limit, rest = _HEADERS + count * math.prod(CIFAR), memoryview(content)[128:]
    while rest and len(arrays) < len(shapes):
        kind, element, rest = _element(rest, padded=False)
        if kind == _COMPRESSED:
            kind, element, _ = _element(memoryview(_inflate(element, limit)))
        name, array = _matrix(kind, element)
        if shapes.get(name) != array.shape:
            raise ValueError(f"it holds {name[:20]!r} of shape {array.shape}, not {shapes}")
        arrays[name] = array
    if len(arrays) < len(shapes):
        raise ValueError("it lacks X or y")
    labels = arrays[b"y"][:, 0]
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError("its y are not from 1 to 10")
    return np.ascontiguousarray(arrays[b"X"].transpose(3, 2, 0, 1)), labels % 10


def _inflate(packed: memoryview, limit: int) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(packed, limit)
    if not unpacker.eof:
        raise ValueError(f"an array of it is cut off, or unpacks to more than {limit} bytes")
    return content


def _element(data: memoryview, *, padded: bool = True) -> tuple[int, memoryview, memoryview]:
    """Type and contents of the first element, and the rest behind it."""
    if len(data) < 8:
        raise ValueError("it is cut off")
    kind, size = struct.unpack("<II", data[:8])
    if kind >> 16:  # up to four bytes are packed into the header
        return kind & 0xFFFF, data[4 : 4 + (kind >> 16)], data[8:]
    if 8 + size > len(data):
        raise ValueError("it is cut off")
    following = 8 + size + (-size % 8 if padded else 0)
    return kind, data[8 : 8 + size], data[following:]


def _matrix(kind: int, data: memoryview) -> tuple[bytes, np.ndarray]:
    """Name and values of an array of uint8."""
    if kind != _MATRIX:
        raise ValueError(f"it holds an element of type {kind}, not an array")
    parts = []
    for _ in range(4):  # flags, dimensions, name, values
        kind, part, data = _element(data)
        parts.append(part)
    flags, dimensions, name, values = parts
    if kind != _BYTES or not flags or flags[0] != _UINT8:
        raise ValueError("it holds other than arrays of uint8")
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    if min(shape) < 0 or math.prod(shape) != len(values):
        raise ValueError(f"it holds {len(values)} bytes as an array of shape {shape}")
    return bytes(name), np.frombuffer(values, np.uint8).reshape(shape, order="F")
