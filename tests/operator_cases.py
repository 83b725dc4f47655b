"""Operators of every kind for tests, their dense matrices, and a recorder of tensor operations."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from controllable_generation import (
    GaussianBlur,
    GrayScale,
    Mask,
    MatrixOperator,
    RandomProjection,
    Separable,
    SuperResolution,
)

SHAPES = ((3, 8, 6), (1, 8, 8), (2, 12), (16,))
RCOND = 1e-5


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def separable(shape):
    """Wider, taller and of less than full rank, and nothing along the first of several axes."""
    kinds = (
        lambda n: rand(n - 1, n, seed=n),
        lambda n: rand(n + 1, 2, seed=n) @ rand(2, n, seed=n + 1),
    )
    matrices = [kind(n) for kind, n in zip(kinds, shape[-2:], strict=False)]
    return Separable(shape, [None] * (len(shape) - len(matrices)) + matrices)


def matrix_operator(shape):
    """Of rank 5."""
    return MatrixOperator(shape, rand(7, 5) @ rand(5, math.prod(shape), seed=1))


MAKERS = {
    "separable": separable,
    "super_resolution": SuperResolution,
    "blur": lambda shape: GaussianBlur(shape, 0.7),
    "strong_blur": lambda shape: GaussianBlur(shape, 2.0),
    "gray": GrayScale,
    "box": Mask.box,
    "random_mask": lambda shape: Mask.random(shape, 0.4, 3),
    "half": Mask.half,
    "matrix": matrix_operator,
    "projection": RandomProjection,
}
CASES = pytest.mark.parametrize("shape", SHAPES, ids=str)
OPERATORS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def dense(operator):
    """The matrix of an operator, (M, n), column by column."""
    n = math.prod(operator.shape)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *operator.shape)
    return operator.apply(basis).reshape(n, -1).T


def some_pairs(operator, dtype=torch.float64):
    """x (5, *D) and y (5, *M)."""
    x = rand(5, *operator.shape, seed=5, dtype=dtype)
    return x, rand(5, *operator.measured_shape, seed=6, dtype=dtype)


class Operations(TorchDispatchMode):
    """Names of the tensor operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Operations that make the host wait for the device.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
