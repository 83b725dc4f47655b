"""Fashion-MNIST by the command line: trained with kills on the way, resumed, evaluated.

    python -m score_lib.data.prepare fashion_mnist
    python -m benchmarks.fashion_mnist --workdir runs/fashion

Every step is a call of `main.py`, in a process of its own; started again, the whole goes on where
it was.  Printed, and kept in the folder: the figures of samples beside those of the test set in the
features of the same classifier, which has not seen any of the score model; and the time taken.

    python -m benchmarks.fashion_mnist --workdir runs/twice --undisturbed \\
        --set training.n_iters=120 --set training.log_freq=10 \\
        --set training.snapshot_freq_for_preemption=20

only trains, once with kills and once without, and says whether the same comes out.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.variants import with_settings
from datasets import get_streams
from evaluation import Statistics, get_extractor, load_dataset_stats, metrics
from score_lib.base.devices import resolve_device
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import load_arrays
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.disk.files import write_text
from score_lib.disk.logs import log_to_console
from score_lib.disk.reports import markdown_table, mean_and_error
from score_lib.metrics.extractors import Extractor
from score_lib.metrics.jackknife import sampling_errors
from score_lib.runs.heldout import DataBytes
from score_lib.runs.setup import setup
from score_lib.runs.start import META

ROOT = pathlib.Path(__file__).parents[1]
SURE = 0.9
PARTS = "step", "model", "ema", "optimizer"  # of a checkpoint
# Completions of half an image are better by noise than along the flow, see docs/control.md.
RESTORING = "--config.sampling.method=dpmpp_sde", "--config.sampling.num_steps=40"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/fashion_mnist_conditional", help="an experiment")
    parser.add_argument(
        "--classifier", default="vp/fashion_mnist_classifier", help="guide of an unconditional one"
    )
    parser.add_argument("--workdir", default="runs/fashion", help="folder of the run")
    parser.add_argument("--kills", type=int, default=2, help="times that training is killed")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default=fast_precision(),
        help="of training and sampling; without it bfloat16 where the processor multiplies that",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="of both configs"
    )
    parser.add_argument(
        "--undisturbed", action="store_true", help="train once more without kills, and compare"
    )
    given = parser.parse_args(argv)
    log_to_console()
    settings = [f"{part}.precision={given.precision}" for part in ("training", "sampling")]
    settings += given.set
    run = Experiment(given.config, pathlib.Path(given.workdir), settings)
    if given.undisturbed:
        other = Experiment(given.config, run.workdir / "undisturbed", settings)
        compare_with_undisturbed(run, other, given.kills)
        return
    guide = Experiment(given.classifier, run.workdir / "classifier", settings)
    run.call("fid_stats")
    seconds = train(run, given.kills)
    run.call("eval")
    table = markdown_table(compare(run))
    write_text(run.workdir / "benchmark.md", table)
    draw_controlled(run, guide)
    print(
        f"\n{given.config} in {given.precision}, training took {seconds / 60:.0f} minutes in this "
        f"call\n{table}"
    )


def fast_precision(device: str = "auto") -> str:
    """bfloat16 on a GPU or a CPU with units for its products; float32 elsewhere, where bfloat16 is
    imitated at a fraction of the speed."""
    if resolve_device(device).type != "cpu":
        return "bfloat16"
    # An older PyTorch does not tell.
    units = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if units.get("amx_bf16") or units.get("avx512_bf16") else "float32"


class Experiment:
    """A config, its folder, and calls of `main.py` with both; their output goes to the console."""

    def __init__(self, name: str, workdir: pathlib.Path, settings: list[str]):
        self.workdir, self.config = workdir, with_settings(name, settings)
        program = [sys.executable, "main.py", f"--config=configs/{name}.py"]
        changes = [f"--config.{setting}" for setting in settings]
        self.command = [*program, f"--workdir={workdir.resolve()}", *changes]

    def start(self, mode: str, *options: str) -> subprocess.Popen:
        """Start a mode."""
        kernels = {"OP_BACKEND": "cpu"} | os.environ
        return subprocess.Popen([*self.command, f"--mode={mode}", *options], cwd=ROOT, env=kernels)

    def call(self, mode: str, *options: str) -> None:
        """Carry out a mode; its failure ends the benchmark."""
        if self.start(mode, *options).wait():
            sys.exit(f"--mode {mode} failed: its message is above")

    def last_step(self) -> int:
        """The last step of training that is in the log, or 0."""
        file = self.workdir / "metrics.jsonl"
        whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
        return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def train(run: Experiment, kills: int) -> float:
    """Train; the process is killed so many times, at even distances.  Seconds that all took."""
    start, steps = time.monotonic(), run.config.training.n_iters
    for mark in (steps * k // (kills + 1) for k in range(1, kills + 1)):
        if run.last_step() >= mark:
            continue
        process = run.start("train")
        while process.poll() is None and run.last_step() < mark:
            time.sleep(0.5)
        if (code := process.poll()) is not None:
            failed = "--mode train failed: its message is above"
            early = "training ended before it was killed: set training.log_freq lower"
            sys.exit(failed if code else early)
        process.send_signal(signal.SIGKILL)
        process.wait()
        logging.info("killed after step %d", run.last_step())
    run.call("train")
    return time.monotonic() - start


def compare_with_undisturbed(run: Experiment, other: Experiment, kills: int) -> None:
    """Train with kills and without; unless both end the same, so does this, with exit code 1."""
    if run.last_step():
        sys.exit(f"{run.workdir} holds a training already: choose another --workdir")
    train(run, kills)
    train(other, 0)
    one, two = (read_checkpoint(e.workdir / META) for e in (run, other))
    names = [name for name in PARTS if not same(one[name], two[name])]
    if names:
        sys.exit(f"{', '.join(names)} of the killed training differ from the undisturbed one's")
    print(f"after {one['step']} steps the killed training is equal, bit for bit, to the other")


def same(one: object, other: object) -> bool:
    """Whether nested parts of two checkpoints are equal, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def compare(run: Experiment) -> list[dict]:
    """Figures of the samples of the last evaluation, and of the test set as if it were samples."""
    folder, config = run.workdir / "eval", run.config
    found = json.loads((folder / "report.json").read_text())[-1]
    extractor, real = get_extractor(config), load_dataset_stats(config, run.workdir)
    parts = sorted((folder / f"ckpt_{found['checkpoint']}").glob("statistics_*.npz"))
    source = get_streams(config, evaluation=True)[2].sources["test"]
    # They may be of the classes in turn.
    samples = statistics_of(extractor, map(load_arrays, parts))
    conditions, count = setup(config).conditions, samples.count
    labels = conditions.classes_of_samples(range(count), source.class_to_idx)
    samples = dataclasses.replace(samples, labels=labels).shuffled()
    test_set = statistics_of(extractor, map(extractor, DataBytes(config, source)))
    of_test = metrics(real, test_set, extractor.device)
    of_classes = {key: found[key] for key in found if key.startswith("recognised")}
    return [
        {"images": f"{samples.count} samples", **figures(real, samples, found), **of_classes},
        {"images": "test set", **figures(real, test_set, of_test)},
        {"images": "model", **{key: found[key] for key in found if key.startswith("bpd")}},
    ]


