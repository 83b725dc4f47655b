"""Samples as files: `--mode sample`, and the snapshots of training."""

import logging
import os
import pathlib

import numpy as np
from torch import Tensor

from score_lib.base import distributed
from score_lib.disk.files import atomic_write
from score_lib.disk.pictures import save_grid, to_uint8
from score_lib.runs.setup import restored


def sample(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Draw `sampling.num_samples` samples from a checkpoint: `samples/step_{step}/sample.{np,png}`.

    The checkpoint is `eval.checkpoint`, or the run's latest; the folder of another average than the
    main one ends in `_{eval.ema}`.

    Returns:
        the folder with the samples.
    """
    run = restored(config, workdir)
    logging.info("drawing samples from step %d", run.state["step"])
    average = f"_{run.config.eval.ema}" if run.config.eval.ema else ""
    folder = pathlib.Path(workdir) / "samples" / f"step_{run.state['step']}{average}"
    images = run.first_samples()
    distributed.on_main(lambda: save_samples(folder, images, run.levels))
    logging.info("samples are in %s", folder)
    return folder


def save_samples(folder: pathlib.Path, images: Tensor, levels: int) -> Tensor:
    """Write `sample.np`, uint8 with channels last, and `sample.png`.

    Returns:
        the pixels, (B, C, *D) in [0, 1].
    """
    pixels = to_uint8(images, levels)
    with atomic_write(folder / "sample.np") as file:
        np.save(file, pixels.numpy(), allow_pickle=False)
    shown = pixels.movedim(-1, 1) / 255
    save_grid(folder / "sample.png", shown)
    return shown
