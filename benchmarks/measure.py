"""Time, memory and operations of a call, limits of the machine, and tables of results.

Times are taken in turns, so that noise of the machine affects all alike: compare their ratios.
"""

import json
import os
import pathlib
import platform
import re
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.precision import matmul_precision
from score_lib.disk.reports import markdown_table


class Timing(NamedTuple):
    """Seconds of several calls: the best, and the median."""

    best: float
    median: float


def in_turns(
    works: dict[str, Callable[[], object]], device: torch.device, rounds: int = 5
) -> dict[str, Timing]:
    """Times of several calls, in turns; without a warm-up only the best is of use."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: Timing(min(taken), statistics.median(taken)) for name, taken in times.items()}


class Ratio(NamedTuple):
    """A ratio of times, and its standard error."""

    value: float
    standard_error: float


def ratio_in_pairs(
    slow: Callable[[], object], fast: Callable[[], object], device: torch.device, rounds: int = 15
) -> Ratio:
    """How many times as long the first call takes: the median over pairs, after a warm-up.

    Calls of a pair follow each other, in alternating order, so that slow changes of the machine
    cancel.  On a CPU other programs do not count.
    """
    ratios = []
    for k in range(-1, rounds):
        order = (slow, fast) if k % 2 else (fast, slow)
        first, second = (busy_seconds(work, device) for work in order)
        ratios.append(first / second if k % 2 else second / first)
    return median_ratio(ratios[1:])


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """Their median, with the error of a median, from the median distance to it."""
    middle = statistics.median(ratios)
    distance = statistics.median(abs(ratio - middle) for ratio in ratios)
    # Of a normal distribution: sigma is 1.48 distances, and the error 1.25 sigma / sqrt(n).
    return Ratio(middle, 1.25 * 1.48 * distance / len(ratios) ** 0.5)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call, until the device has finished."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def busy_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on a CPU, the time that all threads of this process were busy."""
    if device.type != "cpu":
        return seconds(work, device)
    start = time.process_time()
    work()
    return time.process_time() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def growth(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds beyond those allocated before it; calls twice.

    From the allocator's statistics on a GPU, from PyTorch's profiler on a CPU, which does not see
    scratch memory of libraries.
    """
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):  # a CUDA graph is recorded in one of them
            work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # frees are seen only of memory whose allocation was seen
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    records = (e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    return most


def allocated(device: torch.device) -> int:
    """Bytes that tensors and graphs hold on a GPU; elsewhere nobody counts them: 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; shared memory counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call, by PyTorch's
    functions: those that a kernel of `op/` saves are counted as done."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows the products of plain attention, but not all fused kernels.
    plain = unittest.mock.patch.dict(os.environ, OP_BACKEND="plain")
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_product(
    device: torch.device, precision: str, size: int = 0
) -> tuple[Callable[[], None], int]:
    """A call of products of square matrices in a precision, warmed up, and its operations.

    Without the size of a side, they are large enough to keep the device busy.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    repeats = 16 if device.type == "cuda" else 1
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def work():
        with matmul_precision(precision):
            for _ in range(repeats):
                torch.mm(a, b, out=out)

    work()
    return work, repeats * 2 * size**3


def hardware(device: torch.device) -> str:
    """Names of the processor and of PyTorch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{cpu}, {threads} of {os.cpu_count()} cores, PyTorch {torch.__version__}"


def show(name: str, device: torch.device, records: list[dict], **facts) -> None:
    """Print a table, then its rows and further facts as one line of JSON."""
    print(f"{name} on {hardware(device)}\n\n{markdown_table(records)}")
    about = {"benchmark": name, "hardware": hardware(device), **facts}
    print(json.dumps({**about, "results": records}), flush=True)
