"""Operators whose nonzero singular values are all one: masks and random projections."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul, derive_seed
from score_lib.inverse.operators import (
    Constants,
    LinearOperator,
    Shape,
    Weight,
    checked_weights,
    register_operator,
    sides_of,
)


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
        mask: 1 where known and 0 elsewhere; of a shape that broadcasts to D, or (B, *D) with a mask
            for each sample, which then fits only batches of that size.
    Raises:
        ValueError: the mask has another shape or other values.
    """

    def __init__(self, shape: Shape, mask: Tensor):
        super().__init__(shape)
        self.mask = _checked_mask(mask, self.shape)
        self._mask = Constants(self.mask)

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
    def box(cls, shape: Shape, box: Sequence[int] = ()) -> "Mask":
        """A box is open.

        Args:
            shape: D.
            box: (top, left, height, width) for images; in general where it starts along each axis
                of D but the first, or along an only one, then how long it is.  Default: half of
                each side, in the centre.
        Raises:
            ValueError: the box does not lie in the image.
        """
        sides = sides_of(shape)
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
    if not torch.logical_or(mask == 0, mask == 1).all():
        raise ValueError("a mask holds only 1 (known) and 0 (open)")
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
