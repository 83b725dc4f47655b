"""Readers of files of points: .npy arrays, and the vertices of .ply and .off meshes.

Contents in, points (P, C) out.  Memory is taken only once a header agrees with the size of the
file.  All raise ValueError, with the byte or vertex, for other contents.

Formats: Turk's PLY 1.0, and OFF as in ModelNet, where counts may follow "OFF" without a space.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from score_lib.disk.arrays import parse_array

# Types of PLY, by both of their names.
_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}
# Above any header of PLY, and any number as text.
_LONGEST_HEADER, _LONGEST_NUMBER = 1 << 16, 100
# Error of float32 as a share of a cloud's extent.
_MOST_ROUNDED = 1e-3
# Bytes of text that are read at once.
_BLOCK = 1 << 16
_SPACE, _WORD = re.compile(rb"\s"), re.compile(rb"\S+")


def read_points(name: str, content: bytes) -> np.ndarray:
    """The points in a file of this name, (P, C) float32, in the order of the file.

    Raises:
        ValueError: the contents are damaged, hold something else, a point is not finite, or points
            are so far from 0 that float32 cannot tell them apart.
    """
    stored = READERS[name[name.rfind(".") :].lower()](content)
    with np.errstate(over="ignore"):
        points = stored.astype(np.float32)
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(f"point {first} (from 0) is not finite in float32: {points[first]}")
    if len(points):
        _check_rounding(stored.astype(np.float64), points)
    return points


def _check_rounding(stored: np.ndarray, points: np.ndarray) -> None:
    error, extent = np.abs(points - stored).max(), np.ptp(stored, axis=0).max()
    if error > _MOST_ROUNDED * extent:
        raise ValueError(
            f"float32 rounds its coordinates by {error:.2g}, and they extend over {extent:.2g} "
            f"only: subtract an offset from all, or keep clouds in one array of float64 for "
            f"data.dataset='ARRAYS' with data.kind='points'"
        )


def _npy(content: bytes) -> np.ndarray:
    points = parse_array(content)
    if points.dtype.kind not in "iuf" or points.ndim != 2:
        raise ValueError(
            f"it holds {points.dtype} of shape {points.shape}, but points are numbers of shape "
            f"(points, coordinates)"
        )
    return points


def _off(content: bytes) -> np.ndarray:
    if b"#" in content:  # comments become spaces, so that bytes keep their numbers
        content = re.sub(rb"#[^\r\n]*", lambda comment: b" " * len(comment[0]), content)
    header = re.match(rb"\s*OFF\s*([-+]?[0-9]+)\s+([-+]?[0-9]+)\s+([-+]?[0-9]+)(?=\s|$)", content)
    if not header:
        raise ValueError("it does not begin with OFF and the counts of vertices, faces, edges")
    vertices = _count(header[1], content, "vertices")
    faces = _count(header[2], content, "faces")
    words = re.compile(rb"\s*([^\r\n]*)").match(content, header.end())[1].split()
    if vertices and len(words) != 3:
        raise ValueError(f"its first vertex has {len(words)} numbers in a line instead of 3")
    text = _Text(content, header.end())
    points = text.take(3 * vertices, "the vertices").reshape(vertices, 3)
    if faces and text.ended():
        raise ValueError(f"it ends at byte {len(content)}, before its {faces} faces")
    return points


def _count(digits: bytes, content: bytes, name: str) -> int:
    """A count in a header, which a file has at least a byte for each of."""
    # Python limits the length of an int in text.
    if len(digits) < 20 and 0 <= (count := int(digits)) <= len(content):
        return count
    raise ValueError(
        f"its header claims {digits[:20].decode()} {name}, and the file has {len(content)} bytes"
    )


class _Property(NamedTuple):
    """A number of each row; or, with the type of its length, a list of numbers."""

    name: str
    kind: str
    length: str = ""


class _Element(NamedTuple):
    """A table of PLY: `count` rows of these properties."""

    name: str
    count: int
    properties: list[_Property]


def _ply(content: bytes) -> np.ndarray:
    kind, elements, end = _ply_header(content)
    numbers = _Text(content, end) if kind == "ascii" else _Binary(content, end, _ORDERS[kind])
    for element in elements:
        if element.name == "vertex":
            break
        _rows(numbers, element, ())
    else:
        raise ValueError("it has no element 'vertex'")
    names = [each.name for each in element.properties if not each.length]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise ValueError(f"its vertices have {', '.join(names) or 'no numbers'} instead of x, y, z")
    points = _rows(numbers, element, tuple("xyz"))
    later = elements[elements.index(element) + 1 :]
    if numbers.ended() and any(each.count for each in later):
        raise ValueError(f"it ends at byte {len(content)}, after its vertices")
    return points


def _ply_header(content: bytes) -> tuple[str, list[_Element], int]:
    """Encoding, elements, and the byte after the header."""
    start = content[:_LONGEST_HEADER]
    end = re.search(rb"^end_header[ \t]*\r?\n", start, re.MULTILINE)
    if not re.match(rb"ply[ \t]*\r?\n", start) or not end:
        raise ValueError("it has no header from 'ply' to 'end_header'")
    kind, elements = "", []
    for line in start[: end.start()].decode("latin-1").split("\n")[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", found, "1.0"] if found == "ascii" or found in _ORDERS:
                kind = found
            case ["element", name, count] if re.fullmatch("[-+]?[0-9]+", count):
                rows = _count(count.encode(), content, f"rows of {name!r}")
                elements.append(_Element(name, rows, []))
            case ["property", type_, name] if elements and type_ in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[type_]))
            case ["property", "list", length, type_, name] if (
                elements and type_ in _TYPES and _TYPES.get(length, "f")[0] != "f"
            ):
                elements[-1].properties.append(_Property(name, _TYPES[type_], _TYPES[length]))
            case _:
                raise ValueError(f"its header has a line that is not known: {line[:80]!r}")
    if not kind:
        raise ValueError("its header has no line 'format'")
    return kind, elements, end.end()


def _rows(numbers, element: _Element, wanted: tuple[str, ...]) -> np.ndarray:
    """The wanted numbers of the next rows, (count, len(wanted)) float64."""
    count, properties = element.count, element.properties
    where = f"the rows of {element.name!r}"
    if not any(each.length for each in properties):
        return numbers.table(count, properties, wanted, where)
    values = []
    for _ in range(count):
        found = {}
        for each in properties:
            if each.length:
                length = float(numbers.take(1, where, each.length)[0])
                if not (length >= 0 and length.is_integer()):
                    raise ValueError(f"{where} have a list of length {length:g}")
                numbers.take(int(length), where, each.kind)
            else:
                found[each.name] = numbers.take(1, where, each.kind)[0]
        values.append([found[name] for name in wanted])
    return np.array(values, dtype=np.float64).reshape(count, len(wanted))


class _Binary:
    """Numbers of given types, one after the other."""

    def __init__(self, content: bytes, start: int, order: str):
        self._content, self._at, self._order = content, start, order

    def take(self, count: int, where: str, kind) -> np.ndarray:
        """The next numbers of a type, or rows of a structure."""
        dtype = np.dtype(kind).newbyteorder(self._order)
        if self._at + count * dtype.itemsize > len(self._content):
            raise ValueError(f"it ends at byte {len(self._content)}, within {where}")
        values = np.frombuffer(self._content, dtype, count, self._at)
        self._at += values.nbytes
        return values

    def table(self, count: int, properties: list[_Property], wanted, where: str) -> np.ndarray:
        """The wanted columns of the next rows."""
        ends = np.cumsum([0, *(np.dtype(each.kind).itemsize for each in properties)]).tolist()
        if not ends[-1]:
            return np.empty((count, 0))
        places = [[each.name for each in properties].index(name) for name in wanted]
        layout = {
            "names": list(wanted),
            "formats": [properties[k].kind for k in places],
            "offsets": [ends[k] for k in places],
            "itemsize": ends[-1],
        }
        rows = self.take(count, where, layout if wanted else f"V{ends[-1]}")
        return np.array([rows[name] for name in wanted], dtype=np.float64).T

    def ended(self) -> bool:
        return self._at == len(self._content)


class _Text:
    """Numbers as text, one after the other."""

    def __init__(self, content: bytes, start: int):
        self._content, self._at = content, start

    def take(self, count: int, where: str, kind=None) -> np.ndarray:
        """The next numbers, float64."""
        ends = f"it ends at byte {len(self._content)}, within {where}"
        if 2 * count - 1 > len(self._content) - self._at:  # a digit each, and spaces between
            raise ValueError(ends)
        values = np.empty(count)
        done = 0
        while done < count:
            block = self._block(count - done)
            words = block.split(None, count - done)
            rest = len(words[-1]) if len(words) > count - done else 0
            words = words[: count - done]
            try:
                values[done : done + len(words)] = list(map(float, words))
            except ValueError:
                self._refuse(block, where)
            if not block:
                raise ValueError(ends)
            self._at += len(block) - rest
            done += len(words)
        return values

    def _block(self, count: int) -> bytes:
        """The next part of the text, up to a space or the end."""
        end = self._at + min(_BLOCK, 16 * count)
        space = _SPACE.search(self._content, end, end + _LONGEST_NUMBER)
        if space:
            return self._content[self._at : space.start()]
        if end + _LONGEST_NUMBER < len(self._content):
            raise ValueError(f"it holds no number at byte {end}")
        return self._content[self._at :]

    def _refuse(self, block: bytes, where: str) -> None:
        for word in _WORD.finditer(block):
            try:
                float(word[0])
            except ValueError as error:
                at, text = self._at + word.start(), word[0][:40].decode("latin-1")
                raise ValueError(f"byte {at}, in {where}, begins {text!r}, no number") from error

    def table(self, count: int, properties: list[_Property], wanted, where: str) -> np.ndarray:
        """The wanted columns of the next rows."""
        values = self.take(count * len(properties), where).reshape(count, len(properties))
        return values[:, [[each.name for each in properties].index(name) for name in wanted]]

    def ended(self) -> bool:
        return not _WORD.search(self._content, self._at)


READERS: dict[str, Callable[[bytes], np.ndarray]] = {".npy": _npy, ".ply": _ply, ".off": _off}
