"""HUGGINGFACE: images in the files of the package `datasets`, from a path or from the Hub."""

import json
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import torch

from score_lib.data.files import check_size
from score_lib.data.hub import downloaded, is_hub_name
from score_lib.data.images import FILE_OPTIONS, EncodedImages, check_options
from score_lib.data.pixels import Pixels
from score_lib.data.shards import Shards, require_complete, shard_files, split_shards
from score_lib.data.sources import (
    MAX_CLASSES,
    DataError,
    MissingDataError,
    Source,
    log_once,
    register_dataset,
)
from score_lib.data.splits import HELD_OUT, TRAINING
from score_lib.data.tables import SUFFIXES, Column, Rows, columns_of
from score_lib.disk.files import printable

# Columns that are meant, where several could be, in this order.
IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")
_NO_LABEL = -1
# Types of columns that can be classes: by number, and by name.
_NUMBERS = re.compile(r"u?int\d+|bool")
_TITLES = re.compile(r"(large_)?string(_view)?|dictionary<values=(large_)?string\b.*")


@register_dataset(name="HUGGINGFACE", options=FILE_OPTIONS)
def huggingface(
    shape: tuple[int, int, int], path: str, on_error: str, split: str, **pixels
) -> tuple[Source, Source]:
    """The images of Arrow or Parquet files, centre-cropped and resized to (C, H, W).

    Files called test or validation are held out, see `shards.split_shards`; without such, every
    tenth image.
    """
    meaning = check_options(shape, on_error, **pixels)
    if not path:
        raise MissingDataError(
            "data.path is empty: data.dataset='HUGGINGFACE' reads a folder of save_to_disk there, "
            "a folder or file of .parquet or .arrow, or a name on the Hub, such as ylecun/mnist"
        )
    shards = split_shards(*_files(path), split)
    _require_one_set(shards, split)
    source = TableImages(shards, shape, meaning)
    numbers = np.arange(len(source))
    if on_error == "skip":
        numbers = source.readable(numbers)
    source.images(numbers[:1])  # a missing option is an error here, before training starts
    return shards.divided(source, numbers, source.rows.files_of(numbers))


def _files(path: str) -> tuple[pathlib.Path, list[str]]:
    """The folder of a data set, and its files below that."""
    here = os.path.exists(os.path.expanduser(path))
    place = path if here or not is_hub_name(path) else str(downloaded(path))
    root, names = shard_files(place, SUFFIXES)
    if os.path.isdir(os.path.expanduser(place)):
        names = _listed(root, _without_results(root, names))
        require_complete(root, names)
    return root, names


def _without_results(root: pathlib.Path, names: Sequence[str]) -> list[str]:
    """Without the results that the package keeps beside the data, by their names.

    Raises:
        DataError: nothing else is there.
    """
    results = [name for name in names if os.path.basename(name).startswith(("cache-", "tmp"))]
    others = sorted(set(names) - set(results))
    shown = ", ".join(map(printable, results[:20]))
    if not others:
        raise DataError(
            f"{root} has only {shown}, which are called as the package datasets calls results of "
            f"its own: set data.path to one of these files, or rename them"
        )
    if results:
        log_once(f"not read in {root}, as results of the package datasets are called so: {shown}")
    return others


def _listed(root: pathlib.Path, names: Sequence[str]) -> list[str]:
    """Without files that the `state.json` beside them does not list: those of an earlier save.

    Raises:
        DataError: it cannot be read, or a file that it lists is not there.
    """
    kept = set(names)
    for folder in {os.path.dirname(name) for name in names}:
        state = root / folder / "state.json"
        if not state.is_file():
            continue
        there = {name for name in names if os.path.dirname(name) == folder}
        listed = {os.path.join(folder, file) for file in _files_of(state)}
        if missing := sorted(listed - there):
            raise DataError(f"{state} lists {missing[0]}, which is not there: get it")
        if stale := sorted(there - listed):
            log_once(f"not read, as {state} does not list it: {', '.join(map(printable, stale))}")
        kept -= there - listed
    return sorted(kept)


def _files_of(state: pathlib.Path) -> list[str]:
    try:
        check_size(state.stat().st_size)
        files = json.loads(state.read_bytes())["_data_files"]
        return [os.path.basename(file["filename"]) for file in files]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{state} lists no data files, as that of save_to_disk does: {error!r}"
        ) from error


def _require_one_set(shards: Shards, split: str) -> None:
    """Refuse folders of several data sets: those whose names are none of a part."""
    parts = {*TRAINING, *(name for kind in HELD_OUT for name in kind), *split.lower().split(":")}
    folders = (pathlib.PurePosixPath(name).parent.parts for name in shards.names)
    sets = {"/".join(p for p in own if p.lower() not in parts) or "." for own in folders}
    if len(sets) > 1:
        raise DataError(
            f"{shards.root} holds several data sets: {', '.join(sorted(sets)[:20])}: add one of "
            f"these folders to data.path"
        )


