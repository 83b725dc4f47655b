"""Time and memory of several works, as ratios to plain float32 and to another implementation."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator

import torch
from ml_collections import ConfigDict

from benchmarks.against import OtherProcess
from benchmarks.measure import in_turns, matrix_product, show
from benchmarks.variants import PLAIN, Variant

OTHER = "other implementation"
PRECISIONS = ("float32", "tf32", "bfloat16")
# Without a compiler, with too little memory, or by a network that does not support the work.
FAILURES = (RuntimeError, ValueError, OSError, ImportError, NotImplementedError, AttributeError)


@dataclasses.dataclass
class Comparison:
    """Results by name of the work.

    Attributes:
        rows: of a table; those of failures have a note instead of times.
        results: of the first calls.
        rates: operations a second of a large matrix product, by precision.
    """

    rows: dict[str, dict] = dataclasses.field(default_factory=dict)
    results: dict[str, object] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def timed(self) -> dict[str, dict]:
        """The rows with times."""
        return {name: row for name, row in self.rows.items() if "ms" in row}

    def add_ratios(self) -> None:
        """Add speed and memory as ratios to plain float32, and to the other implementation."""
        timed = self.timed()
        for row in timed.values():
            if PLAIN in timed:
                row["speed-up"] = timed[PLAIN]["ms"] / row["ms"]
                if "peak MB" in row:
                    row["memory"] = row["peak MB"] / timed[PLAIN]["peak MB"]
            if OTHER in timed:
                row["against other"] = timed[OTHER]["ms"] / row["ms"]

    def add_rates(self, operations: int) -> None:
        """Add operations a second, also as a share of a matrix product's in the same precision.

        Every row counts the operations of plain float32, without recomputed activations.
        """
        for name, row in self.timed().items():
            rate = operations / row["ms"] * 1e3
            row |= {"GFLOP/s": rate / 1e9, "of matmul": rate / self.rates[precision_of(name)]}

    def show(self, title: str, given: argparse.Namespace, device: torch.device, **facts) -> None:
        """Print the rows, and the command line."""
        show(
            f"{title}, {given.config}, batch {given.batch_size}",
            device,
            list(self.rows.values()),
            config=given.config,
            batch_size=given.batch_size,
            settings=given.set,
            matmul_gflops={name: rate / 1e9 for name, rate in self.rates.items()},
            **facts,
        )


def compare(
    builders: dict[str, Callable[[], Callable]],
    given: argparse.Namespace,
    work: str,
    config: ConfigDict,
    device: torch.device,
) -> Comparison:
    """Measure works in turns, and another implementation if `--against` names one.

    Args:
        builders: functions that build a work, by name.
        given: the command line.
        work: of the other implementation: "train", "sampling" or "likelihood".
    """
    found, works = Comparison(), {}
    with contextlib.ExitStack() as stack:
        if given.against:
            other = OtherProcess(given, work, config)
            builders = {**builders, OTHER: lambda: stack.enter_context(other)}
        for name, build in builders.items():
            row = found.rows[name] = {"variant": name}
            if attempted := _attempt(build, row):
                works[name], found.results[name] = attempted
            else:
                gc.collect()  # free the memory of the failure
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        products = {p: matrix_product(device, p) for p in dict.fromkeys(map(precision_of, works))}
        limits = {f"product, {p}": product for p, (product, _) in products.items()}
        timings = in_turns(works | limits, device, given.rounds)
    for name in works:
        best, median = timings[name]
        found.rows[name] |= {"ms": 1e3 * best, "median ms": 1e3 * median}
        found.rows[name]["images/s"] = given.batch_size / best
    found.rates = {p: count / timings[f"product, {p}"].best for p, (_, count) in products.items()}
    found.add_ratios()
    return found


def _attempt(build: Callable[[], Callable], row: dict) -> tuple[Callable, object] | None:
    """A work and the result of its first call; its memory, or why it fails, goes into its row."""
    try:
        work = build()
        with warnings_logged() as warnings:
            result = work()
        # A network that cannot be compiled runs uncompiled, as in another row.
        if not warnings:
            if peak := work.peak():
                row["peak MB"] = peak / 1e6
            return work, result
        reason = warnings[0]
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
    line = reason.strip().splitlines()[0].replace("|", "/")
    row["note"] = line if len(line) <= 120 else line[:117] + "..."
    return None


def precision_of(name: str) -> str:
    """The precision of a variant; other works have that of the plain one."""
    return Variant.named(name).precision if name.split("+")[0] in PRECISIONS else PLAIN


@contextlib.contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """Context with the list of the warnings that are logged in it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(handler)
