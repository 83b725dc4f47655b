"""What the benchmarks share: timing, the machine's own limits, and how results are shown."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable

import torch

from utils.reports import markdown_table


def alternating(
    works: dict[str, Callable[[], object]], device: torch.device, rounds: int = 5
) -> dict[str, float]:
    """Best times of several calls, taken in turns, so that a noisy machine is noisy for all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_product(device: torch.device, size: int = 3072) -> tuple[Callable[[], object], int]:
    """A large float32 matrix product, and its operations."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    threads = torch.get_num_threads()
    return f"{cpu}, {threads} of {os.cpu_count()} cores, PyTorch {torch.__version__}"


def show(name: str, device: torch.device, records: list[dict]) -> None:
    """Print a table, then the same as one line of JSON."""
    print(f"{name} on {hardware(device)}\n\n{markdown_table(records)}")
    print(json.dumps({"benchmark": name, "hardware": hardware(device), "results": records}))
