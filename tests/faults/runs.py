"""Small runs to be disturbed, and the undisturbed runs that they must equal."""

from __future__ import annotations

import importlib
import logging
import pathlib
import time
from typing import NamedTuple

import numpy as np
import torch
from small_runs import ROOT, SMALL, dotted, small_config

from .launch import Started
from .outcomes import META_EVERY, SNAPSHOTS, STEPS, evaluations_differ, trainings_differ

OPTIONS = {
    **SMALL,
    "model.ch_mult": "(1,)",
    "optim.lr": 1e-3,  # after few large steps a network is hard to integrate
    "training.n_iters": STEPS,
    "training.snapshot_freq": SNAPSHOTS,
    "training.snapshot_freq_for_preemption": META_EVERY,
    "training.eval_freq": 10,
    "sampling.num_samples": 32,
    "data.dataset": "IMAGES",
    "eval.extractor": "digits",
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 1,
    "eval.batch_size": 8,
    "eval.num_samples": 32,
    "eval.bpd_num_repeats": 1,
    "eval.enable_sampling": True,
}


class Result(NamedTuple):
    """Result of one disturbance.

    Attributes:
        kind: row of the table of results.
        name: names the disturbance among its kind.
        problems: messages about losses and wrong outputs; empty if there were none.
        seconds: duration.
    """

    kind: str
    name: str
    problems: list[str]
    seconds: float = 0.0


class Bench:
    """A folder for runs, with their data, and undisturbed runs made once, when first asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made: dict[str, tuple[pathlib.Path, float]] = {}
        self._count = 0
        _import_everything(self.folder)
        self._make_data()

    def _make_data(self) -> None:
        from datasets import get_streams

        _, _, info = get_streams(small_config(), evaluation=True)
        images = info.sources["train"].read(np.arange(320))[0]
        np.save(self.folder / "digits.npy", images.numpy())
        self.options = {
            **OPTIONS,
            "data.path": self.folder / "digits.npy",
            "eval.stats": self.folder / "stats.npz",
        }
        assert self.start("fid_stats", self.new()).end() == 0

    def new(self) -> pathlib.Path:
        """A new, empty folder."""
        self._count += 1
        folder = self.folder / f"run_{self._count}"
        folder.mkdir()
        return folder

    def arguments(self, mode: str, workdir: pathlib.Path, **changes) -> list[str]:
        """Of `main.py`; an evaluation has its checkpoints from the undisturbed run."""
        options = self.options | dotted(changes)
        if mode == "eval" and "eval.checkpoint" not in options:
            options["eval.checkpoint"] = self.trained() / "checkpoints" / "checkpoint_1.pth"
        return [
            f"--config={ROOT / 'configs/vp/digits.py'}",
            f"--workdir={workdir}",
            f"--mode={mode}",
            *(f"--config.{key}={value}" for key, value in options.items()),
        ]

    def start(
        self, mode: str, workdir: pathlib.Path, how: str = "fork", prepare=lambda: None, **changes
    ) -> Started:
        """Start `main.py`; `how` is a key of `LAUNCHERS`, `prepare` is called in a fork first."""
        return Started(self.arguments(mode, workdir, **changes), how, prepare)

    def trained(self, how: str = "fork") -> pathlib.Path:
        """The folder of an undisturbed training run."""
        return self._undisturbed("train", how)[0]

    def evaluated(self) -> pathlib.Path:
        """The folder of an undisturbed evaluation, in one process."""
        return self._undisturbed("eval", "fork")[0]

    def duration(self, mode: str) -> float:
        """Seconds that an undisturbed run takes in one process."""
        return self._undisturbed(mode, "fork")[1]

    def _undisturbed(self, mode: str, how: str) -> tuple[pathlib.Path, float]:
        key = f"{mode} {how}"
        if key not in self._made:
            folder, start = self.new(), time.monotonic()
            started = self.start(mode, folder, how)
            if started.end() != 0:
                raise RuntimeError(f"an undisturbed run failed: {started.output()}")
            self._made[key] = folder, time.monotonic() - start
        return self._made[key]

    def differences(self, mode: str, workdir: pathlib.Path, how: str = "fork") -> list[str]:
        """Messages about the differences of a finished run from an undisturbed one."""
        if mode == "train":
            return trainings_differ(workdir, self.trained(how))
        # Evaluation gives the same figures in any number of processes.
        return evaluations_differ(workdir / "eval", self.evaluated() / "eval")

    def finish(self, mode: str, workdir: pathlib.Path, how: str = "fork") -> list[str]:
        """Resume a run to its end; messages about failures and differences."""
        started = self.start(mode, workdir, how)
        if (code := started.end()) != 0:
            return [f"started again, it ends with {code}: {started.last_lines()}"]
        return self.differences(mode, workdir, how)


_IMPORTED_LATE = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.Image",
    "run_lib",
    "sklearn.datasets",
    "torch.distributed.launcher.api",
    "tqdm.contrib.logging",
)


def _import_everything(folder: pathlib.Path) -> None:
    """Import late imports of runs in advance, so that forks share them."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    from score_lib.disk.logs import MetricsLog

    torch.set_num_threads(1)
    # In forks, the program sets its own handlers; here, messages do not matter.
    logging.getLogger().addHandler(logging.NullHandler())
    (folder / "warm").mkdir(exist_ok=True)
    MetricsLog(folder / "warm").close()
