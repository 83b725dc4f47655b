"""The feature extractor and the data statistics that a config selects."""

import logging
import os
import pathlib

import torch

from score_lib.base.tensors import derive_seed, image_shape
from score_lib.metrics import classifiers, inception, pretrained  # noqa: F401  (they register)
from score_lib.metrics.extractors import EXTRACTORS, Extractor
from score_lib.metrics.own import OwnExtractor
from score_lib.metrics.stats import Statistics, load_statistics
from score_lib.options import complete

STATS_FOLDER = pathlib.Path(__file__).parents[2] / "assets" / "stats"
# Data sets whose published file does not name its size.
PUBLISHED_SIDES = {"cifar10": 32, "celeba": 64}
ADVICE = "compute them with --mode fid_stats, or name another file with --config.eval.stats=FILE"


def get_extractor(config, device: torch.device | str | None = None) -> Extractor:
    """The extractor of `eval.extractor`, with the weights of `eval.extractor_weights`.

    An empty name is "digits" for the data set DIGITS, and "inception" for all others.  A name
    "module:function" is a user's own, see `OwnExtractor`.  The default device is the first GPU if
    there is one.  Errors: see `Extractor`.
    """
    config = complete(config)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, device = extractor_name(config), torch.device(device)
    if extractor_class(name) is OwnExtractor:
        return OwnExtractor(name, config.eval.extractor_weights, device)
    return EXTRACTORS.build(name, config, device=device)


def extractor_class(name: str) -> type[Extractor]:
    """The class of a registered extractor, or of a user's own, "module:function".

    Raises:
        ValueError: no such name.
    """
    return OwnExtractor if ":" in name else EXTRACTORS.get(name)


def recognises_classes(config) -> bool:
    """Whether the class scores of the configured extractor are of the data set's classes."""
    config = complete(config)
    extractor = extractor_class(extractor_name(config))
    return config.data.dataset in getattr(extractor, "classes_of", ())


def extractor_name(config) -> str:
    """`eval.extractor`, or the one that "" stands for, see `get_extractor`."""
    default = "digits" if config.data.dataset == "DIGITS" else "inception"
    return config.eval.extractor or default


def stats_path(config, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """File that statistics are written to: `eval.stats`, or in a run's `stats/`, or `STATS_FOLDER`.

    The published names are `cifar10_stats.npz`, `celeba_stats.npz` (64 px) and
    `lsun_{category}_{size}_stats.npz`.  Other names contain the size, and those of the user's own
    images a hash of their location.
    """
    config = complete(config)
    if config.eval.stats:
        return pathlib.Path(config.eval.stats)
    folder = STATS_FOLDER if workdir is None else pathlib.Path(workdir) / "stats"
    parts = [config.data.dataset.lower()]
    channels, height, width = image_shape(config)
    if height != width or PUBLISHED_SIDES.get(parts[0]) != height:
        parts.append(config.data.category)
        parts.append(f"{height}" if height == width else f"{height}x{width}")
        if config.data.path:
            place = pathlib.Path(config.data.path).resolve()
            identity = derive_seed("statistics", str(place), channels) % 16**8
            parts[1:1] = [place.stem, f"{identity:08x}"]
    return folder / ("_".join(filter(None, [*parts, "stats"])) + ".npz")


def find_statistics(config, workdir: str | os.PathLike | None = None) -> pathlib.Path:
    """File that statistics are read from: `eval.stats`, or in a run's `stats/` or `STATS_FOLDER`.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = [stats_path(config, folder) for folder in dict.fromkeys((workdir, None))]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there are no statistics of {config.data.dataset} at "
        f"{' or '.join(map(str, dict.fromkeys(paths)))}: compute them with --mode fid_stats, or "
        "name a file with --config.eval.stats=FILE"
    )


def load_dataset_stats(config, workdir: str | os.PathLike | None = None) -> Statistics:
    """Statistics of the configured data set, from `find_statistics`; see `load_statistics`.

    Raises:
        ValueError: they are of images of another size.
    """
    path = find_statistics(config, workdir)
    stats = load_statistics(path)
    logging.info("statistics in %s: %s", path, stats.describe())
    channels, height, width = image_shape(complete(config))
    wanted = shape_text(channels, height, width)
    if stats.shape and stats.shape != wanted:
        raise ValueError(
            f"the statistics in {path} are of images of {stats.shape}, and those of the config are "
            f"{wanted} (height x width x channels): {ADVICE}"
        )
    return stats


def shape_text(channels: int, height: int, width: int) -> str:
    """The shape of images as statistics record it."""
    return f"{height} x {width} x {channels}"
