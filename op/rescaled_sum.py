"""A sum and its division by a number in one step, on a CPU."""

import torch
from torch import Tensor

from . import dispatch, host


def rescaled_sum(x: Tensor, h: Tensor, divisor: float) -> Tensor:
    """(x + h) / divisor.

    Args:
        x, h: (*D) each.
    Returns:
        (*D); in bfloat16 the kernel rounds once.
    """
    return operator(x, h, divisor) if _has_kernel(x, h) else (x + h) / divisor


def _has_kernel(x: Tensor, h: Tensor) -> bool:
    """Whether the operator takes them: of one dtype and shape, in one order of memory."""
    alike = x.shape == h.shape and x.dtype == h.dtype and x.device == h.device
    is_dense = x.is_contiguous(memory_format=dispatch.layout(x))
    return host.has_kernels(x) and alike and x.stride() == h.stride() and is_dense


def compute(x: Tensor, h: Tensor, divisor: float) -> Tensor:
    """By the kernel."""
    y = torch.empty_like(x)
    host.launch("rescaled_sum", x, x, h, y, x.numel(), divisor)
    return y


operator = dispatch.operator(
    "cpu",
    "rescaled_sum(Tensor x, Tensor h, float divisor) -> Tensor",
    compute,
    lambda x, h, divisor: torch.empty_like(x),
    lambda ctx, grad: 2 * (grad / ctx.divisor,) + (None,),
    lambda ctx, inputs, output: setattr(ctx, "divisor", inputs[2]),
)
