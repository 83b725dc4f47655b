"""Tasks of `--mode control` that sample: inverse problems, classes, and editing."""

import functools
import logging
from typing import NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from models.conditioning import Condition
from score_lib.base.registry import Registry
from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.data.inputs import read_mask
from score_lib.inverse.conditions import ClassGuidance, StartFrom
from score_lib.inverse.measurements import GrayScale, Mask, build_operator
from score_lib.inverse.operators import OPERATORS, LinearOperator, measure
from score_lib.inverse.rescaled import Rescaled, rescaled
from score_lib.inverse.restoration import RESTORATIONS, STANDARDIZED, build_restoration
from score_lib.options import complete, flatten
from score_lib.runs.conditions import check_told_operator
from score_lib.runs.setup import Run
from score_lib.runs.tasks import (
    Outcome,
    as_here,
    closeness,
    draw,
    given_labels,
    interval_coverage,
    other_run,
    psnr,
    read_images,
    recognised,
    register_task,
)
from score_lib.runs.trained import weights_record
from score_lib.samplers.configured import follows_flow
from score_lib.samplers.loop import Constraint, Noise
from score_lib.sdes.process import SDE

# --- Inverse problems -----------------------------------------------------------------------------


@register_task(name="inpaint")
def inpaint(run: Run) -> Outcome:
    """Fill in the open part of a mask: `control.mask`, or the operator (the right half)."""
    return restore(run, operator="half", kind=Mask)


@register_task(name="colorize")
def colorize(run: Run) -> Outcome:
    """Colour gray images."""
    if run.shape[0] == 1:
        raise ValueError(
            "control.task = 'colorize' needs images of several channels, and the model's have one: "
            "try the config configs/vp/color_digits.py"
        )
    return restore(run, operator="gray", kind=GrayScale)


@register_task(name="restore")
def restore(
    run: Run, operator: str = "super_resolution", kind: type[LinearOperator] = LinearOperator
) -> Outcome:
    """Undo a linear measurement, `control.operator`, by the method `control.method`.

    Args:
        operator: used where that option is "".
        kind: of measurements that the task is for.
    Raises:
        ValueError: another measurement, or options of other measurements or methods.
    """
    options = run.config.control
    operator = _operator(run, operator, kind)
    _refuse_unread(run.config, RESTORATIONS, "control.method", options.method)
    images, labels, condition = read_images(run)
    if follows_flow(run.config) and options.method != "none":
        logging.info(
            "sampling.method = %r follows the flow; with noise at every step images were restored "
            "better: --config.sampling.method=dpmpp_sde --config.sampling.num_steps=40",
            run.config.sampling.method,
        )
    view = _view(run, operator)
    noise_std = options.noise_std * view.unit
    noise = SampleNoise(derive_seed(run.config.seed, "measurement"), range(len(images)), run.device)
    y = measure(view.operator, run.scaler(images), noise_std, noise)
    build = functools.partial(build_restoration, options.method, run.config, view.operator)

    def constrain(rows: Tensor) -> list[Constraint]:
        return [build(y[rows], noise_std, bounds=view.bounds)]

    results = draw(run, len(images), _told(run, view, y, condition), constrain)
    shown = run.inverse_scaler(view.operator.picture(y, fill=view.middle))
    measured = view.operator.apply(run.scaler(results.flatten(0, 1)))
    residual = measured - y.repeat_interleave(results.shape[1], dim=0)
    # A mask measures some entries of y, and the noise is theirs.
    entries = view.operator.observed(torch.ones_like(residual)).sum().clamp(min=1)
    figures = {
        "operator": type(operator).__name__,
        "method": options.method,
        "noise_std": float(options.noise_std),
        "residual": (residual.square().sum() / entries).sqrt().item() / view.unit,
        **closeness(run, "measurement", shown[:, None], images),
        **_psnr_of_bicubic(run, y, images),
        **closeness(run, "", results, images),
        **closeness(run, "of_mean", results.mean(1, keepdim=True), images),
        **recognised(run, results, labels, of_images=True),
    }
    if run.continuous:
        y = y + operator.apply(run.inverse_scaler(torch.zeros_like(images[:1]))).to(y)
        figures |= interval_coverage(results, images, _known(operator, options.noise_std))
    arrays = {"y": y, "labels": labels}
    return Outcome({"input": images, "measurement": shown, "result": results}, [figures], arrays)


