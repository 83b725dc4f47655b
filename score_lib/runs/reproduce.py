"""A checkpoint beside the published figures of its experiment: `--mode reproduce`."""

import functools
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

from score_lib.base import distributed
from score_lib.disk.reports import write_report
from score_lib.metrics.configured import extractor_name, find_statistics
from score_lib.options import Config, complete, flatten
from score_lib.runs.averages import one_average
from score_lib.runs.evaluate import evaluate, find_checkpoints, wanted_checkpoints
from score_lib.runs.history import CHANGES_NO_WEIGHT
from score_lib.runs.measures import MEASURES, evaluate_bpd, evaluate_samples
from score_lib.runs.nearest import Nearest, nearest_experiment
from score_lib.runs.published import KINDS, ROWS, Figure, Kind, Row
from score_lib.runs.setup import Run, setup
from score_lib.samplers.configured import without_unread

FOLDER = "reproduce"
# The share of faithful reproductions whose figure lies in the band.
CONFIDENCE = 0.99
_MEASURES = {
    "enable_bpd": functools.partial(evaluate_bpd, errors=True),
    "enable_sampling": functools.partial(evaluate_samples, errors=True),
}
# Options that do not change the figures, and sections of others.
_FREE = CHANGES_NO_WEIGHT - {"model.weights_except", "training.n_iters"} | {
    "seed",
    "data.data_dir",
    "data.path",
    "data.tfrecords_path",
    "model.checkpoint_activations",
    "sampling.compile",
    "sampling.num_samples",
    "training.compile",
    "training.grad_accumulation",
    "training.posthoc_profiles",
}
_FREE_SECTIONS = ("control.", "dequantizer.", "eval.", "export.")
_NOT_FREE = {"eval.bpd_steps", "eval.dequantizer", "eval.ema"}


def reproduce(config, workdir: str | os.PathLike) -> list[dict]:
    """Measure the published figures of a config's experiment, and print both side by side.

    Evaluations are in `reproduce/samples`, `reproduce/ode` (samples by the probability flow ODE)
    and `reproduce/bpd` in the workdir; they resume like those of `evaluate`.  The table is in
    `reproduce/report.json` and `report.md`.

    Returns:
        a record for each figure of `eval.figures`.
    Raises:
        ValueError: nothing is published of the experiment, the checkpoint is not named or does
            not fit, or the folder holds another evaluation.
        OSError: there is no such checkpoint, or there are no statistics of the data.
    """
    run, workdir = setup(config), pathlib.Path(workdir)
    nearest = nearest_experiment(run.config)
    row, figures = _published(run.config, nearest.name)
    one_average(run.config.eval.ema)
    label = distributed.on_main(lambda: _checkpoint(run.config, workdir))
    if any(figure.kind != "bpd" for figure in figures):
        find_statistics(run.config, workdir)  # before anything is computed, which may take days
    logging.info("checkpoint %s beside %s, %s", label, nearest.name, row.name)
    kinds = {KINDS[figure.kind].folder: KINDS[figure.kind] for figure in figures}
    records = {name: _evaluated(run.config, workdir, kind) for name, kind in kinds.items()}
    found = [compare(row, figure, records[KINDS[figure.kind].folder]) for figure in figures]
    features = extractor_name(run.config)
    for record in found:
        kind = KINDS[record["figure"]]
        remarks = [*_remarks(row, kind, features, nearest), *_of_training(run, kind, records)]
        record["verdict"] += "".join(f"; {remark}" for remark in remarks)
        record |= {"checkpoint": label, "experiment": nearest.name}
    distributed.on_main(lambda: write_report(workdir / FOLDER, found))
    return found


def _published(config: Config, name: str) -> tuple[Row, list[Figure]]:
    """The row of an experiment, and those of its figures that are asked for."""
    if name not in ROWS:
        raise ValueError(
            f"--mode reproduce knows no published figures of {name}, to which this config is "
            f"nearest: it knows those of {', '.join(ROWS)}"
        )
    row, wanted = ROWS[name], config.eval.figures.split(",") if config.eval.figures else []
    figures = [figure for figure in row.figures if not wanted or figure.kind in wanted]
    if missing := set(wanted) - {figure.kind for figure in figures}:
        raise ValueError(
            f"eval.figures = {config.eval.figures!r}, but {', '.join(sorted(missing))} of "
            f"{row.name} is not published: choose from "
            f"{', '.join(figure.kind for figure in row.figures)}"
        )
    return row, figures


