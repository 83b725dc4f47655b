"""The operators: masks, random projections, and products of a matrix for each axis."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from score_lib.base.tensors import Constants, batch_mul, check_real, derive_seed
from score_lib.inverse.operators import (
    OPERATORS,
    LinearOperator,
    Shape,
    Weight,
    checked_weights,
    register_operator,
    sides_of,
)

get_operator, build_operator = OPERATORS.get, OPERATORS.build


class PartialIsometry(LinearOperator):
    """Every nonzero singular value is one: A^+ = A^T."""

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        weights = checked_weights(weight, x.new_ones(1, 1), len(x))
        return batch_mul(weights.reshape(-1), self.adjoint(self.apply(x)))

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


class Mask(PartialIsometry):
    """Some entries are known: inpainting.  y has the shape of x, and zeros where x is open.

    Entries are chosen, not multiplied: nothing, not even NaN, leaks from under the mask.

    Args:
        shape: D.
        mask: 1 where known and 0 elsewhere, a tensor or an array; of a shape that broadcasts to D,
            or (B, *D) with a mask for each sample, which then fits only batches of that size.
    Raises:
        ValueError: the mask has another shape or other values.
    """

    def __init__(self, shape: Shape, mask: Tensor):
        super().__init__(shape)
        self.mask = _checked_mask(torch.as_tensor(mask), self.shape)
        self._mask = Constants(self.mask)

    def apply(self, x: Tensor) -> Tensor:
        return self._choose(self.check_x(x), 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._choose(self.check_y(y), 0.0)

    observed = adjoint

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        return self._choose(self.check_y(y), fill)

    def _choose(self, x, fill):
        (mask,) = self._mask.like(x)
        if len(mask) not in (1, len(x)):
            raise ValueError(f"there are masks for {len(mask)} samples, but {len(x)} samples")
        return torch.where(mask, x, fill)

    @classmethod
    def box(cls, shape: Shape, box: Sequence[int] = ()) -> "Mask":
        """A box is open.

        Args:
            shape: D.
            box: (top, left, height, width) for images; in general where it starts along each axis
                of D but the first, or along an only one, then how long it is.  Default: half of
                each side, in the centre.
        Raises:
            ValueError: the box does not lie in the image, or lies between pixels.
        """
        sides = sides_of(shape)
        box = tuple(box) or _central_half(sides)
        starts, lengths = box[: len(sides)], box[len(sides) :]
        inside = len(box) == 2 * len(sides) and all(
            0 <= a < a + k <= n for a, k, n in zip(starts, lengths, sides, strict=True)
        )
        if not (inside and all(isinstance(value, Integral) for value in box)):
            raise ValueError(
                f"a box is where it starts along each of the sides {sides}, such as top and left, "
                f"then how long it is, such as height and width, inside of them and in whole "
                f"numbers; not {box}"
            )
        mask = torch.ones(sides, dtype=torch.bool)
        mask[tuple(slice(a, a + k) for a, k in zip(starts, lengths, strict=True))] = False
        return cls(shape, mask)

    @classmethod
    def random(cls, shape: Shape, keep: float = 0.25, seed: int = 0) -> "Mask":
        """Pixels at random are known, the same in all channels.

        Args:
            shape: D.
            keep: share of pixels that are known, in (0, 1]; at least one is.  With a larger share
                the same pixels, and others, are known.
            seed: the mask is a function of it.
        Raises:
            ValueError: the share is not in (0, 1].
        """
        if not 0 < keep <= 1:
            raise ValueError(f"the share of pixels to keep lies in (0, 1], it cannot be {keep}")
        sides = sides_of(shape)
        order = torch.randperm(math.prod(sides), generator=_generator(seed, "mask"))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: max(1, round(keep * len(order)))]] = True
        return cls(shape, mask.reshape(sides))

    @classmethod
    def half(cls, shape: Shape) -> "Mask":
        """The end of the last axis of D is open, such as the right half of images."""
        return cls(shape, torch.arange(shape[-1]) < (shape[-1] + 1) // 2)


register_operator(Mask, name="half", build=Mask.half)
register_operator(Mask, name="box", build=Mask.box, options={"box": "control.box"})
register_operator(
    Mask,
    name="random_mask",
    build=Mask.random,
    options={"keep": "control.keep", "seed": "control.operator_seed"},
)


@register_operator(
    name="projection",
    options={"measurements": "control.num_measurements", "seed": "control.operator_seed"},
)
class RandomProjection(PartialIsometry):
    """A few random directions are known: compressed sensing with orthonormal rows.

    Args:
        shape: D.
        measurements: number of rows; 0: a quarter of the dimensions of D.
        seed: the rows are a function of it, and more measurements begin with the same ones.
    Raises:
        ValueError: there are more measurements than dimensions, or more numbers than are held.
    """

    MOST_NUMBERS = 1 << 30  # 8 GiB in float64

    def __init__(self, shape: Shape, measurements: int = 0, seed: int = 0):
        super().__init__(shape)
        dimensions = math.prod(self.shape)
        measurements = measurements or max(1, dimensions // 4)
        if not 1 <= measurements <= dimensions:
            raise ValueError(
                f"a projection of {dimensions} dimensions has 1 to {dimensions} measurements, "
                f"not {measurements}"
            )
        if measurements * dimensions > self.MOST_NUMBERS:
            raise ValueError(
                f"{measurements} random directions in {dimensions} dimensions do not fit into "
                f"memory: {self.MOST_NUMBERS // dimensions} would"
            )
        self.measured_shape = (measurements,)
        self._rows = Constants(_orthonormal_rows(measurements, dimensions, seed))

    def apply(self, x: Tensor) -> Tensor:
        (rows,) = self._rows.like(x)
        return self.check_x(x).reshape(len(x), -1) @ rows.mT

    def adjoint(self, y: Tensor) -> Tensor:
        (rows,) = self._rows.like(y)
        return (self.check_y(y) @ rows).reshape(len(y), *self.shape)


def _central_half(sides: tuple[int, ...]) -> tuple[int, ...]:
    """A box of half of each side, as in `Mask.box`."""
    lengths = [max(1, n // 2) for n in sides]
    return (*((n - k) // 2 for n, k in zip(sides, lengths, strict=True)), *lengths)


def _checked_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as booleans, (1, *D) or (B, *D)."""
    per_sample = mask.dim() == len(shape) + 1
    try:
        expanded = mask.expand(mask.shape[0] if per_sample else 1, *shape)
    except RuntimeError as error:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, which does not fit images of shape {shape}"
        ) from error
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"a mask holds only 1 (known) and 0 (open), not {wrong[0].item():.4g}: a pixel is "
            "known or not, as by mask > 0.5"
        )
    return expanded != 0


