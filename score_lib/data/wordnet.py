"""Files that come with ImageNet: names of classes, and the classes of validation images."""

import csv
import json
import pathlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from score_lib.data.sources import DataError, needed
from score_lib.data.splits import Parts
from score_lib.disk.files import printable

INDEX, WORDS = "imagenet_class_index.json", ("LOC_synset_mapping.txt", "synset_words.txt")
SOLUTION = "LOC_val_solution.csv"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKITS = ("ILSVRC2012_devkit_t12/data", "data", "")
# Limit on each of these files; the largest has 5 MB.
MAX_BYTES = 1 << 25


def is_id(name: str) -> bool:
    """Whether a name is a WordNet id, such as n01440764."""
    return bool(re.fullmatch(r"n\d{8}", name))


def class_names(root: pathlib.Path, base: Parts, classes: Mapping[str, int]) -> dict[str, int]:
    """Readable name of each class -> its label, or WordNet ids where no file says the names.

    Args:
        root: where the file may lie: `INDEX`, or one of `WORDS`.
        base: folders below the root, where it may lie as well.
        classes: WordNet id -> label, in the order of the ids.
    Raises:
        DataError: the file is damaged, in another order, or lacks a class.
    """
    place = _find(root, base, (INDEX, *WORDS))
    if place is None:
        return dict(classes)
    listed = dict(_indexed(place) if place.name == INDEX else _worded(place))
    if list(listed) != sorted(listed):
        first = next(a for a, b in zip(listed, sorted(listed), strict=True) if a != b)
        raise DataError(
            f"{place} lists {printable(first)} out of order, and labels are in the order of the "
            f"WordNet ids: remove the file, or put its lines in this order"
        )
    if missing := sorted(classes.keys() - listed):
        raise DataError(f"{place} does not list the class {missing[0]}: remove or complete it")
    often = Counter(listed[wnid] for wnid in classes)
    titles = {w: f"{listed[w]} ({w})" if often[listed[w]] > 1 else listed[w] for w in classes}
    return {titles[wnid]: label for wnid, label in classes.items()}


def validation_classes(root: pathlib.Path, base: Parts) -> tuple[dict[str, str], pathlib.Path]:
    """Name of each validation image, without a suffix -> its WordNet id; and the file that says so.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    if place := _find(root, base, [SOLUTION]):
        return dict(_solution(place)), place
    place = _find(root, base, [f"{folder}/{TRUTH}".lstrip("/") for folder in DEVKITS])
    if place is None:
        raise DataError(
            f"the images of val/ in {root} are not in folders of classes, and no file says their "
            f"classes: put {DEVKITS[0]}/{TRUTH} and {META}, or Kaggle's {SOLUTION}, into the "
            f"folder, or set data.split=tenths"
        )
    ids = _ids(place.with_name(META))
    truth = {}
    for number, line in enumerate(_lines(place), start=1):
        if line not in ids:
            raise DataError(f"line {number} of {place} is {printable(line)!r}, no class of {META}")
        truth[f"ILSVRC2012_val_{number:08d}"] = ids[line]
    return truth, place


def _find(root: pathlib.Path, base: Parts, names: Collection[str]) -> pathlib.Path | None:
    for folder in (root, root.joinpath(*base)):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def _text(place: pathlib.Path) -> str:
    try:
        with open(place, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return content.decode()
    except (OSError, ValueError) as error:
        raise DataError(f"{place} cannot be read: {error}") from error


def _lines(place: pathlib.Path) -> list[str]:
    return _text(place).splitlines()


def _indexed(place: pathlib.Path) -> Iterator[tuple[str, str]]:
    """WordNet id and name of each class, in the order of the labels in a JSON file."""
    text = _text(place)
    try:
        record = json.loads(text)
        rows = [record[str(label)] for label in range(len(record))]
        for wnid, title in rows:
            yield str(wnid), str(title)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f'{place} should hold {{"0": ["n01440764", "tench"], ...}} for labels from 0 on, and '
            f"does not: {error}"
        ) from error


def _worded(place: pathlib.Path) -> Iterator[tuple[str, str]]:
    """WordNet id and the first of its words, line by line: n01440764 tench, Tinca tinca."""
    for number, line in enumerate(_lines(place), start=1):
        wnid, _, words = line.partition(" ")
        if not is_id(wnid) or not words.strip():
            raise DataError(
                f"line {number} of {place} is {printable(line)!r}, and should be as 'n01440764 "
                f"tench, Tinca tinca'"
            )
        yield wnid, words.split(",")[0].strip()


def _solution(place: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Name and class of each image: ILSVRC2012_val_00048981,n03995372 85 1 499 272."""
    for number, row in enumerate(csv.reader(_lines(place)), start=1):
        wnid = row[1].split(" ")[0] if len(row) == 2 else ""
        if is_id(wnid):
            yield row[0], wnid
        elif number > 1:  # the first has the names of the columns
            raise DataError(f"line {number} of {place} says no image and class")


def _ids(place: pathlib.Path) -> dict[str, str]:
    """Number of a class in the development kit -> its WordNet id, from its MATLAB file."""
    scipy_io = needed("scipy.io", f"{place} needs scipy, which is missing: pip install scipy")
    try:
        synsets = scipy_io.loadmat(place, squeeze_me=True, variable_names=["synsets"])["synsets"]
        numbers, ids = synsets["ILSVRC2012_ID"], synsets["WNID"]
        return {str(int(n)): str(wnid) for n, wnid in zip(numbers, ids, strict=True)}
    except Exception as error:  # damaged files make it raise errors of nearly any type
        raise DataError(f"{place} is missing or damaged: {error}") from error
