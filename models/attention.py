"""Attention by PyTorch's fast kernels, with derivatives of every order and mode.

The kernels have first derivatives in reverse mode only.  The formula itself takes their place in
transforms of `torch.func`, in forward mode, and in a backward pass that will be differentiated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from op.dispatch import is_transformed


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(C)) value, for tokens (..., N, C) -> (..., N, C)."""
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value)
    if is_transformed():
        return _weights(query, key) @ value
    result = F.scaled_dot_product_attention(query, key, value)
    return _Differentiable.apply(result, query, key, value) if result.requires_grad else result


def heads_of(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Attention heads: `num_heads`, unless `num_head_channels` says how wide each is (-1: not).

    Raises:
        ValueError: the channels cannot be split so.
    """
    option, value = "num_head_channels", num_head_channels
    if num_head_channels == -1:
        option, value = "num_heads", num_heads
    if value < 1 or channels % value:
        raise ValueError(
            f"attention over {channels} channels cannot have {option} = {value}: it must be at "
            f"least 1 and divide {channels}"
        )
    return num_heads if num_head_channels == -1 else channels // num_head_channels


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)


class _Differentiable(torch.autograd.Function):
    """The result of attention; a gradient with a graph goes past the kernel, to its arguments."""

    @staticmethod
    def forward(ctx, result: Tensor, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # without create_graph
            return grad, None, None, None
        saved = ctx.saved_tensors
        # Of lower precision under autocast.
        wide = torch.promote_types(grad.dtype, torch.float32)
        query, key, value, grad = (x.to(wide) for x in (*saved, grad))
        weights, slope = _weights(query, key), grad @ value.mT
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
        slope = slope * query.shape[-1] ** -0.5
        exact = slope @ key, slope.mT @ query, weights.mT @ grad
        return None, *(new.to(old.dtype) for new, old in zip(exact, saved, strict=True))
