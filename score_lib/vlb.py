"""Bits/dim of discrete models: the variational bound of DDPM.

[Ho et al. 2020, *Denoising Diffusion Probabilistic Models*, equations 5 to 8 and 13; Nichol and
Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*]

For a chain x_0, x_1, ..., x_T from data with grey levels, which are not dequantised,

    -log p(x_0) <= KL(q(x_T | x_0) || prior)
                   + sum_{t > 1} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - E[log p(x_0 | x_1)]

where p is Gaussian, and in the last term its probability of the bin of each grey level.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.base.affine import read_affine
from score_lib.base.tensors import batch_mul, normal_noise, rows, stratified_mean, wide_floats
from score_lib.parametrization import Parametrization, get_parametrization
from score_lib.scores import LevelDenoiser
from score_lib.sdes.chain import Chain
from score_lib.sdes.process import SDE, LinearSDE, check_linear, check_prior

VARIANCES = ("small", "large", "learned")


class Vlb(NamedTuple):
    """An upper bound of the bits/dim of a batch, with its terms; each field is (B,), float64."""

    total: Tensor
    """prior + steps + decoder, in bits/dim."""
    prior: Tensor
    """L_T: divergence of the chain's end from the prior."""
    steps: Tensor
    """L_1 + ... + L_{T-1}: the sum over the steps between, or its estimate."""
    decoder: Tensor
    """L_0: of the grey levels, given the least noisy x."""
    standard_error: Tensor
    """Of `steps` as an estimate, from differences between times, see `stratified_mean`; nan where
    all steps were evaluated, as one draw of noise each says nothing about their error."""


def get_vlb_fn(
    sde: SDE,
    inverse_scaler: Callable,
    levels: int = 256,
    *,
    variance: str = "small",
    num_times: int = 0,
    clip: bool = True,
    parametrization: Parametrization | str | None = None,
) -> Callable:
    """The variational bound of a network of discrete noise levels, in bits/dim.

    Args:
        sde: a process with discrete noise levels.
        inverse_scaler: from the network's range to [0, 1]; affine, and alike for all entries.
        levels: grey levels of the data.
        variance: of p(x_{t-1} | x_t): "small" is that of q(x_{t-1} | x_t, x_0), and "large" that
            of q(x_t | x_{t-1}).  "learned" ones are between the two, by the second half of the
            network's output channels; the first half is its usual output.
        num_times: steps that the sum is estimated from, without bias, besides the decoder's; 0: it
            is taken over all of them.
        clip: clamp the predicted x_0 to the range of the data, as published figures do.
        parametrization: what the network's output is, see `get_score_fn`.
    Returns:
        `vlb_fn(model, data, *, noise=None) -> Vlb`, for data (B, *D) in the network's range, equal
        to grey levels; noise is called like `torch.randn_like`.  It computes no gradients, and
        raises ValueError for data between grey levels or a wrong number of output channels.
    Raises:
        ValueError: an unknown variance or parametrisation, a single time, fewer than two grey
            levels, an inverse scaler of another kind, or a process whose drift is not linear.
        NotImplementedError: the process has no discrete noise levels.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: known are {', '.join(VARIANCES)}")
    if num_times < 0 or num_times == 1:
        raise ValueError(
            f"the bound needs two or more times for its error, or 0 for all, not {num_times}"
        )
    check_linear(sde)
    chosen = get_parametrization(parametrization)
    grey = GreyLevels(inverse_scaler, levels)
    steps = len(Chain(sde)) - 1
    everywhere = num_times == 0 or num_times >= steps
    sum_of_steps = _all_steps if everywhere else _some_steps

    @torch.no_grad()
    def vlb_fn(model, data, *, noise=None):
        data = wide_floats("the data", data)
        grey.check(data)
        draw = normal_noise(noise)
        limits = grey.limits if clip else None
        predict = Prediction(sde, model, variance, limits, data.device, chosen)
        prior, decoder = predict.prior_term(data), predict.decoder_term(data, draw(data), grey)
        steps, error = sum_of_steps(predict, data, draw, num_times)
        nats = (prior + steps + decoder, prior, steps, decoder, error)
        return Vlb(*(value / (data.shape[1:].numel() * math.log(2)) for value in nats))

    return vlb_fn


class Prediction:
    """The Gaussians p(x_{t-1} | x_t) of a network, at x_t = m x_0 + s z of a known x_0.

    Args:
        sde: with discrete noise levels.
        model: a network, or any function of (x, labels).
        variance: one of `VARIANCES`.
        limits: of the predicted x_0, which is clamped to them; None: none.
        device: of the data.
        parametrization: None is the convention of the process.
    """

    def __init__(
        self,
        sde: LinearSDE,
        model: Callable,
        variance: str,
        limits: tuple[float, float] | None,
        device: torch.device | str,
        parametrization: Parametrization | None = None,
    ):
        self.sde, self.variance, self.limits = sde, variance, limits
        self.chain = Chain(sde, device)
        self.denoiser = LevelDenoiser(sde, model, variance == "learned", parametrization)

    def __call__(self, x_0: Tensor, i: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted x_0 (B, *D), and log variances that broadcast to it, in float64.

        Args:
            x_0, z: data and noise, (B, *D).
            i: steps (B,).
        """
        m, s = self.chain.m[i], self.chain.s[i]
        x = (batch_mul(m, x_0.double()) + batch_mul(s, z.double())).to(x_0.dtype)
        predicted, v = self.denoiser(x, self.chain.labels[i], (m, s))
        if self.limits is not None:
            predicted = predicted.clamp(*self.limits)
        if v is not None:
            return predicted, self.chain.between(i, v)
        fixed = self.chain.log_posterior[i] if self.variance == "small" else self.chain.large(i)
        return predicted, batch_mul(fixed, fixed.new_ones((1,) * x.dim()))

    def prior_term(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || prior), (B,), in nats."""
        check_prior(self.sde, x_0)
        prior = float(self.sde.prior_std) ** 2
        square = (self.chain.m[-1] * rows(x_0).double()) ** 2 / prior
        variance = self.chain.s[-1] ** 2 / prior
        return 0.5 * (square + variance - 1 - variance.log()).sum(1)

    def step_term(self, x_0: Tensor, i: Tensor, z: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) at steps i (B,) above 0: (B,), in nats."""
        predicted, log_variance = self(x_0, i, z)
        # The two means differ by their shares of x_0.
        difference = batch_mul(self.chain.weight[i], x_0.double() - predicted)
        posterior = batch_mul(self.chain.log_posterior[i], torch.ones_like(log_variance))
        ratio = posterior - log_variance
        kl = ratio.exp() - 1 - ratio + difference**2 * torch.exp(-log_variance)
        return 0.5 * rows(kl).sum(1)

    def decoder_term(self, x_0: Tensor, z: Tensor, grey: "GreyLevels") -> Tensor:
        """-log p(x_0 | x_1), (B,), in nats."""
        step = torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device)
        # The mean that step 0 leads to is the predicted x_0 itself.
        mean, log_variance = self(x_0, step, z)
        return -rows(grey.log_probability(x_0, mean, torch.exp(log_variance / 2))).sum(1)


