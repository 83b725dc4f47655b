"""Streams: a source as batches, whose order and random draws are functions of the position."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from score_lib.base.distributed import local_world
from score_lib.base.preemption import leave_signals_to_parent
from score_lib.base.tensors import derive_seed
from score_lib.data.sources import DataError, Source


class ImageStream:
    """Batches {"image": (B, C, H, W) float32 in [0, 1], "label": (B,) int64} from a source.

    For training the stream is endless: one random permutation of the examples after the other,
    cut into batches without regard for where one ends, so that nothing is dropped.  For
    evaluation an iteration is one pass in the order of the source, with a last batch that may be
    smaller.

    Every random draw is a function of (seed, position): workers, earlier iterations and the
    number of processes change nothing, and `seek` continues a run exactly.  Draws come from the
    CPU, so that every device sees the same data.  In evaluation the dequantisation noise of an
    example depends on the seed and its number alone.

    Args:
        source: where the examples are.
        batch_size: examples in a batch of all processes together.
        seed: seed of order, flips and noise.
        evaluation: one ordered pass instead of an endless shuffled stream.
        random_flip: mirror each image left to right with probability 1/2.
        dequantize: uniform dequantisation, (u + (levels - 1) x) / levels with u ~ U[0, 1).
        as_uint8: images as uint8 in 0 ... 255, untouched: what statistics are computed from.
        num_workers: processes that decode, at most one a core (of several processes on a machine,
            each has its share of the cores); 0 decodes in this one.
        device: where batches are wanted; None leaves them on the CPU.
        rank, world: this process and how many share each batch; process r gets the r-th
            contiguous share, which in evaluation may be empty for the last batch (it is left out).

    Attributes:
        position: examples consumed by all processes; the next `iter()` begins here.  In training
            it counts a batch as soon as it is handed out; an evaluation leaves it at 0.
        seed: may be set between passes, for fresh noise.
    Raises:
        ValueError: options that exclude each other, sizes out of range, an empty source.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        evaluation: bool = False,
        random_flip: bool = False,
        dequantize: bool = False,
        as_uint8: bool = False,
        num_workers: int = 0,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        if batch_size < (1 if evaluation else world):
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world} processes")
        if len(source) == 0:
            raise DataError("there are no examples in this data set")
        if as_uint8 and (random_flip or dequantize):
            raise ValueError("as_uint8 gives images as they are: no random_flip, no dequantize")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.evaluation, self.random_flip = evaluation, random_flip
        self.dequantize, self.as_uint8 = dequantize, as_uint8
        self.num_workers, self.rank, self.world = num_workers, rank, world
        self.position = 0
        self.to(device)

    def to(self, device: torch.device | str | None) -> ImageStream:
        """Deliver batches on a device from the next `iter()` on; returns the stream itself."""
        self.device = None if device is None else torch.device(device)
        return self

    def seek(self, position: int) -> None:
        """Let the next `iter()` begin after `position` examples (of all processes)."""
        if position < 0 or (self.evaluation and position > len(self.source)):
            raise ValueError(f"there is no position {position} in {len(self.source)} examples")
        self.position = position

    def __len__(self) -> int:
        """Number of batches in a full pass."""
        if not self.evaluation:
            raise TypeError("a training stream is endless")
        return sum(1 for _ in self._spans(0))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = self.position
        if self.evaluation:
            self.position = 0
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(
            _Reader(self.source),
            batch_sampler=self._numbers(start),
            collate_fn=_identity,
            worker_init_fn=leave_signals_to_parent,
            num_workers=min(self.num_workers, max(1, (os.cpu_count() or 1) // local_world())),
            multiprocessing_context=self.source.start_method if self.num_workers else None,
            pin_memory=self.device is not None and self.device.type == "cuda",
            # Without one of its own a loader draws from, and so disturbs, the global generator.
            generator=torch.Generator(),
        )
        for span, example in zip(self._spans(start), loader, strict=True):
            if isinstance(example, DataError):
                raise example
            if not self.evaluation:
                self.position = span[1]
            yield self._finish(*example, span)

    def _spans(self, start: int) -> Iterator[tuple[int, int]]:
        """Positions [first, last) of each batch in which this process has a share."""
        stop = len(self.source) if self.evaluation else math.inf
        while start < stop:
            span = start, min(start + self.batch_size, stop)
            if len(range(*self._share(span))):
                yield span
            start = span[1]

    def _share(self, span: tuple[int, int]) -> tuple[int, int]:
        first, size = span[0], span[1] - span[0]
        return first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world

    def _numbers(self, start: int) -> Iterator[np.ndarray]:
        """Numbers of this process's examples, batch by batch."""
        examples = np.arange if self.evaluation else shuffled(len(self.source), self.seed)
        for span in self._spans(start):
            yield examples(*self._share(span))

    def _finish(self, images: Tensor, labels: Tensor, span: tuple[int, int]) -> dict[str, Tensor]:
        """What happens after collation, on the device: flips, dequantisation, floats."""
        device = self.device or images.device
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "augment", span[0]))
        levels = self.source.levels
        if self.random_flip:
            flip = (self._draw((), span, draws) < 0.5).to(device, non_blocking=True)
            images = torch.where(flip.reshape(-1, 1, 1, 1), images.flip(-1), images)
        if self.dequantize:
            u = self._noise(span, draws).to(device, non_blocking=True)
            images = (images + u) / levels
        elif not self.as_uint8:
            images = images.float() / (levels - 1)
        elif levels != 256:
            images = (images * (255 / (levels - 1))).round().byte()
        return {"image": images, "label": labels}

    def _noise(self, span: tuple[int, int], draws: torch.Generator) -> Tensor:
        """U[0, 1) for dequantisation: (share, C, H, W)."""
        if self.evaluation:
            streams = (
                torch.Generator().manual_seed(derive_seed(self.seed, "dequantize", number))
                for number in range(*self._share(span))
            )
            u = torch.stack([torch.rand(self.source.shape, generator=g) for g in streams])
        else:
            u = self._draw(self.source.shape, span, draws)
        # The resolution of float32 next to 255: level + u never rounds up to the next level.
        return u.clamp(max=1 - 2**-16)

    def _draw(
        self, shape: tuple[int, ...], span: tuple[int, int], draws: torch.Generator
    ) -> Tensor:
        """U[0, 1) for this process's share, drawn for the batch of all: (share, *shape)."""
        first, last = (position - span[0] for position in self._share(span))
        return torch.rand(span[1] - span[0], *shape, generator=draws)[first:last]


