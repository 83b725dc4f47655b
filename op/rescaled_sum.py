"""A sum and its division by a number in one step, on a CPU."""

import torch
from torch import Tensor

from . import host


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
    return host.has_kernels(x) and alike and x.stride() == h.stride() and _is_dense(x)


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def compute(x: Tensor, h: Tensor, divisor: float) -> Tensor:
    """By the kernel."""
    y = torch.empty_like(x)
    host.launch("rescaled_sum", x, x, h, y, x.numel(), divisor)
    return y


operator = torch.library.custom_op(
    "score_sde::rescaled_sum",
    compute,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor h, float divisor) -> Tensor",
)
operator.register_fake(lambda x, h, divisor: torch.empty_like(x))
operator.register_autograd(
    lambda ctx, grad: 2 * (grad / ctx.divisor,) + (None,),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "divisor", inputs[2]),
)
