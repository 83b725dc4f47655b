"""Streams: batches of a source, whose order and random draws are functions of the position."""

import atexit
import contextlib
import functools
import math
import multiprocessing.util
import os
import pickle
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from score_lib.base.distributed import local_world
from score_lib.base.preemption import born_deaf, held, leave_signals_to_parent
from score_lib.base.tensors import LARGEST_SHARE, derive_seed
from score_lib.base.threads import cores
from score_lib.data.augment import augment
from score_lib.data.sources import DataError, Source, check_finite

# Where data are read and draws made, whatever `torch.set_default_device` says.
ON_CPU = torch.device("cpu")


class ImageStream:
    """Batches {"image": (B, *D), "label": (B,) int64} from a source.

    Grey levels become float32 in [0, 1]; continuous values stay as they are stored.  With
    augmentation there are also "features": (B, 9) float32, the changes of each image.

    In training the stream is endless: random permutations of the examples, concatenated and cut
    into batches that may straddle two of them, so that no example is dropped.  In evaluation an
    iteration is one pass in the order of the source; the last batch may be smaller.

    Every random draw is a function of (seed, position), whatever the workers, earlier iterations
    and number of processes, so `seek` resumes a run exactly.  Draws are made on the CPU, so that
    the data do not depend on the device.  In evaluation the dequantization noise of an example is
    a function of the seed and its number.

    Args:
        batch_size: examples in a batch, over all ranks.
        seed: of order, flips and noise; may be set between passes, for fresh noise.
        random_flip: mirror each image left to right with probability 1/2.
        permute: put the points of each set (N, C) into an order of their own.
        augment: probability of each change of `augment`, of which "features" tell; 0 makes none,
            with features of 0; None leaves out the features, too.  With `random_flip`, the
            features tell which images are mirrored.
        dequantize: uniform dequantization, (u + (levels - 1) x) / levels with u ~ U[0, 1).
        as_uint8: unscaled uint8 images in 0 ... 255, for feature statistics.
        num_workers: processes that decode, at most one per core that this one may use (ranks on one
            machine divide them); 0 decodes in this process.
        worker_init: called in each of them; by default they ignore signals to stop, since they
            end with this process, which may need them for its last step.
        device: of the batches; None is the CPU.
        rank, world: rank of this process and number of ranks.  Rank r gets the r-th contiguous
            share of each batch; empty shares of a last evaluation batch are left out.

    Attributes:
        position: examples consumed by all ranks; the next `iter()` starts here.  In training it
            advances when a batch is yielded; in evaluation it returns to 0.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        evaluation: bool = False,
        random_flip: bool = False,
        permute: bool = False,
        augment: float | None = None,
        dequantize: bool = False,
        as_uint8: bool = False,
        num_workers: int = 0,
        worker_init: Callable[[int], None] | None = leave_signals_to_parent,
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
        if as_uint8 and (random_flip or permute or augment or dequantize):
            raise ValueError("as_uint8 excludes random_flip, permute, augment and dequantize")
        if source.dtype.is_floating_point and (as_uint8 or augment or dequantize):
            raise DataError(
                "these data are continuous values: they have no grey levels to dequantize, to "
                "augment or to count as bytes"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.evaluation, self.random_flip, self.augment = evaluation, random_flip, augment
        self.permute = permute
        self.dequantize, self.as_uint8 = dequantize, as_uint8
        self.num_workers, self.worker_init = num_workers, worker_init
        self.rank, self.world = rank, world
        self.position = 0
        self.to(device)

    def to(self, device: torch.device | str | None) -> "ImageStream":
        """Deliver batches on a device, from the next `iter()` on; returns the stream itself."""
        self.device = None if device is None else torch.device(device)
        return self

    def seek(self, position: int) -> None:
        """Start the next `iter()` after `position` examples (over all ranks)."""
        if position < 0 or (self.evaluation and position > len(self.source)):
            raise ValueError(f"position {position} is not in 0 ... {len(self.source)} examples")
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
            sampler=self._numbers(start),
            batch_size=None,  # the sampler gives the numbers of a whole batch
            worker_init_fn=self.worker_init,
            num_workers=min(self.num_workers, max(1, cores() // local_world())),
            multiprocessing_context=self.source.start_method if self.num_workers else None,
            pin_memory=self.device is not None and self.device.type == "cuda",
            # By default a loader draws from the global generator, which would change its state.
            generator=torch.Generator(),
        )
        for span, example in zip(self._spans(start), _of_workers(loader), strict=True):
            if isinstance(example, DataError):
                raise example
            if not self.evaluation:
                self.position = span[1]
            with ON_CPU:
                batch = self._finish(*example, span)
            yield batch

    def _spans(self, start: int) -> Iterator[tuple[int, int]]:
        """Positions [first, last) of each batch of which this rank has a share."""
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
        """Numbers of this rank's examples, batch by batch."""
        examples = np.arange if self.evaluation else shuffled(len(self.source), self.seed)
        for span in self._spans(start):
            yield examples(*self._share(span))

    def _finish(self, images: Tensor, labels: Tensor, span: tuple[int, int]) -> dict[str, Tensor]:
        """Flip, permute, dequantize, scale and augment a collated batch, on the device."""
        device = self.device or images.device
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "augment", span[0]))
        if self.random_flip and self.augment is None:  # which flips by itself
            flip = (self._draw((), span, draws) < 0.5).to(device, non_blocking=True)
            images = torch.where(flip.reshape(-1, 1, 1, 1), images.flip(-1), images)
        if self.permute:
            order = self._draw(self.source.shape[:1], span, draws).argsort(dim=1)
            order = order.to(device, non_blocking=True)[:, :, None].expand_as(images)
            images = images.gather(1, order)
        batch = {"image": self._scaled(images, span, draws), "label": labels}
        if self.augment is None or self.as_uint8:
            return batch
        return batch | self._augmented(batch["image"], span, draws)

    def _scaled(self, images: Tensor, span: tuple[int, int], draws: torch.Generator) -> Tensor:
        """Grey levels in [0, 1], or bytes in 0 ... 255; continuous values as they are."""
        levels = self.source.levels
        if images.is_floating_point():
            return images
        if self.dequantize:
            u = self._noise(span, draws).to(images.device, non_blocking=True)
            return (images + u) / levels
        if not self.as_uint8:
            return images.float() / (levels - 1)
        return images if levels == 256 else (images * (255 / (levels - 1))).round().byte()

    def _augmented(
        self, images: Tensor, span: tuple[int, int], draws: torch.Generator
    ) -> dict[str, Tensor]:
        """This rank's images after augmentation, and their features."""
        share = {"batch": span[1] - span[0], "first": self._share(span)[0] - span[0]}
        images, features = augment(images, self.augment, draws, mirror=self.random_flip, **share)
        return {"image": images, "features": features}

    def _noise(self, span: tuple[int, int], draws: torch.Generator) -> Tensor:
        """U[0, 1) for dequantization: (share, *D)."""
        if self.evaluation:
            return uniform_noise(self.seed, range(*self._share(span)), self.source.shape)
        return self._draw(self.source.shape, span, draws).clamp(max=LARGEST_SHARE)

    def _draw(
        self, shape: tuple[int, ...], span: tuple[int, int], draws: torch.Generator
    ) -> Tensor:
        """U[0, 1) for this rank's share, drawn for the whole batch: (share, *shape)."""
        first, last = (position - span[0] for position in self._share(span))
        return torch.rand(span[1] - span[0], *shape, generator=draws)[first:last]


