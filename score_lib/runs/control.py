"""Controllable generation and the latent space from the command line: `--mode control`.

A task, chosen by `control.task`, is a function of a run that returns rows of pictures and figures.
Result r of row k is sample number k `control.num_results` + r of the seed, whatever its batch.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from score_lib.base import distributed
from score_lib.base.registry import Registry
from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.data.inputs import read_inputs, read_mask
from score_lib.data.loading import get_streams
from score_lib.data.sources import named
from score_lib.disk.arrays import save_arrays
from score_lib.disk.files import open_folder
from score_lib.disk.logs import messages_to
from score_lib.disk.pictures import is_picture, save_grid, to_uint8
from score_lib.disk.reports import mean_and_error, write_report
from score_lib.inverse import latent
from score_lib.inverse.conditions import ClassGuidance, StartFrom
from score_lib.inverse.measurements import Mask, build_operator
from score_lib.inverse.operators import LinearOperator, measure
from score_lib.inverse.restoration import build_restoration
from score_lib.metrics.configured import get_extractor
from score_lib.runs.setup import Run, from_checkpoint, in_batches, restored
from score_lib.samplers.grids import visited_times
from score_lib.samplers.loop import Constraint

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


def control(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Carry out `control.task` with a checkpoint: `eval.checkpoint`, or the run's latest.

    Files, in `control/{control.name or the task}/`: `grid.png`, the columns side by side;
    `arrays.npz`, the same and more in floats; `report.{md,json}`, `config.json` and `stdout.txt`.

    Returns:
        the folder with the files.
    Raises:
        ValueError: an option, an image, a mask or a checkpoint does not fit, or there are several
            processes.
        OSError: a file is missing, or the folder cannot be written.
    """
    if distributed.world() > 1:
        raise ValueError("--mode control runs in one process: start it without torchrun")
    run = restored(config, workdir)
    options = run.config.control
    task = get_task(options.task)
    outcome = task(run)
    folder = pathlib.Path(workdir) / "control" / (options.name or options.task)
    folder = open_folder(folder, run.config)
    with messages_to(folder / "stdout.txt"):
        arrays = {**outcome.columns, **outcome.arrays}
        known = {name: v.cpu().numpy() for name, v in arrays.items() if v is not None}
        save_arrays(folder / "arrays.npz", **known)
        _save_picture(folder / "grid.png", outcome.columns, run)
        write_report(folder, outcome.figures)
    return folder


def _save_picture(path: pathlib.Path, columns: dict[str, Tensor], run: Run) -> None:
    """The columns in their order, one row for each row of theirs."""
    dimensions = len(run.shape)
    wide = [c[:, None] if c.dim() == dimensions + 1 else c for c in columns.values()]
    rows = torch.cat([column.cpu() for column in wide], dim=1)
    if is_picture((len(rows), *run.shape)):
        save_grid(path, rows.flatten(0, 1), columns=rows.shape[1])
        logging.info("%s shows in each row: %s", path, ", ".join(columns))


# --- Inverse problems -----------------------------------------------------------------------------


@register_task(name="inpaint")
def inpaint(run: Run) -> Outcome:
    """Fill in the open part of a mask: `control.mask`, or the operator (the right half)."""
    return restore(run, operator="half")


@register_task(name="colorize")
def colorize(run: Run) -> Outcome:
    """Colour gray images."""
    if run.shape[0] == 1:
        raise ValueError(
            "control.task = 'colorize' needs images of several channels, and the model's have one: "
            "try the config configs/vp/color_digits.py"
        )
    return restore(run, operator="gray")


