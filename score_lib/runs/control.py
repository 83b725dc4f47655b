"""Controllable generation and the latent space from the command line: `--mode control`."""

import json
import logging
import os
import pathlib

import torch
from ml_collections import ConfigDict
from torch import Tensor

from score_lib.base import distributed
from score_lib.disk.arrays import save_arrays
from score_lib.disk.files import folder_of_results, make_way, open_folder, set_aside
from score_lib.disk.logs import messages_to
from score_lib.disk.pictures import is_picture, save_grid
from score_lib.disk.reports import REPORTS, write_report
from score_lib.option_kinds import tasks
from score_lib.options import complete
from score_lib.runs import image_tasks, latent_tasks  # noqa: F401  (they register)
from score_lib.runs.averages import one_average
from score_lib.runs.samples import draw_samples
from score_lib.runs.setup import Run
from score_lib.runs.tasks import get_task
from score_lib.runs.trained import restored, weights_record

_TASKS, _RESTORING = {*tasks.names}, ("inpaint", "colorize", "restore")
_OF_MEASUREMENTS = ("mask", "operator", "noise_std", "box", "keep", "factor", "blur_std")
_OF_MEASUREMENTS += ("num_measurements", "operator_seed")
_OF_METHODS = ("strength", "data_std", "iterations")
# Options of `control` that would count for nothing in others of these tasks, without those that
# configs for several tasks set: method, guidance, tolerance, numbers of images and results.
_READ_BY = {
    **dict.fromkeys((*_OF_MEASUREMENTS, *_OF_METHODS), _RESTORING),
    **dict.fromkeys(("classifier", "classifier_config"), ("class",)),
    "start_time": ("edit",),
    "num_interpolations": ("interpolate",),
    "temperatures": ("temperature",),
    "other": ("compare_codes",),
    "path": _TASKS - {"class", "temperature"},
    "labels": _TASKS - {"temperature"},
}


def control(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Carry out `control.task` with a checkpoint: `eval.checkpoint`, or the run's latest.

    Files, in `control/{control.name or the task}/`: `grid.png`, the columns side by side;
    `arrays.npz`, the same and more in floats; `report.{md,json}`, `config.json` and `stdout.txt`.
    Results by other options or of other weights that are there are moved to `control/set_aside/`.

    Returns:
        the folder with the files.
    Raises:
        ValueError: an option, an image, a mask or a checkpoint does not fit, or there are several
            processes.
        OSError: a file is missing, or the folder cannot be written.
    """
    distributed.check_alone("control")
    run = restored(config, workdir)
    options = run.config.control
    _refuse_unread(options)
    name = pathlib.PurePath("control", options.name or options.task)
    folder = folder_of_results(workdir, name, f"control.name = {options.name!r}")
    of = weights_record(run, one_average(run.config.eval.ema))
    outcome = get_task(options.task)(run)
    make_way(folder, run.config)
    if folder.exists() and _weights_in(folder) != of["weights"]:
        set_aside(folder, "other_weights")
    open_folder(folder, run.config)
    with messages_to(folder / "stdout.txt"):
        arrays = {**outcome.columns, **outcome.arrays}
        known = {name: v.cpu().numpy() for name, v in arrays.items() if v is not None}
        save_arrays(folder / "arrays.npz", **known)
        _save_picture(folder / "grid.png", outcome.columns, run)
        write_report(folder, [of | figures for figures in outcome.figures])
    return folder


def _refuse_unread(options: ConfigDict) -> None:
    """Refuse options of other tasks than `control.task`; tasks of the user's own may read any.

    Raises:
        ValueError: such an option has another value than its default.
    """
    defaults, task = complete({}).control, options.task
    for name, readers in _READ_BY.items():
        if options[name] != defaults[name] and task in _TASKS - {*readers}:
            raise ValueError(
                f"control.{name} = {options[name]!r} counts for nothing in control.task = "
                f"{task!r}: leave it at {defaults[name]!r}, or choose a task from "
                f"{', '.join(sorted(readers))}"
            )


def _weights_in(folder: pathlib.Path) -> object:
    """The weights that results in a folder are of, as `weights_record` tells them, if it does."""
    try:
        return json.loads((folder / REPORTS[0]).read_text(encoding="utf-8"))[0]["weights"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _save_picture(path: pathlib.Path, columns: dict[str, Tensor], run: Run) -> None:
    """The columns in their order, one row for each row of theirs; of data that are no images, a
    picture for each column."""
    dimensions = len(run.shape)
    if run.continuous or not is_picture((1, *run.shape)):
        for name, column in columns.items():
            shown = column.cpu() if column.dim() == dimensions + 1 else column.cpu().flatten(0, 1)
            draw_samples(path.with_name(f"{name}.png"), shown, run)
        return
    wide = [c[:, None] if c.dim() == dimensions + 1 else c for c in columns.values()]
    rows = torch.cat([column.cpu() for column in wide], dim=1)
    save_grid(path, rows.flatten(0, 1), columns=rows.shape[1])
    logging.info("%s shows in each row: %s", path, ", ".join(columns))
