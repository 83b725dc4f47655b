"""WEBDATASET: images in .tar files, shards, where files with the same key are a sample."""

import os

import numpy as np
import torch

from score_lib.data.files import check_size, report
from score_lib.data.images import FILE_OPTIONS, EncodedImages, check_options
from score_lib.data.pixels import Pixels
from score_lib.data.shards import Shards, require_complete, shard_files, split_shards
from score_lib.data.sources import DataError, MissingDataError, Source, register_dataset
from score_lib.data.tars import IMAGES, NONE, Samples, known_samples
from score_lib.disk.files import printable


@register_dataset(name="WEBDATASET", options=FILE_OPTIONS)
def webdataset(
    shape: tuple[int, int, int], path: str, on_error: str, split: str, **pixels
) -> tuple[Source, Source]:
    """The images of .tar files, centre-cropped and resized to (C, H, W).

    Labels are whole numbers, in .cls files or as "label" of .json files.  Files called test or val
    are held out, see `shards.split_shards`; without such, every tenth image.
    """
    meaning = check_options(shape, on_error, **pixels)
    if not path:
        raise MissingDataError(
            "data.path is empty: data.dataset='WEBDATASET' reads a folder of .tar files there, one "
            "of them, or a pattern such as shard-{000000..000012}.tar"
        )
    root, names = shard_files(path, (".tar",))
    if os.path.isdir(os.path.expanduser(path)):
        require_complete(root, names)
    shards = split_shards(root, names, split)
    source = TarImages(shards, known_samples(shards.root, shards.names), shape, meaning)
    numbers = source.usable(on_error)
    source.images(numbers[:1])  # a missing option is an error here, before training starts
    return shards.divided(source, numbers, source.files_of(numbers))


class TarImages(EncodedImages):
    """The images of .tar files, read by their place."""

    def __init__(self, shards: Shards, samples: Samples, shape, pixels: Pixels):
        super().__init__(shards.root, shape, pixels, torch.from_numpy(samples.labels), {})
        self._files, self._samples = shards.names, samples
        if not len(samples.names):
            raise DataError(
                f"there is no sample in the {len(self._files)} .tar files of {self.path}: files in "
                f"them are named KEY.{IMAGES[0]}, KEY.cls and so on"
            )
        self._ends = np.cumsum(samples.counts)
        self._check_labels()

    def _check_labels(self) -> None:
        labels = self._samples.labels
        bare = np.flatnonzero(labels == NONE)
        if 0 < len(bare) < len(labels):
            raise DataError(
                f"{self.name(bare[0])} in {self.path} has no label, and {len(labels) - len(bare)} "
                f"of {len(labels)} samples have one: all need one, or none (a .cls file, or "
                f"'label' in a .json file)"
            )
        if len(bare):
            self._labels = torch.zeros_like(self._labels)
        self.num_classes = int(self._labels.max()) + 1

    def usable(self, on_error: str) -> np.ndarray:
        """The numbers of the samples that have an image, and, with "skip", one that is readable."""
        empty = self._samples.sizes == NONE
        if not empty.any() and on_error == "raise":
            return np.arange(len(self))
        if on_error == "raise":
            raise DataError(
                f"{self.name(np.flatnonzero(empty)[0])} in {self.path} has no image (.jpg, .jpeg, "
                f".png or .webp, neither a link nor a sparse file): leave such samples out with "
                f"data.on_error=skip"
            )
        report(self, [self.name(n) for n in np.flatnonzero(empty)], "have no image")
        return self.readable(np.flatnonzero(~empty))

    def files_of(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the file of each sample."""
        return np.searchsorted(self._ends, numbers, side="right")

    def name(self, number: int) -> str:
        """See `EncodedImages`."""
        name, offset = self._samples.names[number], self._samples.offsets[number]
        return f"{printable(name)} (byte {offset} of {self._files[self.files_of(number)]})"

    def encoded(self, number: int) -> bytes:
        """See `EncodedImages`."""
        size = int(self._samples.sizes[number])
        check_size(size)
        with open(self.path / self._files[self.files_of(number)], "rb") as file:
            file.seek(self._samples.offsets[number])
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"its file ends after {len(content)} of {size} bytes")
        return content
