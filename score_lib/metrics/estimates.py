"""Figures with a standard error, and checks of the samples and data that they come from."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import check_floats

Values = Tensor | np.ndarray


class Estimate(NamedTuple):
    """A figure and its standard error, as samples and data might have been drawn anew."""

    value: float
    standard_error: float

    def named(self, name: str) -> dict[str, float]:
        """`name` and `name_standard_error`, as in a report."""
        return {name: self.value, f"{name}_standard_error": self.standard_error}


def root_of(power: Tensor, variance: Tensor, order: float) -> Estimate:
    """power^(1 / order) for an estimate with a variance, by the delta method.

    Args:
        power, variance: scalars, in float64; a power of 0 has no error.
    """
    value, error = max(power.item(), 0.0), math.sqrt(max(variance.item(), 0.0))
    if value == 0:
        return Estimate(0.0, 0.0)
    root = value ** (1 / order)
    return Estimate(root, error * root / (value * order))


def variance_of_mean(influence_a: Tensor, influence_b: Tensor) -> Tensor:
    """Variance of mean(a) + mean(b), for values of independent examples, (N,) and (M,)."""
    return sum(values.var(dim=0) / len(values) for values in (influence_a, influence_b))


def checked_pair(
    samples: Values,
    data: Values,
    *,
    least: int,
    ranks: tuple[int, ...] = (),
    shape: str = "(N, *D)",
) -> tuple[Tensor, Tensor]:
    """Samples and data as tensors, without gradients, in their own dtype.

    Args:
        least: how many examples each needs.
        ranks: numbers of dimensions that are allowed; () for any above 0.
        shape: the shape in words, for the message.
    Raises:
        ValueError: complex or integer values, another rank, too few examples, or values that are
            not finite.
    """
    sets = (("samples", samples), ("data", data))
    return tuple(checked(values, name, least, ranks, shape) for name, values in sets)


def checked(
    values: Values, name: str, least: int, ranks: tuple[int, ...] = (), shape: str = "(N, *D)"
) -> Tensor:
    """One set of examples, as in `checked_pair`."""
    x = torch.as_tensor(values).detach()
    check_floats(name, x)
    if x.dim() == 0 or (ranks and x.dim() not in ranks) or 0 in x.shape[1:]:
        raise ValueError(f"{name} should have the shape {shape}, not {tuple(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{name} should be {least} or more examples, not {len(x)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} should be finite numbers, but some are nan or inf")
    return x


def check_same_shape(samples: Tensor, data: Tensor) -> None:
    """Refuse examples of different shapes, (N, *D) and (M, *D')."""
    if samples.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"samples and data should have one shape, not {tuple(samples.shape[1:])} and "
            f"{tuple(data.shape[1:])} for an example"
        )
