"""Samples as files: `--mode sample`, and the snapshots of training."""

import logging
import os
import pathlib

import numpy as np
from torch import Tensor

from score_lib.base import distributed
from score_lib.data.kinds import channel_axis
from score_lib.disk.drawings import save_samples_picture
from score_lib.disk.files import atomic_write, make_way, open_folder
from score_lib.disk.pictures import (
    check_samples_finite,
    is_picture,
    read_picture,
    save_grid,
)
from score_lib.runs.setup import Run
from score_lib.runs.trained import restored


def sample(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Draw `sampling.num_samples` samples from a checkpoint into `samples/step_{step}/`.

    The checkpoint is `eval.checkpoint`, or the run's latest; the folder of another average than the
    main one ends in `_{eval.ema}`.  The files are those of `save_samples`, and `config.json`.
    Samples by other options that are there are moved to `samples/set_aside/`.

    Returns:
        the folder with the samples.
    """
    run = restored(config, workdir)
    logging.info("drawing samples from step %d", run.state["step"])
    average = f"_{run.config.eval.ema}" if run.config.eval.ema else ""
    folder = pathlib.Path(workdir) / "samples" / f"step_{run.state['step']}{average}"
    samples = run.first_samples()

    def save() -> None:
        make_way(folder, run.config)
        open_folder(folder, run.config)
        save_samples(folder, samples, run)

    distributed.on_main(save)
    logging.info("samples are in %s", folder)
    return folder


def save_samples(folder: pathlib.Path, samples: Tensor, run: Run) -> Tensor | None:
    """Write samples and a picture of them, `sample.png`.

    Grey levels are in `sample.np`, bytes with channels last, as points always have them; continuous
    values in `sample.npy`, of the data's shape and in their units.

    Args:
        samples: (B, *D) as `Run.draw` gives them.
    Returns:
        the picture, (C, H, W) in [0, 1]; None without Matplotlib.
    Raises:
        FloatingPointError: a value is not finite.
    """
    if run.continuous:
        check_samples_finite(samples)
        name, values = "sample.npy", samples.cpu()
    else:
        axis = channel_axis(run.kind) or 1  # behind the samples' own
        name, values = "sample.np", run.to_bytes(samples.movedim(axis, 1))
        samples = values.movedim(-1, axis) / 255
    with atomic_write(folder / name) as file:
        np.save(file, values.numpy(), allow_pickle=False)
    return draw_samples(folder / "sample.png", samples, run)


def draw_samples(path: pathlib.Path, samples: Tensor, run: Run) -> Tensor | None:
    """Draw samples as PNG, as their kind is drawn; images of continuous values go from black, their
    least value, to white.

    Returns:
        the picture, as in `save_samples`.
    """
    if is_picture(samples.shape):
        if run.continuous:
            low, high = samples.min(), samples.max()
            samples = (samples - low) / (high - low).clamp(min=1e-12)
        save_grid(path, samples)
        return read_picture(path)
    try:
        save_samples_picture(path, samples, run.kind)
    except ImportError as error:
        logging.warning("samples are not drawn: %s (pip install matplotlib)", error)
        return None
    return read_picture(path)
