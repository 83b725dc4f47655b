"""Crops and resizing: uint8 in, uint8 out, equal to TensorFlow's before the last rounding.

PyTorch's antialiased `interpolate` and `tf.image.resize(antialias=True)` agree to a thousandth of
a grey level, so rounded results differ rarely, and by one level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Larger images are refused: a file of a few kilobytes can claim any size.  This is Pillow's own
# limit, 9,459 squared; an image of this size takes up to 2.5 GB of memory to read.
MAX_PIXELS = 89_478_485


def celeba(images: Tensor, size: int) -> Tensor:
    """CelebA: the central 140 x 140, shrunk.  (n, 3, 218, 178) -> (n, 3, size, size).

    The published code keeps fractional grey levels after shrinking; here they are rounded to the
    nearest of 256 levels (an error of 0.3 levels), as dequantization requires.
    """
    return shrink(center_crop(images, 140, 140), size).round().byte()


def lsun(images: Tensor, size: int) -> Tensor:
    """LSUN: (n, 3, h, w) -> (n, 3, size, size); 128 px has its own published procedure."""
    if size == 128:
        return center_crop(shrink(images, size), size, size).round().byte()
    side = min(images.shape[-2:])
    # The published data are truncated, not rounded.
    return resize(center_crop(images, side, side), size, size, "bicubic").byte()


def resized(images: Tensor, size: int) -> Tensor:
    """CIFAR-10 and SVHN at another size: (n, 3, h, w) -> (n, 3, size, size)."""
    return resize(images, size, size, "bilinear").round().byte()


def fit(images: Tensor, height: int, width: int, levels: int = 256) -> Tensor:
    """Centre crop to the wanted aspect ratio, then bicubic resizing.

    Images that already have this size are returned unchanged.  Of four channels the last is the
    opacity, by which colours are weighted: transparent pixels hide theirs.

    Args:
        images: (n, C, h, w) in 0 ... levels - 1.
    """
    h, w = images.shape[-2:]
    if (h, w) == (height, width):
        return images
    if h * width > w * height:
        cropped = center_crop(images, max(1, round(w * height / width)), w)
    else:
        cropped = center_crop(images, h, max(1, round(h * width / height)))
    enlarge = _resize_transparent if images.shape[1] == 4 else resize
    # Bicubic interpolation overshoots at edges.
    return enlarge(cropped, height, width, "bicubic").clamp(max=levels - 1).round().byte()


def _resize_transparent(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """`resize` for colours and opacity, (n, 4, h, w); colours are 0 where nothing is seen."""
    colors, opacity = images.float().split([3, 1], dim=1)
    resized = resize(torch.cat([colors * opacity / 255, opacity], dim=1), height, width, mode)
    seen, opacity = resized.split([3, 1], dim=1)
    colors = torch.where(opacity.round() > 0, 255 * seen / opacity, 0).clamp(0, 255)
    return torch.cat([colors, opacity], dim=1)


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of (..., h, w); an odd remainder is cropped at the bottom and right."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def shrink(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size`; the other side is rounded half to even."""
    h, w = images.shape[-2:]
    short = min(h, w)
    return resize(images, round(h * size / short), round(w * size / short), "bilinear")


def resize(images: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Antialiased resizing of (n, C, h, w), as float32 grey levels in [0, 255]."""
    images = F.interpolate(images.float(), (height, width), mode=mode, antialias=True)
    return images.clamp(0, 255)  # bicubic overshoots at edges
