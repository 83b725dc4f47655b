"""Linear measurements y = A x + sigma_y n: what is known of x in an inverse problem.

An operator is one class.  `apply` and `adjoint` are A and its transpose; methods that need more
ask for `spectral`, which weights the singular values d of A = U diag(d) V^T:

    @register_operator(name="every_other")
    class EveryOther(Separable):
        def __init__(self, shape):
            super().__init__(shape, [*[None] * (len(shape) - 1), torch.eye(shape[-1])[::2]])

Throughout, x is (B, *D) and y is (B, *M).  What an operator holds is computed once, in float64,
and used in the dtype and on the device of its argument.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base.registry import Registry
from score_lib.base.tensors import batch_mul, derive_seed

_OPERATORS = Registry("operator")

register_operator, get_operator = _OPERATORS.register, _OPERATORS.get

Shape = Sequence[int]
Weight = Callable[[Tensor], Tensor]


def registered_operators() -> list[str]:
    """Names of the operators that a config can ask for."""
    return list(_OPERATORS)


class LinearOperator(abc.ABC):
    """y = A x, for x of one shape.

    Abstract are only `apply` and `adjoint`.

    Args:
        shape: D, such as (C, H, W).
        measured_shape: M; default: as D.
    Attributes:
        rcond: singular values up to rcond times the largest one count as zero, in every dtype.
            What a blur makes smaller than that is rounding in float32, which its inverse would
            enlarge until it hides the rest.
    """

    rcond = 1e-5

    def __init__(self, shape: Shape, measured_shape: Shape | None = None):
        self.shape = tuple(int(n) for n in shape)
        self.measured_shape = self.shape if measured_shape is None else tuple(measured_shape)

    @classmethod
    def from_config(cls, config, shape: Shape) -> LinearOperator:
        """The operator for x of a shape D, with the parameters in `config.control`."""
        return cls(shape)

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x, (B, *M).  ValueError: x is not (B, *D)."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *D).  ValueError: y is not (B, *M)."""

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        """V w(d) V^T x, (B, *D): x with weights along the right singular vectors of A.

        Args:
            x: (B, *D).
            weight: function, entry by entry, of the nonzero singular values d, (1, R), giving
                weights (1, R) or (B, R); coefficients (B,) of the samples enter it as `s[:, None]`.
                Equal singular values may be given once.  What A maps to zero has weight 0.
        Raises:
            NotImplementedError: the singular values are not known.
            ValueError: the weights have another shape.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not know its singular values: define spectral(x, weight), "
            "or choose a method that needs only apply and adjoint"
        )

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, (B, *D): of all x for which |y - A x| is least, the smallest."""
        return self.spectral(self.adjoint(y), lambda d: d**-2)

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x, (B, *D): the part of x that A sees."""
        return self.spectral(x, torch.ones_like)

    def gram(self, y: Tensor) -> Tensor:
        """A A^T y, (B, *M)."""
        return self.apply(self.adjoint(y))

    def observed(self, y: Tensor) -> Tensor:
        """y (B, *M) with zeros where nothing is measured; by default every entry is."""
        return y

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """What shows a person the measurement, (B, *D), with `fill` where nothing is known.

        By default A^+ y, or A^T y where the singular values are not known.
        """
        has_spectrum = type(self).spectral is not LinearOperator.spectral
        return self.pinv(y) if has_spectrum else self.adjoint(y)

    def check_x(self, x: Tensor) -> Tensor:
        """x itself.  ValueError: it is not (B, *D)."""
        return self._check(x, self.shape, "x")

    def check_y(self, y: Tensor) -> Tensor:
        """y itself.  ValueError: it is not (B, *M)."""
        return self._check(y, self.measured_shape, "y")

    def _check(self, tensor, shape, name):
        if tensor.dim() == 0 or tuple(tensor.shape[1:]) != shape:
            expected = ", ".join(map(str, ("B", *shape)))
            raise ValueError(
                f"{type(self).__name__} takes {name} of shape ({expected}), "
                f"not {tuple(tensor.shape)}"
            )
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape})"


def measure(
    operator: LinearOperator,
    x: Tensor,
    noise_std: float = 0.0,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y = A x + sigma_y n.

    Args:
        operator: A.
        x: (B, *D).
        noise_std: sigma_y; without noise none is drawn.
        noise: where standard normal noise comes from; called like `torch.randn_like`.
    Returns:
        y (B, *M); there is no noise where nothing is measured.
    Raises:
        ValueError: the standard deviation is negative, or x does not fit the operator.
    """
    if noise_std < 0:
        raise ValueError(f"the noise's standard deviation is 0 or more, not {noise_std}")
    y = operator.apply(x)
    if noise_std == 0:
        return y
    return y + noise_std * operator.observed((noise or torch.randn_like)(y))


