"""The CUDA kernels on a GPU, where there is one."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from op_cases import random_tensor, some_resamplings
from torch.autograd import gradgradcheck

from op import build, fused_leaky_relu, upfirdn2d

resampling = importlib.import_module("op.upfirdn2d")
activation = importlib.import_module("op.fused_act")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def on_gpu(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype, device="cuda")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_on_a_gpu(monkeypatch, dtype, layout):
    monkeypatch.setenv("OP_BACKEND", "cuda")
    if build.kernels(torch.device("cuda", torch.cuda.current_device())) is None:
        pytest.skip("the kernels could not be compiled")
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for shape, taps, up, down, pad in [
        *some_resamplings(40),
        ((128, 64, 32, 32), (4, 4), 2, 1, [2, 1, 2, 1]),
        ((70_000, 5, 3, 3), (4, 4), 1, 2, [1, 1, 1, 1]),
        ((1, 3, 600, 500), (4, 4), 1, 1, [2, 1, 2, 1]),
    ]:
        x = on_gpu(*shape, dtype=dtype).to(memory_format=layout)
        kernel = on_gpu(*taps, seed=1, dtype=dtype)
        expected = resampling.plain(x.double(), kernel.double(), up, down, pad).to(dtype)
        y = resampling.by_kernel(x, kernel, up, down, pad)
        torch.testing.assert_close(y, expected, **tolerance)
        bias = on_gpu(shape[1], seed=2, dtype=dtype)
        for gate in (None, x.roll(1)):
            gate = None if gate is None else gate.contiguous(memory_format=layout)
            expected = activation.plain(x, bias, gate, 0.2, 1.5)
            y = activation.by_kernel(x, bias, gate, 0.2, 1.5)
            torch.testing.assert_close(y, expected, **tolerance)


def test_the_activation_kernel_on_a_gpu_takes_any_address(monkeypatch):
    """Elements are moved 16 bytes at a time only from addresses that allow it."""
    monkeypatch.setenv("OP_BACKEND", "cuda")
    shape, dtype = (2, 3, 4, 8), torch.float16
    x, gate = (on_gpu(193, seed=seed, dtype=dtype) for seed in (0, 1))
    for first, gate_first in itertools.product((0, 1), repeat=2):
        tensors = [x[first : first + 192], gate[gate_first : gate_first + 192]]
        tensors = [tensor.reshape(shape) for tensor in tensors]
        y = activation.operator(tensors[0], None, tensors[1], 0.2, 1.0)
        expected = activation.plain(tensors[0], None, tensors[1], 0.2, 1.0)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["cuda", "plain"])
def test_derivatives_on_a_gpu(monkeypatch, backend):
    monkeypatch.setenv("OP_BACKEND", backend)
    x, kernel = on_gpu(1, 2, 4, 5).requires_grad_(), on_gpu(4, 4, seed=1).requires_grad_()
    bias = on_gpu(2, seed=2).requires_grad_()
    assert gradgradcheck(lambda x, k: upfirdn2d(x, k, 2, 1, (2, 1)), (x, kernel))
    assert gradgradcheck(fused_leaky_relu, (x, bias))
    _, found = torch.func.jvp(lambda x: upfirdn2d(x, kernel, 2).sin(), (x,), (x,))
    _, expected = torch.func.jvp(
        lambda x: upfirdn2d(x, kernel.cpu(), 2).sin(), (x.cpu(),), (x.cpu(),)
    )
    torch.testing.assert_close(found.cpu(), expected)


def test_networks_compile_and_are_captured_on_a_gpu(monkeypatch):
    monkeypatch.setenv("OP_BACKEND", "cuda")
    torch.compiler.reset()

    def network(x):
        x = fused_leaky_relu(upfirdn2d(x, kernel, up=2, pad=(2, 1)).sin(), bias)
        return upfirdn2d(x, kernel, down=2, pad=(1, 1)).cos()

    x, kernel, bias = (on_gpu(*s, dtype=torch.float32) for s in ((2, 3, 8, 8), (4, 4), (3,)))
    expected = network(x)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = network(x)
    x.copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(y, expected.flip(0), rtol=1e-4, atol=1e-5)