def _checkpoint(config: Config, workdir: pathlib.Path) -> str:
    """The label of the one checkpoint that is asked for, which is there."""
    if len(wanted_checkpoints(config, workdir)) > 1:
        raise ValueError(
            "--mode reproduce compares one checkpoint: name its file as "
            "--config.eval.checkpoint=FILE"
        )
    (label,) = find_checkpoints(config, workdir)
    return label


def matters(nearest: Nearest, kind: Kind) -> Nearest:
    """The differences from a shipped experiment that a kind of figure may depend on."""
    sampler = kind.option == "enable_sampling" and not kind.ode
    sections = (*_FREE_SECTIONS, *(() if sampler else ("sampling.",)))
    kept = [
        difference
        for difference in nearest.differences
        if difference[0] in _NOT_FREE
        or not (difference[0] in _FREE or difference[0].startswith(sections))
    ]
    return Nearest(nearest.name, kept)


def _evaluated(config: Config, workdir: pathlib.Path, kind: Kind) -> dict[str, object]:
    """The record of the evaluation that a kind of figure needs."""
    own = complete(config)
    with own.unlocked():
        own.eval.update({option: False for option in MEASURES})
        own.eval.update({kind.option: True, "bpd_dataset": "test", "dataset": "", "figures": ""})
        if kind.ode:
            own.sampling.method = "ode"
            without_unread(own)
    (record,) = evaluate(own, workdir, f"{FOLDER}/{kind.folder}", _MEASURES)
    return record


def compare(row: Row, figure: Figure, record: dict) -> dict[str, object]:
    """A published figure beside ours, with the band around it and the verdict.

    Args:
        record: of an evaluation, with the errors that `measures` adds.
    """
    name = KINDS[figure.kind].measured
    ours = record.get(name)
    found = {"figure": figure.kind, "source": figure.place, "published": figure.text}
    found |= {"ours": ours, "band": ""}
    if ours is None:
        return found | {"verdict": "not compared: these features do not give it"}
    error = record.get(f"{name}_noise_error", record[f"{name}_standard_error"])
    found["ours_standard_error"] = error
    count = "num_images" if name == "bpd" else "num_samples"
    if (used := record[count]) != (published := getattr(row, count)):
        unlike = f"{used} {count.removeprefix('num_')}, published with {published}"
        return found | {"verdict": f"not compared: {unlike}"}
    # Spread between runs on the same images; the error of one pass is that over images.
    told = name != "bpd" or f"{name}_noise_error" in record or not figure.spread
    width = half_width(figure, error if told else 0.0)
    low, high = figure.value - width, figure.value + width
    verdict = "within" if low <= ours <= high else "outside"
    return found | {"band": f"{low:.4f} to {high:.4f}", "verdict": verdict}


def half_width(figure: Figure, error: float) -> float:
    """Half the width of the band around a published figure.

    Ours and the published one are draws: one with the standard deviation s, the other a mean of n,
    so that they differ by s sqrt(1 + 1 / n), and by rounding.  s is the error of ours, or the
    published spread of single runs with its quantile of Student's t: the larger product counts.

    Args:
        error: standard error of ours, from its samples.
    """
    from scipy.special import ndtri, stdtrit

    level = 0.5 + CONFIDENCE / 2
    product = float(ndtri(level)) * error
    if figure.spread:
        product = max(product, float(stdtrit(figure.runs - 1, level)) * figure.spread)
    return product * math.sqrt(1 + 1 / figure.runs) + figure.rounding


def _remarks(row: Row, kind: Kind, features: str, nearest: Nearest) -> Iterator[str]:
    """Reasons why a figure may differ from the published one, for the verdict."""
    if kind.option == "enable_sampling" and features != row.extractor:
        yield f"features of {features}, published with {row.extractor}"
    changed = matters(nearest, kind)
    if changed.differences:
        yield f"another config: {changed.text(most=3)}"


def _of_training(run: Run, kind: Kind, records: Mapping[str, dict]) -> Iterator[str]:
    """Further reasons: how the weights were trained, where their checkpoint says so."""
    record, options = records[kind.folder], flatten(run.config)
    if "trained_with" not in record:
        return
    differences = [(key, old, options.get(key)) for key, old in record["trained_with"].items()]
    changed = matters(Nearest("trained by this config", differences), kind)
    if changed.differences:
        yield changed.text(most=3)
    if (step := record["step"]) < (steps := options["training.n_iters"]):
        yield f"step {step} of {steps}"
