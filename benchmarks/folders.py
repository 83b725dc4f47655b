"""Time and memory until a folder of very many images is open, at the first start and later.

    python -m benchmarks.folders --files 200000

The files are copies of one small PNG in class folders, in a temporary folder.  Each start is a new
process; imports are not timed.  "worker MB" is the memory that a forked worker does not share with
the process that started it, after a look at every name and label.
"""

import argparse
import io
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.measure import show
from configs.data import images_defaults
from datasets import get_streams
from score_lib.base.memory import peak_memory
from score_lib.base.mistakes import brief_mistakes
from score_lib.data.index import known_listing
from score_lib.data.listing import INDEX

CPU = torch.device("cpu")
SIDE = 32
MB = 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_files(folder, given.files, given.classes)
        time.sleep(2)  # folders changed just now are compared name by name at later starts
        records = [{"start": name, **_fresh(folder)} for name in ("first", "second", "third")]
        index = pathlib.Path(folder, INDEX)
        size = index.stat().st_size / MB if index.exists() else 0
    show(f"{given.files} images", CPU, records, index_file_mb=round(size, 2))


def make_files(folder: str, files: int, classes: int) -> None:
    """Write small images in class folders."""
    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(image, "PNG")
    for number in range(files):
        label = number * classes // files
        path = pathlib.Path(folder, f"class_{label:04d}", f"image_{number:08d}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image.getvalue())


def _fresh(folder: str) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(start, folder).result()


def start(folder: str) -> dict[str, float]:
    """Open the images: seconds, growth of the peak memory, and bytes of names and listing."""
    import PIL.Image  # noqa: F401  (imports are not timed)

    config = images_defaults(SIDE)
    config.data.path = folder
    before, began = peak_memory(CPU), time.perf_counter()
    source = get_streams(config)[2].sources["train"]
    row = {"s": time.perf_counter() - began, "peak MB": (peak_memory(CPU) - before) / MB}
    listing = known_listing(pathlib.Path(folder))
    row["listing MB"] = (listing.states.nbytes + sum(names.nbytes for names in listing[:3])) / MB
    row["worker MB"] = _in_a_worker(source)
    return row


def _in_a_worker(source) -> float:
    """Memory that a forked worker takes for itself, after it went through names and labels."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def look() -> None:
        before = _private()
        files = source._source  # the training part is a subset of these
        sizes = sum(len(files.names[k]) for k in source.numbers)
        sizes += int(files._labels[torch.from_numpy(source.numbers)].sum())
        sender.send((_private() - before) if sizes else 0.0)

    worker = context.Process(target=look)
    worker.start()
    grown = receiver.recv()
    worker.join()
    return grown


def _private() -> float:
    """Memory in MB that this process shares with no other; not a number except on Linux."""
    try:
        lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return float(np.nan)
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MB


if __name__ == "__main__":
    with brief_mistakes():
        main()