def statistics_of(extractor: Extractor, parts: Iterable[Mapping]) -> Statistics:
    """Features and class scores from the extractor's output for parts of the images."""
    parts = list(parts)
    pool_3, logits = (
        torch.cat([torch.as_tensor(part[name]) for part in parts]) for name in ("pool_3", "logits")
    )
    return Statistics.of(extractor, pool_3, logits)


def figures(real: Statistics, images: Statistics, distances: Mapping) -> dict[str, float]:
    """A row of the table: distances with their errors, and `sureness` of the images."""
    names = ("fid", "inception_score", "kid", "kid_standard_error", "precision", "recall")
    errors = sampling_errors(real, images)
    chosen = {name: distances[name] for name in names}
    return chosen | errors | sureness(torch.as_tensor(images["logits"]))


def sureness(logits: Tensor) -> dict[str, float]:
    """The share of images (N, K) whose class is told with a probability above `SURE`."""
    likeliest = logits.double().softmax(dim=1).amax(dim=1)
    return mean_and_error("sure", (likeliest > SURE).double().numpy())


def draw_controlled(run: Experiment, guide: Experiment) -> None:
    """Pictures: samples of each class, inpainting, interpolation.

    Args:
        guide: a classifier of noisy images, trained here if the network is not told classes.
    """
    guidance = []
    if not run.config.training.condition:
        guide.call("train")
        checkpoint = guide.workdir / "checkpoints" / "checkpoint_1.pth"
        guidance = [f"--config.control.classifier={checkpoint.resolve()}"]
    run.call("control", "--config.control.task=class", *guidance)
    run.call("control", "--config.control.task=inpaint", *RESTORING)
    run.call("control", "--config.control.task=interpolate")


if __name__ == "__main__":
    with brief_mistakes():
        main()
