"""The command line of the benchmarks, the network that they measure, and variants of it in turns.

A variant is named by its precision and additions, such as "bfloat16+compile"; "kernels" are those
of `op/` for the device.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import unittest.mock
from collections.abc import Callable, Iterable, Iterator

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.measure import allocated, growth, in_turns, matrix_product, nbytes, show
from configs.defaults import load
from models.ema import ExponentialMovingAverage
from run_lib import Run, restored, setup
from score_lib.base.devices import resolve_device
from score_lib.base.memory import keep_freed_memory
from score_lib.base.tensors import derive_seed
from score_lib.options import complete, flatten

PLAIN = "float32"
PRECISIONS = (PLAIN, "tf32", "bfloat16")
# Modes of `training.compile` by the name of an addition.
MODES = {"compile": "default", "graphs": "reduce-overhead", "cudagraphs": "cudagraphs"}
ADDITIONS = (*MODES, "checkpoint", "kernels")
NEEDS_GPU = ("tf32", "bfloat16+graphs", "bfloat16+cudagraphs")
# Without a compiler, with too little memory, or by a network that does not support the work.
FAILURES = (RuntimeError, ValueError, OSError, ImportError, NotImplementedError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of a config.

    Attributes:
        compile: of `training.compile` and `sampling.compile`.
        checkpoint: recompute activations in the backward pass.
    """

    precision: str = PLAIN
    compile: str = ""
    checkpoint: bool = False

    @classmethod
    def named(cls, name: str) -> "Variant":
        """The variant of a name; unknown precisions are left to the checks of the config.

        Raises:
            ValueError: an unknown addition.
        """
        precision, *added = name.split("+")
        if not set(added) <= set(ADDITIONS):
            raise ValueError(f"unknown variant {name!r}: additions are {', '.join(ADDITIONS)}")
        mode = next((MODES[name] for name in added if name in MODES), "")
        return cls(precision, mode, "checkpoint" in added)

    def of(self, config: ConfigDict, section: str) -> ConfigDict:
        """A copy of a config with these options in a section, "training" or "sampling"."""
        config = complete(config)
        config.model.checkpoint_activations = self.checkpoint
        config[section].update(precision=self.precision, compile=self.compile)
        return config


