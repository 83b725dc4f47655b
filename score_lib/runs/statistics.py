"""Statistics of a data set, for FID and other distances: `--mode fid_stats`."""

import dataclasses
import logging
import os
import pathlib
import tempfile

import numpy as np
import torch

from score_lib.base import distributed
from score_lib.data.loading import check_levels, get_streams
from score_lib.data.public import only_prepared
from score_lib.data.sources import DataError, Source
from score_lib.disk.files import naming, set_aside
from score_lib.metrics.configured import (
    ADVICE,
    find_statistics,
    get_extractor,
    load_dataset_stats,
    shape_text,
    stats_path,
)
from score_lib.metrics.extractors import Extractor
from score_lib.metrics.noise_scales import fitting_num_scales, largest_pairwise_distance
from score_lib.metrics.pixels import hash_sum, pixel_digest
from score_lib.metrics.shares import warn_of_shares
from score_lib.metrics.stats import (
    Statistics,
    check_comparable,
    class_text,
    compute_statistics,
    load_statistics,
    save_statistics,
)
from score_lib.runs.heldout import DataBytes, spaced_numbers
from score_lib.runs.setup import Run, setup

# In grey levels.  Decoders and processors round some pixels differently.
TOLERANCE = 0.25


def fid_stats(config, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """Write the statistics of the configured data set's training part.

    Images are uint8, without flips or dequantisation, and none is left out.  A file of other images
    or of another extractor that is there is moved to `set_aside/` beside it.  With
    `eval.suggest_noise_scales`, also log which `model.sigma_max` and `model.num_scales` fit.

    Returns:
        the file: `eval.stats`, or in the run's `stats/`, or without a run in `assets/stats/`.
    Raises:
        ValueError: there is no place for statistics of the user's own images, or no file can be
            at the place.
        OSError: the place cannot be written, which is told before features are computed.
    """
    run = setup(config)
    config = run.config
    if not run.pictures:
        raise ValueError(
            f"--mode fid_stats is for images of grey levels: samples of {run.kind} are compared "
            "with held-out data themselves, by --mode eval with eval.enable_sampling"
        )
    if workdir is None and not config.eval.stats and config.data.dataset == "IMAGES":
        raise ValueError(
            "statistics of your own images belong to a run: give --workdir, or a file as "
            "--config.eval.stats=FILE"
        )
    path = stats_path(config, workdir)
    distributed.on_main(lambda: _check_place(path))
    extractor = get_extractor(config, run.device)
    moments = config.eval.stats_format == "moments"
    extractor.with_spatial = moments and extractor.has_spatial
    _, _, info = get_streams(config, evaluation=True)
    check_levels(config, info)
    source = info.sources["train"]
    pixels = sampled_pixels(source)
    distributed.agreed(f"{len(source)} examples, sample {pixels['sample']}", "training data")
    batches = DataBytes(config, source, labelled=source.num_classes > 1)
    stats = compute_statistics(extractor, batches.share(), progress=True, dataset=info.name)

    def save() -> None:
        place = pathlib.Path(config.data.path).resolve().name if config.data.path else ""
        record = {"shape": shape_text(*source.shape), "classes": class_text(info.class_to_idx)}
        record |= pixels
        found = dataclasses.replace(stats, place=place, **record)
        _save(path, found.as_moments() if moments else found)

    distributed.on_main(save)
    logging.info("statistics of %d images are in %s", stats.count, path)
    if config.eval.suggest_noise_scales:
        distributed.on_main(lambda: _suggest_noise_scales(run, DataBytes(config, source)))
    return path


def _check_place(path: pathlib.Path) -> None:
    """Refuse a place where no file of statistics can be written, or none would be read."""
    if path.is_dir() or path.suffix == ".pkl":
        wrong = "is a folder" if path.is_dir() else "has the name of a pickle, which is not read"
        raise ValueError(f"eval.stats = {str(path)!r} {wrong}: name a file such as stats.npz")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def _save(path: pathlib.Path, stats: Statistics) -> None:
    """Write statistics; another file than the same ones made before makes way."""
    if path.exists() and _outline_of(path) != _outline(stats):
        set_aside(path, "earlier")
    save_statistics(path, stats)


def _outline_of(path: pathlib.Path) -> dict | None:
    """The `_outline` of a file of statistics; None for another one."""
    try:
        return _outline(load_statistics(path))
    except (ValueError, OSError):
        return None


def _outline(stats: Statistics) -> dict[str, object]:
    """Everything in statistics but floats, of which their shape: the same images give others on
    another machine."""
    return {name: _exact(value) for name, value in vars(stats).items()}


def _exact(value: object) -> object:
    if not isinstance(value, np.ndarray):
        return value
    return value.shape if value.dtype.kind == "f" else value.tolist()


def sampled_pixels(source: Source) -> dict[str, np.ndarray | str]:
    """Of up to 1,000 evenly spaced images: "means", the mean grey level in 0 ... 255 by channel,
    (n, C), and "sample", the `pixel_digest`."""
    means, sums = [], []
    for part in spaced_numbers(source):
        images = source.images(part)
        means.append(images.float().mean(dim=(2, 3)))
        sums.append(hash_sum(images.movedim(1, -1)))
    scaled = torch.cat(means) * (255 / (source.levels - 1))
    return {"means": scaled.numpy(), "sample": pixel_digest(sums)}


def data_statistics(run: Run, workdir: str | os.PathLike | None) -> Statistics:
    """Statistics of the configured data set, if they are of these data.

    Data that are not on this machine, and files that do not record their images, are not compared.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of other images, or of none of a class that samples are drawn of.
    """
    stats = load_dataset_stats(run.config, workdir)
    _check_classes(run, stats)
    if stats.means is not None:
        distributed.on_main(lambda: _compare(stats, run.config, workdir))
    else:
        logging.info("the statistics were not compared with the data: they do not record images")
    return stats


def comparable_extractor(
    run: Run, real: Statistics, workdir: str | os.PathLike | None
) -> Extractor:
    """The configured extractor, if its features can be compared with the statistics of the data.

    Before samples are drawn, which may take days.

    Raises:
        ValueError: the statistics are of another extractor, or of features of another width.
    """
    extractor = get_extractor(run.config, run.device)
    extractor.with_spatial = extractor.has_spatial and real.mu_s is not None
    check_comparable(real.made_by(), extractor.identity)
    channels, *sides = run.shape
    found = extractor(np.zeros((1, *sides, channels), dtype=np.uint8))
    widths = {"pool_3": real.width, "spatial": 0 if real.mu_s is None else len(real.mu_s)}
    for name in ("pool_3", "spatial") if extractor.with_spatial else ("pool_3",):
        if found[name].shape[1] != widths[name]:
            raise ValueError(
                f"the statistics in {find_statistics(run.config, workdir)} are of {widths[name]} "
                f"features ({name}), and the extractor {extractor.name!r} gives "
                f"{found[name].shape[1]}: {ADVICE}"
            )
    return extractor


def statistics_record(run: Run, stats: Statistics, workdir: str | os.PathLike | None) -> dict:
    """Which statistics samples are compared with, for a report."""
    return {
        "file": str(find_statistics(run.config, workdir)),
        "images": stats.count,
        "dataset": stats.dataset,
        "place": stats.place,
        "size": stats.shape,
        "pixels": stats.pixels,
        "extractor": stats.made_by(),
    }


def _compare(stats: Statistics, config, workdir: str | os.PathLike | None) -> None:
    try:
        with only_prepared():
            info = get_streams(config, evaluation=True)[2]
            source = info.sources["train"]
            found = sampled_pixels(source)
    except (DataError, OSError, ImportError) as error:
        logging.info("the statistics were not compared with the data: %s", error)
        return
    check_levels(config, info)
    differ, means = "other pixels", found["means"]
    if len(source) != stats.count:
        differ = f"{len(source)} images"
    elif means.shape == stats.means.shape and np.abs(means - stats.means).max() <= TOLERANCE:
        differ = ""
    if differ:
        raise ValueError(
            f"the statistics in {find_statistics(config, workdir)} are of {stats.describe()}; the "
            f"training part of {config.data.dataset} now has {differ}: {ADVICE}"
        )
    logging.info("the statistics are of these data: %s", _agreement(stats.sample, found["sample"]))


def _check_classes(run: Run, stats: Statistics) -> None:
    """Refuse samples of classes without an image, which no network has learned, and tell of other
    shares of classes than the data's.

    Labels that do not start at 0 leave such classes.  Where the statistics record other names of
    classes, labels are not compared.
    """
    learned = run.state["class_to_idx"]
    drawn = run.conditions.classes_of_samples(range(run.config.eval.num_samples), learned)
    renamed = learned and stats.classes not in ("", class_text(learned))
    if drawn is None or stats.labels is None or renamed:
        return
    known = np.unique(stats.labels).tolist()
    if missing := sorted({*drawn.tolist()} - {*known}):
        shown = ",".join(map(str, known[:20])) + ("..." if len(known) > 20 else "")
        raise ValueError(
            f"samples would be drawn of the class {missing[0]}, of which the statistics have none "
            f"of their {stats.count} images: draw those of the data, as in "
            f"--config.sampling.classes={shown}"
        )
    if distributed.is_main():
        warn_of_shares(drawn.numpy(), stats.labels)


def _agreement(recorded: str, found: str) -> str:
    if not recorded:
        return "the number and mean colours of images agree; the file has no digest of pixels"
    if recorded == found:
        return "the number and pixels of images agree"
    return "the number and mean colours of images agree; some pixels differ, as by rounding"


def _suggest_noise_scales(run: Run, batches: DataBytes) -> None:
    images = run.scaler(torch.cat(list(batches)) / 255)
    sigma_min, sigma_max = run.config.model.sigma_min, largest_pairwise_distance(images)
    logging.info(
        "the largest distance between two images is %.4g with data.centered = %s: model.sigma_max "
        "for a VE process; with model.sigma_min = %g, model.num_scales = %d fits discrete noise "
        "levels",
        sigma_max,
        run.config.data.centered,
        sigma_min,
        fitting_num_scales(sigma_max, sigma_min, images[0].numel()),
    )
