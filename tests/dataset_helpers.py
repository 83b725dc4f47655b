"""Configs, sources and images for the tests of `datasets`."""

from __future__ import annotations

import itertools
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import torch
from ml_collections import ConfigDict

import datasets
from datasets import MemorySource

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_python(program):
    """Run a program in a fresh interpreter."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def make_config(dataset: str, *, image_size=8, num_channels=3, batch_size=4, seed=42, **data):
    """A config with only the options that `datasets` requires."""
    return ConfigDict(
        {
            "seed": seed,
            "data": {
                "dataset": dataset,
                "image_size": image_size,
                "num_channels": num_channels,
                "random_flip": False,
                "centered": False,
                "num_workers": 0,
                **data,
            },
            "training": {"batch_size": batch_size},
            "eval": {"batch_size": batch_size},
        }
    )


def open_images(path, **options):
    """The streams and the description of one's own images."""
    config = make_config("IMAGES", path=str(path), **options)
    return datasets.get_streams(config, evaluation=True)


def numbered_source(size: int, *, levels: int = 256) -> MemorySource:
    """Images of random values, with their numbers as labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, levels, (size, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return MemorySource(images, torch.arange(size), levels=levels)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 with structure at every scale, like a photograph."""
    generator = torch.Generator().manual_seed(seed)
    image = sum(
        torch.nn.functional.interpolate(
            torch.rand(1, 3, max(2, height // scale), max(2, width // scale), generator=generator),
            (height, width),
            mode="bicubic",
        )
        for scale in (1, 4, 16, 64)
    )
    return (image / 4 * 255).clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()


def save_image(folder, name, image):
    from PIL import Image  # not above: a test looks at which packages are imported

    path = pathlib.Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return str(path)


def write_png(path, rows, width, bits, colour, *chunks):
    """A PNG of packed rows of bytes, by hand: Pillow writes few kinds.

    Args:
        colour: 0 gray, 2 RGB.
        chunks: (name, contents), before the pixels.
    """
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with open(path, "ab") as file:
        for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))


def everything(source):
    """Images and labels of all examples."""
    return source.read(np.arange(len(source)))


def take(stream, count):
    return list(itertools.islice(stream, count))


def together(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label")}


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert torch.equal(batch["label"], other["label"])
