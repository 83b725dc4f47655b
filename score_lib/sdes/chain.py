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
        kept: numbers of the levels that the chain has, rising, (N,), int64; None: all.
    Attributes:
        labels: that the network is told at each step, (N,), int64.
        m, s: of x_i given x_0.
        m_before, s_before: of x_{i-1}.
        weight, weight_x: factors of x_0 and x_i in the mean of q(x_{i-1} | x_i, x_0).
        posterior: variance of q(x_{i-1} | x_i, x_0), 0 at step 0.
        log_posterior: its logarithm; step 0 has step 1's.
        log_step: log G_i^2.
    Raises:
        NotImplementedError: the process has no discrete noise levels.
        ValueError: it has fewer than two, or a step adds no noise, or leaves nothing of the data;
            or as in `checked_levels`.
    """

    def __init__(self, sde: SDE, device: torch.device | str = "cpu", kept: Tensor | None = None):
        labels, m, s = checked_levels(sde)
        if kept is not None:
            labels, m, s = labels[kept], m[kept], s[kept]
        m_before, s_before = torch.ones_like(m), torch.zeros_like(s)
        m_before[1:], s_before[1:] = m[:-1], s[:-1]
        ratio = m / m_before
        step = s**2 - (ratio * s_before) ** 2
        if len(m) < 2 or not bool((step > 0).all() and (m > 0).all()):
            raise ValueError(
                f"{sde!r} is no chain of two or more steps, each of which adds noise and leaves "
                "some of the data: choose a larger N, or keep more levels"
            )
        posterior = s_before**2 * step / s**2
        floored = posterior.clone()
        floored[0] = posterior[1]
        self.labels, self.m, self.s = labels.to(device), m.to(device), s.to(device)
        self.m_before, self.s_before = m_before.to(device), s_before.to(device)
        self.weight = (m_before * step / s**2).to(device)
        self.weight_x = (ratio * s_before**2 / s**2).to(device)
        self.posterior = posterior.to(device)
        self.log_posterior, self.log_step = floored.log().to(device), step.log().to(device)

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


def checked_levels(sde: SDE) -> tuple[Tensor, Tensor, Tensor]:
    """The discrete levels of a process, see `SDE.discrete_chain`.

    Raises:
        NotImplementedError: it has none.
        ValueError: its `discrete_coeffs`, which networks are trained with, are others.
    """
    labels, m, s = sde.discrete_chain()
    told = torch.stack([value.double() for value in sde.discrete_coeffs(labels)])
    if not torch.allclose(told**2, torch.stack([m, s]) ** 2, rtol=1e-2, atol=1e-5):
        raise ValueError(
            f"discrete_chain() of {sde!r} gives other noise levels than discrete_coeffs(labels): a "
            "class that overrides one of them, or a table such as alphas_cumprod, overrides all, "
            "discrete_betas (of VE: discrete_sigmas) first"
        )
    return labels, m, s


class Levels(SDE):
    """A process as it is at the levels of a chain, as constraints on samples ask for it.

    The time of level i is that at which a network is told its label; any time means the nearest of
    them.  T and `sampling_eps` are the last and the first of them.

    Args:
        sde: the process.
        chain: one of its chains.
    Raises:
        ValueError: times of the levels do not rise.
    """

    def __init__(self, sde: SDE, chain: Chain):
        super().__init__(len(chain))
        self.process, self.labels = sde, chain.labels
        self.m, self.s, self.G = chain.m, chain.s, torch.exp(chain.log_step / 2)
        self.ratio = chain.m / chain.m_before
        self.times = sde.level_time(chain.labels.double())
        if not bool((self.times.diff() > 0).all()):
            raise ValueError(
                f"the times of the noise levels of {sde!r} do not rise: see level_time"
            )
        self.middles = (self.times[1:] + self.times[:-1]) / 2
        self.sampling_eps, self.T = self.times[0].item(), self.times[-1].item()

    def step_index(self, t: Tensor) -> Tensor:
        """The nearest level, (B,), int64."""
        return torch.searchsorted(self.table_on("middles", t.device), t.double().contiguous())

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.sde(x, t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *D) and standard deviation (B,) of the level's x given x_0 = x."""
        m, s = self._at(t, "m"), self._at(t, "s")
        return batch_mul(m.to(x.dtype), x), s

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The chain's own step to the level of time t."""
        return batch_mul((self._at(t, "ratio") - 1).to(x.dtype), x), self._at(t, "G")

    def _at(self, t: Tensor, table: str) -> Tensor:
        return self.lookup(table, self.step_index(t)).to(t.dtype)

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return self.process.prior_sampling(shape)

    def prior_from_normal(self, z: Tensor) -> Tensor:
        return self.process.prior_from_normal(z)

    def prior_logp(self, z: Tensor) -> Tensor:
        return self.process.prior_logp(z)

    def noise_label(self, t: Tensor, continuous: bool) -> Tensor:
        """The level's label, int64; for a network of all times, such as a classifier, its own."""
        if continuous:
            return self.process.noise_label(t, True)
        return self.lookup("labels", self.step_index(t))

    def score_from_output(self, output: Tensor, std: Tensor) -> Tensor:
        return self.process.score_from_output(output, std)

    def __repr__(self) -> str:
        return f"{self.process!r} at {self.N} levels"
