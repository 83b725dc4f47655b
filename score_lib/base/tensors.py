"""Tensor helpers: broadcasting over a batch, seeds, and noise that belongs to a sample."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Below 1 by the resolution of float32 at 255: a grey level and a share of a cell up to this never
# round up to the next level.
LARGEST_SHARE = 1 - 2**-16


def batch_mul(a: Tensor | float, x: Tensor) -> Tensor:
    """a_b x_b for each element b of a batch: a (B,), x (B, *D) -> (B, *D).

    a may be one number for all samples.

    Raises:
        ValueError: a is not (B,), nor of sides of length 1 beside B.
    """
    if not isinstance(a, Tensor):
        return a * x
    # One sample may stand for all.
    _check_coefficients(a, a.shape[0] if a.dim() and x.shape[0] == 1 else x.shape[0])
    return over_sides(a, x) * x


def over_sides(a: Tensor, x: Tensor) -> Tensor:
    """a (B,) as (B, 1, ..., 1), which broadcasts to x (B, *D): the one place that reshapes so."""
    return a.reshape(-1, *(1,) * (x.dim() - 1))


def per_sample(a: Tensor | float, like: Tensor) -> Tensor:
    """Coefficients of a process as a user's class may give them, as (B,).

    Args:
        a: (B,), or one number for all samples; sides of length 1 beside B are taken away.
        like: times (B,), or one time for all samples, (); or data (B, *D).
    Raises:
        ValueError: as in `batch_mul`.
    """
    count = like.shape[0] if like.dim() else 1
    if not isinstance(a, Tensor):
        return like.new_full((count,), a)
    _check_coefficients(a, count)
    if a.numel() == count:
        return a.reshape(count)
    return a.to(like).reshape(1).expand(count)


def _check_coefficients(a: Tensor, count: int) -> None:
    if a.numel() != 1 and not (a.numel() == a.shape[0] == count):
        raise ValueError(
            f"coefficients such as a standard deviation are one number for each sample, (B,), not "
            f"{tuple(a.shape)} for {count} samples"
        )


def wide_dtype() -> torch.dtype:
    """PyTorch's default dtype, but never half of float32: tables and times would be those of other
    noise levels."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def rows(x: Tensor) -> Tensor:
    """x (B, *D) as (B, D), also for scalars, (B,)."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)


def norms(x: Tensor) -> Tensor:
    """The 2-norm of each sample of x (B, *D), (B,)."""
    return torch.linalg.vector_norm(rows(x), dim=1)


class Constants:
    """Tensors, or None, of which a copy stays on each device, in each dtype, that was asked for."""

    def __init__(self, *tensors: Tensor | None):
        self._tensors = tensors
        self._copies: dict[tuple, tuple[Tensor | None, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors on the device of x, and in its dtype unless they are boolean."""
        return self.on(x.device, x.dtype)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple:
        """The same on a device; without a dtype, in their own."""
        if (key := (device, dtype)) not in self._copies:
            with torch.inference_mode(False):  # gradients may be recorded by them later
                self._copies[key] = tuple(
                    t if t is None else t.to(device, t.dtype if t.dtype == torch.bool else dtype)
                    for t in self._tensors
                )
        return self._copies[key]


def stratified_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B,) of draws (K, B) from K strata, and its standard error, (B,).

    All draws are at one uniform place in their strata, which moves the mean by a share of their
    rise.  A rise that is uneven from one stratum to the next counts as noise; of two strata,
    all their difference.
    """
    steps = values.diff(dim=0)
    noise = (steps.square() / 2 if len(values) == 2 else steps.diff(dim=0).square() / 6).mean(0)
    variance = noise / len(values) + steps.mean(0).square() / 12
    return values.mean(0), variance.sqrt()


def check_real(name: str, x: Tensor) -> None:
    """Refuse complex numbers, and objects other than tensors.

    Raises:
        ValueError: there are some, or x is another object.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} should be a tensor, not {type(x).__name__}: take the tensor out of a tuple or "
            "another object, and make one of numbers by torch.as_tensor"
        )
    if x.is_complex():
        raise ValueError(
            f"{name} should hold real numbers, not {x.dtype}: give real and imaginary parts as two "
            "channels, as torch.view_as_real does"
        )


def check_floats(name: str, x: Tensor) -> None:
    """Refuse anything but real floating-point numbers.

    Raises:
        ValueError: integers, or complex numbers.
    """
    check_real(name, x)
    if not x.is_floating_point():
        raise ValueError(
            f"{name} should hold floating-point numbers in the network's range, not {x.dtype}: "
            "divide bytes by 255, and use the scaler"
        )


