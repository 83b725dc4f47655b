"""Another implementation of the same public names as one more work to measure."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.variants import OTHER, Comparison, compare, living_run
from score_lib.base.devices import resolve_device
from score_lib.base.distributed import unwrapped

SCRIPT = pathlib.Path(__file__).with_name("other.py")


def others(
    folder: str,
    work: str,
    config: ConfigDict,
    stack: contextlib.ExitStack,
    images: Tensor | None = None,
    workdir: str = "",
    steps: int = 0,
    tolerance: float = 0.0,
) -> dict[str, Callable]:
    """Builder of the other implementation's work, by its name; none without a folder.

    Args:
        folder: where it is.
        work: "train", "sampling" or "likelihood".
        config: what it is told.
        stack: ends its process.
        images: in the network's range, (B, C, H, W); random ones by default.
        workdir: a run with weights; by default those that `living_run` draws.
        steps: of the sampler; 0 are as many as the config says.
        tolerance: of the likelihood's solver.
    Raises:
        ValueError: there is no such folder.
    """
    if not folder:
        return {}
    if not pathlib.Path(folder).is_dir():
        raise ValueError(f"--against {folder}: there is no such folder")

    def build():
        run = living_run(config, workdir)
        shape = config.training.batch_size, *run.shape
        job = {
            "work": work,
            "device": str(resolve_device(config.device)),
            "config": config.to_dict(),
            "weights": {k: v.cpu() for k, v in unwrapped(run.state["model"]).state_dict().items()},
            "steps": steps,
            "tolerance": tolerance,
            "images": run.scaler(torch.rand(shape)) if images is None else images.cpu(),
        }
        return stack.enter_context(OtherProcess(folder, job))

    return {OTHER: build}


def compare_all(
    builders: dict[str, Callable],
    given: argparse.Namespace,
    work: str,
    config: ConfigDict,
    device: torch.device,
    **told,
) -> Comparison:
    """Compare works with each other, and with another implementation where `--against` names one.

    Args:
        builders: see `compare`.
        given: the command line.
        work, config, told: see `others`.
        device: where they run.
    """
    with contextlib.ExitStack() as stack:
        builders = builders | others(given.against, work, config, stack, **told)
        return compare(builders, device, given.batch_size, given.rounds)


class OtherProcess(contextlib.AbstractContextManager):
    """A work that is done in another process, with another folder's modules; see `other.py`.

    It runs as it comes, with PyTorch's own choice of precision.

    Raises:
        RuntimeError: it cannot be built or done; says what that process said.
    """

    def __init__(self, folder: str, job: dict):
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(job, file)
            file.flush()
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(pathlib.Path(folder).resolve()), file.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            try:
                self._answer()
            except RuntimeError:
                self.__exit__()
                raise

    def __call__(self) -> None:
        self._ask("work")

    def peak(self) -> int:
        """Bytes on the GPU at most since it began; 0 on a CPU, where nobody counts."""
        return self._ask("peak")["peak"]

    def _ask(self, what: str) -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other implementation ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
