"""Pictures of samples: grids as PNG."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import check_floats, rows
from score_lib.disk.files import atomic_write

# Small images are enlarged to at least this height, so that a person can see them.
_LEGIBLE_HEIGHT = 32
_BORDER = 2  # pixels between images


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """One picture of a batch of images, side by side.

    Args:
        images: (B, C, H, W) in [0, 1].
        columns: images in a row; by default the grid is about square.
    Returns:
        (3 or 4, H', W') in [0, 1], on the CPU.
    Raises:
        ValueError: bytes, or other numbers that are not real floating-point ones.
    """
    check_floats("images", images)
    images = images.detach().float().cpu().clamp(0, 1)
    scale = math.ceil(_LEGIBLE_HEIGHT / images.shape[2])
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images[0] if len(images) == 1 else _in_rows(images, columns)


def _in_rows(images: Tensor, columns: int | None) -> Tensor:
    """Images (B, C, H, W) in rows, (C, H', W'), with grey borders."""
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    height, width = height + _BORDER, width + _BORDER
    size = math.ceil(count / columns) * height + _BORDER, columns * width + _BORDER
    grid = images.new_full((channels, *size), 0.5)
    for k, image in enumerate(images):
        top, left = _BORDER + k // columns * height, _BORDER + k % columns * width
        grid[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return grid


def save_grid(path: str | os.PathLike, images: Tensor, columns: int | None = None) -> bool:
    """Write a grid of images as PNG.

    Data that are no pictures (anything but 1, 3 or 4 channels and two sides) are left out.

    Returns:
        whether a picture was written.
    """
    if not is_picture(images.shape):
        return False
    from PIL import Image

    pixels = (make_grid(images, columns) * 255).round().to(torch.uint8)
    with atomic_write(path) as file:
        Image.fromarray(pixels.movedim(0, -1).numpy()).save(file, format="png")
    return True


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether a batch of this shape can be shown: (B, C, H, W) with 1, 3 or 4 channels."""
    return len(shape) == 4 and shape[1] in (1, 3, 4)


def read_picture(path: str | os.PathLike) -> Tensor:
    """A picture file as (3, H, W) in [0, 1]."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).movedim(-1, 0) / 255


def check_samples_finite(samples: Tensor) -> None:
    """Refuse samples (B, *D) with nan or inf.

    Raises:
        FloatingPointError: tells how many.
    """
    finite = rows(samples.isfinite()).all(1)
    if not finite.all():
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(samples)} samples hold values that are not finite "
            "numbers: sample with more steps or in float32, or train the network longer"
        )


def to_uint8(images: Tensor, levels: int = 256, *, dequantised: bool = True) -> Tensor:
    """Samples in [0, 1], (B, C, *D), as bytes with channels last, (B, *D, C), on the CPU.

    With 256 grey levels the published evaluation's truncation of 255 x, which its figures depend
    on.  With fewer, their levels, spread over 0 to 255 as the data's own are.

    Args:
        dequantised: of fewer levels: whether level k is all of [k, k + 1) / levels, or the point
            k / (levels - 1), so that samples are of the nearest one.
    Raises:
        FloatingPointError: a value is not finite, for which there is no grey level.
        ValueError: bytes, or other numbers that are not real floating-point ones.
    """
    check_floats("images", images)
    check_samples_finite(images)
    if levels == 256:
        pixels = (images * 255).clamp(0, 255)
    else:
        grey = (images * levels).floor() if dequantised else (images * (levels - 1)).round()
        grey = grey.clamp(0, levels - 1)
        pixels = (grey * (255 / (levels - 1))).round()
    pixels = pixels.to(torch.uint8).cpu()
    return pixels.movedim(1, -1) if pixels.dim() > 2 else pixels
