"""Distances between two sets of features, in float64.

Features are (N, F) and (M, F), tensors or arrays; the computation runs on their device.  Functions
that follow a reference implementation name it, and equal it up to rounding.  They raise ValueError
for too few rows, other shapes, and values that are not finite or complex.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import check_real
from score_lib.metrics.moments import ASYMMETRY, NEGATIVE

Features = Tensor | np.ndarray

# Values in one block of a matrix over all pairs: 128 MiB in float64.
BLOCK = 1 << 24


def moments(features: Features) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F)."""
    x = _float64(features)
    mu = x.mean(dim=0)
    centred = x - mu
    return mu, centred.T @ centred / (len(x) - 1)


def fid(features_a: Features, features_b: Features) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    Equals TF-GAN's `frechet_classifier_distance_from_activations` and torch-fidelity's FID.
    """
    a, b = feature_pair(features_a, features_b)
    if max(len(a), len(b)) <= a.shape[1]:
        return _fid_of_few(a, b)
    return frechet_distance(moments(a), moments(b))


def _fid_of_few(a: Tensor, b: Tensor) -> float:
    """The same for no more rows than features, without matrices of features times features.

    Centred rows over sqrt(N - 1) are factors of the covariances, see `frechet_distance`.
    """
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    a, b = ((x - x.mean(dim=0)) / math.sqrt(len(x) - 1) for x in (a, b))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(means + a.square().sum() + b.square().sum() - 2 * shared), 0.0)


def frechet_distance(
    stats_a: tuple[Features, Features], stats_b: tuple[Features, Features]
) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), also of singular covariances.

    Args:
        stats_a, stats_b: mean (F,) and covariance (F, F), all on the same device.
    Raises:
        ValueError: other shapes or widths, or a matrix that is no covariance, up to rounding in
            float32.
    """
    (mu_a, sigma_a), (mu_b, sigma_b) = _gaussian(stats_a), _gaussian(stats_b)
    _check_widths(mu_a, mu_b)
    # With S = L L', the trace of (S_a S_b)^(1/2) is the sum of the singular values of L_a' L_b.
    # The square root of an eigenvalue of S_a S_b would turn a rounding error of 1e-16 into 1e-8 in
    # directions without variance.
    shared = torch.linalg.svdvals(_factor(mu_a, sigma_a).T @ _factor(mu_b, sigma_b)).sum()
    means = (mu_a - mu_b).square().sum()
    distance = means + sigma_a.trace() + sigma_b.trace() - 2 * shared
    return max(float(distance), 0.0)


