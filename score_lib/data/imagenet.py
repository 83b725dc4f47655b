"""IMAGENET: folders of images by WordNet id, as the authors of ImageNet distribute them."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import torch

from score_lib.data import wordnet
from score_lib.data.files import BROKEN, TO_FOLDER, Folder, report
from score_lib.data.folders import bad_links, split_tenths
from score_lib.data.images import (
    FILE_OPTIONS,
    IMAGE,
    EncodedImages,
    check_options,
    named_image,
)
from score_lib.data.names import Names
from score_lib.data.pixels import Pixels
from score_lib.data.sources import (
    DataError,
    MissingDataError,
    Source,
    Subset,
    log_once,
    register_dataset,
)
from score_lib.data.splits import Parts, places_of, two_parts
from score_lib.disk.files import printable

# Where train/ and val/ may be below the root; the latter two are as Kaggle packs them.
BASES: tuple[Parts, ...] = ((), ("ILSVRC", "Data", "CLS-LOC"), ("Data", "CLS-LOC"))
_NO_CLASS = -1


@register_dataset(name="IMAGENET", options=FILE_OPTIONS)
def imagenet(
    shape: tuple[int, int, int], path: str, on_error: str, split: str, **pixels
) -> tuple[Source, Source]:
    """The images of train/ and val/, centre-cropped and resized to (C, H, W).

    Classes are numbered in the order of their WordNet ids, which are the names of their folders.
    Without val/, or with `data.split=tenths`, every tenth image of train/ is held out.
    """
    meaning = check_options(shape, on_error, **pixels)
    if not path:
        raise MissingDataError(
            "data.path is empty: data.dataset='IMAGENET' reads the folder there that holds train/ "
            "and val/, with images as in train/n01440764/n01440764_18.JPEG"
        )
    tree = Tree(pathlib.Path(os.path.expanduser(path)), on_error)
    train, held_out = ("train", "val") if split in ("", "tenths") else two_parts(split)
    base = tree.base(train)
    classes = tree.classes((*base, train))
    titles = wordnet.class_names(tree.root, base, classes)

    def part(name: str) -> Source:
        numbers, labels = tree.labelled((*base, name), classes, base)
        names = tree.names.chosen(numbers)
        source = LabelledFiles(tree.files, names, labels, titles, shape, meaning)
        if on_error == "skip":
            return Subset(source, source.readable(np.arange(len(source))))
        source.images([0])  # a wrong depth or transparency is an error here, before training
        return source

    training = part(train)
    if split == "tenths" or (not split and not tree.holds((*base, held_out))):
        return split_tenths(training, path, IMAGE)
    testing = part(held_out)
    log_once(
        f"{path}: trained on: {train}/ ({len(training)} images); held out: {held_out}/ "
        f"({len(testing)} images); {len(classes)} classes"
    )
    return training, testing


class Tree:
    """The images below a root, by their folders."""

    def __init__(self, root: pathlib.Path, on_error: str):
        if not root.is_dir():
            raise DataError(f"data.path: there is no folder {str(root)!r}")
        self.root, self.files = root, Folder(root)
        self._bad = bad_links(self.files, named_image, on_error)
        images = [named_image(name) and name not in self._bad for name in self.files.names]
        self.names = self.files.names.chosen(np.flatnonzero(images))
        self._others = self.files.names.chosen(np.flatnonzero(~np.array(images, dtype=bool)))
        self._places = places_of(self.names)

    def holds(self, part: Parts) -> bool:
        """Whether a folder, or one below it, has an image."""
        return any(folder[: len(part)] == part for folder in self._places.folders)

    def base(self, train: str) -> Parts:
        """The folder that holds that of the training images.

        Raises:
            DataError: there is none.
        """
        for base in BASES:
            if self.holds((*base, train)):
                return base
            if self._bad.get(link := "/".join((*base, train))) in (TO_FOLDER, BROKEN):
                raise DataError(
                    f"{link} in {self.root} is {self._bad[link]}: set data.path to a folder that "
                    f"holds {train}/ itself"
                )
        inside = {folder[0] for folder in self._places.folders if folder}
        above = any(map(wordnet.is_id, inside))
        raise DataError(
            f"data.path: there is no image in {train}/ of {self.root}, which IMAGENET reads"
            + (f": set it to the folder above, that of {self.root.name}/" if above else "")
        )

    def classes(self, train: Parts) -> dict[str, int]:
        """WordNet id -> label, from the folders of the training images.

        Raises:
            DataError: an image is not in such a folder, or such a folder has no image.
        """
        folders = [f for f in self._places.folders if f[: len(train)] == train]
        for folder in folders:
            if len(folder) != len(train) + 1 or not wordnet.is_id(folder[-1]):
                raise DataError(
                    f"there are images in {printable('/'.join(folder))} of {self.root}, and those "
                    f"of IMAGENET are in folders named by WordNet ids, as in train/n01440764: "
                    f"data.dataset=IMAGES takes other names"
                )
        classes = {wnid: label for label, wnid in enumerate(sorted(f[-1] for f in folders))}
        for entry in map(pathlib.PurePosixPath, [*self.files.folders, *self._others]):
            # An empty folder, a link to one, or an archive that has yet to be unpacked.
            inside = entry.parent.parts == train and wordnet.is_id(entry.stem)
            if inside and entry.stem not in classes:
                raise DataError(
                    f"{entry} in {self.root} holds no image, and the labels of all later classes "
                    f"depend on it: complete or remove it"
                )
        return classes

    def labelled(
        self, part: Parts, classes: Mapping[str, int], base: Parts
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and labels of the images in a folder, whether in folders of classes or not.

        Raises:
            DataError: the class of an image is not known.
        """
        by_folder = np.full(len(self._places.folders), _NO_CLASS)
        used, flat = (np.zeros(len(by_folder), dtype=bool) for _ in range(2))
        for k, folder in enumerate(self._places.folders):
            if folder[: len(part)] == part:
                used[k], flat[k] = True, folder == part
                by_folder[k] = _NO_CLASS if flat[k] else self._class(folder, len(part), classes)
        if not used.any():
            raise DataError(f"data.split: there is no image in {'/'.join(part)} of {self.root}")
        numbers = np.flatnonzero(used[self._places.numbers])
        labels = by_folder[self._places.numbers[numbers]]
        if flat.any():
            rows = np.flatnonzero(labels == _NO_CLASS)
            labels[rows] = self._validation_labels(self.names.chosen(numbers[rows]), classes, base)
        known = labels != _NO_CLASS
        return numbers[known], labels[known]

    def _validation_labels(
        self, names: Names, classes: Mapping[str, int], base: Parts
    ) -> list[int]:
        """Labels of images that are in no folder of a class; -1 where no image is trained on."""
        truth, place = wordnet.validation_classes(self.root, base)
        stems = [pathlib.PurePosixPath(name).stem for name in names]
        if unknown := [name for name, stem in zip(names, stems, strict=True) if stem not in truth]:
            raise DataError(f"{place} says no class for {printable(unknown[0])} in {self.root}")
        labels = [classes.get(truth[stem], _NO_CLASS) for stem in stems]
        others = [name for name, label in zip(names, labels, strict=True) if label == _NO_CLASS]
        report(self.files, others, "are of classes without a training image")
        return labels

    def _class(self, folder: Parts, level: int, classes: Mapping[str, int]) -> int:
        if len(folder) != level + 1 or folder[-1] not in classes:
            raise DataError(
                f"there are images in {printable('/'.join(folder))} of {self.root}, which is none "
                f"of the {len(classes)} classes of the training images"
            )
        return classes[folder[-1]]


class LabelledFiles(EncodedImages):
    """Image files of a folder with given labels."""

    def __init__(
        self,
        files: Folder,
        names: Names,
        labels: np.ndarray,
        class_to_idx: Mapping[str, int],
        shape: tuple[int, int, int],
        pixels: Pixels,
    ):
        super().__init__(files.path, shape, pixels, torch.from_numpy(labels), class_to_idx)
        self._files, self._names, self.num_classes = files, names, len(class_to_idx)

    def encoded(self, number: int) -> bytes:
        """See `EncodedImages`."""
        return self._files.read(self._names[number])

    def name(self, number: int) -> str:
        """See `EncodedImages`."""
        return self._names[number]
