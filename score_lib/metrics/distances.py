"""Distances between two sets of features, in float64.

Features are (N, F), tensors or arrays; the work is done on their device.  Each function follows
the definition of a reference implementation and says which; on the same features the numbers are
the same up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Features = Tensor | np.ndarray

# Numbers in one block of a matrix over all pairs: 128 MiB in float64.
_BLOCK = 1 << 24


def moments(features: Features) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of features (N, F).

    Raises:
        ValueError: fewer than two rows, not two dimensions, or values that are not finite.
    """
    x = _float64(features)
    mu = x.mean(dim=0)
    centred = x - mu
    return mu, centred.T @ centred / (len(x) - 1)


def fid(features_a: Features, features_b: Features) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    Equals TF-GAN's `frechet_classifier_distance_from_activations` and torch-fidelity's FID.
    """
    return frechet_distance(moments(features_a), moments(features_b))


def frechet_distance(
    stats_a: tuple[Features, Features], stats_b: tuple[Features, Features]
) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), also of singular covariances.

    Args:
        stats_a, stats_b: mean (F,) and covariance (F, F), all on the same device.
    """
    mu_a, sigma_a = (torch.as_tensor(value).double() for value in stats_a)
    mu_b, sigma_b = (torch.as_tensor(value).double() for value in stats_b)
    _check_widths(mu_a, mu_b)
    # With S = L L', the trace of (S_a S_b)^(1/2) is the sum of the singular values of L_a' L_b.
    # Eigenvalues of S_a S_b would need a square root, which makes a rounding error of 1e-16 in a
    # direction without variance one of 1e-8.
    shared = torch.linalg.svdvals(_factor(sigma_a).T @ _factor(sigma_b)).sum()
    means = (mu_a - mu_b).square().sum()
    distance = means + sigma_a.trace() + sigma_b.trace() - 2 * shared
    return max(float(distance), 0.0)


def _factor(sigma: Tensor) -> Tensor:
    """L (F, rank) with L L' = sigma, of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(sigma)
    rounding = values.max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > rounding.clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def kid(
    features_a: Features, features_b: Features, *, max_block_size: int = 1024
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): mean of `squared_mmd` over blocks of rows.

    Equals TF-GAN's `kernel_classifier_distance_and_std_from_activations`: consecutive blocks, as
    few and as equal in size as possible.  The rows must be in random order.

    Args:
        features_a, features_b: (N, F) and (M, F).
        max_block_size: most rows of a block.
    Returns:
        the distance and its standard error, which is nan if there is but one block.
    Raises:
        ValueError: one set is so much smaller than the other that its blocks have one row.
    """
    a, b = _pair(features_a, features_b)
    count = math.ceil(max(len(a), len(b)) / max_block_size)
    if min(len(a), len(b)) < 2 * count:
        raise ValueError(
            f"{len(a)} and {len(b)} features do not give {count} blocks of two or more rows each: "
            f"a max_block_size of more than {max_block_size} would"
        )
    blocks = [x.split(_block_sizes(len(x), count)) for x in (a, b)]
    values = torch.tensor(list(map(squared_mmd, *blocks)), dtype=torch.float64)
    error = values.std().item() / math.sqrt(count) if count > 1 else math.nan
    return values.mean().item(), error