def _known(operator: LinearOperator, noise_std: float) -> Tensor:
    """Which entries of D a measurement leaves no doubt of, (*D) bool."""
    if isinstance(operator, Mask) and noise_std == 0:
        return operator.mask[0]
    return torch.zeros(operator.shape, dtype=torch.bool)


class View(NamedTuple):
    """A measurement as it is one of the network's range.

    Attributes:
        operator: of data in that range; less a constant, for continuous data.
        unit: of the measurement, in that of the option `control.noise_std`.
        bounds: of the data in that range, if there are any.
        middle: what is shown where nothing is known.
    """

    operator: LinearOperator
    unit: float
    bounds: tuple[float, float] | None
    middle: float


def _view(run: Run, operator: LinearOperator) -> View:
    if run.continuous:
        bounds = None if run.config.data.standardize == "none" else STANDARDIZED
        return View(rescaled(operator, run.scaler.std), 1.0, bounds, 0.0)
    low, high = (run.scaler(torch.tensor(end)).item() for end in (0.0, 1.0))
    return View(operator, high - low, (low, high), (low + high) / 2)


def _told(run: Run, view: View, y: Tensor, condition: Condition) -> Condition:
    """The condition of images; of a network that is told y, with its noise.

    Without noise, it is that of these images already.
    """
    if run.conditions.operator is None or run.config.control.noise_std == 0:
        return condition
    if isinstance(view.operator, Rescaled):
        y = view.operator.in_own_units(y)
    return {**condition, "image": run.conditions.of_measurement(y)}


def _psnr_of_bicubic(run: Run, y: Tensor, images: Tensor) -> dict[str, float]:
    """Of the usual interpolation, where the measurement is a small image."""
    if not run.pictures or y.dim() != 4 or y.shape[2:] == images.shape[2:]:
        return {}
    enlarged = nn.functional.interpolate(run.inverse_scaler(y), images.shape[2:], mode="bicubic")
    return psnr("psnr_bicubic", enlarged[:, None], images)


def _operator(run: Run, default: str, kind: type[LinearOperator]) -> LinearOperator:
    """The measurement in force, of a kind, whose options alone are set."""
    options, told = run.config.control, run.conditions.operator
    source, name = "control.operator", options.operator or default
    if told is not None:
        check_told_operator(run.config)
        source, name = "training.condition_operator", run.config.training.condition_operator
    elif options.mask:
        source, name = "control.mask", options.mask
    _refuse_unread(run.config, OPERATORS, source, name)
    operator = _built(run, name) if told is None else told
    if not isinstance(operator, kind):
        raise ValueError(
            f"control.task = {options.task!r} is for other measurements: with {source} = {name!r}, "
            "set control.task = 'restore'"
        )
    return operator


def _built(run: Run, name: str) -> LinearOperator:
    """The measurement of `control.mask`, or else of a name."""
    options = run.config.control
    if options.method == "none":
        raise ValueError(
            "control.method = 'none' needs a network that is told the measurement: train with "
            "training.condition = 'image', or choose the method 'pigdm'"
        )
    if options.mask:
        if options.operator:
            raise ValueError(
                f"control.mask and control.operator = {options.operator!r} exclude each other: a "
                "mask is an operator itself"
            )
        return Mask(run.shape, read_mask(options.mask, run.shape))
    return build_operator(name, run.config, run.shape)


def _refuse_unread(config: ConfigDict, registry: Registry, source: str, name: str) -> None:
    """Refuse options that other entries of a registry read, and the one in force does not.

    Args:
        source: the option that chose the entry, which is none of the registry for a mask.
        name: its value.
    Raises:
        ValueError: such an option has another value than its default.
    """
    given, defaults = flatten(config), flatten(complete({}))
    read = set() if source == "control.mask" else {*registry.feeds(name).values()}
    for other in registry:
        for option in sorted({*registry.feeds(other).values()} - read):
            value = given[option]
            if option.startswith("control.") and value != defaults.get(option, value):
                raise ValueError(
                    f"{option} = {value!r} is an option of {other!r}, and {source} = {name!r} "
                    f"does not read it: leave it at {defaults[option]!r}, or choose {other!r}"
                )


# --- Classes --------------------------------------------------------------------------------------


@register_task(name="class")
def conditional(run: Run) -> Outcome:
    """Samples of given classes: `control.labels`, or of each class a row."""
    by_condition = "classes" in run.conditions.kinds and not run.config.control.classifier
    labels, results, figures = (_by_condition if by_condition else _by_classifier)(run)
    figures |= recognised(run, results, labels, of_images=False)
    return Outcome({"result": results}, [figures], {"labels": labels})


