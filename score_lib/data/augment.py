"""Non-leaky augmentation: geometric changes of training images, of which the network is told.

[Karras et al. 2022, appendix F.2]  Each of six changes is made with the same probability.  A
network that is told them generates unchanged images where it is told that there are none.  In the
order in which they are made, with their parameters and labels:

1. mirror left to right: a in {0, 1}; label a;
2. mirror top to bottom: a in {0, 1}; label a;
3. enlarge 2^(0.2 a) times: a ~ N(0, 1); label a;
4. turn counter-clockwise by a: a ~ U(-pi, pi); labels cos a - 1, sin a;
5. stretch 2^(0.2 a) times along the direction b (counter-clockwise from the right), and shrink as
   much across it: a ~ N(0, 1), b ~ U(-pi, pi); labels a cos b, a sin b;
6. shift a W / 8 pixels to the right and b H / 8 down: a, b ~ N(0, 1); labels a, b.

Images are mirrored exactly; the other changes, all at once, interpolate with PyTorch's bicubic
filter, without antialiasing, on an image that continues as its own reflection.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_LABELS = 9
_CHANGES = 6
# Standard deviations: of the logarithm of a scale to the base 2, and of a shift in sides.
_SCALE, _SHIFT = 0.2, 1 / 8


def augment(
    images: Tensor,
    p: float,
    generator: torch.Generator,
    *,
    mirror: bool = False,
    batch: int | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Changed images and the network's labels for the changes.

    Args:
        images: (B, C, H, W) in [0, 1], floating point.
        p: probability of each change.
        generator: of the changes, on the CPU, so that they do not depend on the device.
        mirror: make the first change always, which mirrors half of the images.
        batch: draw for a batch of so many images, of which these are those from `first` on; None:
            they are all.
    Returns:
        images (B, C, H, W) in [0, 1], those without changes as they were, and labels (B, 9), 0
        where no change was made.
    Raises:
        ValueError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"data.augment = {p} should be a probability, from 0 to 1")
    drawn = _draw(len(images) if batch is None else batch, p, generator, mirror)
    changes = drawn[first : first + len(images)].to(images, non_blocking=True)
    return changed(images, changes), labels_of(changes)


def _draw(count: int, p: float, generator: torch.Generator, mirror: bool) -> Tensor:
    """Parameters of the changes, 0 where one is not made: (count, 8).

    They are those of the list above, in its order.
    """
    made = torch.rand(count, _CHANGES, generator=generator) < p
    made[:, 0] |= mirror
    uniform = torch.rand(count, 4, generator=generator)
    normal = torch.randn(count, 4, generator=generator)
    flips, angles = (uniform[:, :2] < 0.5).float(), (2 * uniform[:, 2:] - 1) * math.pi
    zoom, stretch, shifts = normal[:, :1], normal[:, 1:2], normal[:, 2:]
    parameters = [flips, zoom, angles[:, :1], stretch, angles[:, 1:], shifts]
    return torch.cat(parameters, 1) * made[:, [0, 1, 2, 3, 4, 4, 5, 5]]


def labels_of(changes: Tensor) -> Tensor:
    """The network's labels (B, 9) for parameters of changes (B, 8)."""
    left, top, zoom, angle, stretch, direction, right, down = changes.unbind(1)
    turn = torch.cos(angle) - 1, torch.sin(angle)
    along = stretch * torch.cos(direction), stretch * torch.sin(direction)
    return torch.stack([left, top, zoom, *turn, *along, right, down], 1)


def changed(images: Tensor, changes: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after changes with these parameters, (B, 8)."""
    for column, side in ((0, -1), (1, -2)):
        flip = changes[:, column].bool().reshape(-1, 1, 1, 1)
        images = torch.where(flip, images.flip(side), images)
    theta = _sources(changes, *images.shape[2:])
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    options = {"mode": "bicubic", "padding_mode": "reflection", "align_corners": False}
    # Bicubic interpolation overshoots at edges.
    moved = F.grid_sample(images, grid, **options).clamp(0, 1)
    return torch.where(changes[:, 2:].any(1).reshape(-1, 1, 1, 1), moved, images)


def _sources(changes: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of a changed image comes from: affine maps (B, 2, 3) of `affine_grid`."""
    zoom, angle, stretch, direction, right, down = changes[:, 2:].unbind(1)
    scale = 2 ** (_SCALE * stretch)
    along = _turn(direction) @ torch.diag_embed(torch.stack([1 / scale, scale], 1))
    back = _turn(-angle) @ along @ _turn(-direction) / 2 ** (_SCALE * zoom[:, None, None])
    # From pixels about the centre to coordinates of which a side has 2.
    # Filled in on the device: a list that is copied there would wait for it at each batch.
    sides = torch.stack([changes.new_full((), side) for side in (width, height)])
    back = back * sides / sides[:, None]
    shift = 2 * _SHIFT * torch.stack([right, down], 1)
    return torch.cat([back, -back @ shift[:, :, None]], 2)


def _turn(angle: Tensor) -> Tensor:
    """Counter-clockwise turns (B, 2, 2) of (right, down) by angles (B,)."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([cos, sin, -sin, cos], 1).reshape(-1, 2, 2)