def kid_of_subsets(
    features_a: Features,
    features_b: Features,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel distance as mean and spread of `squared_mmd` over random subsets of both sets.

    Equals torch-fidelity's KID, with the same arguments and the same order of the two sets.

    Returns:
        mean and standard deviation over subsets (which is not the error of the mean).
    Raises:
        ValueError: a set has fewer than `size` rows.
    """
    a, b = _pair(features_a, features_b)
    if min(len(a), len(b)) < size:
        raise ValueError(
            f"subsets of {size} rows cannot be drawn from {len(a)} and {len(b)} features: "
            "choose a smaller size"
        )
    # The generator decides which subsets there are, so it must be the one that torch-fidelity has.
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = [torch.from_numpy(rng.choice(len(x), size, replace=False)) for x in (a, b)]
        values.append(squared_mmd(a[rows[0].to(a.device)], b[rows[1].to(b.device)]))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(features_a: Features, features_b: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3.

    Uses all pairs, whatever the order of the rows.  Slightly negative values are normal for sets
    from the same distribution.
    """
    a, b = _pair(features_a, features_b)
    within = sum(
        (_kernel_sum(x, x) - _kernel(x.square().sum(dim=1), x.shape[1]).sum())
        / (len(x) * (len(x) - 1))
        for x in (a, b)
    )
    return float(within - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return sum(_kernel(rows @ y.T, x.shape[1]).sum() for rows in _row_blocks(x, len(y)))


def _block_sizes(length: int, count: int) -> list[int]:
    """Sizes of `count` blocks that cover `length` rows; the larger ones come last, as in TF-GAN."""
    size, larger = divmod(length, count)
    return [size] * (count - larger) + [size + 1] * larger


def inception_score(
    logits: Features, *, splits: int = 1, seed: int | None = None
) -> tuple[float, float]:
    """exp(E[KL(p(y|x) || p(y))]) from logits (N, K) (Salimans et al. 2016).

    One split equals TF-GAN's `classifier_score_from_logits`, which published results used.  Ten
    splits with seed 2020 equal torch-fidelity's defaults.

    Args:
        logits: class scores before the softmax.
        splits: the score is the mean over so many equal parts of the rows.
        seed: the rows are shuffled with it first; None leaves their order.
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
    # xlogy: a class that no image belongs to counts for nothing, though its log is not finite.
    entropy = -torch.special.xlogy(marginal, marginal).sum()
    return (entropy + (p * log_p).sum(dim=1).mean()).exp().item()


def precision_recall(real: Features, fake: Features, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of fake features that lie within the distance of some real feature to
    its k-th nearest real neighbour; recall is the same with the roles exchanged.

    Args:
        real, fake: (N, F) and (M, F).
        k: neighbours; 3 in the paper.
    Returns:
        precision and recall.
    Raises:
        ValueError: there are not more than k features in each set.
    """
    real, fake = _pair(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake features are too few for {k} neighbours: "
            f"each set needs {k + 1} or more"
        )
    # Distances are found as |x|^2 + |y|^2 - 2 x.y: short vectors leave smaller rounding errors.
    origin = real.mean(dim=0)
    real, fake = real - origin, fake - origin
    return _share_covered(fake, real, k), _share_covered(real, fake, k)


def _share_covered(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of the points that are as near to some centre as its k-th nearest other centre."""
    radii = torch.cat(
        [
            # The nearest centre of each is itself.
            squared_distances(rows, centres).topk(k + 1, largest=False).values[:, -1]
            for rows in _row_blocks(centres, len(centres))
        ]
    )
    covered = [
        (squared_distances(rows, centres) <= radii).any(dim=1)
        for rows in _row_blocks(points, len(centres))
    ]
    return torch.cat(covered).double().mean().item()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between rows: (N, F), (M, F) -> (N, M), in their dtype."""
    size = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = size - 2 * x @ y.T
    # What is left of equal rows is rounding.
    rounding = (8 + x.shape[1]) * torch.finfo(x.dtype).eps
    return torch.where(squared > rounding * size, squared, 0.0)


def _row_blocks(x: Tensor, width: int) -> Iterator[Tensor]:
    """Blocks of rows, each small enough to be compared with `width` others at once."""
    return iter(x.split(max(1, _BLOCK // width)))


def _pair(features_a: Features, features_b: Features) -> tuple[Tensor, Tensor]:
    _check_widths(features_a, features_b)
    return _float64(features_a), _float64(features_b)


def _check_widths(features_a: Features, features_b: Features) -> None:
    if features_a.shape[-1:] != features_b.shape[-1:]:
        raise ValueError(
            f"features of {features_a.shape[-1]} and of {features_b.shape[-1]} numbers cannot be "
            "compared: they must come from the same extractor"
        )


def _float64(features: Features) -> Tensor:
    x = torch.as_tensor(features).detach().double()
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"features are two or more rows (N, F), not of shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("some features are not finite: are the samples?")
    return x
