"""The discrete chain of a process as Gaussians: steps, posteriors and their variances.

[Ho et al. 2020, equations 2, 6 and 7; Nichol and Dhariwal 2021, equation 15]
"""

import torch
from torch import Tensor

from score_lib.base.tensors import batch_mul
from score_lib.sdes.process import SDE


class Chain:
    """Noise levels x_i = m_i x_0 + s_i z of N steps x_i = r_i x_{i-1} + G_i z.

    Steps are counted from 0, which has the least noise and comes from the data itself: m_{-1} = 1
    and s_{-1} = 0.  All tables are (N,), float64.

    Args:
        sde: a process with discrete noise levels.
        device: of the tables.
    Attributes:
        labels: what the network is told at each step, (N,), int64.
        m, s: of x_i given x_0.
        weight: factor of x_0 in the mean of q(x_{i-1} | x_i, x_0).
        log_posterior: log variance of q(x_{i-1} | x_i, x_0); step 0, where it is 0, has step 1's.
        log_step: log G_i^2.
    Raises:
        NotImplementedError: the process has no discrete noise levels.
        ValueError: it has fewer than two, or a step adds no noise, or leaves nothing of the data.
    """

    def __init__(self, sde: SDE, device: torch.device | str = "cpu"):
        labels, m, s = sde.discrete_chain()
        m_before, s_before = torch.ones_like(m), torch.zeros_like(s)
        m_before[1:], s_before[1:] = m[:-1], s[:-1]
        step = s**2 - (m / m_before * s_before) ** 2
        if len(m) < 2 or not bool((step > 0).all() and (m > 0).all()):
            raise ValueError(
                f"{sde!r} is no chain of two or more steps, each of which adds noise and leaves "
                "some of the data: choose a larger N"
            )
        posterior = s_before**2 * step / s**2
        posterior[0] = posterior[1]
        self.labels, self.m, self.s = labels.to(device), m.to(device), s.to(device)
        self.weight = (m_before * step / s**2).to(device)
        self.log_posterior, self.log_step = posterior.log().to(device), step.log().to(device)

    def __len__(self) -> int:
        return len(self.m)

    def large(self, i: Tensor) -> Tensor:
        """Log of the fixed variance G_i^2, (B,); step 0 has the posterior's, as published."""
        return torch.where(i > 0, self.log_step[i], self.log_posterior[i])

    def between(self, i: Tensor, v: Tensor) -> Tensor:
        """Log variances (B, *D) between the posterior's, v = -1, and those of a step, v = 1."""
        low, high = batch_mul(self.log_posterior[i], 1 - v), batch_mul(self.log_step[i], 1 + v)
        return (low + high) / 2

    def importance(self) -> Tensor:
        """Probabilities of steps 1 ... N - 1, (N - 1,), as the terms of a bound are weighted.

        With the posterior's variances a term is (snr_{i-1} - snr_i) |x_0 - prediction|^2 / 2 with
        snr = m^2 / s^2, and that error is near 1 / snr_i for data such as images.
        """
        snr = (self.m / self.s) ** 2
        growth = snr[:-1] / snr[1:] - 1
        return growth / growth.sum()