def arguments(description: str, variants: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """A parser of the common options, and of those of a comparison if it has default variants."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default="ve/cifar10_ncsnpp_continuous")
    parser.add_argument("--batch_size", type=int, default=0, help="default: large on a GPU")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="of the config"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of timings")
    if variants is not None:
        parser.add_argument("--variants", nargs="*", default=list(variants), help="beside float32")
        parser.add_argument("--workdir", default="", help="folder of a trained run")
    return parser


def configured(given: argparse.Namespace, batch_on_gpu: int) -> tuple[ConfigDict, torch.device]:
    """The config of a command line, with its batch size, and the device; see `with_settings`.

    On a CPU memory is kept as `main.py` keeps it.
    """
    config = with_settings(given.config, given.set)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    given.batch_size = given.batch_size or (batch_on_gpu if device.type == "cuda" else 4)
    config.training.batch_size = given.batch_size
    return config, device


def with_settings(experiment: str, settings: list[str]) -> ConfigDict:
    """The config of an experiment, with settings such as "model.nf=8".

    Raises:
        ValueError: no such option, or a value of another type.
    """
    config = complete(load(experiment))
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in flatten(config):
            raise ValueError(f"--set {setting}: {experiment} has no option {key!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a name needs no quotes
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    return config


def living_run(config: ConfigDict, workdir: str = "") -> Run:
    """A run with the weights of a folder or, without one, random weights of a fixed seed.

    The last layers of new U-Nets are near 0, so their output would hide the error of a lower
    precision: these layers are drawn anew.
    """
    run = restored(config, workdir) if workdir else setup(config)
    parameters = list(run.state["model"].parameters())
    if workdir:
        run.state["ema"].copy_to(parameters)
        return run
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in parameters:
            if weight.dim() > 1 and weight.abs().max() < 1e-3:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn / weight[0].numel() ** 0.5)
    run.state["ema"] = ExponentialMovingAverage(parameters, config.model.ema_rate)
    return run


def drawn(run: Run, draw: Callable = torch.rand) -> Tensor:
    """Random numbers for a batch of images, (B, C, H, W), the same on every machine."""
    generator = torch.Generator().manual_seed(derive_seed(run.config.seed, draw.__name__))
    shape = run.config.training.batch_size, *run.shape
    return draw(*shape, generator=generator).to(run.device)


@dataclasses.dataclass
class Work:
    """A call to measure.

    Attributes:
        run: holds the tensors that it needs.
        call: does it once.
        short: a faster call that needs as much memory, if there is one.
    """

    run: Run
    call: Callable[[], object]
    short: Callable[[], object] | None = None

    def peak(self) -> int:
        """Bytes of the run's tensors and of those that a call adds at most."""
        return self.kept() + growth(self.short or self.call, self.run.device)

    def first_call(self) -> tuple[object, int]:
        """Its result, and bytes of a GPU that it keeps beside the run's tensors, as graphs do."""
        before = allocated(self.run.device) - self.kept()
        result = self.call()
        return result, max(0, allocated(self.run.device) - self.kept() - before)

    def kept(self) -> int:
        """Bytes of the run's tensors."""
        state, model = self.run.state, self.run.state["model"]
        kept = [*model.parameters(), *model.buffers(), *state["ema"].shadow_params]
        for average in state["averages"].named.values() if "averages" in state else ():
            kept += average.shadow_params
        kept += [p.grad for p in model.parameters() if p.grad is not None]
        for moments in state["optimizer"].state.values() if "optimizer" in state else ():
            kept += [value for value in moments.values() if isinstance(value, Tensor)]
        return nbytes(kept)


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
        """Add speed and memory as ratios to plain float32."""
        timed = self.timed()
        if PLAIN in timed:
            plain = dict(timed[PLAIN])
            for row in timed.values():
                row["speed-up"] = plain["ms"] / row["ms"]
                row["memory"] = row["peak MB"] / plain["peak MB"]

    def add_rates(self, operations: int) -> None:
        """Add operations a second, also as a share of a matrix product's in the same precision.

        Every row counts the operations of plain float32, without recomputed activations.
        """
        for name, row in self.timed().items():
            rate = operations / row["ms"] * 1e3
            row |= {"GFLOP/s": rate / 1e9, "of matmul": rate / self.rates[precision_of(name)]}

    def show(self, title: str, given: argparse.Namespace, device: torch.device, **facts) -> None:
        """Print the rows, and the command line."""
        facts |= {"config": given.config, "batch_size": given.batch_size, "settings": given.set}
        facts["matmul_gflops"] = {name: rate / 1e9 for name, rate in self.rates.items()}
        title = f"{title}, {given.config}, batch {given.batch_size}"
        show(title, device, list(self.rows.values()), **facts)


def compare(
    given: argparse.Namespace,
    device: torch.device,
    build: Callable[[str], Work],
    first: dict[str, Callable[[], Work]] | None = None,
) -> Comparison:
    """Measure works in turns: plain float32, and the variants of the command line.

    Args:
        build: makes the work of a variant; those that need a GPU are left out without one.
        first: functions that make other works, by name, for the first rows.
    """
    builders, found, works = dict(first or {}), Comparison(), {}
    for name in (PLAIN, *given.variants):
        if device.type == "cuda" or name not in NEEDS_GPU:
            kernels = device.type if "kernels" in name.split("+") else ""
            builders[name] = functools.partial(_by_kernels, kernels, build, name)
    for name, builder in builders.items():
        row = found.rows[name] = {"variant": name}
        if attempted := _attempt(builder, row):
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


def _by_kernels(backend: str, build: Callable[[str], Work], name: str) -> Work:
    """A work whose calls have an OP_BACKEND, if one is named."""
    work = build(name)
    if backend:
        work.call = _with_backend(backend, work.call)
        work.short = work.short and _with_backend(backend, work.short)
    return work


def _with_backend(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def chosen() -> object:
        with unittest.mock.patch.dict(os.environ, OP_BACKEND=backend):
            return call()

    return chosen


def _attempt(build: Callable[[], Work], row: dict) -> tuple[Callable, object] | None:
    """A work's call and its first result; its memory, or why it fails, goes into its row."""
    try:
        work = build()
        with warnings_logged() as warnings:
            result, graphs = work.first_call()
        # A network that cannot be compiled runs uncompiled, as in another row.
        if not warnings:
            row["peak MB"] = (work.peak() + graphs) / 1e6
            return work.call, result
        reason = warnings[0]
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
    line = reason.strip().splitlines()[0].replace("|", "/")
    row["note"] = line if len(line) <= 120 else line[:117] + "..."
    return None


def precision_of(name: str) -> str:
    """The precision of a variant; other works have that of the plain one."""
    precision = name.partition("+")[0]
    return precision if precision in PRECISIONS else PLAIN


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
