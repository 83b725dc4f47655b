"""The kernels of `op/` compared with functions of PyTorch and with the memory bandwidth.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --config vp/fashion_mnist_conditional --batch_size 128

On a GPU filtered resampling at the sizes of a network's levels, and the fused activation at its
first one; on a CPU, with channels last, SiLU of group normalisation and the sum that ends a block
at all levels, and the convolution of an enlarged image between two.  Reading and writing the images
once takes a minimum of time: the last columns give bytes moved per second, also as a share of a
large copy's.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.measure import in_turns, show
from configs.defaults import load
from models.layers import channels_last, repeated_conv3x3
from models.normalization import activated, group_norm
from op import build, fused_leaky_relu, host, rescaled_sum, upfirdn2d
from op.repeated_conv import repeated
from score_lib.base.memory import keep_freed_memory
from score_lib.base.mistakes import brief_mistakes

RUNS = 20  # consecutive calls, as in a network
TAPS = (1, 3, 3, 1)


class Operation(NamedTuple):
    """A call to measure.

    Attributes:
        name: in the table.
        x: the first input.
        call: does it once.
        moved: bytes that it has to read and write.
    """

    name: str
    x: Tensor
    call: Callable[[], object]
    moved: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="ve/cifar10_ncsnpp_continuous")
    parser.add_argument("--batch_size", type=int, default=0, help="default: 128, on a CPU 4")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch = arguments.batch_size or (128 if device.type == "cuda" else 4)
    works = on_gpu if device.type == "cuda" else on_cpu
    compiled = host.kernels() if device.type == "cpu" else build.kernels(device)
    backends = ["plain", device.type] if compiled else ["plain"]
    copy_rate = rate_of_a_copy(device)
    features = levels(load(arguments.config), batch)
    records = [
        record(operation, backends, copy_rate)
        for dtype in (torch.float32, torch.bfloat16)
        for operation in works([x.to(device, dtype) for x in features])
    ]
    show(f"kernels, {arguments.config}, batch {batch}", device, records)


def levels(config: ConfigDict, batch: int) -> list[Tensor]:
    """Features of each level of the network, (B, C, H, W), the finest first."""
    size, model = config.data.image_size, config.model
    sizes = [(model.nf * factor, size >> k) for k, factor in enumerate(model.ch_mult)]
    return [torch.randn(batch, channels, side, side) for channels, side in sizes]


def on_gpu(features: list[Tensor]) -> Iterator[Operation]:
    """Filtered resampling between the levels, and bias with activation at the first."""
    first = features[0]
    taps, bias = first.new_tensor(TAPS), first.new_ones(first.shape[1])
    kernel = torch.outer(taps, taps)

    def operation(name: str, work: Callable[[Tensor], Tensor], x: Tensor) -> Operation:
        return Operation(name, x, functools.partial(work, x), x.nbytes + work(x).nbytes)

    for finer, coarser in itertools.pairwise(features):
        yield operation("downsample", lambda x: upfirdn2d(x, kernel, down=2, pad=(1, 1)), finer)
        yield operation("upsample", lambda x: upfirdn2d(x, kernel, up=2, pad=(2, 1)), coarser)
    yield operation("leaky ReLU", lambda x: fused_leaky_relu(x, bias), first)


def on_cpu(features: list[Tensor]) -> Iterator[Operation]:
    """Operations of a block, at each level, and of one between two."""
    return itertools.chain(
        itertools.chain.from_iterable(map(of_block, features)), map(enlargement, features[1:])
    )


def enlargement(x: Tensor) -> Operation:
    """The convolution of an image with repeated pixels, with the backward pass."""
    x, layer = channels_last(x), repeated_conv3x3(x.shape[1], x.shape[1]).to(x.dtype)
    grad = torch.ones_like(repeated(x))

    def both_passes():
        layer(x.detach().requires_grad_()).backward(grad)

    # Forwards x is read and the result written, backwards x and a gradient read, another written.
    return Operation("repeated conv", x, both_passes, 3 * x.nbytes + 2 * grad.nbytes)


def of_block(x: Tensor) -> Iterator[Operation]:
    """Normalisation and activation, without and with the backward pass, and a block's sum."""
    x, h, norm, act = channels_last(x), channels_last(x), group_norm(x.shape[1]), torch.nn.SiLU()

    @torch.no_grad()
    def forward():
        activated(act, norm, x)

    def both_passes():
        activated(act, norm, x.detach().requires_grad_()).backward(x)

    @torch.no_grad()
    def add():
        rescaled_sum(x, h, 2**0.5)

    # The backward pass reads x and the gradient, and writes another.
    yield Operation("group norm, SiLU", x, forward, 2 * x.nbytes)
    yield Operation("with backward", x, both_passes, 5 * x.nbytes)
    yield Operation("rescaled sum", x, add, 3 * x.nbytes)


def record(operation: Operation, backends: list[str], copy_rate: float) -> dict:
    """One row of the table."""

    def runs(backend: str) -> None:
        os.environ["OP_BACKEND"] = backend
        for _ in range(RUNS):
            operation.call()

    x, moved = operation.x, operation.moved
    for backend in backends:  # warms up
        runs(backend)
    calls = {backend: functools.partial(runs, backend) for backend in backends}
    times = {name: timing.median / RUNS for name, timing in in_turns(calls, x.device).items()}
    plain, fastest = times["plain"], times[backends[-1]]
    return {
        "operation": operation.name,
        "input": " x ".join(map(str, x.shape)),
        "dtype": str(x.dtype).removeprefix("torch."),
        "plain, us": 1e6 * plain,
        "kernel, us": 1e6 * fastest if len(backends) > 1 else "",
        "faster": plain / fastest if len(backends) > 1 else "",
        "MB moved": moved / 1e6,
        "GB/s": moved / fastest / 1e9,
        "of a copy's": moved / fastest / copy_rate,
    }


def rate_of_a_copy(device: torch.device, size: int = 2**26) -> float:
    """Bytes that a large copy reads and writes in a second."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, device)
    return 2 * source.nbytes / times["copy"].best


if __name__ == "__main__":
    with brief_mistakes():
        main()
