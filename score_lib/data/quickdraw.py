"""QUICKDRAW and QUICKDRAW_STROKES: the drawings of the Quick, Draw! data set.

Their authors publish a file CATEGORY.ndjson for each category, with a drawing per line: JSON with
"drawing", a list of strokes, each of them the lists [x, y], or with times [x, y, t].  Both versions
do, raw and simplified.
"""

import abc
import functools
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.data.files import refuse_broken
from score_lib.data.folders import split_tenths
from score_lib.data.sources import DataError, MissingDataError, Source, register_dataset
from score_lib.data.splits import natural
from score_lib.data.strokes import draw, follow
from score_lib.disk.files import file_state

SUFFIX = ".ndjson"
DRAWING = "drawing"
# Limits on a line in bytes, above any raw drawing, and on coordinates in pixels.
_LONGEST, _FARTHEST = 1 << 24, 1e9
# Bytes that are searched at once for the ends of lines.
_BLOCK = 1 << 24


@register_dataset(name="QUICKDRAW", options={"path": "data.path"})
def quickdraw(shape: tuple[int, ...], path: str) -> tuple[Source, Source]:
    """The drawings at a path as gray images (1, H, W), see `strokes.draw`; every tenth held out.

    Files are classes, in natural order.

    Raises:
        DataError: there are none, or a file is damaged; names the line.
    """
    if len(shape) != 3 or shape[0] != 1:
        raise DataError(
            f"data.dataset='QUICKDRAW' has gray images (1, H, W), but the config asks for "
            f"{tuple(shape)}: set data.num_channels=1"
        )
    return _split(DrawnImages(_files(path, "QUICKDRAW"), shape), path)


@register_dataset(name="QUICKDRAW_STROKES", options={"path": "data.path"})
def quickdraw_strokes(shape: tuple[int, ...], path: str) -> tuple[Source, Source]:
    """The drawings as x, y and pen at L points, (3, L) float32, see `strokes.follow`.

    Files, classes and split are those of `quickdraw`.
    """
    if len(shape) != 2 or shape[0] != 3 or shape[1] < 2:
        raise DataError(
            f"data.dataset='QUICKDRAW_STROKES' has series (3, L) of x, y and pen at L >= 2 points, "
            f"but the config asks for {tuple(shape)}: set it as in data.shape=(3, 128)"
        )
    return _split(DrawnSeries(_files(path, "QUICKDRAW_STROKES"), shape), path)


quickdraw_strokes.continuous, quickdraw_strokes.kind = True, "series"


class Drawings(NamedTuple):
    """A file of drawings and where its lines are.

    Attributes:
        starts: first byte of each line that is not empty, (N,) int64.
        ends: the byte after it.
    """

    path: str
    starts: np.ndarray
    ends: np.ndarray


