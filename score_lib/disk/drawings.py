"""Pictures of samples that are no images: vectors, series, sets of points, volumes."""

import math
import os

import torch
from torch import Tensor

from score_lib.base.tensors import check_floats, rows
from score_lib.disk.pictures import is_picture, save_grid
from score_lib.disk.reports import new_figure, save_figure, save_histogram

# The first samples are shown, up to these numbers.
_MOST = {"vectors": 5000, "points": 16, "series": 16, "volumes": 8, "images": 64}
_MOST_SLICES = 8


def save_samples_picture(path: str | os.PathLike, samples: Tensor, kind: str | None = None) -> str:
    """Draw samples as PNG, by their shape; the same samples give the same file.

    - images (N, C, H, W): rank 4; a grid, in [0, 1] for 1, 3 or 4 channels
    - volumes (N, C, D, H, W): rank 5; a row of slices for each sample and channel
    - points (N, P, C): rank 3 with a last side of 2 or 3; a scatter plot for each sample
    - series (N, C, L): rank 3 otherwise; a panel for each sample, a line for each channel
    - vectors: any other rank; one scatter plot, or a histogram of single values

    Vectors of more than two values are shown on their first two principal axes.  Points of one
    coordinate lie on a line; of more than three the first three are shown.  Volumes, and images of
    other numbers of channels (one picture for each), are grey from the least to the largest value
    of all.

    Args:
        samples: (N, *D), one or more; the first ones are shown.
        kind: instead of the shape's; series may be (N, L), and anything can be vectors.
    Returns:
        the kind.
    Raises:
        ValueError: a kind that does not suit the shape, no samples, complex numbers, or values
            that are not finite.
    """
    x = torch.as_tensor(samples).detach()
    check_floats("samples", x)
    if x.numel() == 0 or x.dim() == 0:
        raise ValueError(f"there are no samples to draw in the shape {tuple(x.shape)}")
    kind = kind or _kind_of(x.shape)
    _check_kind(kind, x.shape)
    x = x[: _MOST[kind]].double().cpu()
    if not x.isfinite().all():
        raise ValueError("samples with nan or inf cannot be drawn")
    _DRAW[kind](path, x)
    return kind


def principal_coordinates(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates on the first two principal axes, of more than two values.

    The sign of an axis makes its largest component positive.

    Args:
        vectors: (N, F) with F > 2.
    Returns:
        coordinates (N, 2) and each axis's share of the variance (2,), 0 where there is none.
    """
    centred = vectors - vectors.mean(dim=0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    if len(sizes) < 2:  # one sample
        return centred[:, :2], centred.new_zeros(2)
    largest = axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True))
    coordinates = centred @ (axes[:2] * largest.sign()).T
    total = sizes.square().sum()
    shares = sizes[:2].square() / total if total > 0 else torch.zeros_like(sizes[:2])
    return coordinates, shares


def _kind_of(shape: torch.Size) -> str:
    if len(shape) == 3:
        return "points" if shape[2] in (2, 3) else "series"
    return {4: "images", 5: "volumes"}.get(len(shape), "vectors")


def _check_kind(kind: str, shape: torch.Size) -> None:
    if kind not in _DRAW:
        raise ValueError(f"there is no kind of samples {kind!r}: choose from {', '.join(_DRAW)}")
    suits = {
        "images": len(shape) == 4,
        "volumes": len(shape) == 5,
        "points": len(shape) == 3,
        "series": len(shape) in (2, 3),
    }
    if not suits.get(kind, True):
        raise ValueError(f"samples of shape {tuple(shape)} cannot be drawn as {kind}")


def _draw_vectors(path: str | os.PathLike, x: Tensor) -> None:
    x = rows(x)
    if x.shape[1] == 1:
        save_histogram(path, x[:, 0].tolist(), "value")
        return
    labels = ["coordinate 1", "coordinate 2"]
    if x.shape[1] > 2:
        x, shares = principal_coordinates(x)
        labels = [f"principal axis {k + 1} ({shares[k]:.0%} of the variance)" for k in range(2)]
    figure = new_figure(5, 5)
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
    axes.scatter(*x.T.numpy(), s=4, alpha=0.5, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    save_figure(path, figure)


def _draw_points(path: str | os.PathLike, x: Tensor) -> None:
    """All sets in the same box, so that sizes can be compared."""
    x = torch.nn.functional.pad(x, (0, 1)) if x.shape[2] == 1 else x[:, :, :3]
    dimensions = x.shape[2]
    low, high = x.amin(dim=(0, 1)), x.amax(dim=(0, 1))
    half = max(float((high - low).max()) / 2, 1e-12) * 1.05
    limits = [(float(c) - half, float(c) + half) for c in (low + high) / 2]
    columns = math.ceil(math.sqrt(len(x)))
    lines = math.ceil(len(x) / columns)
    figure = new_figure(2.5 * columns, 2.5 * lines)
    for k, points in enumerate(x):
        options = {"projection": "3d"} if dimensions == 3 else {"aspect": "equal"}
        axes = figure.add_subplot(lines, columns, k + 1, **options)
        axes.scatter(*points.T.numpy(), s=4, linewidths=0)
        for name, limit in zip("xyz", limits, strict=False):
            axes.set(**{f"{name}lim": limit, f"{name}ticks": []})
    save_figure(path, figure)


def _draw_series(path: str | os.PathLike, x: Tensor) -> None:
    """A panel for each series, all with the same axes."""
    x = x if x.dim() == 3 else x[:, None]
    columns = min(2, len(x))
    lines = math.ceil(len(x) / columns)
    figure = new_figure(4.5 * columns, 0.5 + 1.2 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, channels in zip(panels.flat, x, strict=False):
        axes.plot(channels.T.numpy(), linewidth=0.8)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    save_figure(path, figure)


def _draw_images(path: str | os.PathLike, x: Tensor) -> None:
    if is_picture(x.shape):
        save_grid(path, x)
    else:
        save_grid(path, _grey(x).flatten(0, 1)[:, None], columns=x.shape[1])


def _draw_volumes(path: str | os.PathLike, x: Tensor) -> None:
    """Slices along the first side at equal distances, of each sample and channel."""
    depth = x.shape[2]
    count = min(depth, _MOST_SLICES)
    places = [(2 * k + 1) * depth // (2 * count) for k in range(count)]
    slices = _grey(x)[:, :, places].flatten(0, 2)
    save_grid(path, slices[:, None], columns=count)


def _grey(x: Tensor) -> Tensor:
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.full_like(x, 0.5)


_DRAW = {
    "images": _draw_images,
    "volumes": _draw_volumes,
    "points": _draw_points,
    "series": _draw_series,
    "vectors": _draw_vectors,
}
