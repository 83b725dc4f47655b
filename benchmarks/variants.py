"""What is compared: one network as the switches of a config make it, and another implementation.

A variant is named by its precision and what is added to it, such as "bfloat16+compile".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.measure import growth, in_turns, matrix_product, nbytes, show
from configs.defaults import load
from models.ema import ExponentialMovingAverage
from run_lib import Run, restored, setup
from score_lib.base.devices import resolve_device
from score_lib.options import complete, flatten

PLAIN, OTHER = "float32", "other implementation"
PRECISIONS = ("float32", "tf32", "bfloat16")
ADDITIONS = ("compile", "graphs", "checkpoint")
NEEDS_GPU = ("tf32", "bfloat16+graphs")
# What measured work may fail with: no compiler, too little memory, a network that cannot do it.
FAILURES = (RuntimeError, ValueError, OSError, ImportError, NotImplementedError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Switches of a config.

    Attributes:
        precision: "float32", "tf32" or "bfloat16".
        compile: a mode of `torch.compile`, or "".
        checkpoint: whether activations are computed again in the backward pass.
    """

    precision: str = PLAIN
    compile: str = ""
    checkpoint: bool = False

    @classmethod
    def named(cls, name: str) -> Variant:
        """The variant of a name such as "bfloat16+compile+checkpoint".

        Raises:
            ValueError: an unknown addition; an unknown precision is found by the config's checks.
        """
        precision, *added = name.split("+")
        if unknown := set(added) - set(ADDITIONS):
            raise ValueError(
                f"unknown variant {name!r}: {', '.join(sorted(unknown))} is none of "
                f"{', '.join(ADDITIONS)}, which can be added to a precision"
            )
        mode = "reduce-overhead" if "graphs" in added else "default" if "compile" in added else ""
        return cls(precision, mode, "checkpoint" in added)

    def of(self, config: ConfigDict, section: str) -> ConfigDict:
        """A copy of a config in which a section, "training" or "sampling", has these switches."""
        config = complete(config)
        config.model.checkpoint_activations = self.checkpoint
        config[section].update(precision=self.precision, compile=self.compile)
        return config


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser of the options that say what is measured, and how often."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default="ve/cifar10_ncsnpp_continuous")
    parser.add_argument("--batch_size", type=int, default=0, help="default: large on a GPU")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="of the config"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that each is timed")
    return parser


def comparing(parser: argparse.ArgumentParser, variants: Iterable[str]) -> argparse.ArgumentParser:
    """The parser with options that say what is compared; by default these variants."""
    parser.add_argument("--variants", nargs="*", default=list(variants), help="beside float32")
    parser.add_argument(
        "--against", default="", metavar="FOLDER", help="another implementation of the same names"
    )
    return parser


def configured(given: argparse.Namespace, batch_on_gpu: int) -> tuple[ConfigDict, torch.device]:
    """The config that the command line describes, its batch size, and the device.

    Raises:
        ValueError: no such option, or a value of another type.
    """
    config = complete(load(given.config))
    for setting in given.set:
        key, _, text = setting.partition("=")
        if key not in flatten(config):
            raise ValueError(f"--set {setting}: {given.config} has no option {key!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a name needs no quotes
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    device = resolve_device(config.device)
    given.batch_size = given.batch_size or (batch_on_gpu if device.type == "cuda" else 4)
    config.training.batch_size = given.batch_size
    return config, device


def chosen(given: argparse.Namespace, device: torch.device) -> list[str]:
    """Names of the variants to compare: the plain one first; on a CPU without those of a GPU."""
    names = dict.fromkeys([PLAIN, *given.variants])
    return [name for name in names if device.type == "cuda" or name not in NEEDS_GPU]


def living_run(config: ConfigDict, workdir: str = "") -> Run:
    """A run with weights of a folder; without one, with weights whose output depends on the input.

    What is drawn is the same for every variant.  New U-Nets give almost nothing, as their last
    layers begin near 0: that would hide what lower precision costs.
    """
    if workdir:
        run = restored(config, workdir)
        run.state["ema"].copy_to(run.state["model"].parameters())
        return run
    run = setup(config)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in run.state["model"].parameters():
            if weight.dim() > 1 and weight.abs().max() < 1e-3:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn / weight[0].numel() ** 0.5)
    parameters = run.state["model"].parameters()
    run.state["ema"] = ExponentialMovingAverage(parameters, config.model.ema_rate)
    return run


@dataclasses.dataclass
class Work:
    """Something to be measured.

    Attributes:
        call: does it once.
        tensors: those that it keeps from call to call.
        short: something that takes as much memory in less time, where there is such a thing.
    """

    call: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]
    device: torch.device
    short: Callable[[], object] | None = None

    def __call__(self) -> object:
        return self.call()

    def peak(self) -> int:
        """Bytes that it needs: its own tensors, and the most that a call adds to them."""
        return nbytes(self.tensors()) + growth(self.short or self.call, self.device)