@register_task(name="restore")
def restore(run: Run, operator: str = "super_resolution") -> Outcome:
    """Undo a linear measurement, `control.operator`, by the method `control.method`.

    Args:
        operator: used where that option is "".
    """
    options = run.config.control
    images, labels = _inputs(run)
    operator = _operator(run, operator)
    # In the network's range, as everything below.
    low, high = (run.scaler(torch.tensor(end)).item() for end in (0.0, 1.0))
    noise_std = options.noise_std * (high - low)
    noise = SampleNoise(derive_seed(run.config.seed, "measurement"), range(len(images)), run.device)
    y = measure(operator, run.scaler(images), noise_std, noise)
    build = functools.partial(build_restoration, options.method, run.config, operator)
    results = _draw(run, len(images), lambda rows: [build(y[rows], noise_std, bounds=(low, high))])
    shown = run.inverse_scaler(operator.picture(y, fill=(low + high) / 2))
    measured = operator.apply(run.scaler(results).flatten(0, 1))
    residual = measured - y.repeat_interleave(results.shape[1], dim=0)
    figures = {
        "operator": type(operator).__name__,
        "method": options.method,
        "noise_std": float(options.noise_std),
        "residual": residual.square().mean().sqrt().item() / (high - low),
        **_psnr("psnr_measurement", shown[:, None], images),
        **_psnr("psnr", results, images),
        **_recognised(run, results, labels),
    }
    arrays = {"y": y, "labels": labels}
    return Outcome({"input": images, "measurement": shown, "result": results}, [figures], arrays)


def _operator(run: Run, default: str) -> LinearOperator:
    options = run.config.control
    if options.mask:
        if options.operator:
            raise ValueError(
                f"control.mask and control.operator = {options.operator!r} exclude each other: a "
                "mask is an operator itself"
            )
        return Mask(run.shape, read_mask(options.mask, run.shape))
    return build_operator(options.operator or default, run.config, run.shape)