def _generator(seed: int, use: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "operator", use))


def _orthonormal_rows(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns), uniformly distributed: the Gram-Schmidt process on normal vectors."""
    generator = _generator(seed, "projection")
    # Row by row, so that the first rows do not depend on their number.
    normal = torch.stack(
        [torch.randn(columns, generator=generator, dtype=torch.float64) for _ in range(rows)]
    )
    q, r = torch.linalg.qr(normal.mT)
    # LAPACK leaves the signs open.
    return (q * r.diagonal().sign()).mT


class Separable(LinearOperator):
    """One matrix along each axis of x: a blur, a lower resolution, a mix of channels.

    The singular values are the products of those of the matrices.

    Args:
        shape: D.
        matrices: for each axis of D a matrix (m, n), n being its length, or None to leave it alone.
    Raises:
        ValueError: a matrix does not fit its axis.
    """

    def __init__(self, shape: Shape, matrices: Sequence[Tensor | None]):
        super().__init__(shape)
        matrices = [None if m is None else _float64(m) for m in matrices]
        self.measured_shape = _measured_shape(self.shape, matrices)
        left, d, right = zip(*map(_svd, matrices), strict=True) if matrices else ((), (), ())
        d = _outer(d)
        kept = d > self.rcond * d.max()
        self._matrices = Constants(*matrices)
        self._left, self._right = Constants(*left), Constants(*right)
        # In place of the values that count as zero stands one that is safe to divide by.
        self._spectrum = Constants(torch.where(kept, d, d.max()), kept)

    def apply(self, x: Tensor) -> Tensor:
        return _along_axes(self.check_x(x), self._matrices.like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return _along_axes(self.check_y(y), self._matrices.like(y), transpose=True)

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        d, kept = self._spectrum.like(x)
        right = self._right.like(x)
        z = _along_axes(self.check_x(x), right, transpose=True)
        weights = checked_weights(weight, d.reshape(1, -1), len(x)).reshape(-1, *d.shape)
        return _along_axes(torch.where(kept, weights * z, 0.0), right)

    def pinv(self, y: Tensor) -> Tensor:
        # Not by way of A^T y, whose rounding would be divided by d^2.
        d, kept = self._spectrum.like(y)
        z = _along_axes(self.check_y(y), self._left.like(y), transpose=True)
        return _along_axes(torch.where(kept, z / d, 0.0), self._right.like(y))


class _BlockMean(Separable):
    """The mean over blocks, whose length is given for each axis of D."""

    def __init__(self, shape: Shape, blocks: Sequence[int]):
        self.blocks = tuple(blocks)
        super().__init__(shape, [_block_mean(n, b) for n, b in zip(shape, blocks, strict=True)])

    def pinv(self, y: Tensor) -> Tensor:
        """Every block filled with its mean."""
        x = self.check_y(y)
        for axis, block in enumerate(self.blocks, start=1):
            x = x.repeat_interleave(block, dim=axis)
        return x


@register_operator(name="super_resolution", options={"factor": "control.factor"})
class SuperResolution(_BlockMean):
    """A lower resolution is known: the mean over blocks of pixels.

    Args:
        shape: D; every axis but the first is reduced, and an only one.
        factor: length of a block along each of these axes.
    Raises:
        ValueError: the factor does not divide a side.
    """

    def __init__(self, shape: Shape, factor: int = 2):
        sides = sides_of(shape)
        if factor < 1 or any(n % factor for n in sides):
            raise ValueError(
                f"super-resolution by a factor {factor} needs sides that it divides, not {sides}"
            )
        super().__init__(shape, [*[1] * (len(shape) - len(sides)), *[factor] * len(sides)])


@register_operator(name="gray")
class GrayScale(_BlockMean):
    """The mean over the channels, the first axis of D, is known; it keeps that axis."""

    def __init__(self, shape: Shape):
        super().__init__(shape, [shape[0], *[1] * (len(shape) - 1)])


@register_operator(name="blur", options={"std": "control.blur_std"})
class GaussianBlur(Separable):
    """Convolution with a Gaussian, along every axis but the first, or along an only one.

    The image goes on beyond its border as its mirror image.  So A is symmetric: it keeps a
    constant, as rows of weights that sum to one would, and also keeps the mean of any image.

    Args:
        shape: D.
        std: standard deviation of the kernel, in pixels.
    Raises:
        ValueError: the standard deviation is not positive, or far beyond the image.
    """

    def __init__(self, shape: Shape, std: float = 1.0):
        sides = sides_of(shape)
        # Of a wider one the mean alone is left, and its kernel would not fit in memory.
        if not 0 < std <= 10 * max(sides):
            raise ValueError(
                f"a blur needs a standard deviation above 0 pixels, not {std}, and of at most 10 "
                f"times the longest side, {max(sides)} pixels"
            )
        super().__init__(
            shape, [*[None] * (len(shape) - len(sides)), *(_mirrored_blur(n, std) for n in sides)]
        )

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """The blurred image itself: its pseudo-inverse shows mostly noise."""
        return self.check_y(y)


class MatrixOperator(LinearOperator):
    """Any matrix, for x that is small enough.

    Args:
        shape: D.
        matrix: (M, n), n being the number of entries of D, in the order of `x.flatten()`.
    Raises:
        ValueError: the matrix does not fit D.
    """

    def __init__(self, shape: Shape, matrix: Tensor):
        super().__init__(shape)
        self._flat = Separable([math.prod(self.shape)], [matrix])
        self.measured_shape = self._flat.measured_shape

    def apply(self, x: Tensor) -> Tensor:
        return self._flat.apply(_flatten(self.check_x(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._unflatten(self._flat.adjoint(self.check_y(y)))

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        return self._unflatten(self._flat.spectral(_flatten(self.check_x(x)), weight))

    def pinv(self, y: Tensor) -> Tensor:
        return self._unflatten(self._flat.pinv(self.check_y(y)))

    def _unflatten(self, x):
        return x.reshape(len(x), *self.shape)


def _along_axes(x: Tensor, matrices: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """x (B, *D) with each axis of D multiplied by its matrix or its transpose."""
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is not None:
            x = (x.movedim(axis, -1) @ (matrix if transpose else matrix.mT)).movedim(-1, axis)
    # Noise like x is drawn in the order of x in memory, which must be the same for all operators.
    return x.contiguous()


def _svd(matrix: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """U (m, r), d (r,) and V (n, r); for None, an identity that is not written out."""
    if matrix is None:
        return None, torch.ones(1, dtype=torch.float64), None
    left, d, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, d, right.mT


def _outer(factors: Sequence[Tensor]) -> Tensor:
    """The products of the entries of vectors: an axis for each of them."""
    product = torch.ones((), dtype=torch.float64)
    for values in factors:
        product = product[..., None] * values
    return product


def _measured_shape(shape: tuple[int, ...], matrices: Sequence[Tensor | None]) -> tuple[int, ...]:
    fits = len(matrices) == len(shape) and all(
        m is None or (m.dim() == 2 and len(m) and m.shape[1] == n)
        for m, n in zip(matrices, shape, strict=True)
    )
    if not fits:
        given = [None if m is None else tuple(m.shape) for m in matrices]
        raise ValueError(
            f"x of shape {shape} needs for each axis a matrix with as many columns as it is long "
            f"and at least one row, or None; not matrices of shapes {given}"
        )
    return tuple(n if m is None else m.shape[0] for m, n in zip(matrices, shape, strict=True))


def _float64(matrix: Tensor) -> Tensor:
    matrix = torch.as_tensor(matrix)
    check_real("a matrix", matrix)
    return matrix.detach().to("cpu", torch.float64)


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _block_mean(length: int, block: int) -> Tensor | None:
    """The matrix (length / block, length) that takes the mean of each block."""
    if block == 1:
        return None
    eye = torch.eye(length // block, dtype=torch.float64)
    return eye.repeat_interleave(block, dim=1) / block


def _mirrored_blur(length: int, std: float) -> Tensor:
    """The symmetric matrix of a convolution with a Gaussian, cut off at four standard deviations.

    Entries beyond an end are those of ..., 1, 0, 0, 1, ..., n - 1, n - 1, n - 2, ...
    """
    radius = math.ceil(4 * std)
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offset.double() / std) ** 2)
    index = (torch.arange(length)[:, None] + offset) % (2 * length)
    index = torch.minimum(index, 2 * length - 1 - index)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, index, (kernel / kernel.sum()).expand(length, -1))
