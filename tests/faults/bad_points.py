"""Files of points and of drawings that are cut, flipped, or claim more than they hold."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
from point_helpers import VERTEX, off, ply, some_points

from score_lib.data.sources import DATASETS
from score_lib.options import complete

from .bad_arrays import HEADERS, npy
from .cases import Case, digest, flips_and_cuts, make_config, written

POINTS = some_points(40)
FACES = ("face", "list uchar int vertex_indices", [((0, 1, 2),)] * 3)
PLY = {
    kind: ply(kind, ("vertex", VERTEX, POINTS.tolist()), FACES)
    for kind in ("ascii", "binary_big_endian")
}
DRAWING = '{"word": "cat", "drawing": [[[0, 9, 120, 255], [7, 3, 0, 90]], [[5, 6], [5, 6]]]}\n'


def _read_points(path: pathlib.Path) -> str:
    """All points beside a file, as training reads them."""
    return _read("POINTS", path.parent, (30, 3))


def _read_drawings(path: pathlib.Path) -> str:
    """All drawings of a file, as training reads them."""
    return _read("QUICKDRAW_STROKES", path, (3, 16))


def _read(name: str, path: pathlib.Path, shape: tuple[int, ...]) -> str:
    config = complete(make_config(dataset=name, path=str(path)))
    values, labels = DATASETS.build(name, config, shape)[0].read(np.arange(1))
    assert values.shape[1:] == shape and values.isfinite().all()
    return digest(values, labels)


def cases() -> Iterator[Case]:
    """All of them."""
    files = {"x.off": off(POINTS), **{f"{kind}.ply": content for kind, content in PLY.items()}}
    for name, content in files.items():
        make, cut = written(name, content), "refused or same"
        yield from flips_and_cuts(
            f"points {name}", make, _read_points, 2, 1, "refused or valid", cut
        )
    for name, content in _claims().items():
        yield Case("points: claims", name, written(f"x.{name.split()[0]}", content), _read_points)
    make = written("cat.ndjson", DRAWING.encode())
    yield from flips_and_cuts("drawings", make, _read_drawings, 2, 1, "refused or valid")


def _claims() -> dict[str, bytes]:
    """Contents by suffix and damage."""
    binary, text = PLY["binary_big_endian"], off(POINTS)
    rows = b"vertex %d"
    claims = {f"npy {name}": HEADERS[name] for name in ("items of 2 GB", "brackets")}
    claims["npy 10^12 points"] = npy({"descr": "<f4", "shape": (10**12, 3)}, bytes(120))
    for count in (10**8, 10**30, -1):
        claims[f"ply {count} rows"] = binary.replace(rows % 40, rows % count)
        claims[f"off {count} rows"] = text.replace(b"40 1", b"%d 1" % count)
    long = b" " * (1 << 20)
    claims["off as many rows as bytes"] = b"OFF\n%d 0 0\n" % len(long) + long
    claims["ply as many rows as bytes"] = (
        b"ply\nformat ascii 1.0\nelement vertex %d\nproperty float x\nproperty float y\n"
        b"property float z\nend_header\n" % len(long) + long
    )
    lists = b"element face 5\nproperty list uint double i\nelement vertex"
    claims["ply lists of 4 GB"] = binary.replace(b"element vertex", lists).replace(
        b"end_header\n", b"end_header\n\xff\xff\xff\xff"
    )
    claims["ply header of 1 MB"] = b"ply\n" + b"comment\n" * (1 << 17)
    return claims