def _psnr(name: str, results: Tensor, images: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of (rows, results, *D), averaged over images in mean square.

    Samples of the posterior cannot reach an arbitrary value: their mean square error is twice the
    posterior's variance.
    """
    error = (results.clamp(0, 1) - images[:, None]).square().mean()
    return {name: (-10 * torch.log10(error)).item()}


# --- Classes --------------------------------------------------------------------------------------


@register_task(name="class")
def conditional(run: Run) -> Outcome:
    """Samples of given classes: `control.labels`, or of each class a row."""
    options = run.config.control
    classifier = _classifier(run, options.classifier)
    classes = classifier.config.data.num_classes
    labels = torch.tensor(_labels(run, classifier) or range(classes))
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"control.labels = {tuple(options.labels)} should be classes of the classifier, whole "
            f"numbers from 0 to {classes - 1}"
        )
    scale = options.guidance_scale
    settings = {
        "until": options.guidance_until,
        "continuous": classifier.config.training.continuous,
    }
    with classifier.sampling_network() as network:

        def guidance(rows: Tensor) -> list[Constraint]:
            return [ClassGuidance(network, labels[rows], scale, **settings)]

        results = _draw(run, len(labels), guidance)
    figures = {"guidance_scale": float(scale), **_recognised(run, results, labels)}
    return Outcome({"result": results}, [figures], {"labels": labels})


def _labels(run: Run, classifier: Run) -> list[int]:
    """`control.labels` as numbers.

    Raises:
        ValueError: a name that neither the classifier's checkpoint nor the data know.
    """
    wanted, texts = run.config.control.labels, []
    for label in wanted:  # a flag passes several names as one text
        texts += [part.strip() for part in label.split(",")] if isinstance(label, str) else [label]
    if not any(isinstance(label, str) for label in texts):
        return texts
    known = classifier.state["class_to_idx"]
    known = known or get_streams(run.config, evaluation=True)[2].class_to_idx
    if unknown := [label for label in texts if isinstance(label, str) and label not in known]:
        raise ValueError(
            f"control.labels = {tuple(wanted)} names {', '.join(map(repr, unknown))}, but the "
            f"classes are {named(known) or 'numbers without names'}"
        )
    labels = [known.get(label, label) for label in texts]
    logging.info(
        "classes to draw: %s", ", ".join(f"{t} = {k}" for t, k in zip(texts, labels, strict=True))
    )
    return labels


def _classifier(run: Run, path: str) -> Run:
    """The classifier in a checkpoint, if it knows this run's noisy images."""
    if not path:
        raise ValueError(
            "control.task = 'class' needs control.classifier: the checkpoint of a classifier, "
            "trained with a config such as configs/vp/digits_classifier.py"
        )
    classifier = _other_run(run, path)
    if classifier.objective != "classifier":
        raise ValueError(
            f"control.classifier = {path!r} holds a network of training.objective = "
            f"{classifier.objective!r}: give a checkpoint of a classifier"
        )
    same = {
        "process": (repr(run.sde), repr(classifier.sde)),
        "shape of images": (run.shape, classifier.shape),
        "data.centered": (run.config.data.centered, classifier.config.data.centered),
    }
    for name, (ours, theirs) in same.items():
        if ours != theirs:
            raise ValueError(
                f"{path} was trained for another {name} than the score network: "
                f"{theirs}, not {ours}"
            )
    return classifier


def _recognised(run: Run, results: Tensor, labels: Tensor | None) -> dict[str, float]:
    """The share of results (rows, results, *D) that the evaluation's classifier, if the data set
    has one, assigns to their row's class."""
    extractor = run.config.eval.extractor or run.config.data.dataset.lower()
    if labels is None or extractor != "digits":
        return {}
    pixels = to_uint8(results.flatten(0, 1), run.levels)
    said = get_extractor(run.config, run.device)(pixels)["logits"].argmax(1)
    right = said == labels.cpu().repeat_interleave(results.shape[1])
    return mean_and_error("recognised", right.double().numpy())


# --- Editing --------------------------------------------------------------------------------------


@register_task(name="edit")
def edit(run: Run) -> Outcome:
    """Add noise to images up to `control.start_time`, and sample from there."""
    images, labels = _inputs(run)
    x, start_time = run.scaler(images), run.config.control.start_time
    sde, sampling = run.sde, run.config.sampling
    steps, grid = sampling.num_steps, sampling.time_grid
    times = visited_times(sde, sde.sampling_eps, start_time, steps=steps, grid=grid)
    t = times[:1].to(run.device).expand(len(x))
    noise = SampleNoise(derive_seed(run.config.seed, "shown"), range(len(x)), run.device)
    noisy = StartFrom(x).start(sde, x, t, noise)
    results = _draw(run, len(x), lambda rows: [StartFrom(x[rows])], start_time=start_time)
    figures = {"start_time": float(start_time), **_psnr("psnr", results, images)}
    figures |= _recognised(run, results, labels)
    columns = {"input": images, "noisy": run.inverse_scaler(noisy), "result": results}
    return Outcome(columns, [figures], {"labels": labels})


# --- The latent space -----------------------------------------------------------------------------


@register_task(name="reconstruct")
def reconstruct(run: Run) -> Outcome:
    """Encode images along the probability flow, and decode them."""
    images, _ = _inputs(run)
    tolerance = run.config.control.tolerance
    codes = _encode(run, images, tolerance)
    decoded = _decode(run, codes, tolerance)
    error = decoded - images
    largest, mean = error.abs().max().item(), error.square().mean().sqrt().item()
    figures = {"largest_error": largest, "root_mean_square_error": mean}
    return Outcome({"input": images, "result": decoded}, [figures], {"codes": codes})


@register_task(name="interpolate")
def interpolate(run: Run) -> Outcome:
    """From each image to the next one but one, along `control.num_interpolations` latent codes."""
    images, _ = _inputs(run, least=2)
    first, second = images[: len(images) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    options = run.config.control
    weights = torch.linspace(0, 1, options.num_interpolations)
    ends = (_encode(run, x, options.tolerance) for x in (first, second))
    codes = latent.interpolate(*ends, weights).movedim(0, 1)
    decoded = _decode(run, codes.flatten(0, 1), options.tolerance).unflatten(0, codes.shape[:2])
    errors = torch.stack([decoded[:, 0] - first, decoded[:, -1] - second])
    figures = {"largest_error_at_ends": errors.abs().max().item()}
    columns = {"first": first, "result": decoded, "second": second}
    return Outcome(columns, [figures], {"codes": codes})


@register_task(name="temperature")
def temperature(run: Run) -> Outcome:
    """The same codes, drawn from the prior, at each of `control.temperatures` a row."""
    options = run.config.control
    count = options.num_images
    noise = SampleNoise(run.config.seed, range(count), run.device)
    z = run.sde.prior_from_normal(noise(torch.empty(count, *run.shape, device=run.device)))
    rows = torch.stack([latent.temper(z, value) for value in options.temperatures])
    decoded = _decode(run, rows.flatten(0, 1), options.tolerance)
    results = decoded.unflatten(0, rows.shape[:2])
    spread = results.clamp(0, 1).std(dim=1).flatten(1).mean(1)
    figures = [
        {"temperature": float(value), "spread_between_images": one.item()}
        for value, one in zip(options.temperatures, spread, strict=True)
    ]
    return Outcome({"result": results}, figures)


@register_task(name="compare_codes")
def compare_codes(run: Run) -> Outcome:
    """Whether this network and that of `control.other` give images the same codes.  [S21, D.5]

    The last column decodes the code of one network by the other.
    """
    path, tolerance = run.config.control.other, run.config.control.tolerance
    if not path:
        raise ValueError(
            "control.task = 'compare_codes' needs control.other: the checkpoint of a network that "
            "was trained independently, for instance with another seed"
        )
    other = _other_run(run, path)
    if repr(other.sde) != repr(run.sde) or other.shape != run.shape:
        raise ValueError(
            f"{path} has codes of another process or shape: {other.sde} and "
            f"{other.shape}, not {run.sde} and {run.shape}"
        )
    images, _ = _inputs(run, least=2)
    ours = _encode(run, images, tolerance)
    theirs = _encode(other, images, tolerance)
    swapped = _decode(other, ours, tolerance)
    found = latent.code_correlation(ours, theirs)
    figures = {
        "images": len(images),
        "correlation_same_image": found.same.item(),
        "correlation_same_image_standard_error": found.same_error.item(),
        "correlation_other_images": found.other.item(),
        "correlation_other_images_standard_error": found.other_error.item(),
        "relative_distance": found.distance.item(),
    }
    columns = {"input": images, "own": _decode(run, ours, tolerance), "by_the_other": swapped}
    return Outcome(columns, [figures], {"codes": ours, "codes_of_the_other": theirs})


def _encode(run: Run, images: Tensor, tolerance: float) -> Tensor:
    return _follow(run, latent.get_encoder, run.scaler, images, tolerance)


def _decode(run: Run, codes: Tensor, tolerance: float) -> Tensor:
    return _follow(run, latent.get_decoder, run.inverse_scaler, codes, tolerance)


def _follow(run: Run, direction: Callable, scaler: Callable, x: Tensor, tolerance: float) -> Tensor:
    """The flow from x in a direction, by the network as it samples, batch by batch."""
    options = {"rtol": tolerance, "atol": tolerance, **run.reading}
    # per_sample: the code of an image does not depend on its batch.
    follow = direction(run.sde, scaler, per_sample=True, **options)
    with run.sampling_network() as model:
        parts = [follow(model, part)[0] for part in x.split(run.config.training.batch_size)]
    return torch.cat(parts)


# --- Shared by tasks ------------------------------------------------------------------------------


def _other_run(run: Run, path: str) -> Run:
    """The run in a checkpoint, with this run's precision and compilation of sampling."""
    other = from_checkpoint(path, run.device)
    for option in ("precision", "compile"):
        other.config.sampling[option] = run.config.sampling[option]
    return other


def _inputs(run: Run, least: int = 1) -> tuple[Tensor, Tensor | None]:
    """Images (n, *D) in [0, 1], as the network knows them, and their labels."""
    options = run.config.control
    found = read_inputs(run.config, options.path, options.num_images)
    images = found.images.to(run.device)
    if len(images) < least:
        raise ValueError(f"control.task = {options.task!r} needs at least {least} images")
    if run.config.data.uniform_dequantization:
        # The middle of each grey level of dequantised data.
        images = (images * (run.levels - 1) + 0.5) / run.levels
    # The class numbers of a folder are not those of the data set.
    return images, None if options.path else found.labels


def _draw(
    run: Run, rows: int, constrain: Callable[[Tensor], Sequence[Constraint]], **options
) -> Tensor:
    """`control.num_results` samples for each row, (rows, results, *D), in [0, 1].

    Args:
        constrain: from the rows (B,) of a batch of samples to their constraints.
        options: of the sampler.
    """
    results, parts = run.config.control.num_results, []
    for part in in_batches(range(rows * results), run.config.training.batch_size):
        constraints = constrain(torch.tensor(part) // results)
        parts.append(run.draw(part, constraints=constraints, **options))
        logging.info("%d of %d results", part[-1] + 1, rows * results)
    return torch.cat(parts).unflatten(0, (rows, results))
