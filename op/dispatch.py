"""Whether an operation runs as a kernel of this package or as functions of PyTorch.

The environment variable OP_BACKEND chooses:

    plain   functions of PyTorch, everywhere; the default;
    cuda    the kernels for GPUs, where they can be compiled, otherwise functions of PyTorch;
    cpu     the kernels for a CPU, see `host`, likewise.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import build

# In the order of the codes in kernels.cu.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Gpu:
    """How kernels are run on a kind of device."""

    def kernels(self, device: torch.device) -> ctypes.CDLL | None:
        """The compiled kernels, or None."""
        return build.kernels(device)

    def active(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Context in which the device is the current one."""
        return torch.cuda.device(device)

    def index_and_stream(self, device: torch.device) -> tuple[int, int | None]:
        """Last arguments of every kernel."""
        return device.index, torch.cuda.current_stream(device).cuda_stream


# By the type of the device.
PLATFORMS: dict[str, Gpu] = {"cuda": Gpu()}


def has_kernel(*tensors: Tensor) -> bool:
    """Whether the registered operators take such tensors: on one GPU, of one floating dtype.

    Forward-mode derivatives and the transforms of `torch.func` need functions of PyTorch.

    Raises:
        ValueError: an unknown OP_BACKEND.
    """
    first = tensors[0]
    return (
        first.device.type in PLATFORMS
        and first.dtype in DTYPES
        and all(x.device == first.device and x.dtype == first.dtype for x in tensors)
        and not is_transformed()
        and backend() == "cuda"
    )


def is_transformed() -> bool:
    """Whether in forward mode or a transform of `torch.func`, which differentiate PyTorch's own
    operations only."""
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active()


def operator(
    device_type: str,
    schema: str,
    compute: Callable,
    like: Callable,
    backward: Callable | None = None,
    remember: Callable | None = None,
) -> torch.library.CustomOpDef:
    """Register an operator of PyTorch that a kernel computes; it changes none of its arguments.

    Args:
        device_type: of its tensors.
        schema: name, arguments and results, as in "scaled(Tensor x, float by) -> Tensor".
        compute: the operator.
        like: uninitialised results for the same arguments.
        backward, remember: see `torch.library.register_autograd`.
    """
    name, parenthesis, rest = schema.partition("(")
    made = torch.library.custom_op(
        f"score_sde::{name}",
        compute,
        mutates_args=(),
        device_types=device_type,
        schema=parenthesis + rest,
    )
    made.register_fake(like)
    if backward is not None:
        made.register_autograd(backward, setup_context=remember)
    return made


def slopes_of(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Derivatives for `create_graph`: by PyTorch's own operations, whose can be differentiated.

    Args:
        plain: the operation, by functions of PyTorch.
        needed: which inputs need one; the others get None.
        grad: the gradient of the result.
    """
    chosen = [v for v, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(plain(*inputs), chosen, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def backend() -> str:
    """The value of OP_BACKEND.

    Raises:
        ValueError: it is none of the known ones.
    """
    chosen = os.environ.get("OP_BACKEND", "plain")
    if chosen not in ("plain", "cuda", "cpu"):
        raise ValueError(f"OP_BACKEND is {chosen!r}: set it to plain, cuda or cpu")
    return chosen


def compute(x: Tensor, kernel: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    """The result of `kernel`, or of the equivalent `plain` where there are no kernels.

    Args:
        x: on the device.
        kernel: calls `launch`.
        plain: calls functions of PyTorch.
    """
    platform = PLATFORMS[x.device.type]
    with platform.active(x.device):
        return plain() if platform.kernels(x.device) is None else kernel()


def launch(name: str, x: Tensor, *arguments: int | float | None) -> None:
    """Run a function of `kernels.cu` on the current stream.

    Args:
        name: of the function.
        x: has the dtype and the device.
        arguments: those between dtype and device.
    Raises:
        RuntimeError: the launch fails.
    """
    platform = PLATFORMS[x.device.type]
    function = getattr(platform.kernels(x.device), name)
    place = platform.index_and_stream(x.device)
    if error := function(DTYPES.index(x.dtype), *arguments, *place):
        raise RuntimeError(f"the CUDA kernel {name} could not be launched: {error.decode()}")


def layout(x: Tensor) -> torch.memory_format:
    """The one of the two layouts known to the kernels that x has, or is to be copied to."""
    if x.dim() != 4 or x.is_contiguous():
        return torch.contiguous_format
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
