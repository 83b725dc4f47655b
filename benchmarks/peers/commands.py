"""The command lines of the contestants."""

import argparse
import pathlib
import sys
from typing import NamedTuple

from ml_collections import ConfigDict

from benchmarks.fashion_mnist import fast_precision

OURS, FLOAT32, PLAIN = "ours", "ours, float32", "plain"
DIFFUSERS, TUNED = "diffusers", "diffusers, tuned"
ALL = (OURS, FLOAT32, PLAIN, DIFFUSERS, TUNED)
RUNS = (OURS, FLOAT32)  # of `main.py`


class Commands(NamedTuple):
    """Command lines for a config, in a work directory.

    Attributes:
        given: of the comparison.
        config: complete.
        python: interpreter of the peers' environment.
        parameters: of our network.
        steps: about as many as each run of ours makes in its time.
    """

    given: argparse.Namespace
    config: ConfigDict
    python: str
    parameters: int
    steps: dict[str, int] = {}

    def folder(self, name: str) -> pathlib.Path:
        """Of a contestant's files."""
        return self.given.workdir / name.replace(", ", "_")

    def train(self, name: str, started: float) -> list[str]:
        """That which trains a contestant, from a time on."""
        if name in RUNS:
            return self._ours(name)
        given = self.given
        turns = ["--seconds", str(60 * given.minutes), "--rounds", str(given.rounds)]
        return [*self.peer(name, "train"), *turns, "--started", repr(started)]

    def peer(self, name: str, action: str, *more: object) -> list[str]:
        """That which lets a peer train, or measure its loss or draw samples."""
        config = self.config
        module, python = "plain_loop", sys.executable
        own = ["--config", str(self.given.workdir / "config.json")]
        if name != PLAIN:
            module, python, own = "diffusers_loop", self.python, self._diffusers(name)
        common = {
            "folder": self.folder(name),
            "images": self.given.workdir / "images.npz",
            "batch_size": config.training.batch_size,
            "log_freq": config.training.log_freq,
            "held_out": self.given.held_out,
            "evaluations": self.given.evaluations,
        }
        shared = [text for key, value in common.items() for text in (f"--{key}", str(value))]
        return [python, "-m", f"benchmarks.peers.{module}", action, *shared, *own, *map(str, more)]

    def _diffusers(self, name: str) -> list[str]:
        """The network of as many parameters, with attention where ours has it."""
        model, optim, side = self.config.model, self.config.optim, self.config.data.image_size
        sides = [side >> level for level in range(len(model.ch_mult))]
        levels = [str(k) for k, side in enumerate(sides) if side in model.attn_resolutions]
        command = ["--parameters", str(self.parameters), "--attention", *levels]
        command += ["--widths", *map(str, model.ch_mult)]
        if name == TUNED:
            command += ["--lr", str(optim.lr), "--warmup", str(optim.warmup)]
            command += ["--ema", str(model.ema_rate)]
        return command

    def precision(self, name: str) -> str:
        """In which a run of ours trains."""
        return fast_precision(self.config.device) if name == OURS else "float32"

    def _ours(self, name: str) -> list[str]:
        config, given, steps = self.config, self.given, self.steps[name]
        settings = {
            "device": config.device,
            "training.batch_size": config.training.batch_size,
            "training.log_freq": config.training.log_freq,
            "training.precision": self.precision(name),
            "training.n_iters": steps,
            "optim.cooldown": steps // 2,
            "training.snapshot_sampling": False,
        }
        changed = [f"--config.{setting}" for setting in given.set]
        changed += [f"--config.{key}={value}" for key, value in settings.items()]
        file, folder = f"configs/{given.config}.py", self.folder(name)
        run = ["main.py", f"--config={file}", f"--workdir={folder}", "--mode=train"]
        return [sys.executable, *run, *changed]