class TableImages(EncodedImages):
    """Encoded images in a column of tables."""

    def __init__(self, shards: Shards, shape: tuple[int, int, int], pixels: Pixels):
        files = [shards.root / name for name in shards.names]
        self._names = shards.names
        image, label = _columns(files)
        self._column = image.name
        wanted = [image.name] if label is None else [image.name, label.name]
        self.rows = Rows(files, wanted)
        if not len(self.rows):
            raise DataError(f"there is no row in {shards.root}")
        labels, titles = self._told(label)
        classes = {str(title): number for number, title in enumerate(titles)}
        super().__init__(shards.root, shape, pixels, torch.from_numpy(labels), classes)
        self._check_labels(labels, len(titles) or MAX_CLASSES)
        self.num_classes = len(titles) or int(labels.max()) + 1

    def _told(self, column: Column | None) -> tuple[np.ndarray, list[str]]:
        """The label of each row, and the names of classes if they have such."""
        if column is None:
            return np.zeros(len(self.rows), dtype=np.int64), []
        if not _is_class_label(column) and _TITLES.fullmatch(column.type):
            return self.rows.titles(column.name, missing=_NO_LABEL)
        labels = self.rows.integers(column.name, missing=_NO_LABEL)
        return labels, column.feature.get("names") or []

    def _check_labels(self, labels: np.ndarray, classes: int) -> None:
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if wrong.size:
            label = labels[wrong[0]]
            has = "no label" if label == _NO_LABEL else f"the label {label} of {classes} classes"
            raise DataError(
                f"{self.name(wrong[0])} in {self.path} has {has}: other parts are chosen as in "
                f"data.split=train:validation"
            )

    def name(self, number: int) -> str:
        """See `EncodedImages`."""
        file, row = self.rows.place(number)
        return f"row {row} (from 0) of {self._names[file]}"

    def encoded(self, number: int) -> bytes:
        """See `EncodedImages`."""
        value = self.rows.value(number, self._column)
        if isinstance(value, dict):
            if value["bytes"] is None and value.get("path"):
                raise OSError(
                    f"it is only the path {value['path']!r}: save_to_disk writes the images too"
                )
            value = value["bytes"]
        if not isinstance(value, bytes):
            raise OSError("it is no bytes")
        check_size(len(value))
        return value


def _columns(files: Sequence[pathlib.Path]) -> tuple[Column, Column | None]:
    """The columns of images and of labels, the latter None without one."""
    first, *others = ((file, columns_of(file)) for file in files)
    place, columns = first
    image = _only(place, "images", IMAGES, [c for c in columns if _may_hold_images(c)])
    if image is None:
        known = ", ".join(column.name for column in columns)
        raise DataError(f"{place} has no column of images: its columns are {known}")
    label = _only(place, "classes", LABELS, _labels(columns))
    for file, found in others:
        for column in filter(None, (image, label)):
            if column not in found:
                raise DataError(f"{file} has not the same column {column.name!r} as {place}")
    return image, label


def _only(
    place: pathlib.Path, kind: str, preferred: Sequence[str], columns: Sequence[Column]
) -> Column | None:
    """The only column of several, or the one with a preferred name."""
    by_name = {column.name: column for column in columns}
    named = [by_name[name] for name in preferred if name in by_name]
    if len(columns) > 1 and not named:
        raise DataError(
            f"{place} has several columns of {kind}: {', '.join(by_name)}: rename the one that is "
            f"meant to {preferred[0]}, or remove the others"
        )
    return (named or [*columns, None])[0]


def _may_hold_images(column: Column) -> bool:
    if column.feature:
        return column.feature.get("_type") == "Image"
    return bool(re.fullmatch(r"(struct<(.*, )?bytes: )?(large_)?binary\b.*", column.type))


def _labels(columns: Sequence[Column]) -> list[Column]:
    """Columns of classes; without a description, numbers or names in a column of a usual name."""
    if found := [column for column in columns if _is_class_label(column)]:
        return found
    usual = [column for column in columns if column.name in LABELS]
    for column in usual:
        if not _may_be_classes(column):
            log_once(
                f"the column {column.name!r} holds {printable(column.type)}, so it is not read as "
                f"classes: these are whole numbers or names"
            )
    return [column for column in usual if _may_be_classes(column)]


def _is_class_label(column: Column) -> bool:
    return column.feature.get("_type") == "ClassLabel"


def _may_be_classes(column: Column) -> bool:
    return bool(_NUMBERS.fullmatch(column.type) or _TITLES.fullmatch(column.type))
