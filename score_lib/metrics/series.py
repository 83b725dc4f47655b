"""Measures of series: spectra and autocorrelations, and their distances between two sets.

Series are (N, C, L) or, with one channel, (N, L), tensors or arrays; the computation is in float64
on their device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from score_lib.metrics.distances import BLOCK
from score_lib.metrics.estimates import (
    Estimate,
    Values,
    check_same_shape,
    checked,
    root_of,
    variance_of_mean,
)
from score_lib.metrics.samples import sample_metrics

# Power below this share of the data's largest is rounding noise, whose logarithm says nothing.
_LEAST_POWER = 1e-10
_DECIBELS = 10 / math.log(10)


class Curve(NamedTuple):
    """A function of frequency or lag, by channel.

    Attributes:
        at: frequencies in cycles per step, from 0 to 1/2, or lags in steps; (K,).
        mean, standard_error: over series, (C, K).
    """

    at: Tensor
    mean: Tensor
    standard_error: Tensor


def series_metrics(samples: Values, data: Values, *, seed: int = 0) -> dict[str, float]:
    """All distances for series: those of `sample_metrics`, and two of their own.

    Args:
        samples, data: (N, C, L) and (M, C, L), or (N, L) and (M, L); four or more.
        seed: of the projections of the sliced Wasserstein distance.
    Returns:
        also "log_spectral_distance" in dB and "autocorrelation_distance", each with its
        "_standard_error".
    """
    return {
        **log_spectral_distance(samples, data).named("log_spectral_distance"),
        **autocorrelation_distance(samples, data).named("autocorrelation_distance"),
        **sample_metrics(samples, data, seed=seed),
    }


def power_spectrum(series: Values) -> Curve:
    """Mean periodogram |sum_t x_t exp(-2 pi i f t)|^2 / L at the frequencies k / L.

    White noise of variance s^2 has the power s^2 at every frequency.  No mean is subtracted.
    """
    x = _series(series, "series")
    power = _periodograms(x)
    at = torch.fft.rfftfreq(x.shape[2], dtype=torch.float64, device=x.device)
    return Curve(at, power.mean(dim=0), _error_of_mean(power))


def autocorrelation(series: Values, max_lag: int | None = None) -> Curve:
    """Correlation of x_t and x_(t + k) over all series and t, for k = 0, ..., max_lag.

    The mean is that over all series and t, by channel; each lag averages over its L - k pairs.

    Args:
        series: (N, C, L) or (N, L), two or more.
        max_lag: by default a quarter of the length.
    Raises:
        ValueError: as in `checked_pair`, a lag out of range, or a channel that is constant.
    """
    x = _series(series, "series")
    mean, influence = _correlations(x, _lags(x, max_lag))
    at = torch.arange(mean.shape[1], device=x.device)
    return Curve(at, mean, _error_of_mean(influence))


def log_spectral_distance(samples: Values, data: Values) -> Estimate:
    """Root mean square, over channels and frequencies, of 10 log10 of the ratio of mean powers.

    In dB.  Powers are raised to 1e-10 of the data's largest in the channel (-100 dB).  Two sets of
    one distribution have a distance above 0, about 4.3 sqrt(1/N + 1/M); the standard error holds
    where spectra differ.

    Args:
        samples, data: (N, C, L) and (M, C, L), or (N, L) and (M, L); two or more.
    """
    powers = [_periodograms(v) for v in _series_pair(samples, data)]
    means = [power.mean(dim=0) for power in powers]
    least = _LEAST_POWER * means[1].amax(dim=1, keepdim=True).clamp(min=torch.finfo().tiny)
    ratio = _DECIBELS * (means[0].maximum(least) / means[1].maximum(least)).log()
    # Derivative of the mean square by the logarithm of either power, with opposite signs.
    slope = 2 * ratio * _DECIBELS / ratio.numel()
    influence = [
        (power * (slope / mean.maximum(least)).masked_fill(mean < least, 0)).sum(dim=(1, 2))
        for power, mean in zip(powers, means, strict=True)
    ]
    return root_of(ratio.square().mean(), variance_of_mean(*influence), 2)


def autocorrelation_distance(samples: Values, data: Values, max_lag: int | None = None) -> Estimate:
    """Root mean square difference of autocorrelations, over channels and lags from 1 to max_lag.

    The standard error holds where autocorrelations differ.

    Args:
        samples, data: (N, C, L) and (M, C, L), or (N, L) and (M, L); two or more.
        max_lag: by default a quarter of the length.
    """
    x, y = _series_pair(samples, data)
    lags = _lags(x, max_lag)
    (mean_x, influence_x), (mean_y, influence_y) = (_correlations(v, lags) for v in (x, y))
    difference = (mean_x - mean_y)[:, 1:]
    slope = 2 * difference / difference.numel()
    influence = [(v[:, :, 1:] * slope).sum(dim=(1, 2)) for v in (influence_x, influence_y)]
    return root_of(difference.square().mean(), variance_of_mean(*influence), 2)


def _periodograms(x: Tensor) -> Tensor:
    """(N, C, L) -> (N, C, L // 2 + 1)."""
    parts = [torch.fft.rfft(part.double()).abs().square() for part in _blocks(x)]
    return torch.cat(parts) / x.shape[2]


def _correlations(x: Tensor, lags: int) -> tuple[Tensor, Tensor]:
    """Autocorrelations (C, K), and the influence of each series on them, (N, C, K)."""
    centre = x.mean(dim=(0, 2), keepdim=True, dtype=torch.float64)
    products = torch.cat([_products(part - centre, lags) for part in _blocks(x)])
    mean = products.mean(dim=0)
    variance = mean[:, :1]
    # A constant channel has a variance of rounding errors only.
    rounding = 1e-24 * (centre[0].square() + torch.finfo().tiny)
    if bool((variance <= rounding).any()):
        raise ValueError("a channel of the series is constant, so it has no autocorrelation")
    mean = mean / variance
    return mean, products / variance - mean * products[:, :, :1] / variance


def _products(x: Tensor, lags: int) -> Tensor:
    """Mean over t of x_t x_(t + k), for k up to a lag: (B, C, L) -> (B, C, K)."""
    length = x.shape[2]
    power = torch.fft.rfft(x, n=2 * length).abs().square()  # zeros keep ends from meeting
    sums = torch.fft.irfft(power, n=2 * length)[:, :, : lags + 1]
    return sums / (length - torch.arange(lags + 1, device=x.device))


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, BLOCK // x[0].numel()))


def _error_of_mean(values: Tensor) -> Tensor:
    return values.std(dim=0) / math.sqrt(len(values))


def _lags(x: Tensor, max_lag: int | None) -> int:
    lags = max(1, x.shape[2] // 4) if max_lag is None else max_lag
    if not 1 <= lags < x.shape[2]:
        raise ValueError(f"max_lag should be from 1 to {x.shape[2] - 1}, not {max_lag}")
    return lags


def _series(series: Values, name: str) -> Tensor:
    x = checked(series, name, 2, (2, 3), "(N, C, L) or (N, L)")
    if x.shape[-1] < 2:
        raise ValueError(f"{name} should have two or more steps, not {x.shape[-1]}")
    return x if x.dim() == 3 else x[:, None]


def _series_pair(samples: Values, data: Values) -> tuple[Tensor, Tensor]:
    samples, data = _series(samples, "samples"), _series(data, "data")
    check_same_shape(samples, data)
    return samples, data
