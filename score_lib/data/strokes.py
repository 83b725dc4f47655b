"""Drawings as strokes: placed in a box, drawn as an image, or followed at even steps.

A stroke is the path of a pen, (n, 2) float64 of x to the right and y down, n >= 1.
"""

from collections.abc import Sequence

import numpy as np

# As in the bitmaps that come with Quick, Draw!: the longer side of a drawing takes 16/19 of the
# side, a line is 1/19 wide, and 1/19 at each edge stays free.
_PARTS, _BOX = 19, 16
# Antialiasing averages an image that is larger by this factor.
_FINER = 8


def in_unit_box(strokes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The strokes with the longer side of the drawing from 0 to 1, and the shorter about 1/2.

    A drawing without any extent is put at (1/2, 1/2).
    """
    every = np.concatenate(strokes)
    low, high = every.min(axis=0), every.max(axis=0)
    extent = (high - low).max()
    return [(stroke - (low + high) / 2) / (extent or 1.0) + 0.5 for stroke in strokes]


def draw(strokes: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """White antialiased lines on black, (height, width) uint8.

    The drawing is centred in the largest square: of its side, the lines are 1/19 wide, with round
    ends and joints, and 1/19 stays free at each edge that the drawing reaches.
    """
    from PIL import Image, ImageDraw

    size = _FINER * np.array([width, height])
    middle = (size - 1) / 2  # Pillow counts from the middle of the first pixel
    side, line = size.min(), size.min() / _PARTS
    cap = max(0.0, line - 1) / 2  # between middles of pixels, which both are drawn
    canvas = Image.new("L", tuple(size.tolist()))
    pen = ImageDraw.Draw(canvas)
    for stroke in in_unit_box(strokes):
        places = (stroke - 0.5) * (side * _BOX / _PARTS) + middle
        if len(places) > 1:
            pen.line([tuple(place) for place in places.tolist()], fill=255, width=round(line))
        for x, y in places.tolist():
            pen.ellipse((x - cap, y - cap, x + cap, y + cap), fill=255)
    return np.asarray(canvas.reduce(_FINER))


def follow(strokes: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Points at even steps along the drawn lines, and whether the pen stays down, (3, length).

    The steps divide the length of all strokes together, without the ways between them; the first
    point is where the first stroke begins, and the last where the last one ends.  Strokes without
    length, which are dots, are left out, unless there are no others.

    Returns:
        x and y, see `in_unit_box`, and pen: 1 where the next point is on the same stroke, so that a
        line is drawn up to it; 0 at the last point of a stroke.  float32.
    """
    # With the last vertex twice, so that a dot, too, is a piece from one vertex to the next.
    strokes = [np.append(stroke, stroke[-1:], axis=0) for stroke in in_unit_box(strokes)]
    sizes = [np.hypot(*np.diff(stroke, axis=0).T) for stroke in strokes]
    drawn = [k for k, size in enumerate(sizes) if size.sum() > 0] or [0]
    vertices = np.concatenate([strokes[k] for k in drawn])
    # The way to each vertex from the one before; none to the first of a stroke.
    steps = np.concatenate([np.append(0.0, sizes[k]) for k in drawn])
    number = np.repeat(np.arange(len(drawn)), [len(strokes[k]) for k in drawn])
    reached = np.cumsum(steps)
    wanted = np.linspace(0.0, reached[-1], length)
    # Of the pieces that a point may be on, the first: it never leads to another stroke.
    end = np.maximum(np.searchsorted(reached, wanted), 1)
    share = (wanted - reached[end - 1]) / np.where(steps[end] > 0, steps[end], 1.0)
    points = vertices[end - 1] + share[:, None] * (vertices[end] - vertices[end - 1])
    pen = np.append(number[end][1:] == number[end][:-1], False)
    return np.concatenate([points.T, pen[None]]).astype(np.float32)
