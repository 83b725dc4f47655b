"""The command line of the benchmarks, the network that they measure, and its variants.

A variant is named by its precision and additions, such as "bfloat16+compile".
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.measure import growth, nbytes
from configs.defaults import load
from models.ema import ExponentialMovingAverage
from run_lib import Run, restored, setup
from score_lib.base.devices import resolve_device
from score_lib.base.tensors import derive_seed
from score_lib.options import complete, flatten

PLAIN = "float32"
ADDITIONS = ("compile", "graphs", "checkpoint")
NEEDS_GPU = ("tf32", "bfloat16+graphs")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of a config.

    Attributes:
        precision: "float32", "tf32" or "bfloat16".
        compile: a mode of `torch.compile`, or "".
        checkpoint: recompute activations in the backward pass.
    """

    precision: str = PLAIN
    compile: str = ""
    checkpoint: bool = False

    @classmethod
    def named(cls, name: str) -> Variant:
        """The variant of a name; unknown precisions are left to the checks of the config.

        Raises:
            ValueError: an unknown addition.
        """
        precision, *added = name.split("+")
        if not set(added) <= set(ADDITIONS):
            raise ValueError(f"unknown variant {name!r}: additions are {', '.join(ADDITIONS)}")
        mode = "reduce-overhead" if "graphs" in added else "default" if "compile" in added else ""
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
        parser.add_argument(
            "--against",
            default="",
            type=_folder,
            metavar="FOLDER",
            help="another implementation with the same public names",
        )
    return parser


def _folder(path: str) -> str:
    if path and not pathlib.Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no such folder")
    return path


def configured(given: argparse.Namespace, batch_on_gpu: int) -> tuple[ConfigDict, torch.device]:
    """The config of a command line, with its batch size, and the device.

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
    """Names of the variants to compare, plain float32 first; those of a GPU only on a GPU."""
    names = dict.fromkeys([PLAIN, *given.variants])
    return [name for name in names if device.type == "cuda" or name not in NEEDS_GPU]


def living_run(config: ConfigDict, workdir: str = "") -> Run:
    """A run with the weights of a folder or, without one, random weights of a fixed seed.

    The last layers of new U-Nets are near 0, so their output would hide the error of a lower
    precision: these layers are drawn anew.
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

    def __call__(self) -> object:
        return self.call()

    def peak(self) -> int:
        """Bytes of the run's tensors and of those that a call adds at most."""
        state, model = self.run.state, self.run.state["model"]
        kept = [*model.parameters(), *model.buffers(), *state["ema"].shadow_params]
        kept += [p.grad for p in model.parameters() if p.grad is not None]
        for moments in state["optimizer"].state.values() if "optimizer" in state else ():
            kept += [value for value in moments.values() if isinstance(value, Tensor)]
        return nbytes(kept) + growth(self.short or self.call, self.run.device)
