"""A run with trained weights: of its own folder, of a file, or of a file with a config in it."""

import os
import pathlib

import torch
from ml_collections import ConfigDict

from score_lib.base import distributed
from score_lib.base.weights import weights_digest
from score_lib.disk import checkpoints
from score_lib.options import complete
from score_lib.runs.averages import choose_average, one_average
from score_lib.runs.history import changes, check_guidance, check_same_output, trained_config
from score_lib.runs.setup import Run, setup
from score_lib.runs.start import (
    META,
    check_units,
    chosen_checkpoint,
    expect_units,
    load_start,
    name_of,
    weights_serve,
)
from score_lib.samplers.configured import without_unread


def restored(config, workdir: str | os.PathLike) -> Run:
    """The run of a config, with the weights that `load_chosen` finds, averaged as `eval.ema` says.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config or the checkpoint does not fit.
    """
    run = setup(config)
    load_chosen(run, workdir, one_average(run.config.eval.ema))
    return run


def load_chosen(run: Run, workdir: str | os.PathLike, average: str) -> None:
    """Load the weights of `eval.checkpoint`, else of the run's latest checkpoint, else of
    `model.weights`; see `load_trained`."""
    chosen = chosen_checkpoint(run.config, workdir)
    if not chosen and distributed.on_main(lambda: weights_serve(run.config, workdir)):
        load_weights(run, average)
    else:
        path = chosen or pathlib.Path(workdir) / META
        load_trained(run, path, latest=not chosen, average=average)


def load_weights(run: Run, average: str) -> str:
    """Load `model.weights`, see `load_start`; returns "", as there is one average only.

    Raises:
        ValueError: another average is asked for, or the file does not fit.
    """
    if average not in ("", "none"):
        raise ValueError(
            f"eval.ema = {average!r} is an average of a checkpoint: give it as eval.checkpoint"
        )
    expect_units(run.state)
    run.checkpoint = name_of(pathlib.Path(run.config.model.weights))
    run.trained = load_start(run.config, run.state, run.device, averaged=average != "none")
    check_units(run.config.model.weights, run.config, run.state)
    check_guidance(run.config.model.weights, run.trained, run.config)
    return ""


def load_trained(
    run: Run, path: str | os.PathLike, *, latest: bool = False, average: str = ""
) -> str:
    """Load trained weights: of a file, or of the latest undamaged one among its predecessors.

    Args:
        average: the average to load, see `choose_average`.
    Returns:
        a text that tells averages of the same file apart, see `choose_average`.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it does not fit the network, or was trained with other options that decide
            what its output means.
        ValueError: it has no such average.
    """
    run.checkpoint = name_of(pathlib.Path(path))
    run.state |= {"config": "", "averages": {}, "average": "", "start": {}, "examples": []}
    expect_units(run.state)
    restore = checkpoints.restore_latest if latest else checkpoints.restore_checkpoint
    restore(path, run.state, run.device, must_exist=True)
    check_units(path, run.config, run.state)
    run.trained = trained_config(path, {"config": run.state.pop("config")})
    if run.trained is not None:
        check_same_output(path, run.trained, run.config)
    check_guidance(path, run.trained, run.config)
    if not (isinstance(start := run.state["start"], dict) and "digest" in start):
        del run.state["start"]
    return choose_average(pathlib.Path(path), run.state, average, run.state.pop("averages"))


def weights_record(run: Run, average: str = "") -> dict[str, object]:
    """Which weights results are of, for a report: "checkpoint", "step", the average, and a digest
    of the averaged weights; where they are known, classes and the options of training that differ.

    Args:
        average: that was loaded, of those that `eval.ema` names.
    """
    record = {"checkpoint": run.checkpoint, "step": run.state["step"]}
    if run.config.eval.ema:
        record["ema"] = average
    if run.state["class_to_idx"]:
        record["class_to_idx"] = run.state["class_to_idx"]
    if run.trained is not None:
        changed = changes(run.trained, run.config)
        record["trained_with"] = {key: old for key, (old, _) in changed.items()}
    model = run.state["model"]
    with run.state["ema"].applied(model.parameters()):
        return record | {"weights": {"digest": weights_digest(model)}}


def from_checkpoint(
    path: str | os.PathLike, device: torch.device | str, config: ConfigDict | None = None
) -> Run:
    """The run of the config inside a checkpoint, with the checkpoint's weights.

    Args:
        config: for a file that holds none.
    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a checkpoint, or holds no config, as published ones do not.
    """
    contents = checkpoints.read_checkpoint(path, device)
    own = trained_config(path, contents) or config
    if own is None:
        raise checkpoints.CheckpointError(
            f"{path} holds no config, so that its network is unknown: use a checkpoint that was "
            "trained here, or set control.classifier_config for a classifier"
        )
    own = without_unread(complete(own))
    own.device = str(device)
    run = setup(own)
    run.checkpoint = name_of(pathlib.Path(path))
    expect_units(run.state)
    checkpoints.restore_contents(path, contents, run.state)
    check_units(path, own, run.state)
    return run
