"""A config checked before a run, and how far its numbers can be trusted: `--mode check`."""

import functools
import json
import logging
import os
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from models.utils import get_model
from score_lib.base import distributed
from score_lib.checks.exact import told_by_time
from score_lib.checks.finding import NOTE, OK, WRONG, Finding, worst
from score_lib.checks.likelihood import log_likelihood
from score_lib.checks.network import Cost, cost
from score_lib.checks.process import few_entries, process
from score_lib.checks.sampling import corrector, order, order_of_steps, restoration, sampler
from score_lib.data.loading import DatasetInfo, check_levels, get_streams
from score_lib.data.public import only_prepared
from score_lib.data.sources import MissingDataError, log_once, named
from score_lib.data.stream import ImageStream
from score_lib.disk.files import write_text
from score_lib.disk.logs import kept_messages
from score_lib.inverse.measurements import get_operator
from score_lib.inverse.restoration import build_restoration, get_restoration
from score_lib.metrics.configured import extractor_class, find_statistics
from score_lib.options import complete
from score_lib.runs import image_tasks, latent_tasks, quality  # noqa: F401  (tasks register)
from score_lib.runs.estimates import estimate, evaluation_text, memory_text, training_text
from score_lib.runs.history import changes, told
from score_lib.runs.nearest import nearest_experiment
from score_lib.runs.setup import Run, setup
from score_lib.runs.start import Resumed, load_latest, load_start
from score_lib.runs.statistics import data_statistics
from score_lib.runs.tasks import get_task
from score_lib.samplers.configured import get_sampling_fn
from score_lib.samplers.steps import NoneCorrector, get_corrector, get_predictor
from score_lib.scores import label_at
from score_lib.sdes.chain import Chain, Levels
from score_lib.sdes.process import SDE

# Solvers whose samples are a smooth function of the start, so that they have an order.
DETERMINISTIC = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m")


class Data(NamedTuple):
    """The data, if they are on this machine."""

    findings: list[Finding]
    stream: ImageStream | None = None
    """Of training."""
    sizes: Mapping[str, int] = types.MappingProxyType({})
    """Numbers of data by part."""
    class_to_idx: Mapping[str, int] = types.MappingProxyType({})
    """Labels by class."""


def check(config, workdir: str | os.PathLike = "") -> list[Finding]:
    """Check a config in under a minute, without a download, and print the findings.

    They are also in `check.json` in the workdir, if one is given.

    Raises:
        ValueError: there are several processes, of which each would time other numbers of steps,
            and wait for the others.
    """
    distributed.check_alone("check")
    try:
        run = setup(config)
        data = data_of(run)
        findings = _config(run) + _names(run.config) + _network(run, data)
        findings += _process(run) + _samplers(run) + data.findings
        findings += _statistics(run, workdir) + _quality(run) + _start(run, data, workdir)
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        # Also of a network that cannot be built, or of a batch that cannot be read.
        findings = [Finding("config", WRONG, str(error))]
    rows = [finding._asdict() for finding in findings]
    if workdir:
        write_text(pathlib.Path(workdir) / "check.json", json.dumps(rows, indent=2) + "\n")
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{f.state:>5}  {f.subject:<{width}}  {f.text}" for f in findings]
    logging.info("checked: %s\n%s", worst(findings), "\n".join(lines))
    return findings


def _config(run: Run) -> list[Finding]:
    """The shipped experiment that a config is nearest to, and the differences."""
    return [Finding("config", OK, nearest_experiment(run.config).text(most=12))]


def _names(config) -> list[Finding]:
    """Unknown names that only another mode would look up, or another method of sampling."""
    sampling, control = config.sampling, config.control
    lookups = {
        "sampling.predictor": (get_predictor, sampling.predictor),
        "sampling.corrector": (get_corrector, sampling.corrector),
        "control.task": (get_task, control.task),
        "control.operator": (get_operator, control.operator),
        "control.method": (get_restoration, control.method),
        "eval.extractor": (extractor_class, config.eval.extractor),
    }
    findings = []
    for option, (lookup, name) in lookups.items():
        try:
            if name:
                lookup(name)
        except ValueError as error:
            findings.append(Finding("names", WRONG, f"{option}: {error}"))
    return findings