def wide_floats(name: str, x: Tensor) -> Tensor:
    """x of real floating-point numbers; half precision becomes float32.

    Times, labels and sums follow the precision of x: in half of it they would be those of other
    noise levels, and lose small steps.

    Raises:
        ValueError: as in `check_floats`.
    """
    check_floats(name, x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score_of_data(score_fn: Callable, x: Tensor, t: Tensor) -> Tensor:
    """score_fn(x, t) itself, (B, *D).

    Raises:
        ValueError: it has another shape than x, to which it would be broadcast.
    """
    score = score_fn(x, t)
    if score.shape != x.shape:
        raise ValueError(
            f"the score has the shape {tuple(score.shape)} for x of {tuple(x.shape)}, which should "
            "be the same: where a network takes a condition beside the data, give a function of "
            "the data alone, which joins the condition to them"
        )
    return score


def check_batch(x: Tensor) -> None:
    """Refuse anything but one or more samples of real floating-point numbers.

    Raises:
        ValueError: integers, complex numbers, or no sample, which has no mean loss.
    """
    check_floats("a batch", x)
    if not len(x):
        raise ValueError(f"a batch should hold one sample or more, not {tuple(x.shape)}")


def normal_noise(noise: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The source of standard normal noise that a caller gave, or `torch.randn_like`.

    Its calls raise ValueError where the caller's gives complex numbers, or another shape, which
    would be broadcast: samples would share their noise.
    """
    if noise is None:
        return torch.randn_like

    def checked(like: Tensor) -> Tensor:
        z = noise(like)
        check_real("noise", z)
        if z.shape != like.shape:
            raise ValueError(
                f"noise like x of {tuple(like.shape)} should have its shape, not {tuple(z.shape)}, "
                "as that of torch.randn_like has"
            )
        return z

    return checked


def data_shape(config) -> tuple[int, ...]:
    """The shape *D of one datum that a complete config describes.

    It is `data.shape` or, where that is (), the (C, H, W) of an image: `data.image_size` is the
    side of a square, the height if `data.image_width` is not 0, or in a config file (height,
    width).
    """
    if config.data.shape:
        return tuple(map(int, config.data.shape))
    size, width = config.data.image_size, config.data.image_width
    height, width = (size, width or size) if isinstance(size, int) else size
    return config.data.num_channels, int(height), int(width)


def image_shape(config) -> tuple[int, int, int]:
    """(C, H, W) of the images that a complete config describes.

    Raises:
        ValueError: the data are no images.
    """
    shape = data_shape(config)
    if len(shape) != 3:
        raise ValueError(
            f"images are needed, (C, H, W), but data.shape is {shape}: set data.shape = (), or "
            "choose a network of other data, such as mlp or set_transformer"
        )
    return shape


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of its parts, such as (seed, "order", epoch).

    Different parts give streams that do not overlap in practice; consecutive integers as seeds
    would not promise that.
    """
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which the generator of the CPU starts from a seed; then it goes on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def bytes_of(x: Tensor) -> np.ndarray:
    """The values of a tensor as bytes, for hashes; NumPy lacks some of PyTorch's types."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def some_of(count: int, most: int, purpose: str) -> Tensor:
    """Sorted numbers of all of `count` examples or, if `most` is less, of so many at random.

    The choice is always the same for a purpose.  Neither the first examples nor evenly spaced ones
    are like the others where data are stored class by class, or with classes in turn.
    """
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed(purpose))
    return torch.randperm(count, generator=generator)[:most].sort().values


class SampleNoise:
    """Standard normal noise with one stream per sample.

    Called like `torch.randn_like`, it returns (B, *D) noise whose row b is the next piece of the
    stream of sample `indices[b]`: a function of the seed, that index and how often it was called,
    but not of the batch that the sample happens to be in.

    Args:
        seed: seed of the run.
        indices: (B,) numbers of the samples in the batch.
        device: where noise is drawn; a CPU and a GPU give different (equally good) streams.
    """

    # Draws made at once from each stream, and numbers that they may hold: few launches for small
    # images, little memory for large ones.  They are part of the definition of a stream.
    MOST_DRAWS, MOST_NUMBERS = 64, 1 << 14

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._streams = [
            torch.Generator(self.device).manual_seed(derive_seed(seed, "sample", int(k)))
            for k in indices
        ]
        self._block: Tensor | None = None
        self._used = 0

    def __call__(self, like: Tensor) -> Tensor:
        """Noise of the shape, dtype and device of `like` (B, *D)."""
        if like.shape[0] != len(self._streams):
            raise ValueError(
                f"noise for {len(self._streams)} samples was asked for a batch of {like.shape[0]}"
            )
        row = like.shape[1:]
        if self._block is None or self._block.shape[2:] != row or self._used == len(self._block):
            self._refill(row)
        self._used += 1
        return self._block[self._used - 1].to(like)

    def _refill(self, row: torch.Size) -> None:
        draws = max(1, min(self.MOST_DRAWS, self.MOST_NUMBERS // max(1, row.numel())))
        like = {"dtype": wide_dtype(), "device": self.device}
        rows = [torch.randn(draws, *row, generator=g, **like) for g in self._streams]
        self._block, self._used = torch.stack(rows, dim=1), 0
