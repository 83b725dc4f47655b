"""Continuous data in units of their own deviation, as the network sees them."""

import math

import numpy as np
import torch
from torch import Tensor

from score_lib.data.kinds import channel_axis
from score_lib.data.sources import DataError, Source, check_finite

# Numbers that are read at once.
_CHUNK = 1 << 22
# Squares of smaller deviations lose digits in float64.
_SMALLEST = 1e-150


class Standardization:
    """x -> (x - mean) / std, entry by entry, and back.

    Both are in float64, since data may be far from 0 by many deviations; the network's range is in
    float32, and data that come back have their own type.

    Args:
        shape: D.
        device: of the data.
    Attributes:
        mean, std: of a shape that broadcasts to D; 0 and 1 until they are loaded.
        dtype: of the data.
        fitted: whether they are loaded.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.shape, self.device = tuple(shape), torch.device(device)
        self.mean = torch.zeros((1,) * len(shape), dtype=torch.float64, device=device)
        self.std = torch.ones_like(self.mean)
        self.dtype, self.fitted = torch.float32, False

    def __call__(self, x: Tensor) -> Tensor:
        """Data (B, *D) in the user's units -> the network's range, float32."""
        return ((x.double() - self.mean) / self.std).float()

    def inverse(self, y: Tensor) -> Tensor:
        """The network's range (B, *D) -> the user's units, in the data's own type."""
        return (y.double() * self.std + self.mean).to(self.dtype)

    @property
    def log_volume(self) -> float:
        """log |dx / dy|, in nats: log p(x) = log p(y) minus this."""
        return float(self.std.log().expand(self.shape).sum())

    def state_dict(self) -> dict[str, Tensor | str]:
        """Mean, deviation and type of the data, for a checkpoint."""
        return {"mean": self.mean, "std": self.std, "dtype": str(self.dtype).removeprefix("torch.")}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` or `fit` gave.

        Raises:
            ValueError: it does not fit data of this shape.
        """
        mean, std, dtype = state["mean"], state["std"], state["dtype"]
        if dtype not in _TYPES:
            raise ValueError(f"its data are {dtype!r}, not one of {', '.join(_TYPES)}")
        for name, value in (("mean", mean), ("std", std)):
            try:
                value.expand(self.shape)
            except RuntimeError as error:
                raise ValueError(
                    f"its {name} has shape {tuple(value.shape)}, but data have {self.shape}"
                ) from error
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("its mean and std should be finite, and std above 0")
        self.mean = mean.to(self.device, torch.float64).clone()
        self.std = std.to(self.device, torch.float64).clone()
        self.dtype, self.fitted = _TYPES[dtype], True


_TYPES = {"float32": torch.float32, "float64": torch.float64}


def fit(source: Source, how: str, kind: str) -> dict[str, Tensor | str]:
    """Mean and deviation of a source, by one pass in its order, as `Standardization` loads them.

    Args:
        source: continuous.
        how: what shares one mean and deviation: the entries of a "channel", no two entries
            ("entry"), "all", or "none" for a mean of 0 and a deviation of 1.
        kind: see `kinds.kind_of`; it says which axis counts channels.
    Raises:
        DataError: a channel or entry is constant or out of range, or a value is not finite; names
            it.
    """
    rank = len(source.shape)
    kept = {"entry": range(rank), "channel": [channel_axis(kind) % rank]}.get(how, ())
    shared = (0, *(axis + 1 for axis in range(rank) if axis not in kept))
    dtype = str(source.dtype).removeprefix("torch.")
    if how == "none":
        mean = torch.zeros((1,) * rank, dtype=torch.float64)
        return {"mean": mean, "std": mean + 1, "dtype": dtype}
    count, mean, squares = 0, 0.0, 0.0
    size = max(1, _CHUNK // math.prod(source.shape))
    for first in range(0, len(source), size):
        numbers = np.arange(first, min(first + size, len(source)))
        x = source.images(numbers).double()
        variance, part = torch.var_mean(x, dim=shared, correction=0, keepdim=True)
        if not variance.isfinite().all():
            check_finite(x, numbers)
        n = x.numel() // part.numel()
        shift = part - mean
        # [Chan, Golub and LeVeque 1983, equation 2.1]
        squares = squares + n * variance + shift.square() * (count * n / (count + n))
        mean = mean + shift * (n / (count + n))
        count += n
    std = (squares / count).sqrt()[0]
    mean = mean[0]
    _check_varying(mean, std, how)
    return {"mean": mean, "std": std, "dtype": dtype}


def _check_varying(mean: Tensor, std: Tensor, how: str) -> None:
    scale = std.maximum(mean.abs())
    lost = ~scale.isfinite() | ((scale > 0) & (scale < _SMALLEST))
    if lost.any():
        raise DataError(
            f"the squares of these data are out of float64's range, at "
            f"{tuple(lost.nonzero()[0].tolist())} of the {how} means: save them in other units"
        )
    # Rounding errors of a constant are not a deviation.
    constant = std <= 1e-14 * mean.abs()
    if constant.any():
        place = tuple(constant.nonzero()[0].tolist())
        raise DataError(
            f"the data are constant ({mean[place].item():g}) at {place} of the {how} means, where "
            "nothing can be learned and no density is finite: leave it out, or set "
            "data.standardize to 'all' or 'none'"
        )