def _gaussian(stats: tuple[Features, Features]) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), in float64; faults that `_factor` cannot see are refused."""
    mu, sigma = (_double(value).detach() for value in stats)
    if mu.dim() != 1 or not len(mu) or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(
            "the Fréchet distance needs a mean (F,) and a covariance (F, F), not "
            f"{tuple(mu.shape)} and {tuple(sigma.shape)}"
        )
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("a mean or covariance for the Fréchet distance is not finite")
    off = (sigma - sigma.T).abs().max()
    if off > ASYMMETRY * sigma.abs().max() + _rounding(mu):
        raise ValueError(f"a covariance should be symmetric, not off by {off:.3g}")
    return mu, sigma


def _rounding(mu: Tensor) -> Tensor:
    """Rounding errors of a covariance around this mean, also where samples are all the same."""
    return torch.finfo(mu.dtype).eps * mu.square().sum()


def _factor(mu: Tensor, sigma: Tensor) -> Tensor:
    """L (F, rank) with L L' = sigma, for a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(sigma)
    if values.min() < -NEGATIVE * sigma.trace().clamp(min=0) - _rounding(mu):
        raise ValueError(f"a covariance has a negative variance, {values.min():.3g}")
    rounding = values.max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > rounding.clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def kid(
    features_a: Features, features_b: Features, *, max_block_size: int = 1024
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): mean of `squared_mmd` over blocks of rows.

    Equals TF-GAN's `kernel_classifier_distance_and_std_from_activations`: the fewest consecutive
    blocks, of sizes that differ by at most one.  The rows must be in random order.

    Returns:
        the distance and its standard error by the spread of the blocks: a rough one for a few of
        them, and nan for a single one.
    Raises:
        ValueError: one set is so much smaller that its blocks have fewer than two rows, or
            max_block_size is below two.
    """
    a, b = feature_pair(features_a, features_b)
    if not max_block_size >= 2:
        raise ValueError(f"max_block_size should be 2 or more, not {max_block_size}")
    count = max(1, math.ceil(max(len(a), len(b)) / max_block_size))
    if min(len(a), len(b)) < 2 * count:
        raise ValueError(
            f"{len(a)} and {len(b)} features do not give {count} blocks of two or more rows: KID "
            f"needs at least {2 * count} of each, or blocks above max_block_size = {max_block_size}"
        )
    # The larger blocks come last, as in TF-GAN.
    blocks = [x.split([(len(x) + k) // count for k in range(count)]) for x in (a, b)]
    values = torch.tensor(list(map(squared_mmd, *blocks)), dtype=torch.float64)
    error = values.std().item() / math.sqrt(count) if count > 1 else math.nan
    return values.mean().item(), error


def squared_mmd(features_a: Features, features_b: Features, *, block: int = BLOCK) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3.

    Averages over all pairs, so the order of the rows is irrelevant.  Slightly negative values are
    normal for sets from the same distribution.

    Args:
        block: values of the kernel matrix in memory at once.
    """
    a, b = feature_pair(features_a, features_b)
    within = sum(
        (_kernel_sum(x, x, block) - _kernel(x.square().sum(dim=1), x.shape[1]).sum())
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    )
    return float(within - 2 * _kernel_sum(a, b, block) / (len(a) * len(b)))


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / F + 1)^3 of all pairs of rows: (N, F), (M, F) -> (N, M)."""
    return _kernel(x @ y.T, x.shape[1])


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> Tensor:
    blocks = x.split(max(1, block // len(y)))
    return sum(polynomial_kernel(rows, y).sum() for rows in blocks)


def inception_score(
    logits: Features, *, splits: int = 1, seed: int | None = None
) -> tuple[float, float]:
    """exp(E[KL(p(y|x) || p(y))]) from logits (N, K) (Salimans et al. 2016).

    One split equals TF-GAN's `classifier_score_from_logits`, used for published results.  Ten
    splits with seed 2020 equal torch-fidelity's defaults.

    Args:
        splits: number of equal parts of the rows; the score is the mean over them.
        seed: for shuffling the rows first; None keeps their order.
    Returns:
        mean and standard deviation over splits.
    """
    x = _float64(logits)
    if not 1 <= splits <= len(x):
        raise ValueError(f"{len(x)} rows cannot be split into {splits} parts")
    if seed is not None:
        order = np.random.RandomState(seed).permutation(len(x))
        x = x[torch.from_numpy(order).to(x.device)]
    edges = [part * len(x) // splits for part in range(splits + 1)]
    scores = [_classifier_score(x[i:j]) for i, j in itertools.pairwise(edges)]
    return float(np.mean(scores)), float(np.std(scores))


def _classifier_score(logits: Tensor) -> float:
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    marginal = p.mean(dim=0)
    # xlogy is 0 for a class without images, whose log is not finite.
    entropy = -torch.special.xlogy(marginal, marginal).sum()
    return (entropy + (p * log_p).sum(dim=1).mean()).exp().item()


def precision_recall(
    real: Features, fake: Features, k: int = 3, *, block: int = 0
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of fake features that are at least as near to some real feature as its
    k-th nearest real neighbour; recall is the same with the roles exchanged.

    Args:
        k: neighbours; 3 in the paper.
        block: distances in memory at once; 0: `tile_size`.
    Returns:
        precision and recall.
    Raises:
        ValueError: k is no whole number from 1 on, or a set has no more features than that.
    """
    real, fake = feature_pair(real, fake)
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k should be a whole number of neighbours, 1 or more, not {k}")
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake features are too few for {k} neighbours: "
            f"each set needs {k + 1} or more"
        )
    # Distances are |x|^2 + |y|^2 - 2 x.y: centring makes their rounding errors smaller.
    origin = real.mean(dim=0)
    real, fake = real - origin, fake - origin
    block = block or tile_size(real.device)
    return _share_covered(fake, real, k, block), _share_covered(real, fake, k, block)


def _share_covered(points: Tensor, centres: Tensor, k: int, block: int) -> float:
    """Share of the points that are as near to some centre as its k-th nearest other centre."""
    side = max(1, math.isqrt(block))
    # k + 1, since the nearest centre of a centre is itself.
    radii = torch.cat([_nearest(rows, centres, k + 1, side)[:, -1] for rows in centres.split(side)])
    parts = list(zip(centres.split(side), radii.split(side), strict=True))
    covered = [
        torch.stack(
            [(squared_distances(rows, part) <= near).any(dim=1) for part, near in parts]
        ).any(dim=0)
        for rows in points.split(side)
    ]
    return torch.cat(covered).double().mean().item()


def _nearest(rows: Tensor, centres: Tensor, count: int, side: int) -> Tensor:
    """Squared distances of rows (n, F) to their so many nearest centres, (n, count), growing."""
    found = rows.new_empty(len(rows), 0)
    for part in centres.split(side):
        found = torch.cat([found, squared_distances(rows, part)], dim=1)
        found = found.topk(min(count, found.shape[1]), largest=False).values
    return found


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between rows: (N, F), (M, F) -> (N, M), in their dtype."""
    size = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = size - 2 * x @ y.T
    # For equal rows only rounding errors remain.
    rounding = (8 + x.shape[1]) * torch.finfo(x.dtype).eps
    return torch.where(squared > rounding * size, squared, 0.0)


def tile_size(device: torch.device) -> int:
    """Values of a square tile of a matrix over all pairs: `BLOCK`, or on a CPU its cache's size."""
    return 1 << 18 if device.type == "cpu" else BLOCK


def feature_pair(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    """Both sets (N, F) and (M, F) in float64, checked."""
    a, b = _float64(features_a), _float64(features_b)
    _check_widths(a, b)
    return a, b


def _check_widths(features_a: Tensor, features_b: Tensor) -> None:
    if features_a.shape[-1:] != features_b.shape[-1:]:
        raise ValueError(
            f"features of widths {features_a.shape[-1]} and {features_b.shape[-1]} cannot be "
            "compared: use the same extractor for both"
        )


def _float64(features: Features) -> Tensor:
    x = _double(features).detach()
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"features must be two or more rows (N, F), not {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("some features are not finite: check the images for nan or inf")
    return x


def _double(values: Features) -> Tensor:
    x = torch.as_tensor(values)
    check_real("features", x)
    return x.double()