class GreyLevels:
    """Grey levels in the network's range, and their bins, of which the two at the ends are open.

    Args:
        inverse_scaler: from the network's range to [0, 1]; affine, and alike for all entries.
        levels: their number.
    Raises:
        ValueError: a single grey level, or another inverse scaler.
    """

    def __init__(self, inverse_scaler: Callable, levels: int):
        if levels < 2:
            raise ValueError(f"data have two or more grey levels, not {levels}")
        low, high = (end.unique().tolist() for end in read_affine(inverse_scaler).limits())
        if len(low) > 1 or len(high) > 1:
            raise ValueError(
                "grey levels need an inverse_scaler that is alike for all entries of the data, not "
                "one with numbers for each: use one such as lambda x: (x + 1) / 2"
            )
        self.inverse_scaler, self.levels = inverse_scaler, levels
        self.limits = low[0], high[0]
        self.half = (self.limits[1] - self.limits[0]) / (levels - 1) / 2

    def check(self, data: Tensor) -> None:
        """Refuse data between grey levels.

        Raises:
            ValueError: says how far off they are.
        """
        number = self.inverse_scaler(data.double()) * (self.levels - 1)
        off = (number - number.round().clamp(0, self.levels - 1)).abs()
        if not (off < 0.01).all():
            raise ValueError(
                f"the data should be {self.levels} grey levels, but are up to {off.max():.2g} "
                "levels off: the bound of a discrete model takes data that are not dequantized"
            )

    def log_probability(self, data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log of the mass that N(mean, std^2) has in the bins of the data, (B, *D), float64."""
        data, (low, high) = data.double(), self.limits
        lower, upper = (data - self.half - mean) / std, (data + self.half - mean) / std
        lower = torch.where(data < low + self.half, -torch.inf, lower)
        upper = torch.where(data > high - self.half, torch.inf, upper)
        # In the lower tail, small masses are no differences of numbers near 1.
        flip = lower + upper > 0
        lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        most, rest = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
        return most + torch.log1p(-torch.exp(rest - most))


def _all_steps(
    predict: Prediction, data: Tensor, draw: Callable, num_times: int
) -> tuple[Tensor, Tensor]:
    """The sum of the terms at all steps above 0, and nan for its error: (B,), in nats."""
    total = torch.zeros(len(data), dtype=torch.float64, device=data.device)
    for i in torch.arange(1, len(predict.chain), device=data.device):
        total += predict.step_term(data, i.expand(len(data)), draw(data))
    return total, torch.full_like(total, torch.nan)


def _some_steps(
    predict: Prediction, data: Tensor, draw: Callable, num_times: int
) -> tuple[Tensor, Tensor]:
    """An estimate of that sum, and its error: (B,), in nats."""
    probabilities = predict.chain.importance()
    cumulative = probabilities.cumsum(0)
    # One stratum of quantiles for each time, shifted alike for all times of a sample.
    shift, terms = torch.special.ndtr(draw(data.new_empty(len(data)))).double(), []
    for k in range(num_times):
        found = torch.searchsorted(cumulative, (k + shift) / num_times, right=True)
        found = found.clamp(max=len(probabilities) - 1)
        terms.append(predict.step_term(data, found + 1, draw(data)) / probabilities[found])
    return stratified_mean(torch.stack(terms))
