"""Statistics of a set of images: their features, and a record of the network that computed them.

Files are .npz without pickle.  Ours hold `pool_3` (N, F), optionally `logits` (N, K) and `labels`
(N,), and `extractor`, `resize`, `digest`, `dataset`, `place`, `shape`, `means`, `pixels`,
`sample`, `classes`, `count` and `hash`.  The common layouts are read too, by the names of their
arrays: `pool_3` alone (TF-GAN), or `mu` (F,) and `sigma` (F, F), which suffice for the FID only
(TTUR, pytorch-fid, EDM).  Those of ADM have `mu_s` and `sigma_s` as well, for the sFID, and images
`arr_0`, which are not read.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from score_lib.base.distributed import gather
from score_lib.base.tensors import derive_seed
from score_lib.disk.arrays import array_sizes, known_type, load_arrays, save_arrays
from score_lib.disk.files import printable
from score_lib.disk.logs import progress_bar
from score_lib.disk.reports import mean_and_error
from score_lib.metrics import distances
from score_lib.metrics.extractors import Extractor, described
from score_lib.metrics.moments import check_moments, check_rows
from score_lib.metrics.pixels import hash_sum, pixel_digest
from score_lib.metrics.two_sample import kid_estimate

_ARRAYS = ("pool_3", "logits", "mu", "sigma", "means", "labels", "mu_s", "sigma_s")
_RECORD = ("extractor", "resize", "digest", "dataset")
_IMAGES = ("place", "shape", "pixels", "sample", "classes")  # not in older files


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Features of N images, or only their mean and covariance.

    Attributes:
        pool_3: features (N, F); None if only mu and sigma, (F,) and (F, F), are known.
        logits: class scores (N, K), or None.
        mu_s, sigma_s: mean (S,) and covariance (S, S) of spatial features, or None.
        extractor, resize, digest: of the network that computed them; "" if not recorded.
        dataset: a description of the images.
        place, shape: last part of the path of the images, and "height x width x channels"; "" if
            not recorded.
        means: grey level of some of the images by channel (n, C), to tell whether images are the
            same; None if not recorded.
        pixels, sample: `pixel_digest` of all images, and of those that `means` are of; "" if not
            recorded.
        labels: class of each image (N,), or None.
        count: number of images; 0 if not known.
        classes: names of classes and their labels, as `class_text` writes them; "" if not recorded.
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
    pixels: str = ""
    sample: str = ""
    means: np.ndarray | None = None
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    labels: np.ndarray | None = None
    count: int = 0
    classes: str = ""

    def __post_init__(self):
        for name in _ARRAYS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value))
        if (self.mu_s is None) != (self.sigma_s is None):
            raise ValueError("of 'mu_s' and 'sigma_s' there is only one")
        if self.mu_s is not None:
            check_moments("mu_s", self.mu_s, "sigma_s", self.sigma_s)
        if self.pool_3 is None:
            if self.mu is None or self.sigma is None:
                raise ValueError("there is neither 'pool_3' nor both 'mu' and 'sigma'")
            check_moments("mu", self.mu, "sigma", self.sigma)
            return
        object.__setattr__(self, "count", len(self.pool_3))
        check_rows("pool_3", self.pool_3, self.count)
        if self.logits is not None:
            check_rows("logits", self.logits, self.count)
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
        spatial: Tensor | None = None,
        pixels: str = "",
        classes: str = "",
    ) -> "Statistics":
        """Statistics from an extractor's output: pool_3 (N, F), and logits (N, K) and spatial
        features (N, S) or None."""
        mu_s, sigma_s = (None, None) if spatial is None else distances.moments(spatial)
        return cls(
            pool_3=pool_3,
            logits=logits,
            labels=labels,
            mu_s=mu_s,
            sigma_s=sigma_s,
            pixels=pixels,
            classes=classes,
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

    @property
    def width(self) -> int:
        """Number of features of an image."""
        return (self.mu if self.pool_3 is None else self.pool_3).shape[-1]

    def moments(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Mean (F,) and unbiased covariance (F, F) of the features."""
        if self.pool_3 is None:
            return tuple(torch.as_tensor(x, device=device) for x in (self.mu, self.sigma))
        return distances.moments(torch.as_tensor(self.pool_3, device=device))

    def as_moments(self) -> "Statistics":
        """Only the mean and covariance, as other tools read them."""
        mu, sigma = (np.asarray(value) for value in self.moments())
        return dataclasses.replace(self, pool_3=None, logits=None, labels=None, mu=mu, sigma=sigma)

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

    def by_class(self) -> "Statistics":
        """These, class by class if they have labels, so that every n-th row has all classes alike.

        Samples are drawn of the classes in turn, in fixed shares: groups of them that differ in
        their shares would tell of more than chance, and errors by the jackknife be too large.
        """
        return self if self.labels is None else self._rows(self.labels.argsort(kind="stable"))

    def shuffled(self) -> "Statistics":
        """These in random order, always the same."""
        return self._rows(_random_order(self.count))

    def _rows(self, order: np.ndarray) -> "Statistics":
        rows = {name: getattr(self, name) for name in ("pool_3", "logits", "labels")}
        found = {name: value[order] for name, value in rows.items() if value is not None}
        return dataclasses.replace(self, **found)

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
        return self.extractor and described(self.extractor, self.digest, self.resize)

    def describe(self) -> str:
        """The images and the network, for a message; says what is not known."""
        place = f" ({self.place})" if self.place else ""
        return (
            f"{self.count or 'an unknown number of'} images of {self.dataset or 'unknown data'}"
            f"{place}, {self.shape or 'of unknown size'}, features by "
            f"{self.made_by() or 'an unknown network'}"
        )


