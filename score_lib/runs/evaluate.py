"""Evaluation of checkpoints: `--mode eval`."""

import contextlib
import itertools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping

from models.precision import matmul_precision
from score_lib.base import distributed
from score_lib.disk.files import (
    file_state,
    folder_of_results,
    locked,
    make_way,
    open_folder,
    remove_leftovers,
)
from score_lib.disk.logs import messages_to
from score_lib.disk.reports import REPORTS, write_report
from score_lib.runs.averages import names_of_averages
from score_lib.runs.dequantizer import dequantizer_file
from score_lib.runs.measures import MEASURES
from score_lib.runs.refusals import CHECKS
from score_lib.runs.rounds import Job, check_folder, fingerprint, has_rounds
from score_lib.runs.setup import Run, setup
from score_lib.runs.start import chosen_checkpoint, name_of, weights_serve
from score_lib.runs.trained import load_trained, load_weights, weights_record


def evaluate(
    config,
    workdir: str | os.PathLike,
    eval_folder: str = "eval",
    measures: Mapping[str, Callable[[Job], dict]] = MEASURES,
) -> list[dict]:
    """Evaluate checkpoints, with each of the averages in `eval.ema`, by the measures in
    `eval.enable_*`; see `measures` for the files.

    An evaluation that was killed resumes at the first missing round.

    Args:
        workdir: folder of the run.
        eval_folder: name of the folder for results, inside workdir.
        measures: by the option of `eval` that asks for them.
    Returns:
        one record a checkpoint and average, as in `report.json`.
    Raises:
        ValueError: the config, a checkpoint, the data or their statistics do not fit, or the folder
            holds the rounds of another evaluation.
        OSError: checkpoints (all of them are named), statistics or weights of an extractor are
            missing, a folder cannot be written, or another evaluation is in it.
    """
    run, workdir = setup(config), pathlib.Path(workdir)
    folder = folder_of_results(workdir, eval_folder, f"--eval_folder={eval_folder}")
    checkpoints = distributed.on_main(lambda: find_checkpoints(run.config, workdir))
    distributed.on_main(lambda: check_folder(run.config, folder))
    with contextlib.ExitStack() as stack:
        distributed.on_main(lambda: _enter(folder, stack))
        if distributed.is_main():
            stack.enter_context(messages_to(folder / "stdout.txt"))
        records, compared = [], set()
        averages = names_of_averages(run.config.eval.ema)
        wanted = list(itertools.product(checkpoints.items(), averages))
        if len(wanted) > 1:  # the last is refused before the first is measured
            for (_, path), average in wanted:
                _load(run, path, average)
        for (label, path), average in wanted:
            job = _job(run, path, folder, label, workdir, average, compared)
            for option, check in CHECKS.items():
                if option in measures and run.config.eval[option]:
                    check(job)
            distributed.on_main(lambda: _begin(folder, run.config))
            records.append(_evaluate_one(job, average, measures))
            distributed.on_main(lambda: write_report(folder, records))
        # Now that the rounds that were there have turned out to be of these checkpoints.
        distributed.on_main(lambda: open_folder(folder, run.config))
    return records


def _enter(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Lock the folder of an evaluation, and remove leftovers before any process writes there."""
    stack.enter_context(locked(folder))
    remove_leftovers(folder, *folder.glob("ckpt_*/"))


def _begin(folder: pathlib.Path, config) -> None:
    """Record the options before the first round; a report of other ones makes way."""
    if not has_rounds(folder):
        make_way(folder, config, *REPORTS)
        open_folder(folder, config)


def _job(
    run: Run,
    path: pathlib.Path,
    folder: pathlib.Path,
    label: str,
    workdir: pathlib.Path,
    average: str,
    compared: set[str],
) -> Job:
    """The evaluation of one average of a checkpoint, which is loaded into the run.

    Raises:
        OSError: the file was replaced meanwhile, as a training run may do: rounds of one file would
            count as those of another.
    """
    before = file_state(path)
    choice = _load(run, path, average)
    dequantizer = dequantizer_file(run.config, workdir)
    files = (path,) if dequantizer is None else (path, dequantizer)
    name = f"{label}_{average}" if average else label
    known = fingerprint(run.config, *files, average=choice)
    if file_state(path) != before:
        raise OSError(
            f"{path} was replaced while it was read: evaluate it again, or a numbered checkpoint"
        )
    return Job(run, folder, name, known, workdir, compared)


def _load(run: Run, path: pathlib.Path, average: str) -> str:
    """Load an average of a checkpoint, or of `model.weights`, into the run, see `load_trained`."""
    run.state["class_to_idx"] = {}  # a file that records none is not of the classes of another
    given = path == pathlib.Path(run.config.model.weights) and not run.config.eval.checkpoint
    return load_weights(run, average) if given else load_trained(run, path, average=average)


def _evaluate_one(job: Job, average: str, measures: Mapping[str, Callable[[Job], dict]]) -> dict:
    run = job.run
    record = weights_record(run, average)
    weights = run.state["ema"].applied(run.state["model"].parameters())
    with weights, matmul_precision("float32"):
        for option, measure in measures.items():
            if run.config.eval[option]:
                record |= measure(job)
    if job.held_out:
        record["held_out"] = job.held_out
    return record


def find_checkpoints(config, workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of the checkpoints to evaluate, by number or name.

    Those are `eval.checkpoint`, else numbered ones of the run, else `model.weights`, if the run has
    no numbered ones and none is waited for.

    Raises:
        ValueError: no checkpoint is asked for.
        FileNotFoundError: names all that are missing, once `eval.wait_minutes` are over.
    """
    options, wanted = config.eval, wanted_checkpoints(config, workdir)
    deadline = time.monotonic() + 60 * options.wait_minutes
    while missing := [str(path) for path in wanted.values() if not path.exists()]:
        if time.monotonic() >= deadline:
            advice = (
                "eval.begin_ckpt and eval.end_ckpt to those that exist, eval.checkpoint to a file"
            )
            if options.checkpoint:
                advice = f"eval.checkpoint to a file, by its path from {os.getcwd()}"
            raise FileNotFoundError(
                f"there are no checkpoints {', '.join(missing)}: set {advice}, or "
                "eval.wait_minutes to wait for them"
            )
        logging.info("waiting for %s", missing[0])
        time.sleep(10)
    return wanted


def wanted_checkpoints(config, workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """See `find_checkpoints`; the files need not be there."""
    options, folder = config.eval, workdir / "checkpoints"
    path = chosen_checkpoint(config, workdir)
    if not (path or options.wait_minutes) and weights_serve(config, workdir):
        path = pathlib.Path(config.model.weights)
    if path:
        return {name_of(path): path}
    numbers = range(options.begin_ckpt, options.end_ckpt + 1)
    if not numbers:
        raise ValueError(
            f"eval.begin_ckpt = {numbers.start} comes after eval.end_ckpt = {numbers.stop - 1}"
        )
    return {str(k): folder / f"checkpoint_{k}.pth" for k in numbers}