def shuffled(size: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The endless training order: a function (first, last) -> numbers at these positions.

    Epoch e, positions [e size, (e + 1) size), is a permutation drawn from (seed, e).
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        return torch.randperm(size, generator=generator).numpy()

    def numbers(first: int, last: int) -> np.ndarray:
        parts = []
        while first < last:
            epoch, offset = divmod(first, size)
            parts.append(permutation(epoch)[offset : offset + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    return numbers


class _Reader(Dataset):
    """What a worker runs: reads a batch at once and checks it."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, numbers: np.ndarray) -> tuple[Tensor, Tensor] | DataError:
        try:
            images, labels = self.source.read(numbers)
            self._check(images, numbers)
        except DataError as error:
            return error  # raised in a worker it would arrive inside a page of traceback
        labels = torch.zeros(len(numbers), dtype=torch.int64) if labels is None else labels
        return images.contiguous(), labels

    def _check(self, images: Tensor, numbers: np.ndarray) -> None:
        source = self.source
        if images.dtype != torch.uint8 or images.shape != (len(numbers), *source.shape):
            raise DataError(
                f"{type(source).__name__} gave {images.dtype} {tuple(images.shape)} for "
                f"{len(numbers)} uint8 images of {source.shape}"
            )
        if source.levels < 256 and int(images.max()) >= source.levels:
            raise DataError(
                f"an image holds the grey value {int(images.max())}, but data.levels="
                f"{source.levels} allows 0 to {source.levels - 1}"
            )


def _identity(batch):
    return batch