def compute_statistics(
    extractor: Extractor,
    batches: Iterable[Tensor | np.ndarray | tuple[Tensor, Tensor]],
    progress: bool = False,
    *,
    dataset: str = "",
) -> Statistics:
    """Features and class scores of images.

    Rows are shuffled with a fixed seed: `distances.kid` and TF-GAN compare blocks of them, and data
    sets are often sorted by class.  With several ranks, each passes its own batches, and all get
    the statistics of all batches, in the order of ranks.

    Args:
        batches: images (B, H, W, C) uint8, or tuples of them and their labels (B,).
        dataset: a description of the images, for the record.
    Raises:
        ValueError: fewer than two images, images that the extractor cannot take, or not one label
            for each.
    """
    parts = []
    with progress_bar(operator.length_hint(batches) or None, 0, "batch") as bar:
        bar.disable = bar.disable or not progress
        for images in batches:
            images, labels = _with_labels(images)
            parts.append({**extractor(images), "labels": labels, "pixels": hash_sum(images)})
            bar.update()
    parts = list(itertools.chain.from_iterable(gather(parts)))
    if sum(len(part["pool_3"]) for part in parts) < 2:
        raise ValueError("statistics need two or more images")
    if len({part["labels"] is None for part in parts}) > 1:
        raise ValueError("some batches of images have labels, and others have none")
    pool_3 = torch.cat([part["pool_3"] for part in parts])
    order = _random_order(len(pool_3))
    logits, labels, spatial = (
        None if parts[0].get(name) is None else torch.cat([part[name] for part in parts])[order]
        for name in ("logits", "labels", "spatial")
    )
    pixels = pixel_digest(part["pixels"] for part in parts)
    return Statistics.of(extractor, pool_3[order], logits, dataset, labels, spatial, pixels)


def _with_labels(batch: Tensor | np.ndarray | tuple) -> tuple[Tensor | np.ndarray, Tensor | None]:
    """Images (B, H, W, C) of a batch, and their labels (B,) or None."""
    images, labels = batch if isinstance(batch, tuple) else (batch, None)
    labels = None if labels is None else torch.as_tensor(labels)
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images should have as many labels, not {labels.numel()}")
    return images, labels


def _random_order(count: int) -> np.ndarray:
    """A permutation of so many rows, the same each time."""
    return np.random.default_rng(derive_seed("order of statistics")).permutation(count)


def class_text(class_to_idx: Mapping[str, int]) -> str:
    """Names of classes and their labels as `Statistics` record them; "" if there are none."""
    return json.dumps(dict(class_to_idx), sort_keys=True) if class_to_idx else ""


