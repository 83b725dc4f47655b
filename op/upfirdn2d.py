"""Upsample, filter, downsample: the one operation behind all resampling with an FIR filter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch


def upfirdn2d(
    input: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    """Insert zeros, pad, convolve with an FIR filter and keep every `down`-th pixel.

    Both axes are treated alike and every channel by itself.  Differentiable to any order in both
    tensors.

    Args:
        input: images, (B, C, H, W).
        kernel: filter, (h, w); applied as a convolution, that is, flipped.
        up: up - 1 zeros follow each pixel.
        down: step between the pixels that are kept.
        pad: zeros before the first and after the last pixel of the upsampled image; negative
            numbers crop.
    Returns:
        (B, C, H', W') with H' = (H up + pad[0] + pad[1] - h) // down + 1, in the dtype of `input`.
    Raises:
        ValueError: a shape, a factor or the padding is invalid, no pixel would be left, or images
            of whole numbers.
    """
    _check(input, kernel, up, down, pad)
    return _resample(input, _as_image(kernel, input), up, down, [*pad, *pad])


def upfirdn2d_native(
    input: Tensor,
    kernel: Tensor,
    up_x: int,
    up_y: int,
    down_x: int,
    down_y: int,
    pad_x0: int,
    pad_x1: int,
    pad_y0: int,
    pad_y1: int,
) -> Tensor:
    """`upfirdn2d` with settings for each axis, step by step, by functions of PyTorch."""
    u = _extend(_with_zeros(input, up_y, up_x), [pad_x0, pad_x1, pad_y0, pad_y1])
    weight = _depthwise(_as_image(kernel, input).flip(0, 1), input.shape[1])
    return F.conv2d(u, weight, groups=input.shape[1])[..., ::down_y, ::down_x]


def _check(input: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> None:
    if input.dim() != 4 or kernel.dim() != 2:
        raise ValueError(
            "upfirdn2d takes images (B, C, H, W) and a kernel (h, w), not shapes "
            f"{tuple(input.shape)} and {tuple(kernel.shape)}"
        )
    if up < 1 or down < 1 or len(pad) != 2:
        raise ValueError(
            "upfirdn2d takes factors of at least 1 and two paddings (before, after), "
            f"not up={up}, down={down}, pad={pad}"
        )
    for size, taps in zip(input.shape[2:], kernel.shape, strict=True):
        if size * up + sum(pad) < taps:
            raise ValueError(
                f"upfirdn2d: {taps} taps do not fit an axis of {size} * {up} + {sum(pad)} pixels"
            )


def _as_image(kernel: Tensor, input: Tensor) -> Tensor:
    """The filter in the dtype of the images."""
    if not input.is_floating_point():
        raise ValueError(
            f"upfirdn2d takes images of real numbers, not {input.dtype}, to which the taps of the "
            "filter would be rounded: pass input.float()"
        )
    return kernel.to(input.dtype)


# Below, the padding is [left, right, top, bottom], as `F.pad` takes it.


def _resample(x: Tensor, kernel: Tensor, up: int, down: int, pad: list[int]) -> Tensor:
    chosen = operator if dispatch.has_kernel(x, kernel) else plain
    return chosen(x, kernel, up, down, pad)


def plain(x: Tensor, kernel: Tensor, up: int, down: int, pad: list[int]) -> Tensor:
    """By convolutions of PyTorch."""
    if up == 1:
        return _filter_and_decimate(x, kernel, down, pad)
    return _interpolate(x, kernel, up, pad)[..., ::down, ::down]


def _filter_and_decimate(x: Tensor, kernel: Tensor, down: int, pad: list[int]) -> Tensor:
    # The convolution pads all sides alike; the rest of an uneven padding is added before.
    even = max(0, min(pad))
    x = _extend(x, [side - even for side in pad])
    weight = _depthwise(kernel.flip(0, 1), x.shape[1])
    return F.conv2d(x, weight, stride=down, padding=even, groups=x.shape[1])


def _interpolate(x: Tensor, kernel: Tensor, up: int, pad: list[int]) -> Tensor:
    """Zero insertion and filtering as one transposed convolution.

    That yields every position where filter and image overlap; the paddings tell how many of them
    to drop on each side (or, if negative, how many zeros to add).
    """
    (left, right, top, bottom), (h, w) = pad, kernel.shape
    crop = [w - 1 - left, w - up - right, h - 1 - top, h - up - bottom]
    even = max(0, min(crop))
    weight = _depthwise(kernel, x.shape[1])
    x = F.conv_transpose2d(x, weight, stride=up, padding=even, groups=x.shape[1])
    return _extend(x, [even - edge for edge in crop])


def _extend(x: Tensor, sides: list[int]) -> Tensor:
    """Zeros at the sides, or pixels less where a number is negative, perhaps of these zeros."""
    if min(sides) < 0 < max(sides):
        x = F.pad(x, [max(side, 0) for side in sides])
        sides = [min(side, 0) for side in sides]
    return F.pad(x, sides) if any(sides) else x


def _depthwise(kernel: Tensor, channels: int) -> Tensor:
    return kernel.expand(channels, 1, *kernel.shape)


def compute(x: Tensor, kernel: Tensor, up: int, down: int, pad: list[int]) -> Tensor:
    """By the CUDA kernel, or by `plain` where it cannot be compiled or the images are too large.

    Images that are neither contiguous nor channels_last are copied; the result has their layout.
    """
    layout = dispatch.layout(x)
    x, kernel = x.contiguous(memory_format=layout), kernel.contiguous()

    def by_convolutions() -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return plain(x, kernel, up, down, pad).contiguous(memory_format=layout)

    if not counts_fit(x, up, down, pad):
        return by_convolutions()
    return dispatch.compute(x, lambda: by_kernel(x, kernel, up, down, pad), by_convolutions)


def by_kernel(x: Tensor, kernel: Tensor, up: int, down: int, pad: list[int]) -> Tensor:
    """By the CUDA kernel; tensors are in one of its layouts."""
    y = _result(x, kernel, up, down, pad)
    (b, c, *size), (left, _, top, _) = x.shape, pad
    outer, inner = (b * c, 1) if x.is_contiguous() else (b, c)
    if y.numel():
        pointers = [tensor.data_ptr() for tensor in (x, kernel, y)]
        lengths = [outer, inner, *size, *y.shape[2:], *kernel.shape]
        dispatch.launch("upfirdn2d", x, *pointers, *lengths, up, down, top, left)
    return y


def _result(x: Tensor, kernel: Tensor, up: int, down: int, pad: list[int]) -> Tensor:
    """Uninitialised output."""
    sides = (pad[2] + pad[3], pad[0] + pad[1])
    size = [
        (length * up + side - taps) // down + 1
        for length, side, taps in zip(x.shape[2:], sides, kernel.shape, strict=True)
    ]
    return torch.empty(
        (*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=dispatch.layout(x)
    )


def counts_fit(x: Tensor, up: int, down: int, pad: list[int]) -> bool:
    """Whether the kernel, which counts the numbers in one image with 32 bits, takes such images."""
    sides = sum(map(abs, pad))
    height, width = (length * up + sides + down for length in x.shape[2:])
    return x.shape[1] * height * width < 2**31


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, kernel, ctx.up, ctx.down, ctx.pad = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, kernel)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The adjoint in x is the same operation with the factors exchanged and the filter turned, so
    derivatives of any order exist."""
    x, kernel = ctx.saved_tensors
    grad_x = grad_kernel = None
    if ctx.needs_input_grad[0]:
        pad = _adjoint_pad(ctx.size, grad.shape[2:], kernel.shape, ctx.up, ctx.down, ctx.pad)
        grad_x = _resample(grad, kernel.flip(0, 1), ctx.down, ctx.up, pad)
    if ctx.needs_input_grad[1]:
        grad_kernel = _kernel_gradient(x, grad, kernel.shape, ctx.up, ctx.down, ctx.pad)
    return grad_x, grad_kernel, None, None, None


