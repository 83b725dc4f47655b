"""How good samples are: features of images, their statistics, and distances between them.

Behind this door: `score_lib.metrics`.
"""

from score_lib.metrics.configured import get_extractor, load_dataset_stats, stats_path
from score_lib.metrics.digits import DigitsClassifier
from score_lib.metrics.distances import (
    fid,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
    squared_mmd,
)
from score_lib.metrics.extractors import Extractor, register_extractor
from score_lib.metrics.inception import get_inception_model, run_inception_distributed
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.stats import (
    Statistics,
    compute_statistics,
    load_statistics,
    metrics,
    save_statistics,
)