def save_statistics(path: str | os.PathLike, stats: Statistics) -> None:
    """Write statistics as .npz, whole or not at all."""
    arrays = {name: getattr(stats, name) for name in _ARRAYS if getattr(stats, name) is not None}
    record = {name: np.array(getattr(stats, name)) for name in (*_RECORD, *_IMAGES, "count")}
    # The hash comes first: a damaged table of contents may lose the last entries.
    save_arrays(path, hash=np.array(stats.hash()), **arrays, **record)


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read statistics in any of the layouts above; other arrays of the file are not read.

    Raises:
        ValueError: the file is damaged or not one of statistics.
    """
    if pathlib.Path(path).suffix == ".pkl":
        raise ValueError(
            f"{path} is a pickle, which may run code and is not read: write the 'mu' and 'sigma' "
            "in it with numpy.savez, and name that file"
        )
    known = (*_ARRAYS, *_RECORD, *_IMAGES, "count", "hash")
    stored = array_sizes(path)
    arrays = load_arrays(path, [name for name in known if name in stored])
    try:
        stats = Statistics(
            **{name: known_type(arrays[name]) for name in _ARRAYS if name in arrays},
            **{name: str(arrays[name]) for name in _RECORD + _IMAGES if name in arrays},
            count=int(arrays.get("count", 0)),
        )
    except (ValueError, TypeError, OverflowError) as error:
        batch = ", only a batch of images" if "arr_0" in stored and not arrays else ""
        reason = printable(str(error)) + batch
        raise ValueError(f"{path} is not a file of statistics: {reason}") from error
    if "hash" in arrays and str(arrays["hash"]) != stats.hash():
        raise ValueError(
            f"{path} was changed after it was written (its hash differs): compute it again with "
            "--mode fid_stats"
        )
    return stats


def metrics(
    real: Statistics,
    fake: Statistics,
    device: torch.device | str = "cpu",
    *,
    distance: str = "fid",
) -> dict[str, float | None]:
    """All distances between two sets of images, as defined for the published results.

    KID is over all pairs of images, see `kid_estimate`: TF-GAN's, `distances.kid`, is over those of
    blocks, with the same expectation.

    Args:
        real, fake: statistics of the data set and of samples; the Inception Score is of samples.
        distance: name of the Fréchet distance, see `Extractor`.
    Returns:
        "fid" (or `distance`), "inception_score", "kid", "kid_standard_error", "precision" and
        "recall", and "sfid" if the data have spatial features; None for those that cannot be
        computed from these statistics, with a warning that says why.
    Raises:
        ValueError: features of different extractors.
    """
    check_comparable(real.made_by(), fake.made_by())
    names = (distance, "inception_score", "kid", "kid_standard_error", "precision", "recall")
    result: dict[str, float | None] = dict.fromkeys(names)
    result[distance] = distances.frechet_distance(real.moments(device), fake.moments(device))
    if real.mu_s is not None:
        result["sfid"] = _spatial_distance(real, fake, device)
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
        kid, error = kid_estimate(*features)
        result["kid"], result["kid_standard_error"] = kid, None if math.isnan(error) else error
        result["precision"], result["recall"] = distances.precision_recall(*features)
    except ValueError as too_few:
        logging.warning("some distances are left out: %s", too_few)
    return result


def _spatial_distance(
    real: Statistics, fake: Statistics, device: torch.device | str
) -> float | None:
    """sFID [Nash et al. 2021]: the distance in features that keep their place in the image."""
    if fake.mu_s is None:
        logging.warning(
            "no sFID: the samples have no spatial features, which only the extractor 'inception' "
            "computes"
        )
        return None
    moments = [
        tuple(torch.as_tensor(x, device=device) for x in (stats.mu_s, stats.sigma_s))
        for stats in (real, fake)
    ]
    return distances.frechet_distance(*moments)


def class_metrics(
    real: Statistics, fake: Statistics, recognises: bool, *, distance: str = "fid"
) -> dict[str, float]:
    """How well samples of given classes are of them.

    Args:
        real, fake: with labels; those of samples are the classes that they were drawn for.
        recognises: whether the class scores are of the data's classes.
        distance: as for `metrics`.
    Returns:
        "recognised", the share of samples that the extractor assigns to their class, with its
        standard error, if it recognises them; "fid_within_classes", the mean over classes of the
        FID between the samples and the data of a class, if both have two images of each and
        record the same names of classes, or one of them none.
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
    if real.classes and fake.classes and real.classes != fake.classes:
        logging.warning(
            "no FID within classes: the statistics of the data are of the classes %s, and the "
            "network has learned %s; compute them again of data with the same classes",
            printable(real.classes),
            printable(fake.classes),
        )
        return result
    classes = np.unique(fake.labels)
    counts = [min((s.labels == c).sum() for s in (real, fake)) for c in classes]
    if min(counts) < 2:
        logging.warning("no FID within classes: a class has fewer than two images")
        return result
    found = [distances.fid(real.of_class(c).pool_3, fake.of_class(c).pool_3) for c in classes]
    return result | {f"{distance}_within_classes": float(np.mean(found))}


def check_comparable(real: str, fake: str) -> None:
    """Refuse features of different extractors, which `Statistics.made_by` describes.

    Raises:
        ValueError: they differ; if one of them is unknown, a warning is logged.
    """
    if real and fake and real != fake:
        raise ValueError(
            "features of different extractors cannot be compared: the data's come from "
            f"{real}, the samples' from {fake}"
        )
    if not (real and fake):
        logging.warning(
            "the statistics of the %s do not name their extractor: distances are meaningless "
            "unless both sets have the same one",
            "samples" if real else "data",
        )
