"""The CUDA kernels of `op/` compared with functions of PyTorch and with the memory bandwidth.

    python -m benchmarks.kernels

Filtered resampling at the sizes of a network's levels, and the fused activation at its first one.
Reading and writing the images once takes a minimum of time: the last columns give bytes moved per
second, also as a share of a large copy's.  Without a GPU it measures PyTorch's functions.
"""

import argparse
import itertools
import os
from collections.abc import Callable

import torch
from ml_collections import ConfigDict

from benchmarks.measure import in_turns, show
from configs.defaults import load
from op import build, fused_leaky_relu, upfirdn2d
from score_lib.base.memory import keep_freed_memory

RUNS = 20  # consecutive calls, as in a network
TAPS = (1, 3, 3, 1)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="ve/cifar10_ncsnpp_continuous")
    parser.add_argument("--batch_size", type=int, default=0, help="default: 128, on a CPU 4")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch = arguments.batch_size or (128 if device.type == "cuda" else 4)
    backends = ["plain"]
    if device.type == "cpu":
        print("There is no GPU: these are PyTorch's functions on the CPU.")
    elif build.kernels(device) is not None:
        backends.append("cuda")
    copy_rate = rate_of_a_copy(device)
    records = [
        record(name, work, x.to(device, dtype), backends, copy_rate)
        for dtype in (torch.float32, torch.bfloat16)
        for name, work, x in works(load(arguments.config), batch)
    ]
    show(f"kernels, {arguments.config}, batch {batch}", device, records)


def works(config: ConfigDict, batch: int) -> list[tuple[str, Callable, torch.Tensor]]:
    """Operations at the levels of the network: name, function, input."""
    size, model = config.data.image_size, config.model
    channels = [model.nf * multiple for multiple in model.ch_mult]
    sizes = [size >> level for level in range(len(channels))]
    images = [torch.randn(batch, c, n, n) for c, n in zip(channels, sizes, strict=True)]
    found: list[tuple[str, Callable, torch.Tensor]] = []
    for finer, coarser in itertools.pairwise(images):
        found.append(("downsample", lambda x, k, _: upfirdn2d(x, k, down=2, pad=(1, 1)), finer))
        found.append(("upsample", lambda x, k, _: upfirdn2d(x, k, up=2, pad=(2, 1)), coarser))
    found.append(("leaky ReLU", lambda x, _, bias: fused_leaky_relu(x, bias), images[0]))
    return found


def record(
    name: str, work: Callable, x: torch.Tensor, backends: list[str], copy_rate: float
) -> dict:
    """One row of the table."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device)
    kernel, bias = torch.outer(taps, taps), x.new_ones(x.shape[1])
    y = work(x, kernel, bias)
    moved = x.nbytes + y.nbytes

    def runs(backend: str) -> None:
        os.environ["OP_BACKEND"] = backend
        for _ in range(RUNS):
            work(x, kernel, bias)

    calls = {backend: lambda backend=backend: runs(backend) for backend in backends}
    times = {name: timing.best / RUNS for name, timing in in_turns(calls, x.device).items()}
    rate = moved / times[backends[-1]]
    return {
        "operation": name,
        "input": " x ".join(map(str, x.shape)),
        "dtype": str(x.dtype).removeprefix("torch."),
        "plain, us": 1e6 * times["plain"],
        "kernel, us": 1e6 * times["cuda"] if "cuda" in times else "",
        "MB moved": moved / 1e6,
        "GB/s": rate / 1e9,
        "of a copy's": rate / copy_rate,
    }


def rate_of_a_copy(device: torch.device, size: int = 2**26) -> float:
    """Bytes that a large copy reads and writes in a second."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, device)
    return 2 * source.nbytes / times["copy"].best


if __name__ == "__main__":
    main()
