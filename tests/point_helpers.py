"""Point files with known points, for tests."""

from __future__ import annotations

import struct

import numpy as np

# Letters of `struct` for the types of PLY.
LETTERS = {"uchar": "B", "short": "h", "int": "i", "float": "f", "double": "d", "float32": "f"}
ENCODINGS = ("ascii", "binary_little_endian", "binary_big_endian")
VERTEX = "float x, float y, float z"


def ply(encoding: str, *elements: tuple[str, str, list]) -> bytes:
    """A .ply file; an element is its name, its properties as in "float x, list uchar int i", and
    rows of numbers, with tuples for lists."""
    order = ">" if encoding == "binary_big_endian" else "<"
    lines, body = ["ply", f"format {encoding} 1.0", "comment end_header is not here"], b""
    for name, properties, rows in elements:
        kinds = [words.split() for words in properties.split(", ")]
        lines.append(f"element {name} {len(rows)}")
        lines += [f"property {' '.join(words)}" for words in kinds]
        for row in rows:
            flat = []  # (letter, number)
            for words, value in zip(kinds, row, strict=True):
                if words[0] == "list":
                    flat.append((LETTERS[words[1]], len(value)))
                    flat += [(LETTERS[words[2]], item) for item in value]
                else:
                    flat.append((LETTERS[words[0]], value))
            if encoding == "ascii":
                body += " ".join(f"{value!r}" for _, value in flat).encode() + b"\n"
            else:
                form = order + "".join(letter for letter, _ in flat)
                body += struct.pack(form, *(value for _, value in flat))
    return "\n".join([*lines, "end_header\n"]).encode() + body


def off(points, faces: int = 1, start: str = "OFF\n", between: str = "\n") -> bytes:
    """An .off file."""
    rows = [" ".join(repr(float(value)) for value in point) for point in points]
    rows += ["3 0 1 2"] * faces
    return f"{start}{len(points)} {faces} 0\n{between.join(rows)}\n".encode()


def some_points(count: int, seed: int = 0) -> np.ndarray:
    """(count, 3) float32, whose digits as text are exact in float64."""
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
