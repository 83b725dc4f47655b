"""Averaged weights as checkpoints of their own: `--mode ema`."""

import functools
import logging
import os
import pathlib

import torch
from torch import nn

from score_lib.base import distributed
from score_lib.disk.checkpoints import contents_of, read_checkpoint, save_checkpoint
from score_lib.disk.files import set_aside
from score_lib.disk.fit import CheckpointError
from score_lib.runs.averages import names_of_averages, recorded
from score_lib.runs.history import training_options
from score_lib.runs.setup import Run, setup
from score_lib.runs.trained import load_chosen


def write_averages(config, workdir: str | os.PathLike) -> list[pathlib.Path]:
    """Write each average in `eval.ema` as a checkpoint, `ema/step_{step}_{average}.pth`.

    Its "model" and its "ema" are the average, and it has no optimiser: it is to evaluate, to sample
    from and to share.  A file of other weights that is there is moved to `ema/set_aside/`.  For the
    source see `load_chosen`, for its config `as_trained`.

    Returns:
        the files.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config or the checkpoint does not fit, or there is no such average.
    """
    run, workdir = setup(config), pathlib.Path(workdir)
    paths = []
    for average in names_of_averages(run.config.eval.ema):
        load_chosen(run, workdir, average)
        name = "_".join([f"step_{run.state['step']}", average.partition("@")[0] or "ema"])
        paths.append(workdir / "ema" / f"{name}.pth")
        distributed.on_main(functools.partial(_write, as_trained(run), paths[-1], average))
    return paths


def as_trained(run: Run) -> Run:
    """A run with loaded weights as one of the config that they were trained with, if it is known.

    Options of other modes, such as `sampling`, are the present ones.

    Raises:
        ValueError: these do not go together with the training's.
    """
    if run.trained is None:
        return run
    own = setup(training_options(run.trained, run.config))
    own.state, own.scaler, own.inverse_scaler = run.state, run.scaler, run.inverse_scaler
    return own


@torch.no_grad()
def _write(run: Run, path: pathlib.Path, average: str) -> None:
    run.state["ema"].copy_to(run.state["model"].parameters())
    contents = {"config": run.config.to_json_best_effort(), "average": recorded(average)}
    if path.exists() and not _are_in(path, run.state["model"]):
        set_aside(path, "other_weights")
    save_checkpoint(path, {**run.state, **contents})
    logging.info("averaged weights are in %s", path)


def _are_in(path: pathlib.Path, model: nn.Module) -> bool:
    """Whether a file holds just the weights of a network."""
    try:
        stored = read_checkpoint(path)["model"]
    except CheckpointError:
        return False
    ours = contents_of({"model": model})["model"]
    return stored.keys() == ours.keys() and all(
        torch.equal(stored[name], value.cpu()) for name, value in ours.items()
    )
