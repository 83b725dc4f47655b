"""How good samples are: features of images, their statistics, and distances between them.

For other data: distances of samples of any shape, of sets of points and of series, and pictures.
Behind this door: `score_lib.metrics`, `score_lib.disk.drawings` and `score_lib.disk.pictures`.
"""

from score_lib.disk.drawings import save_samples_picture
from score_lib.disk.pictures import make_grid, save_grid, to_uint8
from score_lib.metrics.classifiers import DigitsClassifier
from score_lib.metrics.configured import get_extractor, load_dataset_stats, stats_path
from score_lib.metrics.distances import (
    fid,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
    squared_mmd,
)
from score_lib.metrics.estimates import Estimate
from score_lib.metrics.extractors import Extractor, register_extractor
from score_lib.metrics.inception import get_inception_model, run_inception_distributed
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.point_sets import (
    chamfer_distances,
    coverage,
    matching_distance,
    nearest_neighbour_accuracy,
    point_set_metrics,
)
from score_lib.metrics.samples import (
    KernelDistance,
    energy_distance,
    sample_metrics,
    squared_gaussian_mmd,
)
from score_lib.metrics.series import (
    autocorrelation,
    autocorrelation_distance,
    log_spectral_distance,
    power_spectrum,
    series_metrics,
)
from score_lib.metrics.sliced import sliced_wasserstein
from score_lib.metrics.stats import (
    Statistics,
    compute_statistics,
    load_statistics,
    metrics,
    save_statistics,
)
