"""Statistics of a data set, for FID and other distances: `--mode fid_stats`."""

import logging
import pathlib

import torch

from score_lib.base import distributed
from score_lib.data.loading import get_streams
from score_lib.metrics.configured import get_extractor, stats_path
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.stats import compute_statistics, save_statistics
from score_lib.runs.heldout import DataBytes
from score_lib.runs.setup import setup


def fid_stats(config) -> pathlib.Path:
    """Write the statistics of the configured data set's training part.

    Images are uint8, without flips or dequantisation, and none is left out.  With
    `eval.suggest_noise_scales`, also log which `model.sigma_max` and `model.num_scales` fit.

    Returns:
        the file: `eval.stats`, or its place in `assets/stats/`.
    """
    run = setup(config)
    config = run.config
    extractor = get_extractor(config, run.device)
    _, _, info = get_streams(config, evaluation=True)
    batches = DataBytes(config, info.sources["train"])
    stats = compute_statistics(extractor, batches.share(), progress=True, dataset=info.name)
    path = stats_path(config)
    distributed.on_main(lambda: save_statistics(path, stats))
    logging.info("statistics of %d images are in %s", stats.count, path)
    if config.eval.suggest_noise_scales:
        distributed.on_main(lambda: _suggest_noise_scales(config, batches))
    return path


def _suggest_noise_scales(config, batches: DataBytes) -> None:
    images = torch.cat(list(batches)) / 255
    sigma_max = largest_pairwise_distance(images)
    logging.info(
        "the largest distance between two images is %.4g: model.sigma_max for a VE process; with "
        "model.sigma_min = %g, model.num_scales = %d fits discrete noise levels",
        sigma_max,
        config.model.sigma_min,
        fitting_num_scales(sigma_max, config.model.sigma_min, images[0].numel()),
    )
