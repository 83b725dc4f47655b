"""A conditional flow on the unit cube, for learned dequantization.

[Ho et al. 2019, *Flow++*; Durkan et al. 2019, *Neural Spline Flows*]

Coupling layers move the numbers of one half of a checkerboard by monotone rational-quadratic
splines of [0, 1], which depend on the data and on the other half.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_lib.base.tensors import rows

from .adm_layers import conv, zeroed

# Least width and height of a bin, as a share of its mean, and least slope at a knot.
_LEAST = 1e-2


class Splines(NamedTuple):
    """Monotone rational-quadratic functions of [0, 1] onto itself, one a number: (*S, K + 1)."""

    x: Tensor
    """Knots."""
    y: Tensor
    """Values at the knots."""
    slope: Tensor
    """Slopes at the knots."""

    @classmethod
    def of(cls, raw: Tensor) -> "Splines":
        """From free numbers (*S, 3 K + 1); zeros give the identity."""
        bins = (raw.shape[-1] - 1) // 3
        widths, heights, slopes = raw.split((bins, bins, bins + 1), dim=-1)
        one = math.log(math.expm1(1 - _LEAST))  # where softplus is 1 - _LEAST
        return cls(_knots(widths), _knots(heights), _LEAST + F.softplus(slopes + one))

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values at u (*S), and the logarithms of the slopes there."""
        x, y, width, height, left, right = self._bin(self.x, u)
        mean = height / width
        share = (u - x) / width
        mixed, curve = share * (1 - share), left + right - 2 * mean
        below = mean + curve * mixed
        value = y + height * (mean * share**2 + left * mixed) / below
        slope = right * share**2 + 2 * mean * mixed + left * (1 - share) ** 2
        return value, 2 * mean.log() + slope.log() - 2 * below.log()

    def inverse(self, v: Tensor) -> Tensor:
        """The u (*S) at which the values are v."""
        x, y, width, height, left, right = self._bin(self.y, v)
        mean, rise = height / width, v - y
        curve = rise * (left + right - 2 * mean)
        a, b, c = height * (mean - left) + curve, height * left - curve, -mean * rise
        root = torch.sqrt((b**2 - 4 * a * c).clamp(min=0))
        return x + width * 2 * c / (-b - root)

    def _bin(self, knots: Tensor, at: Tensor) -> list[Tensor]:
        """Left knot and value, width, height and slopes at both ends of the bins of `at`."""
        left = (knots[..., 1:-1] <= at[..., None]).sum(-1, keepdim=True)
        tables = (self.x, self.y, self.x.diff(), self.y.diff(), self.slope, self.slope[..., 1:])
        return [table.gather(-1, left).squeeze(-1) for table in tables]


def _knots(raw: Tensor) -> Tensor:
    """Rising numbers from 0 to 1, (*S, K + 1), from K free ones."""
    sizes = _LEAST / raw.shape[-1] + (1 - _LEAST) * torch.softmax(raw, dim=-1)
    inner = sizes[..., :-1].cumsum(-1)
    return torch.cat([torch.zeros_like(raw[..., :1]), inner, torch.ones_like(raw[..., :1])], dim=-1)


class Dequantizer(nn.Module):
    """A flow of u in [0, 1)^D given x, the identity when it is new.

    Convolutions see x of shape (C, *S) with one to three dimensions S; other x are seen as vectors.

    Args:
        shape: D, of one x.
        nf: features.
        num_layers: coupling layers.
        num_bins: of each spline.
    """

    def __init__(
        self, shape: tuple[int, ...], *, nf: int = 32, num_layers: int = 4, num_bins: int = 8
    ):
        super().__init__()
        self.shape, self.numbers = tuple(shape), 3 * num_bins + 1
        spatial = len(shape) in (2, 3, 4)
        self.seen = self.shape if spatial else (math.prod(shape),)
        layer = partial(conv, len(shape) - 1) if spatial else nn.Linear
        channels = self.seen[0]
        self.context = nn.Sequential(
            layer(channels, nf), _Residual(layer, nf), _Residual(layer, nf), nn.SiLU()
        )
        self.couplings = nn.ModuleList(
            nn.Sequential(
                layer(nf + 2 * channels, nf),
                nn.SiLU(),
                layer(nf, nf),
                nn.SiLU(),
                zeroed(layer(nf, channels * self.numbers)),
            )
            for _ in range(num_layers)
        )
        grid = torch.meshgrid(*(torch.arange(side) for side in self.seen), indexing="ij")
        self.register_buffer("odd", torch.stack(grid).sum(0) % 2 == 1, persistent=False)

    def forward(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the flow at u, (B, *D), and the log determinants of its Jacobian there, (B,).

        Args:
            x: data in [0, 1], (B, *D).
            u: in [0, 1), (B, *D).
        """
        context, u, log_det = self._context(x), self._reshaped(u), 0.0
        for number in range(len(self.couplings)):
            kept, splines = self._splines(number, context, u)
            moved, log_slope = splines(u)
            u = torch.where(kept, u, moved)
            log_det = log_det + rows(torch.where(kept, 0.0, log_slope)).sum(1)
        return u.reshape(x.shape), log_det

    def inverse(self, x: Tensor, v: Tensor) -> Tensor:
        """The u at which the flow has the values v, (B, *D)."""
        context, v = self._context(x), self._reshaped(v)
        for number in reversed(range(len(self.couplings))):
            kept, splines = self._splines(number, context, v)
            v = torch.where(kept, v, splines.inverse(v))
        return v.reshape(x.shape)

    def _context(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"this dequantizer is for data of {self.shape}, not of {tuple(x.shape[1:])}"
            )
        return self.context(2 * self._reshaped(x) - 1)

    def _reshaped(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.seen)

    def _splines(self, number: int, context: Tensor, u: Tensor) -> tuple[Tensor, Splines]:
        """Which numbers a layer keeps, and the splines that move the others."""
        kept = self.odd if number % 2 else ~self.odd
        mask = kept.to(u).expand_as(u)
        raw = self.couplings[number](torch.cat([context, (2 * u - 1) * mask, mask], dim=1))
        raw = raw.reshape(len(u), self.seen[0], self.numbers, *self.seen[1:]).movedim(2, -1)
        return kept, Splines.of(raw)


class _Residual(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self, layer: Callable[[int, int], nn.Module], nf: int):
        super().__init__()
        self.branch = nn.Sequential(nn.SiLU(), layer(nf, nf), nn.SiLU(), layer(nf, nf))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)