def _network(run: Run, data: Data) -> list[Finding]:
    """Parameters, operations, attention; time and memory of training and evaluation."""
    config, options = run.config, run.config.training
    found = cost_of(run)
    attention = ", ".join(f"{n} at {side}" for side, n in found.attention.items()) or "none"
    facts = (
        f"{config.model.name}: {found.parameters / 1e6:.2f} M parameters, "
        f"{found.operations / 1e9:.3g} GFLOP an image; attention blocks: {attention}"
    )
    asked = set(config.model.attn_resolutions if "attn_resolutions" in config.model else ())
    there = {int(side.partition("x")[0]) for side in found.attention}
    missing = sorted(asked - there)
    if missing:
        facts += f"; model.attn_resolutions = {missing} match no feature map"
    expected = estimate(run, found, data.stream, data.sizes)
    training, evaluation = training_text(run, expected), evaluation_text(run, expected)
    if data.stream is None:
        training += "; without reading the data, which are not here"
    short = [
        f"optim.{name} = {config.optim[name]} steps are longer than training"
        for name in ("warmup", "cooldown")
        if config.optim[name] >= options.n_iters
    ]
    training = "; ".join([training, *short])
    memory, fits = memory_text(run, expected)
    return [
        Finding("network", NOTE if missing else OK, facts),
        Finding("training", NOTE if short else OK, training),
        Finding("memory", OK if fits else NOTE, memory),
        *([Finding("evaluation", OK, evaluation)] if evaluation else []),
    ]


def cost_of(run: Run) -> Cost:
    """The cost of the network for one datum."""
    t = torch.full((1,), 0.5 * run.sde.T)
    label = label_at(run.sde, t, **run.reading, dimensions=len(run.shape))
    build = functools.partial(get_model(run.config.model.name), run.config)
    return cost(build, run.shape, label, run.arguments(run.zeros(1))[2])


def _process(run: Run) -> list[Finding]:
    shape = _stand_in(run)
    findings = process(run.sde, shape=shape, **run.reading)
    if run.objective == "score":
        return findings + log_likelihood(run.sde, shape)
    # A classifier is told the noise level by a convention of its own, and predicts classes.
    return [one for one in findings if one.subject != "convention" or one.state != OK]


def _stand_in(run: Run) -> tuple[int, ...]:
    """D of what stands for data in checks of processes and samplers: of their rank, since a
    process of one's own may broadcast for no other."""
    return (1, 2, 2) if len(run.shape) == 3 else few_entries(run.shape)


def _samplers(run: Run) -> list[Finding]:
    """The configured sampler, corrector, solver and restoration method on exact scores."""
    if run.objective != "score":
        return []
    config, options, exact = complete(run.config), run.config.sampling, told_by_time(run.sde)
    with config.unlocked():
        config.model.parametrization = ""  # the exact network gives the score itself

    def build(sde, shape, constraints=(), **keywords) -> Callable:
        eps = sde.sampling_eps
        keywords = {"continuous": True, "constraints": constraints, **keywords}
        return get_sampling_fn(config, sde, shape, lambda x: x, eps, **keywords)

    sde = run.sde
    if options.method == "chain":
        sde, build = Levels(sde, Chain(sde)), functools.partial(_chain, config, sde)
    shape = _stand_in(run)
    findings = sampler(build, sde, shape)
    steps = options.num_steps or run.sde.N
    if options.method == "pc":
        predictor = get_predictor(options.predictor)
        findings += order_of_steps(predictor, run.sde, steps, options.probability_flow, shape)
    if options.method == "pc" and get_corrector(options.corrector) is not NoneCorrector:
        findings += corrector(get_corrector(options.corrector), run.sde, options.snr, shape)
    if options.method in DETERMINISTIC and options.churn == 0:
        findings += order(
            lambda steps: build(exact, (64, *shape), steps=steps, denoise=False),
            run.sde,
            steps,
            shape,
        )
    return findings + _restoration(config, build, sde, len(shape))


def _restoration(config, build: Callable, sde: SDE, dimensions: int) -> list[Finding]:
    """The configured restoration method, by the sampler that `build` makes."""

    def constrain(operator, y):
        method = config.control.method
        return build_restoration(method, config, operator, y, 0.0, bounds=(-1.0, 1.0))

    try:
        return restoration(build, sde, constrain, dimensions)
    except (ValueError, NotImplementedError) as error:
        return [Finding("restoration", NOTE, str(error))]


def _chain(config, sde: SDE, levels: SDE, shape: tuple[int, ...], constraints=()) -> Callable:
    """The configured sampler of a chain, for an exact score told by the times of its levels."""
    exact = {"parametrization": "score", "clip": False, "constraints": constraints}
    # No exact score has learned variances.
    exact |= {"variance": "small"} if config.sampling.variance == "learned" else {}
    sample = get_sampling_fn(config, sde, shape, lambda x: x, sde.sampling_eps, **exact)
    return lambda score: sample(lambda x, label: score(x, sde.level_time(label.to(x))))


