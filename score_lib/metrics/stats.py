"""Statistics of a set of images: their features, and a record of the network that computed them.

Files are .npz without pickle.  Ours hold `pool_3` (N, F), optionally `logits` (N, K) and `labels`
(N,), and `extractor`, `resize`, `digest`, `dataset`, `place`, `shape`, `means`, `count` and `hash`.
The common layouts are read too: `pool_3` alone, or `mu` (F,) and `sigma` (F, F), which suffice for
the FID only.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import operator
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from score_lib.base.distributed import gather
from score_lib.base.tensors import derive_seed
from score_lib.disk.arrays import load_arrays, save_arrays
from score_lib.disk.files import printable
from score_lib.disk.logs import progress_bar
from score_lib.disk.reports import mean_and_error
from score_lib.metrics import distances
from score_lib.metrics.extractors import Extractor

_ARRAYS = ("pool_3", "logits", "mu", "sigma", "means", "labels")
_RECORD = ("extractor", "resize", "digest", "dataset")
_IMAGES = ("place", "shape")  # not in older files


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Features of N images, or only their mean and covariance.

    Attributes:
        pool_3: features (N, F); None if only mu and sigma, (F,) and (F, F), are known.
        logits: class scores (N, K), or None.
        extractor, resize, digest: of the network that computed them; "" if not recorded.
        dataset: a description of the images.
        place, shape: last part of the path of the images, and "height x width x channels"; "" if
            not recorded.
        means: grey level of some of the images by channel (n, C), to tell whether images are the
            same; None if not recorded.
        labels: class of each image (N,), or None.
        count: number of images; 0 if not known.
    """

    pool_3: np.ndarray | None = None
    logits: np.ndarray | None = None
    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    extractor: str = ""
    resize: str = ""
    digest: str = ""
    dataset: str = ""
    place: str = ""
    shape: str = ""
    means: np.ndarray | None = None
    labels: np.ndarray | None = None
    count: int = 0

    def __post_init__(self):
        if self.pool_3 is None:
            _check_moments(self.mu, self.sigma)
            return
        object.__setattr__(self, "count", len(self.pool_3))
        _check_rows("pool_3", self.pool_3, self.count)
        if self.logits is not None:
            _check_rows("logits", self.logits, self.count)
        if self.labels is not None and (
            self.labels.shape != (self.count,) or self.labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"labels must be {self.count} whole numbers, one per image, not "
                f"{self.labels.dtype} of shape {self.labels.shape}"
            )

    @classmethod
    def of(
        cls,
        extractor: Extractor,
        pool_3: Tensor,
        logits: Tensor | None = None,
        dataset: str = "",
        labels: Tensor | None = None,
    ) -> "Statistics":
        """Statistics from an extractor's output: pool_3 (N, F) and logits (N, K) or None."""
        return cls(
            pool_3=np.asarray(pool_3),
            logits=None if logits is None else np.asarray(logits),
            labels=None if labels is None else np.asarray(labels),
            extractor=extractor.name,
            resize=extractor.resize,
            digest=extractor.digest,
            dataset=dataset,
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """`stats["pool_3"]`, as in the file."""
        value = getattr(self, name) if name in _ARRAYS else None
        if value is None:
            raise KeyError(f"these statistics have no {name!r}")
        return value

    def moments(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Mean (F,) and unbiased covariance (F, F) of the features."""
        if self.pool_3 is None:
            return tuple(torch.as_tensor(x, device=device) for x in (self.mu, self.sigma))
        return distances.moments(torch.as_tensor(self.pool_3, device=device))

    def of_class(self, label: int) -> "Statistics":
        """Those of the images of a class alone.

        Raises:
            ValueError: there are fewer than two.
        """
        rows = np.flatnonzero(self.labels == label)
        logits = None if self.logits is None else self.logits[rows]
        return dataclasses.replace(
            self, pool_3=self.pool_3[rows], logits=logits, labels=self.labels[rows]
        )

    def hash(self) -> str:
        """A short hash of the arrays and their record."""
        record = [getattr(self, name) for name in _RECORD]
        record += [value for name in _IMAGES if (value := getattr(self, name))]
        digest = hashlib.blake2b(repr(record).encode(), digest_size=8)
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                digest.update(np.ascontiguousarray(getattr(self, name)))
        return digest.hexdigest()

    def made_by(self) -> str:
        """The network, such as "'digits' (weights 9f31, resize: none)"; "" if unknown."""
        if not self.extractor:
            return ""
        return f"{self.extractor!r} (weights {self.digest}, resize: {self.resize})"

    def describe(self) -> str:
        """The images and the network, for a message; says what is not known."""
        place = f" ({self.place})" if self.place else ""
        return (
            f"{self.count or 'an unknown number of'} images of {self.dataset or 'unknown data'}"
            f"{place}, {self.shape or 'of unknown size'}, features by "
            f"{self.made_by() or 'an unknown network'}"
        )


def _check_rows(name: str, values: np.ndarray, count: int) -> None:
    if values.ndim != 2 or not values.shape[1] or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{name} must be rows of floating-point numbers, one per image, not {values.dtype} of "
            f"shape {values.shape}"
        )
    if len(values) != count or count < 2:
        raise ValueError(
            f"{name} has {len(values)} rows for {count} images: one row per image and two or more "
            "images are needed"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")


def _check_moments(mu: np.ndarray | None, sigma: np.ndarray | None) -> None:
    if mu is None or sigma is None:
        raise ValueError("there is neither 'pool_3' nor both 'mu' and 'sigma'")
    if mu.ndim != 1 or not mu.size or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(
            f"mu and sigma must have shapes (F,) and (F, F), not {mu.shape} and {sigma.shape}"
        )
    if not all(np.issubdtype(x.dtype, np.floating) and np.isfinite(x).all() for x in (mu, sigma)):
        raise ValueError("mu and sigma must be finite floating-point numbers")


def compute_statistics(
    extractor: Extractor,
    batches: Iterable[Tensor | np.ndarray | tuple[Tensor, Tensor]],
    progress: bool = False,
    *,
    dataset: str = "",
) -> Statistics:
    """Features and class scores of images.

    Rows are shuffled with a fixed seed: the kernel distance compares blocks of rows, and data sets
    are often sorted by class.  With several ranks, each passes its own batches, and all get the
    statistics of all batches, in the order of ranks.

    Args:
        batches: images (B, H, W, C) uint8, or pairs of them and their labels (B,).
        dataset: a description of the images, for the record.
    Raises:
        ValueError: fewer than two images, or images that the extractor cannot take.
    """
    parts = []
    with progress_bar(operator.length_hint(batches) or None, 0, "batch") as bar:
        bar.disable = bar.disable or not progress
        for images in batches:
            images, labels = images if isinstance(images, tuple) else (images, None)
            parts.append({**extractor(images), "labels": labels})
            bar.update()
    parts = list(itertools.chain.from_iterable(gather(parts)))
    if sum(len(part["pool_3"]) for part in parts) < 2:
        raise ValueError("statistics need two or more images")
    pool_3 = torch.cat([part["pool_3"] for part in parts])
    order = np.random.default_rng(derive_seed("order of statistics")).permutation(len(pool_3))
    logits, labels = (
        None if parts[0][name] is None else torch.cat([part[name] for part in parts])[order]
        for name in ("logits", "labels")
    )
    return Statistics.of(extractor, pool_3[order], logits, dataset, labels)


def save_statistics(path: str | os.PathLike, stats: Statistics) -> None:
    """Write statistics as .npz, whole or not at all."""
    arrays = {name: getattr(stats, name) for name in _ARRAYS if getattr(stats, name) is not None}
    record = {name: np.array(getattr(stats, name)) for name in (*_RECORD, *_IMAGES, "count")}
    # The hash comes first: a damaged table of contents may lose the last entries.
    save_arrays(path, hash=np.array(stats.hash()), **arrays, **record)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read statistics: ours, `pool_3` alone, or `mu` and `sigma`.

    Raises:
        ValueError: the file is damaged or not one of statistics.
    """
    arrays = load_arrays(path)
    try:
        stats = Statistics(
            **{name: arrays[name] for name in _ARRAYS if name in arrays},
            **{name: str(arrays[name]) for name in _RECORD + _IMAGES if name in arrays},
            count=int(arrays.get("count", 0)),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a file of statistics: {printable(str(error))}") from error
    if str(arrays.get("hash", stats.hash())) != stats.hash():
        raise ValueError(
            f"{path} was changed after it was written (its hash differs): compute it again with "
            "--mode fid_stats"
        )
    return stats


def metrics(
    real: Statistics, fake: Statistics, device: torch.device | str = "cpu"
) -> dict[str, float | None]:
    """All distances between two sets of images, as defined for the published results.

    Args:
        real, fake: statistics of the data set and of samples; the Inception Score is of samples.
    Returns:
        "fid", "inception_score", "kid", "kid_standard_error", "precision" and "recall"; None for
        those that cannot be computed from these statistics, with a warning that says why.
    Raises:
        ValueError: features of different extractors.
    """
    _check_comparable(real, fake)
    names = ("fid", "inception_score", "kid", "kid_standard_error", "precision", "recall")
    result: dict[str, float | None] = dict.fromkeys(names)
    result["fid"] = distances.frechet_distance(real.moments(device), fake.moments(device))
    if fake.logits is None:
        logging.warning("no Inception Score: the statistics of the samples have no logits")
    else:
        logits = torch.as_tensor(fake.logits, device=device)
        result["inception_score"] = distances.inception_score(logits)[0]
    if real.pool_3 is None or fake.pool_3 is None:
        logging.warning(
            "no KID, precision or recall: these need the features of every image (pool_3), but "
            "the statistics of the %s have only mean and covariance",
            "data" if real.pool_3 is None else "samples",
        )
        return result
    features = [torch.as_tensor(stats.pool_3, device=device) for stats in (real, fake)]
    try:
        result["precision"], result["recall"] = distances.precision_recall(*features)
        kid, error = distances.kid(*features)
        result["kid"], result["kid_standard_error"] = kid, None if math.isnan(error) else error
    except ValueError as too_few:
        logging.warning("some distances are left out: %s", too_few)
    return result


def class_metrics(real: Statistics, fake: Statistics, recognises: bool) -> dict[str, float]:
    """How well samples of given classes are of them.

    Args:
        real, fake: with labels; those of samples are the classes that they were drawn for.
        recognises: whether the class scores are of the data's classes.
    Returns:
        "recognised", the share of samples that the extractor assigns to their class, with its
        standard error, if it recognises them; "fid_within_classes", the mean over classes of the
        FID between the samples and the data of a class, if both have two images of each.
    """
    result = {}
    if recognises and fake.logits is not None:
        right = fake.logits.argmax(1) == fake.labels
        result |= mean_and_error("recognised", right.astype(float))
    if real.labels is None or real.pool_3 is None:
        logging.warning(
            "no FID within classes: the statistics of the data have no labels; compute them again "
            "with --mode fid_stats"
        )
        return result
    classes = np.unique(fake.labels)
    counts = [min((s.labels == c).sum() for s in (real, fake)) for c in classes]
    if min(counts) < 2:
        logging.warning("no FID within classes: a class has fewer than two images")
        return result
    distance = [
        distances.frechet_distance(real.of_class(c).moments(), fake.of_class(c).moments())
        for c in classes
    ]
    return result | {"fid_within_classes": float(np.mean(distance))}


def _check_comparable(real: Statistics, fake: Statistics) -> None:
    made_by = [real.made_by(), fake.made_by()]
    if all(made_by) and made_by[0] != made_by[1]:
        raise ValueError(
            "features of different extractors cannot be compared: the data's come from "
            f"{made_by[0]}, the samples' from {made_by[1]}"
        )
    if not all(made_by):
        logging.warning(
            "the statistics of the %s do not name their extractor: distances are meaningless "
            "unless both sets have the same one",
            "data" if not made_by[0] else "samples",
        )
