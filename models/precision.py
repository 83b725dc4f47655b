"""Faster networks: in lower precision, and compiled.

Both are wrappers that hold the network as `module` and share its parameters, its mode and its state
dict; a checkpoint of either is a checkpoint of the network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .layers import choose

# Whether float32 matrix products and convolutions on CUDA are rounded to TF32.
_TF32 = {"float32": False, "tf32": True, "bfloat16": False}

# Modes of `torch.compile` that replay CUDA graphs.
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Context that sets how precise float32 matrix products and convolutions are on CUDA.

    PyTorch by itself rounds the factors of convolutions, but not those of matrix products, to
    TF32 (10 bits) on GPUs that can.  "float32" here is float32 in both, as the published numbers
    suppose; "tf32" is TF32 in both.  These are switches of the whole process that are looked at
    when an operation runs, so forward and backward pass belong into the same context; they are put
    back at its end.  Nothing changes on other devices.

    Args:
        precision: "float32", "tf32", or "bfloat16", in which what remains float32 is exact.
    Raises:
        ValueError: an unknown precision.
    """
    tf32 = choose("precision", precision, _TF32)
    # The older names of these switches: they keep the newer ones in step, while after use of the
    # newer ones reading the older, as `torch.backends.cudnn.flags` does, raises.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """A network that computes in a precision, sharing parameters and mode with `model`.

    Args:
        model: a network, called as `model(x, labels)`, whose parameters stay float32.
        precision: "float32" and "tf32" give the model itself, since they differ by what
            `matmul_precision` sets; "bfloat16" computes most layers in bfloat16.  Embedded noise
            levels, the first layer, the last one, statistics and the division by sigma stay
            float32, and so does the output.
    Raises:
        ValueError: an unknown precision, or a model that is in bfloat16 already.
    """
    choose("precision", precision, _TF32)
    if precision != "bfloat16":
        return model
    if any(isinstance(module, InBfloat16) for module in model.modules()):
        raise ValueError("the network is in bfloat16 already: wrap it once")
    return InBfloat16(model)


def accelerated(model: nn.Module, precision: str, mode: str) -> nn.Module:
    """A network in a precision, and compiled in a mode of `torch.compile` unless that is "".

    Of the modes, "default" fuses; "reduce-overhead" also replays CUDA graphs, which saves launches
    where kernels are short; "max-autotune" also tries which kernels are fastest, for minutes.
    """
    model = in_precision(model, precision)
    return compiled(model, mode=mode) if mode else model


def compiled(model: nn.Module, **options) -> nn.Module:
    """A network that `torch.compile` turns into a few kernels, sharing parameters with `model`.

    Compilation happens at the first call in each mode (training, evaluation with and without
    gradients) and for new shapes.  Where it fails, for want of a compiler for instance, one line in
    the log says so and the network runs as it is.  A compiled network has first derivatives only;
    its `module` has all of them.

    Args:
        model: a network, called as `model(x, labels)`; compile after `in_precision`, not before.
        options: of `torch.compile`.
    Returns:
        The compiled network; the model itself, after one line in the log, where it says by an
        attribute `compiles = False` that the compiler does it wrong.
    Raises:
        ValueError: the model is compiled already.
    """
    if any(isinstance(module, Compiled) for module in model.modules()):
        raise ValueError("the network is compiled already: compile it once, last of all wrappers")
    if not all(getattr(module, "compiles", True) for module in model.modules()):
        logging.warning("this network is not compiled: the compiler gets its gradients wrong")
        return model
    return Compiled(model, options)


class _Wrapper(nn.Module):
    """Another way to call a network; mode and state dict are the network's own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    @property
    def training(self) -> bool:
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """`train` and `eval` reach the network itself, which is a child."""

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)


class InBfloat16(_Wrapper):
    """Calls a network under autocast to bfloat16; see `in_precision`."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, *D), labels (B,) -> the network's output, in the dtype of x."""
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x, labels).to(x.dtype)


class Compiled(_Wrapper):
    """Calls a network as `torch.compile` makes it, as long as that works; see `compiled`."""

    def __init__(self, module: nn.Module, options: dict):
        super().__init__(module)
        self.options = options
        self.works = True
        self._fast: Callable | None = None  # made when first called

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (B, *D), labels (B,) -> the network's output."""
        if not self.works:
            return self.module(x, labels)
        try:
            return self._call_fast(x, labels)
        except _compiler_errors() as error:
            # The first line names the stage that failed, the second what went wrong there.
            reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:2])
        # What is wrong with the arguments is raised here, and says nothing about the compiler.
        output = self.module(x, labels)
        self.works = False
        logging.warning("the network cannot be compiled here and runs as it is (%s)", reason)
        return output

    def _call_fast(self, x: Tensor, labels: Tensor) -> Tensor:
        import torch._functorch.config as functorch_config

        if self._fast is None:
            self._fast = torch.compile(_call, **self.options)
        if self.options.get("mode") in _WITH_GRAPHS and not torch.is_grad_enabled():
            # A CUDA graph puts every output in the same place, and samplers keep some of them.
            torch.compiler.cudagraph_mark_step_begin()
            return self._fast(self.module, x, labels).clone()
        # A backward pass may overwrite what was saved for it where it runs once, as in training;
        # the likelihood runs several through one forward pass.
        with functorch_config.patch(donated_buffer=self.training):
            return self._fast(self.module, x, labels)

    def __getstate__(self) -> dict:
        # Copies and pickles compile for themselves.
        return {**self.__dict__, "_fast": None}


def _call(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    # The network is an argument, so that nothing compiled is tied to one copy of it.
    return network(x, labels)


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
