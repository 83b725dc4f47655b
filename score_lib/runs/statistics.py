"""Statistics of a data set, for FID and other distances: `--mode fid_stats`."""

import dataclasses
import logging
import os
import pathlib

import numpy as np
import torch

from score_lib.base import distributed
from score_lib.data.loading import get_streams
from score_lib.data.public import only_prepared
from score_lib.data.sources import DataError, Source
from score_lib.metrics.configured import (
    ADVICE,
    find_statistics,
    get_extractor,
    load_dataset_stats,
    shape_text,
    stats_path,
)
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.stats import Statistics, compute_statistics, save_statistics
from score_lib.runs.heldout import DataBytes
from score_lib.runs.setup import Run, setup

COMPARED_IMAGES = 1000
# In grey levels.  Decoders and processors round some pixels differently.
TOLERANCE = 0.25


def fid_stats(config, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """Write the statistics of the configured data set's training part.

    Images are uint8, without flips or dequantisation, and none is left out.  With
    `eval.suggest_noise_scales`, also log which `model.sigma_max` and `model.num_scales` fit.

    Returns:
        the file: `eval.stats`, or in the run's `stats/`, or without a run in `assets/stats/`.
    Raises:
        ValueError: there is no place for statistics of the user's own images.
    """
    run = setup(config)
    config = run.config
    if not run.pictures:
        raise ValueError(
            f"--mode fid_stats is for images of grey levels: samples of {run.kind} are compared "
            "with held-out data themselves, by --mode eval with eval.enable_sampling"
        )
    if workdir is None and not config.eval.stats and config.data.dataset.upper() == "IMAGES":
        raise ValueError(
            "statistics of your own images belong to a run: give --workdir, or a file as "
            "--config.eval.stats=FILE"
        )
    extractor = get_extractor(config, run.device)
    _, _, info = get_streams(config, evaluation=True)
    source = info.sources["train"]
    batches = DataBytes(config, source, labelled=source.num_classes > 1)
    stats = compute_statistics(extractor, batches.share(), progress=True, dataset=info.name)
    path = stats_path(config, workdir)

    def save() -> None:
        place = pathlib.Path(config.data.path).resolve().name if config.data.path else ""
        record = {"shape": shape_text(*source.shape), "means": channel_means(source)}
        save_statistics(path, dataclasses.replace(stats, place=place, **record))

    distributed.on_main(save)
    logging.info("statistics of %d images are in %s", stats.count, path)
    if config.eval.suggest_noise_scales:
        distributed.on_main(lambda: _suggest_noise_scales(config, DataBytes(config, source)))
    return path


def channel_means(source: Source) -> np.ndarray:
    """Mean grey level in 0 ... 255 by channel, of up to 1,000 evenly spaced images: (n, C)."""
    count = min(len(source), COMPARED_IMAGES)
    numbers = np.arange(count) * len(source) // count
    parts = np.array_split(numbers, -(-count // 32))
    means = [source.images(part).float().mean(dim=(2, 3)) for part in parts]
    return (torch.cat(means) * (255 / (source.levels - 1))).numpy()


def data_statistics(run: Run, workdir: str | os.PathLike | None) -> Statistics:
    """Statistics of the configured data set, if they are of these data.

    Data that are not on this machine, and files that do not record their images, are not compared.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of other images.
    """
    stats = load_dataset_stats(run.config, workdir)
    if stats.means is not None:
        distributed.on_main(lambda: _compare(stats, run.config, workdir))
    return stats


def _compare(stats: Statistics, config, workdir: str | os.PathLike | None) -> None:
    try:
        with only_prepared():
            source = get_streams(config, evaluation=True)[2].sources["train"]
            means = channel_means(source)
    except (DataError, OSError, ImportError) as error:
        logging.info("the statistics were not compared with the data: %s", error)
        return
    differ = "other pixels"
    if len(source) != stats.count:
        differ = f"{len(source)} images"
    elif means.shape == stats.means.shape and np.abs(means - stats.means).max() <= TOLERANCE:
        differ = ""
    if differ:
        raise ValueError(
            f"the statistics in {find_statistics(config, workdir)} are of {stats.describe()}; the "
            f"training part of {config.data.dataset} now has {differ}: {ADVICE}"
        )


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
