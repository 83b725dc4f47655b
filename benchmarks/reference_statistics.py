"""Time and memory of reading a reference batch of ADM: gigabytes of images beside statistics.

    python -m benchmarks.reference_statistics --images 10000

The file has the arrays of `VIRTUAL_imagenet256_labeled.npz` at their full sizes, with black images,
so that it is small on the disk; it is removed afterwards.  It is read by a new process.  "peak MB"
is all that the process takes, and "imports MB" what it takes before it reads.
"""

import argparse
import multiprocessing
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.measure import seconds, show
from evaluation import load_statistics
from score_lib.base.memory import peak_memory
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import array_sizes

CPU = torch.device("cpu")
SIDE, WIDTH, SPATIAL = 256, 2048, 2023
MB = 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "VIRTUAL.npz")
        make_file(path, given.images)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(read, str(path)).result()
        unpacked = sum(array_sizes(path).values()) / MB
    show("A reference batch", CPU, [{"unpacked MB": unpacked, **row}])


def make_file(path: pathlib.Path, images: int) -> None:
    """Write arrays as in ADM's files: black images, labels, and statistics of random features."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            shape = (images, SIDE, SIDE, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(images):
                file.write(bytes(SIDE * SIDE * 3))
        arrays = {"arr_1": np.zeros(images, dtype=np.int64)}
        for suffix, width in {"": WIDTH, "_s": SPATIAL}.items():
            rows = rng.standard_normal((width, width)) / width**0.5
            arrays |= {f"mu{suffix}": rng.random(width), f"sigma{suffix}": rows @ rows.T}
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def read(path: str) -> dict[str, float]:
    """Seconds and peak memory of reading the statistics, in this process."""
    before = peak_memory(CPU) / MB
    taken = seconds(lambda: load_statistics(path), CPU)
    peak = peak_memory(CPU) / MB
    return {"s": taken, "imports MB": before, "peak MB": peak, "grown MB": peak - before}


if __name__ == "__main__":
    with brief_mistakes():
        main()
