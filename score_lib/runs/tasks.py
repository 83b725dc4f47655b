"""Tasks of `--mode control`: the registry, and what tasks share.

A task, chosen by `control.task`, is a function of a run that returns rows of pictures and figures.
Result r of row k is sample number k `control.num_results` + r of the seed, whatever its batch.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.conditioning import Condition
from score_lib.base.registry import Registry
from score_lib.data.inputs import read_inputs
from score_lib.disk.pictures import check_samples_finite
from score_lib.disk.reports import mean_and_error
from score_lib.metrics.configured import get_extractor, recognises_classes
from score_lib.runs.conditions import as_known, check_classes, class_numbers
from score_lib.runs.history import knows_all_times
from score_lib.runs.nearest import named_config
from score_lib.runs.setup import Run, in_batches
from score_lib.runs.trained import from_checkpoint
from score_lib.samplers.loop import Constraint
from score_lib.sdes.process import SDE

TASKS = Registry("control task")

register_task, get_task = TASKS.register, TASKS.get


@dataclasses.dataclass
class Outcome:
    """The result of a task.

    Attributes:
        columns: of the picture: names, and images in [0, 1], (rows, *D) or, where a column is
            several images wide, (rows, width, *D).
        figures: rows of the report.
        arrays: further arrays to save, by name; None is left out.
    """

    columns: dict[str, Tensor]
    figures: list[dict]
    arrays: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)


class Inputs(NamedTuple):
    """Images to start from: (n, *D) in [0, 1], as the network knows them; their labels, (n,), if
    they are known, and their condition."""

    images: Tensor
    labels: Tensor | None
    condition: Condition


def read_images(run: Run, least: int = 1) -> Inputs:
    """The images of `control.path`, or held-out ones.

    Raises:
        ValueError: they are too few, have no labels for a network that needs them, or
            `control.labels` names classes for one that takes none.
    """
    if run.config.control.labels and "classes" not in run.conditions.kinds:
        raise ValueError(
            f"control.labels = {run.config.control.labels} counts for nothing, as the network is "
            "told no class: leave it at (), or choose control.task = 'class'"
        )
    stored, labels = read_stored(run, least)
    images = as_known(run.config, stored, run.levels)
    return Inputs(images, labels, condition_of(run, run, stored, labels))


def read_stored(run: Run, least: int) -> tuple[Tensor, Tensor | None]:
    """The images of `control.path`, or held-out ones, as they are stored, and their labels.

    Raises:
        ValueError: they are too few.
    """
    options = run.config.control
    found = read_inputs(run.config, options.path, options.num_images)
    if len(found.images) < least:
        raise ValueError(f"control.task = {options.task!r} needs at least {least} images")
    # The class numbers of a folder are not those of the data set.
    return found.images.to(run.device), None if options.path else found.labels


def condition_of(run: Run, told: Run, stored: Tensor, labels: Tensor | None) -> Condition:
    """The condition of stored images, with the classes of `control.labels` if there are any.

    Args:
        told: the run of the network that is told it, perhaps another one.
    Raises:
        ValueError: other numbers of classes, or no labels for a network that needs them.
    """
    if run.config.control.labels and "classes" in told.conditions.kinds:
        labels = given_labels(run, told)
        labels = labels.expand(len(stored)) if len(labels) == 1 else labels
        if len(labels) != len(stored):
            raise ValueError(
                f"control.labels names {len(labels)} classes for {len(stored)} images: give one "
                "for each of them, or one for all"
            )
    return told.conditions.of_data(stored, labels, dequantized=False)


def given_labels(run: Run, knowing: Run) -> Tensor:
    """`control.labels`, or every class, as numbers, (n,).

    Args:
        knowing: the run of the network that knows the classes.
    Raises:
        ValueError: an unknown class.
    """
    option, classes = "control.labels", knowing.config.data.num_classes
    wanted = class_numbers(run.config, option, knowing.state["class_to_idx"])
    labels = torch.tensor(wanted or range(classes))
    check_classes(option, labels, classes)
    return labels


def draw(
    run: Run,
    rows: int,
    condition: Condition | None = None,
    constrain: Callable[[Tensor], Sequence[Constraint]] = lambda rows: (),
    **options,
) -> Tensor:
    """`control.num_results` samples for each row, (rows, results, *D), in [0, 1].

    Args:
        condition: of each row; default: that of the sample's number.
        constrain: from the rows (B,) of a batch of samples to their constraints.
        options: of the sampler.
    Raises:
        FloatingPointError: a result is not finite.
    """
    results, parts = run.config.control.num_results, []
    for part in in_batches(range(rows * results), run.config.training.batch_size):
        of_row = torch.tensor(part) // results
        given = None
        if condition is not None:
            given = {kind: value[of_row.to(value.device)] for kind, value in condition.items()}
        drawn = run.draw(part, condition=given, constraints=constrain(of_row), **options)
        check_samples_finite(drawn)
        parts.append(drawn)
        logging.info("%d of %d results", part[-1] + 1, rows * results)
    return torch.cat(parts).unflatten(0, (rows, results))


def psnr(name: str, results: Tensor, images: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of (rows, results, *D), averaged over images in mean square,
    with its standard error over images.

    Samples of the posterior cannot reach an arbitrary value: their mean square error is twice the
    posterior's variance.
    """
    errors = (results.clamp(0, 1) - images[:, None]).square().flatten(1).mean(1).double()
    mean = errors.mean()
    found = {name: (-10 * torch.log10(mean)).item()}
    if len(errors) > 1:
        relative = errors.std() / math.sqrt(len(errors)) / mean
        found[f"{name}_standard_error"] = (10 / math.log(10) * relative).item()
    return found


