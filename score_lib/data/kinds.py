"""Kinds of data: images, vectors, series, sets of points and volumes."""

from collections.abc import Callable

from score_lib.base.tensors import data_shape, image_shape
from score_lib.data.augment import NUM_LABELS
from score_lib.data.sources import DATASETS, DataError
from score_lib.options import complete

# Kind -> numbers of dimensions of a datum; None: any.
KINDS = {
    "vectors": None,
    "series": (1, 2),
    "points": (2,),
    "images": (3,),
    "volumes": (4,),
}
_BY_RANK = {1: "vectors", 2: "series", 3: "images", 4: "volumes"}


def kind_of(config) -> str:
    """`data.kind` or, where that is "", that of the data set, or the one a shape usually has.

    The opener of a data set of one kind says so by its attribute `kind`.  By their shapes, (D,) are
    vectors, (C, L) series, (C, H, W) images, (C, D, H, W) volumes, and others vectors: of these
    nothing is assumed.  Sets of points, (N, C), have to be named.

    Raises:
        DataError: the kind does not suit the shape.
    """
    config = complete(config)
    shape = data_shape(config)
    told = config.data.kind or getattr(_opener(config), "kind", "")
    kind = told or _BY_RANK.get(len(shape), "vectors")
    ranks = KINDS[kind]
    if ranks is not None and len(shape) not in ranks:
        suited = [name for name, r in KINDS.items() if r is None or len(shape) in r]
        raise DataError(
            f"data.kind = {kind!r} does not suit data of shape {shape}, which can be "
            f"{' or '.join(suited)}: set data.kind or data.shape"
        )
    return kind


def is_continuous(config) -> bool:
    """Whether the data are continuous values in the user's units, not grey levels.

    The opener of a data set says so by its attribute `continuous`: a truth value, or a function of
    the complete config.
    """
    config = complete(config)
    said = getattr(_opener(config), "continuous", False)
    return bool(said(config)) if callable(said) else said


def stored_shape(config) -> tuple[int, ...]:
    """The shape of a datum that the configured data set is opened with.

    Raises:
        ValueError: the data set has images, and `data.shape` is of something else.
    """
    config = complete(config)
    any_shape = hasattr(_opener(config), "continuous")
    return data_shape(config) if any_shape else image_shape(config)


def channel_axis(kind: str) -> int:
    """The axis of a datum that counts its channels: the last of points, else the first."""
    return -1 if kind == "points" else 0


def _opener(config) -> Callable:
    return DATASETS.get(config.data.dataset)


def check_options(config) -> None:
    """Refuse options of grey levels for continuous values, and of images for other data.

    Raises:
        DataError: names the option.
    """
    config = complete(config)
    kind, augment = kind_of(config), config.data.augment
    if augment and kind != "images":
        raise DataError(f"data.augment = {augment} changes images, not {kind}: set it to 0")
    if augment and (told := config.model.num_features) != NUM_LABELS:
        raise DataError(
            f"model.num_features = {told} should be {NUM_LABELS} with data.augment = {augment}, of "
            "which the network is told so many numbers"
        )
    if not is_continuous(config):
        return
    of_grey_levels = {
        "data.uniform_dequantization": config.data.uniform_dequantization,
        "data.augment": augment,
        "eval.enable_vlb": config.eval.enable_vlb,
        "sampling.clip": config.sampling.clip and config.sampling.method == "chain",
        "eval.dequantizer": config.eval.dequantizer,
    }
    if found := [f"{key} = {value!r}" for key, value in of_grey_levels.items() if value]:
        raise DataError(
            f"{', '.join(found)}: only data of grey levels have it, and data.dataset = "
            f"{config.data.dataset!r} holds continuous values"
        )
