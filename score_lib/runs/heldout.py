"""The examples of a data set as an evaluation reads them."""

import copy
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.conditioning import Condition
from score_lib.base import distributed
from score_lib.base.tensors import bytes_of
from score_lib.data.loading import check_levels, get_streams
from score_lib.data.sources import Source
from score_lib.data.stream import ImageStream, uniform_noise
from score_lib.runs.setup import Run

# Of those by which two sets are compared.
COMPARED_EXAMPLES = 1000
# Labels by which data that are stored class by class are known.
_FOR_ORDER = 64


def spaced_numbers(source: Source, most: int = COMPARED_EXAMPLES) -> list[np.ndarray]:
    """Numbers of up to 1,000 evenly spaced examples, in parts that fit into memory."""
    count = min(len(source), most)
    return [np.arange(i, min(i + 32, count)) * len(source) // count for i in range(0, count, 32)]


def examples_text(source: Source, most: int = COMPARED_EXAMPLES) -> str:
    """The number of examples, and a digest of `spaced_numbers` of them, with labels and classes."""
    record = [source.levels, dict(source.class_to_idx)]
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8)
    for part in spaced_numbers(source, most):
        for values in source.read(part):
            if values is not None:
                digest.update(bytes_of(values))
    return f"{len(source)} examples (digest {digest.hexdigest()})"


class DataBytes:
    """The images of a source in batches of bytes, (B, H, W, C), as extractors take them.

    Args:
        labelled: give pairs of images and labels (B,).
    """

    def __init__(self, config, source: Source, *, labelled: bool = False):
        self.labelled = labelled
        size, workers = config.eval.batch_size, config.data.num_workers
        self.stream = ImageStream(source, size, evaluation=True, as_uint8=True, num_workers=workers)
        self.numbers = range(len(self.stream))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        self.stream.seek(self.numbers.start * self.stream.batch_size)
        for batch in itertools.islice(self.stream, len(self.numbers)):
            images = batch["image"].movedim(1, -1)
            yield (images, batch["label"]) if self.labelled else images

    def share(self) -> "DataBytes":
        """This process's share of the batches."""
        mine = copy.copy(self)
        mine.numbers = distributed.share(self.numbers)
        return mine


class HeldOut:
    """The batches of one pass over a part of the data set, by number.

    Args:
        split: "train" or "test".
        dequantize: add uniform noise within each grey level.
        seed: of that noise; by default the data set's own.
        count: of examples, the first ones; 0 is all.
    Raises:
        ValueError: there are fewer.
    """

    def __init__(
        self, run: Run, split: str, dequantize: bool, seed: int | None = None, count: int = 0
    ):
        train, test, info = get_streams(run.config, dequantize, evaluation=True, device=run.device)
        check_levels(run.config, info)
        self.stream = {"train": train, "test": test}[split]
        self.run, self.info, self.levels = run, info, info.levels
        self.stream.seed = self.stream.seed if seed is None else seed
        self._batches, self._next = None, None
        available = len(self.stream.source)
        if count > available:
            raise ValueError(
                f"{count} examples are asked for, and the {split} part of {self.info.name} has "
                f"{available}"
            )
        self.count = count or available

    def tell_order(self) -> None:
        """Warn where the first examples are not like the others: of data stored class by class."""
        source = self.stream.source
        if self.count == len(source) or source.num_classes == 1:
            return
        parts = [source.read(part)[1] for part in spaced_numbers(source, _FOR_ORDER)]
        if any(part is None for part in parts):  # of a source whose other part has labels
            return
        labels = torch.cat([torch.as_tensor(part) for part in parts])
        if bool((labels.diff() >= 0).all() and labels[0] < labels[-1]) and distributed.is_main():
            logging.warning(
                "the first %d of %d examples are not like the others, since %s is stored class by "
                "class: figures of them, and their errors, are not those of all, which "
                "eval.bpd_num_images = 0 takes",
                self.count, len(source), self.info.name,
            )  # fmt: skip

    def __len__(self) -> int:
        return math.ceil(self.count / self.stream.batch_size)

    def indices(self, number: int) -> range:
        """Numbers of the examples in a batch."""
        first = number * self.stream.batch_size
        return range(first, min(first + self.stream.batch_size, self.count))

    def uniform(self, number: int) -> Tensor:
        """The uniform noise that dequantizes a batch, (B, *D) in [0, 1)."""
        shape = self.stream.source.shape
        return uniform_noise(self.stream.seed, self.indices(number), shape).to(self.stream.device)

    def map(self, of_batch: Callable[[int], Tensor]) -> np.ndarray:
        """The values (N,) of a function of the batch number that gives (b,), over all batches.

        Several processes share the batches.
        """
        mine = [of_batch(number) for number in distributed.share(range(len(self)))]
        values = torch.cat(mine).cpu().numpy() if mine else np.empty(0)
        return np.concatenate(distributed.gather(values))

    def release(self) -> None:
        """End the processes that prepare batches, until the next one is read."""
        self._batches, self._next = None, None

    def read(self, number: int) -> tuple[Tensor, Tensor, Condition]:
        """A batch in the network's range, (B, *D), its labels (B,), and its condition.

        Reading in order is fastest.
        """
        if number != self._next:
            self.stream.seek(number * self.stream.batch_size)
            self._batches = iter(self.stream)
        self._next = number + 1
        batch = {
            key: part[: len(self.indices(number))] for key, part in next(self._batches).items()
        }
        return self.run.arguments(batch, self.stream.dequantize)