class DrawingFiles(Source):
    """Drawings in files, one class each.

    Args:
        files: by category, in the order of labels.
        shape: of an example.
    """

    def __init__(self, files: dict[str, Drawings], shape: tuple[int, ...]):
        self.shape = shape
        self._files = list(files.values())
        self._first = np.cumsum([0, *(len(file.starts) for file in self._files)])
        self.class_to_idx = {name: label for label, name in enumerate(files)}
        self.num_classes = len(files)

    @abc.abstractmethod
    def example(self, strokes: list[np.ndarray]) -> np.ndarray:
        """The example that a drawing is, of this shape."""

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        labels = np.searchsorted(self._first, numbers, side="right") - 1
        rows = numbers - self._first[labels]
        examples = [
            self.example(read_drawing(self._files[label], row))
            for label, row in zip(labels.tolist(), rows.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(examples)), torch.from_numpy(labels.astype(np.int64))


class DrawnImages(DrawingFiles):
    """Drawings as images, see `quickdraw`."""

    def example(self, strokes: list[np.ndarray]) -> np.ndarray:
        return draw(strokes, *self.shape[1:])[None]


class DrawnSeries(DrawingFiles):
    """Drawings as series, see `quickdraw_strokes`."""

    dtype = torch.float32

    def example(self, strokes: list[np.ndarray]) -> np.ndarray:
        return follow(strokes, self.shape[1])


def read_drawing(file: Drawings, row: int) -> list[np.ndarray]:
    """The strokes of a drawing, each (n, 2) float64 of x and y as stored.

    Raises:
        DataError: the line is damaged; names it.
    """
    start, end = int(file.starts[row]), int(file.ends[row])
    try:
        with open(file.path, "rb") as opened:
            opened.seek(start)
            drawing = json.loads(opened.read(end - start))
        return _strokes(drawing)
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(
            f"line {_line(file.path, start)} of {file.path} is not a drawing: {error}"
        ) from error


def _strokes(line) -> list[np.ndarray]:
    drawing = line.get("drawing") if isinstance(line, dict) else None
    if not isinstance(drawing, list) or not drawing:
        raise ValueError("it has no strokes as 'drawing'")
    strokes = []
    for number, stroke in enumerate(drawing):
        # A list of lists of other lengths makes no array; texts and huge integers make another.
        if not isinstance(stroke, list) or not 2 <= len(stroke) <= 3:
            raise ValueError(f"stroke {number} (from 0) is not a list of x, y and perhaps t")
        places = np.array(stroke[:2])
        if places.dtype.kind not in "iuf" or places.ndim != 2 or not places.size:
            raise ValueError(f"stroke {number} (from 0) has no numbers x and y, as many of each")
        if not (np.abs(places.astype(np.float64)) <= _FARTHEST).all():
            raise ValueError(f"stroke {number} (from 0) leads farther than {_FARTHEST:g} pixels")
        strokes.append(places.T.astype(np.float64))
    return strokes


def _files(path: str, name: str) -> dict[str, Drawings]:
    """The files at a path by category."""
    if not path:
        raise MissingDataError(
            f"data.path is empty: data.dataset={name!r} reads CATEGORY{SUFFIX}, a file or a folder "
            f"of them, as the authors of Quick, Draw! publish them"
        )
    place = pathlib.Path(os.path.expanduser(path))
    found = [place] if place.is_file() else sorted(place.glob(f"[!.]*{SUFFIX}"))
    for file in found:
        refuse_broken(file)
    files = {file.name.removesuffix(SUFFIX): file for file in found if file.is_file()}
    if not files:
        raise DataError(f"data.path: there is no file CATEGORY{SUFFIX} in {str(place)!r}")
    drawings = {}
    for category in sorted(files, key=natural):
        drawings[category] = find_lines(str(files[category]), file_state(files[category]))
        if not len(drawings[category].starts):
            raise DataError(f"there is no drawing in {files[category]}")
    return drawings


@functools.lru_cache(maxsize=1024)  # of files; a run opens its data several times
def find_lines(path: str, state: tuple[int, int]) -> Drawings:
    """The lines of a file, in one pass; cached until the file changes.

    Raises:
        DataError: a line is longer than any drawing; names it.
    """
    breaks, at = [np.array([-1])], 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at
            breaks.append(found)
            at += len(block)
    edges = np.concatenate([*breaks, [at]]).astype(np.int64)
    starts, ends = edges[:-1] + 1, edges[1:]
    longest = int(np.argmax(ends - starts))
    if ends[longest] - starts[longest] > _LONGEST:
        raise DataError(f"line {longest + 1} of {path} is longer than {_LONGEST} bytes")
    drawn = ends - starts > 1  # not empty, nor the "\r" of an empty line
    return Drawings(path, starts[drawn], ends[drawn])


def _line(path: str, start: int) -> int:
    """The number, from 1, of the line that begins at a byte."""
    number = 1
    with open(path, "rb") as file:
        while start > 0 and (block := file.read(min(_BLOCK, start))):
            number += block.count(b"\n")
            start -= len(block)
    return number


def _split(source: Source, path: str) -> tuple[Source, Source]:
    source.read(np.array([0]))  # a file of something else is an error here, before training starts
    return split_tenths(source, path, DRAWING)
