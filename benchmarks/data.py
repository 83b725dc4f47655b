"""Speed of the input pipeline, from memory and from image files, by number of workers.

    python -m benchmarks.data --batch_size 128 --step_time 0.05

The files are PNGs written to a temporary folder.  With --step_time, the seconds of a training step
as measured by `benchmarks.train`, the column "of the need" is the rate of batches relative to the
rate of training steps: above 1, the device never waits for data.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from benchmarks.measure import show
from configs.data import digits_defaults, images_defaults
from datasets import ImageStream, get_streams
from score_lib.base.devices import resolve_device
from score_lib.base.mistakes import brief_mistakes

SIDES = (32, 256)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=10, help="number of timed batches")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--files", type=int, default=512, help="number of PNGs of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step_time", type=float, default=0.0, help="seconds of a training step")
    given = parser.parse_args(argv)
    device = resolve_device("auto")
    # A stream starts at most one worker per core.
    workers = sorted({min(count, os.cpu_count() or 1) for count in given.workers})
    with tempfile.TemporaryDirectory() as folder:
        configs = {"digits, in memory": digits_defaults()}
        for side in SIDES:
            configs[f"PNG files, {side} px"] = folder_of_images(folder, side, given.files)
        taken = {case: [] for case in itertools.product(configs, workers)}
        for _ in range(given.rounds):
            for (name, count), times in taken.items():
                config = configs[name]
                config.training.batch_size, config.data.num_workers = given.batch_size, count
                dequantize = config.data.uniform_dequantization
                stream, *_ = get_streams(config, dequantize, device=device)
                times.append(delivery(stream, given.batches))
    records = []
    for (name, count), times in taken.items():
        first, best = map(min, zip(*times, strict=True))
        row = {"data": name, "workers": count, "first batch, s": first, "ms/batch": 1e3 * best}
        row["median ms"] = 1e3 * statistics.median(batch for _, batch in times)
        row["images/s"] = given.batch_size / best
        if given.step_time:
            row["of the need"] = given.step_time / best
        records.append(row)
    show(f"input pipeline, batch {given.batch_size}", device, records, step_time=given.step_time)


def folder_of_images(folder: str, side: int, count: int) -> ConfigDict:
    """A config of PNGs in a new folder: smooth colours with some grain, like photographs."""
    from PIL import Image

    config = images_defaults(side)
    path = pathlib.Path(folder, str(side))
    config.data.path = str(path)
    path.mkdir()
    generator = np.random.default_rng(side)
    for number in range(count):
        corners = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC))
        grain = generator.integers(-6, 7, smooth.shape)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{number:05d}.png")
    return config


def delivery(stream: ImageStream, batches: int) -> tuple[float, float]:
    """Seconds until the first batch, and seconds per batch after it."""
    start = time.perf_counter()
    iterator = iter(stream)
    next(iterator)
    first = time.perf_counter() - start
    # Skip batches that were prefetched with the first one, two per worker.
    for _ in range(2 * stream.num_workers):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        batch = next(iterator)
    batch["image"].sum().item()  # wait for the device
    return first, (time.perf_counter() - start) / batches


if __name__ == "__main__":
    with brief_mistakes():
        main()