def tensors_of(state: dict) -> list[Tensor]:
    """Weights, gradients, averages and the optimiser's tensors of a training state."""
    model = state["model"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer = state["optimizer"].state.values() if "optimizer" in state else ()
    moments = [value for kept in optimizer for value in kept.values() if isinstance(value, Tensor)]
    kept = [*model.parameters(), *model.buffers(), *state["ema"].shadow_params]
    return [*kept, *gradients, *moments]


@dataclasses.dataclass
class Comparison:
    """What came out, by name of the variant.

    Attributes:
        rows: of a table.
        results: what the first call gave.
        rates: operations a second of a large matrix product, by precision.
    """

    rows: dict[str, dict]
    results: dict[str, object]
    rates: dict[str, float]


def compare(
    builders: dict[str, Callable[[], Callable]], device: torch.device, images: int, rounds: int
) -> Comparison:
    """Time and memory of several works, and their ratios to the plain one.

    Args:
        builders: functions that build a work, by name; one is `PLAIN`.
        device: where they run.
        images: in one call.
        rounds: how often each is timed.
    Returns:
        rows; one that failed says why, and has no times.
    """
    works, found = {}, Comparison({}, {}, {})
    for name, build in builders.items():
        row = found.rows[name] = {"variant": name}
        if attempted := _attempt(build, row):
            works[name], found.results[name] = attempted
        else:
            _release(device)
    products = {p: matrix_product(device, p) for p in dict.fromkeys(map(precision_of, works))}
    limits = {f"matrix product, {p}": work for p, (work, _) in products.items()}
    timings = in_turns(works | limits, device, rounds)
    for name in works:
        found.rows[name] |= {
            "ms": 1e3 * timings[name].best,
            "median ms": 1e3 * timings[name].median,
            "images/s": images / timings[name].best,
        }
    for precision, (_, count) in products.items():
        found.rates[precision] = count / timings[f"matrix product, {precision}"].best
    _add_ratios(found.rows)
    return found


def _attempt(build: Callable[[], Callable], row: dict) -> tuple[Callable, object] | None:
    """A work and what its first call gave; its memory, or why it fails, goes into its row."""
    try:
        work = build()
        with warnings_logged() as warnings:
            result = work()
        # A network that cannot be compiled runs as it is, which is another row.
        if warnings:
            row["note"] = sentence(warnings[0])
            return None
        if peak := work.peak():
            row["peak MB"] = peak / 1e6
        return work, result
    except FAILURES as error:
        row["note"] = sentence(f"{type(error).__name__}: {error}")
        return None


def precision_of(name: str) -> str:
    """What a variant computes in; what is no variant is taken to be like the plain one."""
    return Variant.named(name).precision if name.split("+")[0] in PRECISIONS else PLAIN


def _release(device: torch.device) -> None:
    """Let another variant have the memory of one that failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _add_ratios(rows: dict[str, dict]) -> None:
    """Speed and memory as ratios to the plain network's, and to the other implementation's."""
    plain, other = rows[PLAIN], rows.get(OTHER, {})
    for row in rows.values():
        if "ms" not in row:
            continue
        if "ms" in plain:
            row["speed-up"] = plain["ms"] / row["ms"]
            if "peak MB" in row:
                row["memory"] = row["peak MB"] / plain["peak MB"]
        if "ms" in other:
            row["against other"] = other["ms"] / row["ms"]


def add_rates(found: Comparison, operations: int) -> None:
    """Add operations a second, also as a share of a matrix product's in the same precision.

    Every variant is credited with the operations of the plain one, however it does its work.
    """
    for name, row in found.rows.items():
        if "ms" in row:
            rate = operations / row["ms"] * 1e3
            share = rate / found.rates[precision_of(name)]
            row |= {"GFLOP/s": rate / 1e9, "of matmul": share}


def show_comparison(
    what: str, given: argparse.Namespace, device: torch.device, found: Comparison, **facts
) -> None:
    """Print the rows of a comparison, and what the command line said."""
    show(
        f"{what}, {given.config}, batch {given.batch_size}",
        device,
        list(found.rows.values()),
        config=given.config,
        batch_size=given.batch_size,
        settings=given.set,
        matmul_gflops={name: rate / 1e9 for name, rate in found.rates.items()},
        **facts,
    )


@contextlib.contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """Context with the list of what is logged in it as a warning."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(handler)


def sentence(message: str, limit: int = 120) -> str:
    """The first line of a message, cut to a limit and fit for a table."""
    line = message.strip().splitlines()[0].replace("|", "/")
    return line if len(line) <= limit else line[: limit - 3] + "..."