def uniform_noise(seed: int, numbers: range, shape: tuple[int, ...]) -> Tensor:
    """U[0, 1) that dequantizes the examples of these numbers in an evaluation: (n, *shape)."""
    streams = (
        torch.Generator().manual_seed(derive_seed(seed, "dequantize", number)) for number in numbers
    )
    u = torch.stack([torch.rand(shape, generator=generator) for generator in streams])
    return u.clamp(max=LARGEST_SHARE)


def shuffled(size: int, seed: int) -> Callable[[int, int], np.ndarray]:
    """The endless training order, as a function (first, last) -> numbers at these positions.

    Epoch e, at positions [e size, (e + 1) size), is a permutation drawn from (seed, e).
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        return torch.randperm(size, generator=generator, device="cpu").numpy()

    def numbers(first: int, last: int) -> np.ndarray:
        parts = []
        while first < last:
            epoch, offset = divmod(first, size)
            parts.append(permutation(epoch)[offset : offset + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    return numbers


def _of_workers(loader: DataLoader) -> Iterator:
    """The batches of a loader; its workers end with the program, also in the midst of a pass.

    Raises:
        DataError: a worker has ended, as the system ends it for want of memory; or the source
            cannot be sent to one.
    """
    with ON_CPU, _known_at_exit(loader) if loader.num_workers else contextlib.nullcontext():
        try:
            examples = iter(loader)  # it draws a number with the CPU's generator
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            method = (loader.multiprocessing_context or multiprocessing).get_start_method()
            if not loader.num_workers or method == "fork":
                raise
            raise DataError(
                f"the data cannot be sent to processes that are started by {method!r}: read them "
                f"without such processes by data.num_workers=0, or let Python fork them ({error})"
            ) from error
    try:
        yield from examples
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"a process that reads the data has ended: try a smaller data.num_workers, or 0 to "
            f"read without such processes ({reason})"
        ) from error


@contextlib.contextmanager
def _known_at_exit(loader: DataLoader) -> Iterator[None]:
    """Context in which workers are started that end with this process: also those of which the
    loader knows nothing yet when the start of another one fails."""
    # The folder of their sockets.  Made here it is removed with this process; workers that are
    # killed would each leave one behind.
    multiprocessing.util.get_temp_dir()
    leaves = loader.worker_init_fn is leave_signals_to_parent
    known, others = _ended_at_exit(os.getpid()), set(multiprocessing.active_children())
    try:
        with (
            held(),
            _same_handler(),
            born_deaf() if leaves else contextlib.nullcontext(),
        ):
            yield
    finally:
        started = (child for child in multiprocessing.active_children() if child not in others)
        known[:] = [*filter(multiprocessing.Process.is_alive, known), *started]


@contextlib.contextmanager
def _same_handler() -> Iterator[None]:
    """Context that leaves the handler of SIGCHLD as it was.

    That of PyTorch raises an error wherever the program is when a worker ends, as in the midst of a
    step.  Whoever waits for its batch learns of it within seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # only POSIX systems have it
    before = number and signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(number) is not before:
            signal.signal(number, before)


