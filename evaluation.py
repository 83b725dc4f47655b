"""How good samples are: features, their statistics, and distances between them.

`distances` holds the metrics, which see features only; `extractors` the interface of the networks
that make features, with `inception` and `digits` behind it; `stats` the files that keep features
and know where they came from; `noise_scales` what a data set says about noise levels.
"""

from score_lib.metrics.digits import DigitsClassifier
from score_lib.metrics.distances import (
    fid,
    frechet_distance,
    inception_score,
    kid,
    kid_of_subsets,
    precision_recall,
    squared_mmd,
)
from score_lib.metrics.extractors import Extractor, get_extractor, register_extractor
from score_lib.metrics.inception import get_inception_model
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.stats import (
    Statistics,
    compute_statistics,
    load_dataset_stats,
    load_statistics,
    metrics,
    save_statistics,
    stats_path,
)

__all__ = [
    "DigitsClassifier",
    "Extractor",
    "Statistics",
    "compute_statistics",
    "fid",
    "fitting_num_scales",
    "frechet_distance",
    "get_extractor",
    "get_inception_model",
    "inception_score",
    "kid",
    "kid_of_subsets",
    "largest_pairwise_distance",
    "load_dataset_stats",
    "load_statistics",
    "metrics",
    "precision_recall",
    "register_extractor",
    "save_statistics",
    "squared_mmd",
    "stats_path",
]