def closeness(run: Run, suffix: str, results: Tensor, images: Tensor) -> dict[str, float]:
    """`psnr` of images in [0, 1]; of continuous data "rmse", the root of the mean square error, in
    the data's units, with its standard error over examples.

    Args:
        suffix: of the figure's name; "": none.
    """
    if not run.continuous:
        return psnr("_".join(filter(None, ("psnr", suffix))), results, images)
    name = "_".join(filter(None, ("rmse", suffix)))
    errors = (results - images[:, None]).square().flatten(1).mean(1).double()
    found = {name: errors.mean().sqrt().item()}
    if len(errors) > 1:
        error = errors.std() / math.sqrt(len(errors)) / (2 * found[name])
        found[f"{name}_standard_error"] = error.item()
    return found


def interval_coverage(results: Tensor, images: Tensor, known: Tensor) -> dict[str, float]:
    """The share of entries inside the central interval of 90 % of their results.

    For samples of the posterior, of which each gap between neighbouring results is as likely to
    hold the truth, it is 0.9 on average whatever the number of results: an end of the interval that
    lies within a gap counts it in part.

    Args:
        results: (rows, results, *D), two or more for each row; else there is no figure.
        images: the truth, (rows, *D).
        known: entries without a posterior of their own, which are left out, (*D) bool.
    """
    count = results.shape[1]
    if count < 2 or known.all():
        return {}
    below, above = (side(results, images[:, None]).sum(1).cpu() for side in (torch.lt, torch.gt))
    # The truth is taken as uniform between the two places that it has in the order of the results.
    first, last = below.double(), count + 1 - above.double()
    ends = 0.05 * (count + 1), 0.95 * (count + 1)
    inside = (last.clamp(*ends) - first.clamp(*ends)) / (last - first)
    return mean_and_error("inside_90_interval", inside[:, ~known.cpu()].mean(1).numpy())


def recognised(
    run: Run, results: Tensor, labels: Tensor | None, *, of_images: bool
) -> dict[str, float]:
    """The share of results (rows, results, *D) that the evaluation's classifier, if the data set
    has one, assigns to their row's class.

    Args:
        of_images: whether a row is of one image, whose results are alike: the standard error is
            then over images.  The results of a given class are independent draws.
    """
    if labels is None or not recognises_classes(run.config):
        return {}
    pixels = run.to_bytes(results.flatten(0, 1))
    said = get_extractor(run.config, run.device)(pixels)["logits"].argmax(1)
    right = (said.reshape(results.shape[:2]) == labels.cpu()[:, None]).double()
    return mean_and_error("recognised", (right.mean(1) if of_images else right.flatten()).numpy())


def other_run(run: Run, path: str, config: str = "") -> Run:
    """The run in a checkpoint, with this run's precision and compilation of sampling.

    Args:
        config: for a file that holds none: the name of an experiment, or a `config.json`.
    """
    other = from_checkpoint(path, run.device, named_config(config) if config else None)
    for option in ("precision", "compile"):
        other.config.sampling[option] = run.config.sampling[option]
    return other


def as_here(run: Run, other: Run) -> SDE:
    """The process of another network, in as many steps as the run's if both know all times."""
    free = all(knows_all_times(one.config) for one in (run, other))
    return other.sde.with_steps(run.sde.N) if free and other.sde.N != run.sde.N else other.sde
