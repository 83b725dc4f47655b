"""Another implementation of the same public names, as a work to measure."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from ml_collections import ConfigDict

from benchmarks.variants import drawn, living_run
from score_lib.base.distributed import unwrapped

SCRIPT = pathlib.Path(__file__).with_name("other.py")


class OtherProcess(contextlib.AbstractContextManager):
    """A work in another process, with another folder's modules; see `other.py`.

    It uses PyTorch's default precision, and the weights and images of the other works.

    Args:
        given: the command line; `--against` names the folder.
        work: "train", "sampling" or "likelihood".
    Raises:
        RuntimeError: it cannot be built or done, with the message of that process.
    """

    def __init__(self, given: argparse.Namespace, work: str, config: ConfigDict):
        self.given, self.work, self.config = given, work, config

    def __enter__(self) -> OtherProcess:
        folder = pathlib.Path(self.given.against).resolve()
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(self._job(), file)
            file.flush()
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), file.name],
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
        return self

    def _job(self) -> dict:
        run = living_run(self.config, self.given.workdir)
        weights = unwrapped(run.state["model"]).state_dict()
        return {
            "work": self.work,
            "device": str(run.device),
            "config": self.config.to_dict(),
            "weights": {name: value.cpu() for name, value in weights.items()},
            "steps": getattr(self.given, "steps", 0),
            "tolerance": getattr(self.given, "tolerance", 0.0),
            "images": run.scaler(drawn(run)).cpu(),
        }

    def __call__(self) -> None:
        self._ask("work")

    def peak(self) -> int:
        """Most bytes on the GPU since its start; 0 on a CPU."""
        return self._ask("peak")["peak"]

    def _ask(self, question: str) -> dict:
        self.process.stdin.write(question + "\n")
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
