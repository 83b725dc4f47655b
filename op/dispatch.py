"""Which of two ways computes an operation on a GPU: PyTorch's own functions, or a CUDA kernel.

The environment variable OP_BACKEND says it:

    plain   PyTorch's functions, everywhere;
    cuda    the kernels, where they can be compiled;
    auto    whichever is faster, the default.  The first call of each kind (operation, dtype,
            layout, factors, rough size) tries both, and the process remembers.

Where PyTorch is asked for deterministic algorithms, `auto` is `cuda`: what wins a close race may
differ between runs, and then their rounding does.  While a CUDA graph is captured nothing is
compiled or tried; what has not run before is left to PyTorch's functions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from . import build

# In the order of the codes in kernels.cu.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TRIES, _RUNS = 3, 10

_takes_kernel: dict[Hashable, bool] = {}


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the registered operators take such tensors: on one GPU, of one floating dtype.

    Forward-mode derivatives and the transforms of `torch.func` are left to PyTorch's functions,
    which know them.

    Raises:
        ValueError: OP_BACKEND is none of the above.
    """
    first = tensors[0]
    return (
        _on_gpu(first)
        and first.dtype in DTYPES
        and all(x.device == first.device and x.dtype == first.dtype for x in tensors)
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and _backend() != "plain"
    )


def fastest(
    kind: Hashable, x: Tensor, kernel: Callable[[], Tensor], plain: Callable[[], Tensor]
) -> Tensor:
    """The result of one of two equivalent functions, chosen as said above.

    Args:
        kind: calls of one kind are taken to have one winner.
        x: tells the device.
        kernel: calls `launch`.
        plain: calls PyTorch's functions.
    """
    backend = _backend()
    forced = backend == "cuda" or torch.are_deterministic_algorithms_enabled()
    key = (forced, x.device, kind)
    with _guard(x.device):
        if backend == "plain":
            return plain()
        if key not in _takes_kernel and not _capturing():
            _takes_kernel[key] = build.kernels(x.device) is not None and (
                forced or _seconds(kernel) <= _seconds(plain)
            )
        return kernel() if _takes_kernel.get(key) else plain()


def launch(name: str, x: Tensor, *arguments: int | float | None) -> None:
    """Run a function of `kernels.cu` on the current stream.

    Args:
        name: of the function.
        x: tells dtype and device.
        arguments: what stands between these two there.
    Raises:
        RuntimeError: the launch fails.
    """
    function = getattr(build.kernels(x.device), name)
    error = function(DTYPES.index(x.dtype), *arguments, *_index_and_stream(x.device))
    if error:
        raise RuntimeError(f"the CUDA kernel {name} could not be launched: {error.decode()}")


def layout(x: Tensor) -> torch.memory_format:
    """In which of the two layouts that the kernels know x is, or is to be copied to."""
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def size_class(x: Tensor) -> tuple[int, ...]:
    """The same for sizes up to the next power of two."""
    return tuple(size.bit_length() for size in (x.numel(), *x.shape[2:]))


def _backend() -> str:
    backend = os.environ.get("OP_BACKEND", "auto")
    if backend not in ("auto", "plain", "cuda"):
        raise ValueError(f"OP_BACKEND is auto, plain or cuda, not {backend!r}")
    return backend


# What asks the GPU.


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _guard(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _index_and_stream(device: torch.device) -> tuple[int, int]:
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _seconds(work: Callable[[], object]) -> float:
    """Best time of a call, among several behind each other as in a network."""
    work()  # the first one may choose algorithms and fill caches
    times = []
    for _ in range(_TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_RUNS):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (1000 * _RUNS))
    return min(times)
