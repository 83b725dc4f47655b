"""Networks replayed from CUDA graphs: hundreds of kernels are launched as one.

A host that launches the kernels of a layer one by one takes longer than a fast GPU needs for them,
unless images are large: the GPU waits.  A graph holds the kernels that PyTorch would launch, so the
numbers are the same, and recording it takes seconds where compilation takes minutes.
"""

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from op.dispatch import is_transformed

from .wrapper import Wrapper


class Replayed(Wrapper):
    """Calls a network by replaying graphs, one for each of the first `MOST` shapes of arguments,
    recorded when it comes: in training with the backward pass, without gradients for the output.

    All other calls run the network itself: on other devices, for gradients with respect to the
    image or of a network that is evaluated, inside the transforms of `torch.func` or another graph,
    and when training calls it again before the backward pass.  If recording fails, one line in the
    log says so, and all calls do.

    Weights may change in place only, as by optimizers, averages and `load_state_dict`.

    Args:
        module: a network, called as `module(x, labels, **condition)`.
    Attributes:
        works: False once recording has failed.
    """

    comes_last = True
    PLATFORM = "cuda"
    MOST = 4  # graphs, which keep the memory of their features

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.works = True
        self._recordings: dict[tuple, _Recording] = {}

    def forward(self, x: Tensor, labels: Tensor, **condition: Tensor) -> Tensor:
        """x (B, *D), labels (B,) -> the network's output."""
        recording = self._recording(x, labels, condition) if self._can_replay(x) else None
        if recording is None:
            return self.module(x, labels, **condition)
        return recording(x, labels, *condition.values())

    def _can_replay(self, x: Tensor) -> bool:
        return (
            self.works
            and x.device.type == self.PLATFORM
            and (not torch.is_grad_enabled() or (self.training and not x.requires_grad))
            and not is_transformed()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _recording(self, x: Tensor, labels: Tensor, condition: dict) -> "_Recording | None":
        """The recording of such arguments, made now if there is none; None if it cannot be used."""
        named = {"x": x, "labels": labels, **condition}
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in named.items())
        key = (self.training, torch.is_grad_enabled(), shapes)
        if key not in self._recordings and len(self._recordings) < self.MOST:
            try:
                self._recordings[key] = _Recording(self.module, x, labels, condition)
            except RuntimeError as error:  # of CUDA too
                self.works = False
                reason = " ".join(str(error).splitlines()[:1])
                logging.warning(
                    "the network's CUDA graph cannot be recorded, and it runs without (%s)", reason
                )
        found = self._recordings.get(key)
        return None if found is None or found.is_awaited() else found

    def __getstate__(self) -> dict:
        # Copies and pickles record for themselves.
        return {**self.__dict__, "_recordings": {}}


class _Recording:
    """A recorded call of a network: with its backward pass where gradients are enabled."""

    def __init__(self, module: nn.Module, x: Tensor, labels: Tensor, condition: dict[str, Tensor]):
        _allow_other_streams()
        places = tuple(tensor.clone() for tensor in (x, labels, *condition.values()))
        # Calls for practice draw the random numbers of dropout: none of them count.  A graph is
        # recorded on the current GPU: it would be empty, and replays would change nothing.
        with torch.random.fork_rng(devices=[x.device]), torch.cuda.device(x.device):
            self._replay: Callable[..., Tensor] = torch.cuda.make_graphed_callables(
                _Positional(module, tuple(condition)), places, allow_unused_input=True
            )
        self._node: weakref.ref | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        output = self._replay(*arguments)
        if not torch.is_grad_enabled():
            return output.clone()  # the next call overwrites it, and samplers keep some
        self._node = weakref.ref(output.grad_fn)
        output.register_hook(self._arrived)
        return output

    def is_awaited(self) -> bool:
        """Whether a backward pass may come that needs the features of the last call."""
        return self._node is not None and self._node() is not None

    def _arrived(self, _: Tensor) -> None:
        self._node = None


def _allow_other_streams() -> None:
    """Gradients come from the stream of the recording, of which some versions of PyTorch warn."""
    graph = torch.autograd.graph
    getattr(graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda _: None)(False)


class _Positional(nn.Module):
    """A network that takes its condition by position, as recording needs it."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.module, self.names = module, names
        self.train(module.training)

    def forward(self, x: Tensor, labels: Tensor, *values: Tensor) -> Tensor:
        return self.module(x, labels, **dict(zip(self.names, values, strict=True)))