# --- Operators by their singular value decomposition ----------------------------------------------


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
        self._matrices = _Constants(*matrices)
        self._left, self._right = _Constants(*left), _Constants(*right)
        # In place of the values that count as zero stands one that is safe to divide by.
        self._spectrum = _Constants(torch.where(kept, d, d.max()), kept)

    def apply(self, x: Tensor) -> Tensor:
        return _along_axes(self.check_x(x), self._matrices.like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return _along_axes(self.check_y(y), self._matrices.like(y), transpose=True)

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        d, kept = self._spectrum.like(x)
        right = self._right.like(x)
        z = _along_axes(self.check_x(x), right, transpose=True)
        weights = _weights(weight, d.reshape(1, -1), len(x)).reshape(-1, *d.shape)
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


@register_operator(name="super_resolution")
class SuperResolution(_BlockMean):
    """A lower resolution is known: the mean over blocks of pixels.

    Args:
        shape: D; every axis but the first is reduced, and an only one.
        factor: length of a block along each of these axes.
    Raises:
        ValueError: the factor does not divide a side.
    """

    def __init__(self, shape: Shape, factor: int = 2):
        sides = _sides(shape)
        if factor < 1 or any(n % factor for n in sides):
            raise ValueError(
                f"super-resolution by a factor {factor} needs sides that it divides, not {sides}"
            )
        super().__init__(shape, [*[1] * (len(shape) - len(sides)), *[factor] * len(sides)])

    @classmethod
    def from_config(cls, config, shape: Shape) -> SuperResolution:
        return cls(shape, config.control.get("factor", 2))


@register_operator(name="gray")
class GrayScale(_BlockMean):
    """The mean over the channels, the first axis of D, is known; it keeps that axis."""

    def __init__(self, shape: Shape):
        super().__init__(shape, [shape[0], *[1] * (len(shape) - 1)])


@register_operator(name="blur")
class GaussianBlur(Separable):
    """Convolution with a Gaussian, along every axis but the first, or along an only one.

    The image goes on beyond its border as its mirror image.  So A is symmetric: it keeps a
    constant, as rows of weights that sum to one would, and also keeps the mean of any image.

    Args:
        shape: D.
        std: standard deviation of the kernel, in pixels.
    Raises:
        ValueError: the standard deviation is not positive.
    """

    def __init__(self, shape: Shape, std: float = 1.0):
        if not std > 0:
            raise ValueError(f"a blur needs a standard deviation above 0 pixels, not {std}")
        sides = _sides(shape)
        super().__init__(
            shape, [*[None] * (len(shape) - len(sides)), *(_mirrored_blur(n, std) for n in sides)]
        )

    @classmethod
    def from_config(cls, config, shape: Shape) -> GaussianBlur:
        return cls(shape, config.control.get("blur_std", 1.0))

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


# --- Operators whose nonzero singular values are all one ------------------------------------------


class PartialIsometry(LinearOperator):
    """Every nonzero singular value is one: A^+ = A^T."""

    def spectral(self, x: Tensor, weight: Weight) -> Tensor:
        weights = _weights(weight, x.new_ones(1, 1), len(x))
        return batch_mul(weights.reshape(-1), self.adjoint(self.apply(x)))

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


class Mask(PartialIsometry):
    """Some entries are known: inpainting.  y has the shape of x, and zeros where x is open.

    Entries are chosen, not multiplied: nothing, not even NaN, leaks from under the mask.

    Args:
        shape: D.
        mask: 1 where known and 0 elsewhere; of a shape that broadcasts to D, or (B, *D) with a mask
            for each sample, which then fits only batches of that size.
    Raises:
        ValueError: the mask has another shape or other values.
    """

    def __init__(self, shape: Shape, mask: Tensor):
        super().__init__(shape)
        self.mask = _checked_mask(mask, self.shape)
        self._mask = _Constants(self.mask)

    def apply(self, x: Tensor) -> Tensor:
        return self._choose(self.check_x(x), 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._choose(self.check_y(y), 0.0)

    def observed(self, y: Tensor) -> Tensor:
        return self._choose(self.check_y(y), 0.0)

    def picture(self, y: Tensor, fill: float = 0.0) -> Tensor:
        return self._choose(self.check_y(y), fill)

    def _choose(self, x, fill):
        (mask,) = self._mask.like(x)
        if len(mask) not in (1, len(x)):
            raise ValueError(f"there are masks for {len(mask)} samples, but {len(x)} samples")
        return torch.where(mask, x, fill)

    @classmethod
    def box(cls, shape: Shape, box: Sequence[int] = ()) -> Mask:
        """A box is open.

        Args:
            shape: D.
            box: (top, left, height, width) for images; in general where it starts along each axis
                of D but the first, or along an only one, then how long it is.  Default: half of
                each side, in the centre.
        Raises:
            ValueError: the box does not lie in the image.
        """
        sides = _sides(shape)
        box = tuple(box) or _central_half(sides)
        starts, lengths = box[: len(sides)], box[len(sides) :]
        inside = len(box) == 2 * len(sides) and all(
            0 <= a < a + k <= n for a, k, n in zip(starts, lengths, sides, strict=True)
        )
        if not inside:
            raise ValueError(
                f"a box is where it starts along each of the sides {sides}, such as top and left, "
                f"then how long it is, such as height and width, inside of them; not {box}"
            )
        mask = torch.ones(sides, dtype=torch.bool)
        mask[tuple(slice(a, a + k) for a, k in zip(starts, lengths, strict=True))] = False
        return cls(shape, mask)

    @classmethod
    def random(cls, shape: Shape, keep: float = 0.25, seed: int = 0) -> Mask:
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
        sides = _sides(shape)
        order = torch.randperm(math.prod(sides), generator=_generator(seed, "mask"))
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: max(1, round(keep * len(order)))]] = True
        return cls(shape, mask.reshape(sides))

    @classmethod
    def half(cls, shape: Shape) -> Mask:
        """The end of the last axis of D is open, such as the right half of images."""
        return cls(shape, torch.arange(shape[-1]) < (shape[-1] + 1) // 2)


@register_operator(name="box")
class BoxMask(Mask):
    """`Mask.box` for configs."""

    @classmethod
    def from_config(cls, config, shape: Shape) -> Mask:
        return cls.box(shape, config.control.get("box", ()))


@register_operator(name="random_mask")
class RandomMask(Mask):
    """`Mask.random` for configs."""

    @classmethod
    def from_config(cls, config, shape: Shape) -> Mask:
        return cls.random(
            shape, config.control.get("keep", 0.25), config.control.get("operator_seed", 0)
        )


@register_operator(name="half")
class HalfMask(Mask):
    """`Mask.half` for configs."""

    @classmethod
    def from_config(cls, config, shape: Shape) -> Mask:
        return cls.half(shape)


@register_operator(name="projection")
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
        self._rows = _Constants(_orthonormal_rows(measurements, dimensions, seed))

    @classmethod
    def from_config(cls, config, shape: Shape) -> RandomProjection:
        return cls(
            shape, config.control.get("num_measurements", 0), config.control.get("operator_seed", 0)
        )

    def apply(self, x: Tensor) -> Tensor:
        (rows,) = self._rows.like(x)
        return _flatten(self.check_x(x)) @ rows.mT

    def adjoint(self, y: Tensor) -> Tensor:
        (rows,) = self._rows.like(y)
        return (self.check_y(y) @ rows).reshape(len(y), *self.shape)


# --- What they are made of ------------------------------------------------------------------------


class _Constants:
    """Tensors, or None, and their copies in the dtypes and on the devices that were asked for."""

    def __init__(self, *tensors: Tensor | None):
        self._tensors = tensors
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[Tensor | None, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors on the device of x, and in its dtype unless they are of truth values."""
        key = x.dtype, x.device
        if key not in self._copies:
            self._copies[key] = tuple(self._copy(t, x) for t in self._tensors)
        return self._copies[key]

    @staticmethod
    def _copy(tensor, x):
        if tensor is None:
            return None
        return tensor.to(x.device, tensor.dtype if tensor.dtype == torch.bool else x.dtype)


def _along_axes(x: Tensor, matrices: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """x (B, *D) with each axis of D multiplied by its matrix or its transpose."""
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is not None:
            x = (x.movedim(axis, -1) @ (matrix if transpose else matrix.mT)).movedim(-1, axis)
    # Noise like x is drawn in the order of x in memory, which must be the same for all operators.
    return x.contiguous()


def _weights(weight: Weight, d: Tensor, batch: int) -> Tensor:
    """weight(d) for d (1, R): (1, R) or (batch, R)."""
    weights = weight(d)
    R = d.shape[1]
    if weights.dim() != 2 or weights.shape[0] not in (1, batch) or weights.shape[1] not in (1, R):
        raise ValueError(
            f"weights of {R} singular values have shape (1, {R}) or ({batch}, {R}), not "
            f"{tuple(weights.shape)}; coefficients (B,) of the samples enter as s[:, None]"
        )
    return weights.expand(-1, R)


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
    return torch.as_tensor(matrix).detach().to("cpu", torch.float64)


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _sides(shape: Shape) -> tuple[int, ...]:
    """The lengths of the axes of D that are not channels: all but the first, or an only one."""
    return tuple(shape[1:]) or tuple(shape)


def _central_half(sides: tuple[int, ...]) -> tuple[int, ...]:
    """A box of half of each side, as in `Mask.box`."""
    lengths = [max(1, n // 2) for n in sides]
    return (*((n - k) // 2 for n, k in zip(sides, lengths, strict=True)), *lengths)


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


def _checked_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of truth values, (1, *D) or (B, *D)."""
    per_sample = mask.dim() == len(shape) + 1
    try:
        expanded = mask.expand(mask.shape[0] if per_sample else 1, *shape)
    except RuntimeError as error:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, which does not fit images of shape {shape}"
        ) from error
    if not torch.logical_or(mask == 0, mask == 1).all():
        raise ValueError("a mask holds 1 for what is known and 0 for what is not")
    return expanded != 0


def _generator(seed: int, use: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "operator", use))


def _orthonormal_rows(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns), uniformly distributed: the Gram-Schmidt process on normal vectors."""
    generator = _generator(seed, "projection")
    # Row by row: the first ones must not depend on how many there are.
    normal = torch.stack(
        [torch.randn(columns, generator=generator, dtype=torch.float64) for _ in range(rows)]
    )
    q, r = torch.linalg.qr(normal.mT)
    # The signs are a library's own choice unless fixed.
    return (q * r.diagonal().sign()).mT
