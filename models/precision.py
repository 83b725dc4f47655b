"""Networks in lower precision, in another order of memory, and compiled.

All are wrappers that hold the network as `module` and share its parameters, mode and state dict: a
checkpoint of a wrapper is a checkpoint of the network.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .graphs import Replayed
from .layers import channels_last, choose
from .wrapper import Wrapper

# Whether float32 matrix products and convolutions on CUDA are rounded to TF32.
_TF32 = {"float32": False, "tf32": True, "bfloat16": False}

# Modes of `torch.compile` that replay CUDA graphs.
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Context that sets the precision of float32 matrix products and convolutions on CUDA.

    By default PyTorch rounds the factors of convolutions, but not those of matrix products, to TF32
    (10 bits).  Here "float32" is float32 in both, as in the published results, and "tf32" is TF32
    in both.  These are global switches, read when an operation runs, so forward and backward pass
    belong in the same context; they are restored at its end.  No-op on other devices.

    Args:
        precision: "float32", "tf32", or "bfloat16": float32 in the layers that stay float32.
    Raises:
        ValueError: an unknown precision.
    """
    tf32 = choose("precision", precision, _TF32)
    # Not the newer names of these switches: after they were set, PyTorch raises when the older ones
    # are read, as `torch.backends.cudnn.flags` does.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def accelerated(model: nn.Module, precision: str = "float32", mode: str = "") -> nn.Module:
    """The network in a precision, compiled if a mode is given; parameters and mode are shared.

    Args:
        model: a network, called as `model(x, labels)`, with float32 parameters.
        precision: "bfloat16" wraps it in `InBfloat16`; "float32" and "tf32", which differ by
            `matmul_precision` only, return the network itself.
        mode: of `torch.compile`: "" does not compile; "default" fuses kernels; "reduce-overhead"
            also replays CUDA graphs, for networks of short kernels; "max-autotune" also searches
            for the fastest kernels, for minutes.  A network with the attribute `compiles = False`
            is not compiled, with a warning in the log.  "cudagraphs" does not compile either, and
            replays CUDA graphs, see `Replayed`; without a GPU, which the log says, it is "".
    Returns:
        where neither applies the network itself or, on a CPU, a U-Net in `ChannelsLast`.
    Raises:
        ValueError: an unknown precision, or a network that is wrapped already.
    """
    choose("precision", precision, _TF32)
    if precision == "bfloat16":
        model = InBfloat16(model)
    if mode == "cudagraphs":
        if _is_on(model, "cuda"):
            return Replayed(model)
        logging.info("without an NVIDIA GPU there are no CUDA graphs to replay")
        mode = ""
    if mode and not all(getattr(module, "compiles", True) for module in model.modules()):
        logging.warning("this network is not compiled: torch.compile gets its gradients wrong")
        return model
    if mode:
        return Compiled(model, mode=mode)
    return ChannelsLast(model) if _follows_on_cpu(model) else model


def _follows_on_cpu(model: nn.Module) -> bool:
    follows = any(getattr(m, "follows_its_input", False) for m in model.modules())
    return follows and _is_on(model, "cpu")


def _is_on(model: nn.Module, device: str) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.device.type == device


class InBfloat16(Wrapper):
    """Calls a network under autocast to bfloat16.

    The embedding of the noise level, the first and the last layer, statistics and the division by
    sigma stay float32, and so does the output.
    """

    def forward(self, x: Tensor, labels: Tensor, **condition: Tensor) -> Tensor:
        """x (B, *D), labels (B,) -> the network's output, in the dtype of x."""
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x, labels, **condition).to(x.dtype)


class ChannelsLast(Wrapper):
    """Calls a network with images whose channels are neighbours in memory, which the features of a
    U-Net follow: the faster order for convolutions on a CPU.

    The result differs by rounding.  Not for the transforms of `torch.func`, which know the other
    order only.
    """

    def forward(self, x: Tensor, labels: Tensor, **condition: Tensor) -> Tensor:
        """x (B, C, H, W), labels (B,) -> the network's output."""
        return self.module(channels_last(x), labels, **condition).contiguous()


class Compiled(Wrapper):
    """Calls a network through `torch.compile`.

    Compilation happens at the first call in each mode (training, evaluation with and without
    gradients) and for new shapes.  If it fails, for lack of a compiler for instance, one line in
    the log says so and the network runs uncompiled.  It has first derivatives only; `module` has
    all of them.

    Args:
        module: a network, called as `module(x, labels, **condition)`.
        options: of `torch.compile`.
    Attributes:
        works: False once compilation has failed.
    """

    comes_last = True

    def __init__(self, module: nn.Module, **options):
        super().__init__(module)
        self.options = options
        self.works = True
        self._fast: Callable | None = None  # made at the first call

    def forward(self, x: Tensor, labels: Tensor, **condition: Tensor) -> Tensor:
        """x (B, *D), labels (B,) -> the network's output."""
        if not self.works:
            return self.module(x, labels, **condition)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._call_fast(x, labels, condition)
        except TorchDynamoException as error:
            # The first line names the stage that failed, the second the reason.
            reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:2])
        # Wrong arguments raise here, and are no failure of the compiler.
        output = self.module(x, labels, **condition)
        self.works = False
        logging.warning("the network cannot be compiled here and runs uncompiled (%s)", reason)
        return output

    def _call_fast(self, x: Tensor, labels: Tensor, condition: dict[str, Tensor]) -> Tensor:
        import torch._functorch.config as functorch_config

        if self._fast is None:
            self._fast = torch.compile(_call, **self.options)
        if self.options.get("mode") in _WITH_GRAPHS and not torch.is_grad_enabled():
            # A CUDA graph overwrites its previous output, and samplers keep some of them.
            torch.compiler.cudagraph_mark_step_begin()
            return self._fast(self.module, x, labels, condition).clone()
        # Training runs one backward pass, which may overwrite the saved tensors; the likelihood
        # runs several through the same forward pass.
        with functorch_config.patch(donated_buffer=self.training):
            return self._fast(self.module, x, labels, condition)

    def __getstate__(self) -> dict:
        # Copies and pickles compile for themselves.
        return {**self.__dict__, "_fast": None}


def _call(network: nn.Module, x: Tensor, labels: Tensor, condition: dict[str, Tensor]) -> Tensor:
    # With the network as an argument, the compiled function is not tied to one copy of it.
    return network(x, labels, **condition)
