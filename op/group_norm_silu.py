"""Group normalisation and SiLU in one step, on a CPU."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, host


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None
) -> Tensor:
    """silu(weight n + bias), where n is x + shift, each group of channels with mean 0, variance 1.

    Args:
        x: (B, C, *S).
        groups: a number that divides C.
        weight, bias: (C,).
        eps: added to the variance.
        shift: (B, C), added to every pixel.
    Returns:
        (B, C, *S) in the dtype of x.
    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_shapes(x, groups, weight, bias, shift)
    if not has_kernel(x, weight, bias):
        return plain(x, shift, weight, bias, groups, eps)
    shift = x.new_zeros(x.shape[:2], dtype=torch.float32) if shift is None else shift.float()
    return operator(x, shift, weight, bias, groups, eps)[0]


def _check_shapes(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None
) -> None:
    fits = x.dim() > 1 and weight.shape == bias.shape == x.shape[1:2] and not x.shape[1] % groups
    if not fits or (shift is not None and shift.shape != x.shape[:2]):
        shapes = [None if v is None else tuple(v.shape) for v in (x, weight, bias, shift)]
        raise ValueError(
            "group_norm_silu takes x (B, C, *S), weight and bias (C,), a shift (B, C) or none, and "
            f"groups that divide C, not {shapes} and {groups} groups"
        )


def has_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the operator takes them: images whose channels come last, and float32 weights."""
    return (
        host.has_kernels(x)
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.dtype == bias.dtype == torch.float32
        and weight.device == bias.device == x.device
    )


def plain(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """The formula, by functions of PyTorch."""
    if shift is not None:
        x = x + shift.to(x.dtype).reshape(*shift.shape, *(1,) * (x.dim() - 2))
    normalized = F.group_norm(x.contiguous(), groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(normalized.to(x.dtype))


def compute(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel: the result, and means and inverse deviations (B, groups)."""
    y, mean, inverse = _results(x, shift, weight, bias, groups, eps)
    vectors = (v.contiguous() for v in (shift, weight, bias))
    sizes = *_sizes(x), groups
    host.launch("group_norm_silu", x, x, *vectors, y, mean, inverse, *sizes, eps)
    return y, mean, inverse


def differentiate(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the kernel: the slopes of x, of the shift, and (B, C) of weight and bias of each image."""
    slopes = _slopes(grad, x)
    grad = grad.contiguous(memory_format=torch.channels_last)
    vectors = (v.contiguous() for v in (shift, weight, bias))
    given = grad, x, *vectors, mean, inverse, *slopes, *_sizes(x), mean.shape[1]
    host.launch("group_norm_silu_backward", x, *given)
    return slopes


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Images, pixels and channels."""
    return len(x), x.shape[2] * x.shape[3], x.shape[1]


def _results(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float):
    statistics = (x.new_empty((len(x), groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), *statistics


def _slopes(grad: Tensor, x: Tensor, *_):
    vectors = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3))
    return torch.empty_like(x), *vectors


def _remember(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    *inputs, mean, inverse = ctx.saved_tensors
    if torch.is_grad_enabled():  # with create_graph
        again = functools.partial(plain, groups=ctx.groups, eps=ctx.eps)
        return *dispatch.slopes_of(again, inputs, ctx.needs_input_grad[:4], grad), None, None
    slopes = backward_operator(grad, *inputs, mean, inverse)
    return *slopes[:2], *(slope.sum(0) for slope in slopes[2:]), None, None


operator = dispatch.operator(
    "cpu",
    "group_norm_silu(Tensor x, Tensor shift, Tensor weight, Tensor bias, int groups, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    compute,
    _results,
    _backward,
    _remember,
)
backward_operator = dispatch.operator(
    "cpu",
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor shift, Tensor weight, Tensor bias,"
    " Tensor mean, Tensor inverse) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiate,
    _slopes,
)
