"""A density of times for importance sampling.  [Song et al. 2021, *Maximum Likelihood Training*]"""

import math

import torch
from torch import Tensor

from score_lib.sdes.process import LinearSDE

# Estimates are right for any number of cells: the density is that of the times that are drawn.
CELLS = 4096
# Of the times drawn for given data, the share that is drawn for a loss that is alike at all times:
# it bounds the weights where the loss is larger than was guessed.
SAFE_SHARE = 0.25


class TimeDensity:
    """Times on [eps, T] with a density that follows a weight, constant within small cells.

    The weight is g^2 / s^2, that of |s score + z|^2 in the likelihood.  With `sigma_data` it is the
    product of both: at large noise levels z is seen, and the second is, for independent Gaussian
    pixels, 1 / (1 + (sigma / sigma_data)^2) with sigma = s / m.  Half of `sigma_data` is put there,
    since pixels of images tell of each other.  A quarter of the times still follow the first weight
    alone, so that none is ever 4 times rarer.

    Args:
        sigma_data: standard deviation of the data; None leaves them out.
    """

    def __init__(self, sde: LinearSDE, eps: float, sigma_data: float | None = None):
        ends = torch.logspace(math.log10(eps), math.log10(sde.T), CELLS + 1, dtype=torch.float64)
        ends[0], ends[-1] = eps, sde.T
        width, middle = ends.diff(), (ends[1:] + ends[:-1]) / 2
        m, s = sde.marginal_coeffs(middle)
        mass = width * sde.diffusion(middle) ** 2 / s**2
        mass = mass / mass.sum()
        if sigma_data is not None:
            expected = mass / (1 + (s / (m * sigma_data / 2)) ** 2)
            mass = torch.lerp(expected / expected.sum(), mass, SAFE_SHARE)
        cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
        self._tables = {ends.device: (ends, cumulative, mass / width)}

    def at(self, quantile: Tensor) -> tuple[Tensor, Tensor]:
        """The times at these quantiles, numbers in [0, 1), (B,), and their density: float64."""
        ends, cumulative, density = self._on(quantile.device)
        quantile = quantile.double()
        cell = (torch.searchsorted(cumulative, quantile, right=True) - 1).clamp(0, CELLS - 1)
        inside = (quantile - cumulative[cell]) / density[cell]
        return torch.minimum(ends[cell] + inside, ends[cell + 1]), density[cell]

    def of(self, t: Tensor) -> Tensor:
        """The density at times, (B,), float64."""
        ends, _, density = self._on(t.device)
        cell = torch.searchsorted(ends, t.double(), right=True) - 1
        return density[cell.clamp(0, CELLS - 1)]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            first = next(iter(self._tables.values()))
            self._tables[device] = tuple(table.to(device) for table in first)
        return self._tables[device]
