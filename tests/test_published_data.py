"""The published calls for data: batches with channels last, and crops of one image."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dataset_helpers import ROOT, make_config, smooth_image
from PIL import Image

import datasets


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("evaluation", [False, True])
def test_batches_are_arrays_with_channels_last(dequantize, evaluation):
    config = make_config("COLOR_DIGITS", random_flip=True, batch_size=7)
    found = datasets.get_dataset(config, dequantize, evaluation)
    streams = datasets.get_streams(config, dequantize, evaluation)
    for batches, stream in zip(found[:2], streams[:2], strict=True):
        for batch, expected in itertools.islice(zip(batches, stream, strict=False), 3):
            image = batch["image"]
            assert isinstance(image, np.ndarray) and image.dtype == np.float32
            assert image.shape == (7, 8, 8, 3) and 0 <= image.min() <= image.max() <= 1
            for values in (image._numpy(), image.numpy(), np.asarray(image)):
                assert type(values) is np.ndarray
                assert torch.equal(torch.from_numpy(values).movedim(-1, 1), expected["image"])
            assert torch.equal(torch.from_numpy(image).movedim(-1, 1), expected["image"])
            assert np.array_equal(batch["label"]._numpy(), expected["label"].numpy())
    if evaluation:
        assert len(found[0]) == len(streams[0]) == 215


def test_builder_knows_the_sizes_of_the_splits():
    builder = datasets.get_dataset(make_config("COLOR_DIGITS"))[2]
    assert builder.info.splits["train"].num_examples == 1501
    assert builder.info.splits["test"].num_examples == 296


PROGRAM = """
import multiprocessing, sys
print("started", flush=True)
import datasets
from dataset_helpers import make_config
from datasets import MemorySource, register_dataset
import torch

@register_dataset(name="SPAWNED")
def spawned(shape):
    source = MemorySource(torch.zeros(64, *shape, dtype=torch.uint8))
    source.start_method = sys.argv[1]
    return source, source

config = make_config("SPAWNED", num_workers=4)
batches = iter(datasets.get_dataset(config, num_workers=int(sys.argv[2]))[0])
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def start(*arguments, then=""):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM + then, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_unguarded_script_ends_and_starts_no_workers():
    output, _ = start("spawn", "0").communicate(timeout=120)
    assert output.split() == ["started"]


@pytest.mark.slow
def test_workers_that_are_asked_for_obey_signals():
    with start("fork", "1", then="import time; time.sleep(100)") as script:
        assert script.stdout.readline() == "started\n"
        (worker,) = map(int, script.stdout.readline().split())
        os.kill(worker, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while _runs(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _runs(worker)
        script.kill()


def _runs(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_crops_and_resizing_of_one_image(kind):
    stored = smooth_image(41, 90)
    image = kind(stored)
    same_kind = (np.ndarray, torch.Tensor)[kind is torch.as_tensor]
    crop = datasets.central_crop(image, 20)
    assert isinstance(crop, same_kind) and np.array_equal(crop, stored[10:30, 35:55])
    square = datasets.crop_resize(image, 16)
    assert isinstance(square, same_kind) and square.shape == (16, 16, 3)
    middle = Image.fromarray(stored[:, 24:65])
    expected = np.array(middle.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert "uint8" in str(square.dtype) and np.abs(np.asarray(square) - expected).max() <= 1
    small = datasets.resize_small(image, 16)
    assert isinstance(small, same_kind) and small.shape == (16, 35, 3)
    expected = np.array(Image.fromarray(stored).resize((35, 16), Image.Resampling.BILINEAR))
    assert "float32" in str(small.dtype) and np.abs(np.asarray(small) - expected).max() <= 1.01