def _by_condition(run: Run) -> tuple[Tensor, Tensor, dict]:
    """Classes, samples of them by a network that is told these, and how they are guided."""
    labels = given_labels(run, run)
    results = draw(run, len(labels), _of_classes(run, labels))
    return labels, results, {"guidance_scale": float(run.config.sampling.guidance_scale)}


def _by_classifier(run: Run) -> tuple[Tensor, Tensor, dict]:
    """The same of samples that a classifier guides."""
    options = run.config.control
    classifier = _classifier(run, options.classifier)
    labels = given_labels(run, classifier)
    condition = _told_beside(run, labels)
    scale = options.guidance_scale
    settings = {
        "until": options.guidance_until,
        "continuous": classifier.config.training.continuous,
    }
    with classifier.sampling_network() as network:

        def guidance(rows: Tensor) -> list[Constraint]:
            return [ClassGuidance(network, labels[rows], scale, **settings)]

        results = draw(run, len(labels), condition, guidance)
    figures = {"guidance_scale": float(scale), "classifier": weights_record(classifier)}
    return labels, results, figures


def _told_beside(run: Run, labels: Tensor) -> Condition | None:
    """The condition of rows that a classifier guides to labels; None if the network takes no class.

    The network may have other numbers than the classifier for the names in `control.labels`.

    Raises:
        ValueError: the network has other classes.
    """
    if "classes" not in run.conditions.kinds:
        return None
    told = given_labels(run, run)
    if len(told) != len(labels):
        raise ValueError(
            f"the classifier tells {len(labels)} classes apart, and the network {len(told)}: set "
            "control.labels to classes that both know"
        )
    return _of_classes(run, told)


def _of_classes(run: Run, labels: Tensor) -> Condition:
    return run.arguments({**run.zeros(len(labels)), "label": labels})[2]


def _classifier(run: Run, path: str) -> Run:
    """The classifier in a checkpoint, if it knows this run's noisy images."""
    if not path:
        raise ValueError(
            "control.task = 'class' needs control.classifier: the checkpoint of a classifier, "
            "trained with a config such as configs/vp/digits_classifier.py"
        )
    classifier = other_run(run, path, run.config.control.classifier_config)
    if classifier.objective != "classifier":
        raise ValueError(
            f"control.classifier = {path!r} holds a network of training.objective = "
            f"{classifier.objective!r}: give a checkpoint of a classifier"
        )
    same = {
        "process": (repr(run.sde), repr(as_here(run, classifier))),
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


# --- Editing --------------------------------------------------------------------------------------


class FirstTime(Constraint):
    """No condition: notes where sampling starts, which only the sampler knows.

    Attributes:
        sde: the process, or a chain's levels of it.
        t: the first time, (1,).
    """

    def start(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        self.sde, self.t = sde, t[:1]
        return x


@register_task(name="edit")
def edit(run: Run) -> Outcome:
    """Add noise to images up to `control.start_time`, and sample from there."""
    start_time = _start_time(run)
    images, labels, condition = read_images(run)
    x, first = run.scaler(images), FirstTime()

    def constrain(rows: Tensor) -> list[Constraint]:
        return [first, StartFrom(x[rows])]

    results = draw(run, len(x), condition, constrain, start_time=start_time)
    noise = SampleNoise(derive_seed(run.config.seed, "shown"), range(len(x)), run.device)
    noisy = StartFrom(x).start(first.sde, x, first.t.expand(len(x)), noise)
    figures = {"start_time": float(start_time), **closeness(run, "", results, images)}
    figures |= recognised(run, results, labels, of_images=True)
    columns = {"input": images, "noisy": run.inverse_scaler(noisy), "result": results}
    return Outcome(columns, [figures], {"labels": labels})


def _start_time(run: Run) -> float:
    """`control.start_time`, if the configured sampler can start there.

    Raises:
        ValueError: it cannot.
    """
    start_time, sde = run.config.control.start_time, run.sde
    try:
        sde.check_times(0.0, start_time)  # a chain would start at T
        run.sampler(1, start_time=start_time)
    except ValueError as error:
        raise ValueError(
            f"control.start_time = {start_time:g}: choose a time from {sde.sampling_eps:g}, where "
            f"sampling stops, to T = {sde.T:g} ({error})"
        ) from error
    return start_time
