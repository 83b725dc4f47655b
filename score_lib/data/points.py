"""POINTS: the user's own point clouds and vertices of meshes, a file each, in a folder or zip."""

import functools
import hashlib
import os
import pathlib

import numpy as np
import torch
from torch import Tensor

from score_lib.data.files import Folder, Zip
from score_lib.data.folders import Tree, open_tree, split_tree
from score_lib.data.pixels import Unsuited
from score_lib.data.point_files import READERS, read_points
from score_lib.data.sources import DataError, MissingDataError, Source, register_dataset
from score_lib.disk.files import printable

CLOUD = "point file"


@register_dataset(
    name="POINTS",
    options={"path": "data.path", "on_error": "data.on_error", "split": "data.split"},
)
def points(shape: tuple[int, ...], path: str, on_error: str, split: str) -> tuple[Source, Source]:
    """The .npy, .ply and .off files at a path as (N, C) float32, in their own units.

    Folders are classes and splits as for images, see `splits.find_split`.  From a file with more
    than N points, N are chosen by its name, see `chosen_rows`.

    Raises:
        DataError: there are none, or one is damaged or has fewer than N points.
    """
    if not path:
        raise MissingDataError("data.path is empty: data.dataset='POINTS' reads a folder or .zip")
    if len(shape) != 2:
        raise DataError(
            f"data.dataset='POINTS' needs the numbers of points and coordinates, as in "
            f"data.shape=(2048, 3), but the shape is {tuple(shape)}"
        )
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_dir():
        files = Folder(place)
    elif place.is_file() and place.suffix.lower() == ".zip":
        files = Zip(place)
    else:
        raise DataError(
            f"data.path: {str(place)!r} is neither a folder nor a .zip of point files; an array "
            f"of many clouds is read by data.dataset='ARRAYS'"
        )

    def is_cloud(name: str) -> Tensor:
        return decode(files, name, shape)

    skipping = on_error == "skip"
    tree = open_tree(files, tuple(READERS), CLOUD, split, is_cloud if skipping else None)
    is_cloud(tree.names[0])  # a wrong shape is an error here, before training starts
    return split_tree(tree, functools.partial(PointFiles, shape=shape), path, split, CLOUD)


points.continuous, points.kind = True, "points"


class PointFiles(Source):
    """Files of points, see `points`.

    Args:
        tree: the files.
        shape: (N, C).
    """

    dtype = torch.float32

    def __init__(self, tree: Tree, shape: tuple[int, int]):
        self.tree, self.shape = tree, shape
        self.class_to_idx, self.num_classes = tree.class_to_idx, tree.num_classes

    def __len__(self) -> int:
        return len(self.tree)

    def read(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        files, names = self.tree.files, self.tree.names
        clouds = [decode(files, names[n], self.shape) for n in numbers]
        return torch.stack(clouds), self.tree.labels[numbers]


def decode(files: Folder | Zip, name: str, shape: tuple[int, int]) -> Tensor:
    """N points of a file, (N, C) float32.

    Raises:
        Unsuited: its points have another number of coordinates.
        DataError: it cannot be read, or has fewer points.
    """
    where, (count, channels) = f"{printable(name)} in {files.path}", shape
    try:
        found = read_points(name, files.read(name))
    except Exception as error:  # damaged files make NumPy raise errors of nearly any type
        raise DataError(f"{where} is not a readable file of points: {error}") from error
    if found.shape[1] != channels:
        raise Unsuited(
            f"{where} has points of {found.shape[1]} coordinates, but data.shape={tuple(shape)} "
            f"asks for {channels}: set data.shape=({count}, {found.shape[1]})"
        )
    if len(found) < count:
        raise DataError(
            f"{where} has {len(found)} points, fewer than the {count} of data.shape: set "
            f"data.shape=({len(found)}, {channels}), or leave such files out with "
            f"data.on_error=skip"
        )
    return torch.from_numpy(found[chosen_rows(name, len(found), count)])


def chosen_rows(name: str, total: int, count: int) -> np.ndarray:
    """`count` of `total` rows, in their order: a random choice that the file's own name fixes.

    It depends on no seed and no folder, and is the same on every machine and with every version of
    NumPy, which promises the raw numbers of its generators for good.
    """
    if total == count:
        return np.arange(total)
    own = name[name.rfind("/") + 1 :].encode("utf-8", "surrogatepass")
    seed = int.from_bytes(hashlib.blake2b(own, digest_size=16).digest(), "little")
    keys = np.random.PCG64(seed).random_raw(total)
    return np.sort(np.argsort(keys, kind="stable")[:count])
