"""Times of training that are drawn by tables: by their density, or by their noise level."""

import math

import torch
from torch import Tensor

from score_lib.base.tensors import Constants
from score_lib.sdes.process import SDE, LinearSDE
from score_lib.sdes.snr import log_snr, time_at

# Estimates are right for any number of cells: the density is that of the times that are drawn.
CELLS = 4096
# Of the times drawn for given data, the share that is drawn for a loss that is alike at all times:
# it bounds the weights where the loss is larger than was guessed.
SAFE_SHARE = 0.25


# A straight line between neighbours errs by less than a float32 rounds.
NODES = 65536


class NoiseTimes:
    """The times in [eps, T] at which lambda = log(m / s) has given values, read off a table.

    Values of earlier and later times give eps and T; |lambda| above 20 is as 20.  It takes a few
    operations, where the bisection of `time_at` takes hundreds.
    """

    def __init__(self, sde: SDE, eps: float):
        ends = torch.tensor([sde.T, eps], dtype=torch.float64)
        self._first, last = log_snr(sde, ends).clamp(-20.0, 20.0).tolist()
        self._per_unit = (NODES - 1) / (last - self._first)
        values = torch.linspace(self._first, last, NODES, dtype=torch.float64)
        times = time_at(sde, values)
        times[0], times[-1] = ends
        self._tables = Constants(times)

    def at(self, wanted: Tensor) -> Tensor:
        """The times, (B,), float64, at which lambda has the values wanted, (B,)."""
        (times,) = self._tables.on(wanted.device)
        place = ((wanted.double() - self._first) * self._per_unit).clamp(0, NODES - 1)
        node = place.long().clamp(max=NODES - 2)
        return torch.lerp(times[node], times[node + 1], place - node)


class TimeDensity:
    """Times on [eps, T] with a density that follows a weight, constant within small cells.

    [Song et al. 2021, *Maximum Likelihood Training*]

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
        self._tables = Constants(ends, cumulative, mass / width)

    def at(self, quantile: Tensor) -> tuple[Tensor, Tensor]:
        """The times at these quantiles, numbers in [0, 1), (B,), and their density: float64."""
        ends, cumulative, density = self._tables.on(quantile.device)
        quantile = quantile.double()
        cell = (torch.searchsorted(cumulative, quantile, right=True) - 1).clamp(0, CELLS - 1)
        inside = (quantile - cumulative[cell]) / density[cell]
        return torch.minimum(ends[cell] + inside, ends[cell + 1]), density[cell]

    def of(self, t: Tensor) -> Tensor:
        """The density at times, (B,), float64."""
        ends, _, density = self._tables.on(t.device)
        cell = torch.searchsorted(ends, t.double(), right=True) - 1
        return density[cell.clamp(0, CELLS - 1)]
