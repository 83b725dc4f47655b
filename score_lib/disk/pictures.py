"""Pictures of samples: grids as PNG."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from score_lib.base.tensors import rows
from score_lib.disk.files import atomic_write

# Small images are enlarged to at least this height, so that a person can see them.
_LEGIBLE_HEIGHT = 32


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """One picture of a batch of images, side by side.

    Args:
        images: (B, C, H, W) in [0, 1].
        columns: images in a row; by default the grid is about square.
    Returns:
        (3 or 4, H', W') in [0, 1], on the CPU.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    scale = math.ceil(_LEGIBLE_HEIGHT / images.shape[2])
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    columns = columns or math.ceil(math.sqrt(len(images)))
    return _torchvision_utils().make_grid(images, nrow=columns, padding=2, pad_value=0.5)


def save_grid(path: str | os.PathLike, images: Tensor, columns: int | None = None) -> bool:
    """Write a grid of images as PNG.

    Data that are no pictures (anything but 1, 3 or 4 channels and two sides) are left out.

    Returns:
        whether a picture was written.
    """
    if not is_picture(images.shape):
        return False
    with atomic_write(path) as file:
        _torchvision_utils().save_image(make_grid(images, columns), file, format="png")
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


def to_uint8(images: Tensor, levels: int = 256) -> Tensor:
    """Samples in [0, 1], (B, C, *D), as bytes with channels last, (B, *D, C), on the CPU.

    With 256 grey levels the published evaluation's truncation of 255 x, which its figures depend
    on.  With fewer, the levels of dequantised data, spread over 0 to 255 as the data's own are.

    Raises:
        FloatingPointError: a value is not finite, for which there is no grey level.
    """
    check_samples_finite(images)
    if levels == 256:
        pixels = (images * 255).clamp(0, 255)
    else:
        grey = (images * levels).floor().clamp(0, levels - 1)
        pixels = (grey * (255 / (levels - 1))).round()
    pixels = pixels.to(torch.uint8).cpu()
    return pixels.movedim(1, -1) if pixels.dim() > 2 else pixels


def _torchvision_utils():
    declare_box_operators()
    from torchvision import utils

    return utils


def declare_box_operators() -> None:
    """Let a torchvision that was built for CUDA be imported beside a PyTorch without it.

    Its import refers to two operators that only its compiled part defines; we use neither.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _LIBRARIES.append(library)


# Operators are forgotten together with the library object that declared them.
_LIBRARIES: list = []