def _adjoint_pad(size, out_size, taps, up: int, down: int, pad: list[int]) -> list[int]:
    """Padding with which an output of `out_size` pixels goes back to `size` pixels.

    A filter that begins p zeros before the first pixel has taps - 1 - p zeros before it once it is
    turned; the zeros after the last pixel make the sizes agree.
    """
    sides = []
    for axis, before in ((1, pad[0]), (0, pad[2])):
        first = taps[axis] - 1 - before
        last = (size[axis] - 1) * up + taps[axis] - out_size[axis] * down - first
        sides += [first, last]
    return sides


def _kernel_gradient(x: Tensor, grad: Tensor, taps, up: int, down: int, pad: list[int]) -> Tensor:
    """Correlation of the upsampled images with the gradient of the output, tap by tap."""
    h, w = taps
    u = _extend(_with_zeros(x, up, up), pad)
    tall, wide = (down * (length - 1) + 1 for length in grad.shape[2:])
    products = [
        (grad * u[:, :, i : i + tall : down, j : j + wide : down]).sum()
        for i in range(h)
        for j in range(w)
    ]
    return torch.stack(products).reshape(h, w).flip(0, 1)


def _with_zeros(x: Tensor, up_y: int, up_x: int) -> Tensor:
    """Images with up - 1 zeros after each pixel."""
    b, c, height, width = x.shape
    u = F.pad(x.reshape(b, c, height, 1, width, 1), (0, up_x - 1, 0, 0, 0, up_y - 1))
    return u.reshape(b, c, height * up_y, width * up_x)


operator = dispatch.operator(
    "cuda",
    "upfirdn2d(Tensor x, Tensor kernel, SymInt up, SymInt down, SymInt[] pad) -> Tensor",
    compute,
    _result,
    _backward,
    _remember,
)