def data_of(run: Run) -> Data:
    """Counts, classes and values of the data, if they are on this machine."""
    options = run.config.training
    log_once.cache_clear()  # a second check tells it all again
    dequantize = run.config.data.uniform_dequantization
    try:
        with only_prepared(), kept_messages() as messages:
            stream, _, info = get_streams(run.config, dequantize, device=run.device)
        check_levels(run.config, info)
        if run.needs_labels:
            run.check_labels(info)
        train, test = (info.sources[split] for split in ("train", "test"))
        numbers = range(0, len(train), -(-len(train) // 256))
        pixels = train.images(np.asarray(numbers))
    except MissingDataError as error:
        return Data([Finding("data", NOTE, f"not looked at: {error}")])
    except (ValueError, OSError, ImportError) as error:
        return Data([Finding("data", WRONG, str(error))])
    low, high, most = pixels.min().item(), pixels.max().item(), info.levels - 1
    epochs = options.n_iters * options.batch_size / len(train)
    kind = "sets of points" if run.kind == "points" else run.kind
    of = "" if run.continuous else f" of {most}"
    text = (
        f"{info.name}: {len(train)} {kind} to train on, {len(test)} held out, {_classes(info)}; "
        f"values {low:.6g} to {high:.6g}{of} in a sample of {len(pixels)}; {epochs:.3g} epochs"
    )
    dark = high < most / 2 and not run.continuous
    said = [
        Finding("data", NOTE if message.levelno > logging.INFO else OK, message.getMessage())
        for message in messages
    ]
    text += "; no bright pixels" if dark else ""
    sizes = {split: len(source) for split, source in info.sources.items()}
    findings = [Finding("data", NOTE if dark else OK, text), *said]
    return Data(findings, stream, sizes, info.class_to_idx)


def _classes(info: DatasetInfo) -> str:
    if info.num_classes < 2:
        return "no classes"
    names = f" ({named(info.class_to_idx)})" if info.class_to_idx else ""
    return f"{info.num_classes} classes{names}"


def _statistics(run: Run, workdir: str | os.PathLike) -> list[Finding]:
    """The statistics that samples would be compared with."""
    if run.objective != "score" or not run.pictures:
        return []
    try:
        stats = data_statistics(run, workdir or None)
        path = find_statistics(run.config, workdir or None)
    except FileNotFoundError as error:
        return [Finding("statistics", NOTE, str(error))]
    except ValueError as error:
        return [Finding("statistics", WRONG, str(error))]
    text = f"{path}: {stats.describe()}"
    return [
        Finding("statistics", OK if stats.means is not None and stats.made_by() else NOTE, text)
    ]


def _quality(run: Run) -> list[Finding]:
    """The cost of measurements while training."""
    if not run.config.training.metrics_freq:
        return []
    try:
        with only_prepared():
            return [Finding("quality", OK, quality.cost_of(run))]
    except MissingDataError as error:  # conditions of samples are of the data
        return [Finding("quality", NOTE, f"not looked at: {error}")]
    except ValueError as error:
        return [Finding("quality", WRONG, str(error))]


def _start(run: Run, data: Data, workdir: str | os.PathLike) -> list[Finding]:
    """The checkpoint that training goes on from, or the weights that it starts from.

    They are loaded into the run: the last of all checks.
    """
    config, state, changed, resumed = run.config, run.state, {}, Resumed()
    run.add_optimizer()
    try:
        with kept_messages() as messages:
            if workdir:
                resumed = load_latest(config, state, run.device, pathlib.Path(workdir))
                run.check_classes(data.class_to_idx)
                changed = {} if resumed.config is None else changes(resumed.config, config)
            elif config.model.weights:
                load_start(config, state, run.device)
    except (OSError, ValueError) as error:
        return [Finding("start", WRONG, str(error))]
    text = "training starts from scratch"
    if resumed.path is not None:
        text = f"training goes on after step {state['step']} of {config.training.n_iters}"
        text += f", with {told(changed)}" if changed else ""
    elif start := state.get("start"):
        text = f"training starts from the weights in {start['weights']} ({start['digest']})"
    warnings = [m.getMessage() for m in messages if m.levelno > logging.INFO]
    return [
        Finding("start", NOTE if changed else OK, text),
        *(Finding("start", NOTE, warning) for warning in warnings),
    ]
