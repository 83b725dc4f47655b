"""Memory and time of training on an array that is larger than memory should hold.

    python -m benchmarks.arrays --gigabytes 8

The array is random float32 rows of (3, 32, 32), in a temporary folder.  Training is a new process:
one pass for mean and deviation, then steps of a small network.  "peak MB" is all of its memory, and
"imports MB" what it held before.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.measure import show
from configs.defaults import load
from score_lib.base.mistakes import brief_mistakes
from score_lib.data.values import open_array_source
from score_lib.runs.setup import setup
from score_lib.runs.train import standardize, train

SHAPE = (3, 32, 32)
GB, MB = 1e9, 1e6
# Rows that are made at once.
BLOCK = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(argv)
    rows = int(given.gigabytes * GB / (4 * math.prod(SHAPE)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "array.npy")
        make_array(path, rows)
        record = fresh(str(path), given.steps)
        size = path.stat().st_size / GB
    show(f"{rows} rows, {size:.2f} GB", torch.device("cpu"), [record])


def make_array(path: pathlib.Path, rows: int) -> None:
    """Write an .npy of random rows, block by block."""
    random = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", "float32", (rows, *SHAPE))
    for first in range(0, rows, BLOCK):
        size = min(BLOCK, rows - first)
        array[first : first + size] = random.standard_normal((size, *SHAPE), dtype=np.float32)
        if first // BLOCK % 16 == 0:
            array.flush()


def fresh(path: str, steps: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, path, steps).result()


def measure(path: str, steps: int) -> dict[str, float]:
    """Train on an array: peak memory, and seconds of the pass and of a step."""
    config = load("vp/fields")
    config.data.update(path=path, shape=SHAPE)
    config.model.update(num_res_blocks=1, ch_mult=(1,), attn_resolutions=())
    config.training.update(batch_size=8, n_iters=steps, snapshot_freq=steps)
    config.training.update(snapshot_freq_for_preemption=steps, snapshot_sampling=False)
    config.training.update(eval_freq=steps, log_freq=steps)
    before = _peak()
    start = time.perf_counter()
    source = open_array_source(pathlib.Path(path), SHAPE)
    standardize(setup(config), source)
    pass_seconds = time.perf_counter() - start
    config.data.standardize = "none"  # no second pass in the time of training
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        train(config, workdir)
        seconds = time.perf_counter() - start
    return {
        "imports MB": before,
        "peak MB": _peak(),
        "pass s": pass_seconds,
        "training s": seconds,
        "steps": steps,
    }


def _peak() -> float:
    """Peak memory of this program; that of `getrusage` would begin with its parent's."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / MB


if __name__ == "__main__":
    with brief_mistakes():
        main()
