"""The feature extractor and the data statistics that a config selects."""

import pathlib

import torch

from score_lib.base.tensors import derive_seed, image_shape
from score_lib.metrics import digits, inception  # noqa: F401  (they register)
from score_lib.metrics.extractors import EXTRACTORS, Extractor
from score_lib.metrics.stats import Statistics, load_statistics
from score_lib.options import complete

STATS_FOLDER = pathlib.Path(__file__).parents[2] / "assets" / "stats"


def get_extractor(config, device: torch.device | str | None = None) -> Extractor:
    """The extractor of `eval.extractor`, with the weights of `eval.extractor_weights`.

    An empty name is "digits" for the data set DIGITS, and "inception" for all others.  The default
    device is the first GPU if there is one.  Errors: see `Extractor`.
    """
    config = complete(config)
    default = "digits" if config.data.dataset == "DIGITS" else "inception"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EXTRACTORS.build(config.eval.extractor or default, config, device=torch.device(device))


def stats_path(config) -> pathlib.Path:
    """File of the data set's statistics: `eval.stats`, or by default one in `STATS_FOLDER`.

    The published names are `cifar10_stats.npz`, `celeba_stats.npz` and
    `lsun_{category}_{size}_stats.npz`.  Other names contain the size, and those of the user's own
    images a hash of their location.
    """
    config = complete(config)
    if config.eval.stats:
        return pathlib.Path(config.eval.stats)
    parts = [config.data.dataset.lower()]
    if parts[0] not in ("cifar10", "celeba"):
        channels, height, width = image_shape(config)
        parts.append(config.data.category)
        parts.append(f"{height}" if height == width else f"{height}x{width}")
        if config.data.path:
            place = pathlib.Path(config.data.path).resolve()
            identity = derive_seed("statistics", str(place), channels) % 16**8
            parts[1:1] = [place.stem, f"{identity:08x}"]
    return STATS_FOLDER / ("_".join(filter(None, [*parts, "stats"])) + ".npz")


def load_dataset_stats(config) -> Statistics:
    """Statistics of the configured data set, from `stats_path`; see `load_statistics`."""
    path = stats_path(config)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no statistics of {config.data.dataset} at {path}: compute them with "
            "--mode fid_stats, or name a file with --config.eval.stats=FILE"
        )
    return load_statistics(path)
