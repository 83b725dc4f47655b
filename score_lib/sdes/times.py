"""A density of times for importance sampling.  [Song et al. 2021, *Maximum Likelihood Training*]"""

import math

import torch
from torch import Tensor

from score_lib.sdes.process import LinearSDE

# Estimates are right for any number of cells: the density is that of the times that are drawn.
CELLS = 4096


class TimeDensity:
    """Times on [eps, T] with a density proportional to g^2 / s^2, constant within small cells.

    Losses and bounds weighted by g^2 follow that weight for data such as images.
    """

    def __init__(self, sde: LinearSDE, eps: float):
        ends = torch.logspace(math.log10(eps), math.log10(sde.T), CELLS + 1, dtype=torch.float64)
        ends[0], ends[-1] = eps, sde.T
        width, middle = ends.diff(), (ends[1:] + ends[:-1]) / 2
        mass = width * sde.diffusion(middle) ** 2 / sde.marginal_coeffs(middle)[1] ** 2
        mass = mass / mass.sum()
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
