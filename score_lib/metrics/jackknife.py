"""Standard errors of distances of samples, from the samples that were drawn, by the jackknife."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from score_lib.metrics import distances
from score_lib.metrics.stats import Statistics

# Each costs one evaluation of the distance; the error itself is then known to a tenth.  Where
# samples are as good as data, so that a FID is all bias, the jackknife's is up to half too large.
GROUPS = 50


def jackknife_error(whole: float, left_out: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of a statistic of N draws, from its values without each of G groups of them.

    Of equal groups, sqrt((G - 1) / G * sum (value - mean)^2), the delete-a-group jackknife [Shao
    and Tu 1995].  The bias of a distance depends on how many samples are left: unequal groups are
    weighted so that its differences do not count as spread [Busing et al. 1999].

    Args:
        whole: the statistic of all draws.
        left_out: its values without each group, (G,).
        sizes: of the groups, (G,), N in all.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    shares = sizes.sum() / sizes
    pseudo = shares * whole - (shares - 1) * np.asarray(left_out, dtype=np.float64)
    deviations = pseudo - np.average(pseudo, weights=sizes)
    return float(np.sqrt(np.mean(deviations**2 / (shares - 1))))


def sampling_errors(
    real: Statistics,
    fake: Statistics,
    device: torch.device | str = "cpu",
    *,
    distance: str = "fid",
    groups: int = GROUPS,
) -> dict[str, float]:
    """How far the Fréchet distance and the Inception Score would vary with other samples.

    Only the samples vary: the data's statistics are the same for everyone.

    Args:
        real, fake: statistics of the data set and of N samples with their features.
        distance: name of the Fréchet distance, see `Extractor`.
        groups: into which the samples are dealt; at most N.
    Returns:
        "fid_standard_error" (or that of `distance`), and "inception_score_standard_error" if there
        are class scores.
    Raises:
        ValueError: fewer than four samples.
    """
    if fake.count < 4:
        raise ValueError(f"standard errors of distances need 4 or more samples, not {fake.count}")
    count, fake = min(groups, fake.count), fake.by_class()
    pool_3 = torch.as_tensor(fake.pool_3, device=device, dtype=torch.float64)
    of_data = real.moments(device)
    left_out = [distances.frechet_distance(of_data, m) for m in _moments_without(pool_3, count)]
    whole = distances.frechet_distance(of_data, distances.moments(pool_3))
    found = {distance: (whole, left_out)}
    if fake.logits is not None:
        logits = torch.as_tensor(fake.logits, device=device)
        score = distances.inception_score
        found["inception_score"] = (score(logits)[0], _without(logits, count, score))
    sizes = [len(range(k, fake.count, count)) for k in range(count)]
    return {
        f"{name}_standard_error": jackknife_error(*values, sizes) for name, values in found.items()
    }


def _moments_without(x: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and unbiased covariance of the rows (N, F), without each group of rows in turn.

    From sums over groups: N F^2 operations in all, and not in each.
    """
    mu = x.mean(dim=0)
    parts = [(x[k::groups] - mu) for k in range(groups)]
    total = sum(part.T @ part for part in parts)
    for part in parts:
        rest = len(x) - len(part)
        shift = -part.sum(dim=0) / rest  # the deviations from mu add up to 0
        scatter = total - part.T @ part - rest * torch.outer(shift, shift)
        yield mu + shift, scatter / (rest - 1)


def _without(rows: Tensor, groups: int, statistic: Callable) -> list[float]:
    """The first value of a statistic of the rows, without each group of rows in turn."""
    number = torch.arange(len(rows), device=rows.device) % groups
    return [statistic(rows[number != k])[0] for k in range(groups)]