@functools.cache
def _ended_at_exit(owner: int) -> list[multiprocessing.Process]:
    """Workers that are killed when the process of this id, which started them, ends.

    Python would send them SIGTERM, which they ignore, and wait without end.
    """
    workers = []

    def end() -> None:
        if os.getpid() != owner:  # forked from it
            return
        for worker in workers:
            worker.kill()

    atexit.register(end)  # called before Python's own, which was registered first
    return workers


def _handed_over(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In a worker, tensors in memory that the process which waits for them can see.

    Otherwise a thread of the worker puts them there: where that fails, the batch is lost, and
    training would wait for it without end.

    Raises:
        DataError: there is no room.
    """
    if get_worker_info() is None:
        return tensors
    try:
        return tuple(tensor.share_memory_() for tensor in tensors)
    except (RuntimeError, OSError) as error:
        raise DataError(
            "a process that reads the data cannot hand them over, for want of shared memory: "
            "enlarge /dev/shm, as by --shm-size of docker run, or set a smaller data.num_workers, "
            f"or 0 to read without such processes ({error})"
        ) from error


def _is_known_elsewhere(kind: type) -> bool:
    """Whether other processes find a class by its name, as they do not find one of a config.

    A thread of the worker would fail to send it: the batch is lost then, and waited for without
    end.
    """
    try:
        pickle.dumps(kind)
    except (pickle.PicklingError, AttributeError):
        return False
    return True


class _Reader(Dataset):
    """Reads and checks a batch at once, in a worker."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, numbers: np.ndarray) -> tuple[Tensor, Tensor] | DataError:
        try:
            with ON_CPU:
                images, labels = self.source.read(numbers)
                self._check(images, numbers)
                labels = self._checked(labels, len(numbers))
                return _handed_over(images.contiguous(), labels)
        except DataError as error:  # raised in a worker, it would be wrapped in a long traceback
            return error if get_worker_info() is None else DataError(str(error))
        except Exception as error:
            if get_worker_info() is None or _is_known_elsewhere(type(error)):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _checked(self, labels: Tensor | None, count: int) -> Tensor:
        """Labels (count,); zeros where the source has none."""
        if labels is None:
            return torch.zeros(count, dtype=torch.int64)
        labels, classes = torch.as_tensor(labels), self.source.num_classes
        whole = not (labels.is_floating_point() or labels.is_complex())
        if not whole or labels.shape != (count,):
            raise DataError(
                f"{type(self.source).__name__} gave labels of {labels.dtype} {tuple(labels.shape)} "
                f"for {count} examples: labels are whole numbers, ({count},), or None"
            )
        wrong = labels[(labels < 0) | (labels >= classes)]
        if classes > 1 and len(wrong):
            raise DataError(
                f"{type(self.source).__name__} gave the label {int(wrong[0])}, but its num_classes "
                f"= {classes} allows 0 to {classes - 1}"
            )
        return labels.long()

    def _check(self, images: Tensor, numbers: np.ndarray) -> None:
        source = self.source
        if images.dtype != source.dtype or images.shape != (len(numbers), *source.shape):
            kind = str(source.dtype).removeprefix("torch.")
            raise DataError(
                f"{type(source).__name__} gave {images.dtype} {tuple(images.shape)} for "
                f"{len(numbers)} {kind} examples of {source.shape}"
            )
        if images.is_floating_point():
            check_finite(images, numbers)
        elif source.levels < 256 and int(images.max()) >= source.levels:
            raise DataError(
                f"an image holds the grey value {int(images.max())}, but data.levels="
                f"{source.levels} allows 0 to {source.levels - 1}"
            )
