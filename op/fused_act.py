"""Bias, leaky ReLU and gain in one step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch


def fused_leaky_relu(
    input: Tensor, bias: Tensor, negative_slope: float = 0.2, scale: float = 2**0.5
) -> Tensor:
    """scale * leaky_relu(input + bias): the default scale keeps the variance of normal input.

    Args:
        input: (B, C, *D).
        bias: one number per channel, (C,).
        negative_slope: factor below zero.
        scale: gain after the activation.
    Raises:
        ValueError: the number of channels differs.
    """
    if input.dim() < 2 or bias.shape != input.shape[1:2]:
        raise ValueError(
            f"fused_leaky_relu takes input (B, C, *D) and a bias (C,), not shapes "
            f"{tuple(input.shape)} and {tuple(bias.shape)}"
        )
    return _activate(input, bias, None, negative_slope, scale)


class FusedLeakyReLU(nn.Module):
    """`fused_leaky_relu` with a trainable bias that starts at zero."""

    def __init__(self, channel: int, negative_slope: float = 0.2, scale: float = 2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel))
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)


def _activate(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, slope: float, gain: float
) -> Tensor:
    """gain * leaky_relu(x + bias): the sign of `gate`, if given, tells the side of the kink."""
    # The operator's gradient reads the side of the kink from the sign of the output.
    told_by_sign = slope >= 0 and gain > 0
    # A compiler fuses the plain formula with its surroundings, but not an operator.
    takes_operator = told_by_sign and not torch.compiler.is_compiling()
    tensors = [tensor for tensor in (x, bias, gate) if tensor is not None]
    chosen = operator if takes_operator and dispatch.has_kernel(*tensors) else plain
    return chosen(x, bias, gate, slope, gain)


def plain(x: Tensor, bias: Tensor | None, gate: Tensor | None, slope: float, gain: float) -> Tensor:
    """The formula, by functions of PyTorch."""
    if bias is not None:
        x = x + bias.reshape(-1, *(1,) * (x.dim() - 2))
    if gate is not None:
        return torch.where(gate > 0, x, x * slope) * gain
    return F.leaky_relu(x, slope) * gain


def compute(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, slope: float, gain: float
) -> Tensor:
    """By the CUDA kernel, or by `plain` where it cannot be compiled.

    Images that are neither contiguous nor channels_last are copied; the result has their layout.
    """
    layout = dispatch.layout(x)
    x = x.contiguous(memory_format=layout)
    bias = None if bias is None else bias.contiguous()
    gate = None if gate is None else gate.contiguous(memory_format=layout)
    return dispatch.compute(
        x,
        lambda: by_kernel(x, bias, gate, slope, gain),
        lambda: plain(x, bias, gate, slope, gain).contiguous(memory_format=layout),
    )


def by_kernel(
    x: Tensor, bias: Tensor | None, gate: Tensor | None, slope: float, gain: float
) -> Tensor:
    """By the CUDA kernel; tensors are in one of its layouts."""
    y = _result(x)
    if y.numel():
        pointers = [None if t is None else t.data_ptr() for t in (x, bias, gate, y)]
        # In memory order, the channel changes after every `inner` numbers.
        inner = math.prod(x.shape[2:]) if x.is_contiguous() else 1
        dispatch.launch("leaky_relu", x, *pointers, x.numel(), x.shape[1], inner, slope, gain)
    return y


def _result(x: Tensor, *_) -> Tensor:
    """Uninitialised output."""
    return torch.empty_like(x, memory_format=dispatch.layout(x))


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    _, bias, gate, ctx.slope, ctx.gain = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output if gate is None else gate)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Linear in `grad`, with the sides of the kink as they were: the same operation again."""
    (gate,) = ctx.saved_tensors
    grad_x = _activate(grad, None, gate, ctx.slope, ctx.gain)
    grad_bias = grad_x.sum([0, *range(2, grad.dim())]) if ctx.has_bias else None
    return grad_x, grad_bias, None, None, None


operator = dispatch.operator(
    "cuda",
    "leaky_relu(Tensor x, Tensor? bias, Tensor? gate, float slope, float gain) -> Tensor",
    compute,
    _result,
    _backward,
    _remember,
)
