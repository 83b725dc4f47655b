"""Inverse scalers as numbers: x -> a x + b, with a and b of each entry's own."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """x -> a x + b.  Both are float64, of a shape that broadcasts to the data's, (B, *D)."""

    a: Tensor
    b: Tensor

    def mean_log2(self) -> float:
        """The mean of log2 |a| over entries: the bits by which a dimension grows."""
        sizes, counts = self.a.abs().unique(return_counts=True)
        shares = (counts.double() / self.a.numel()).tolist()
        return sum(share * math.log2(a) for a, share in zip(sizes.tolist(), shares, strict=True))

    def limits(self) -> tuple[Tensor, Tensor]:
        """The numbers that are mapped to 0 and 1, the smaller first."""
        ends = (0.0 - self.b) / self.a, (1.0 - self.b) / self.a
        return torch.minimum(*ends), torch.maximum(*ends)


@torch.inference_mode(False)
@torch.no_grad()
def read_affine(
    inverse_scaler: Callable,
    shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Affine:
    """A function of data as numbers, from its values at three points.

    Args:
        inverse_scaler: from the network's range to [0, 1].
        shape: of one datum, D; None: numbers are given, and an answer of any shape broadcasts.
        device: of the data.
    Raises:
        ValueError: it is not affine entry by entry, or constant.
    """
    start = torch.zeros(1, *(shape or ()), dtype=torch.float64, device=device)
    # No two entries are alike, as a function that mixes them gives itself away so.  Between 0 and
    # 1, which are in the range of all data: some inverse scalers clamp beyond it.
    between = torch.linspace(0.3, 0.7, start.numel(), dtype=torch.float64, device=device)
    between = between.reshape(start.shape)
    zero, one, inner = (
        torch.as_tensor(inverse_scaler(x), dtype=torch.float64, device=device)
        for x in (start, start + 1, between)
    )
    a, kept = one - zero, shape is None or zero.shape == start.shape
    # A hundredth is rounding in a short type, and less than a sigmoid bends.
    if not kept or not ((inner - zero - a * between).abs() < 0.01 * a.abs()).all():
        of = "" if shape is None else f" {tuple(shape)}"
        raise ValueError(
            f"inverse_scaler should map each entry x of a datum{of} to a x + b, with numbers a, "
            "not 0, and b: use one such as lambda x: (x + 1) / 2"
        )
    return Affine(a, zero)


class Clamp:
    """Clamps data in the network's range to the part that an inverse scaler maps to [0, 1].

    Called with x (B, *D), it raises ValueError as `read_affine` does.
    """

    def __init__(self, inverse_scaler: Callable):
        self.inverse_scaler = inverse_scaler
        self._known: tuple | None = None

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape[1:], x.device, x.dtype
        if self._known is None or self._known[0] != key:
            ends = read_affine(self.inverse_scaler, x.shape[1:], x.device).limits()
            self._known = key, [end.to(x.dtype) for end in ends]
        return x.clamp(*self._known[1])
