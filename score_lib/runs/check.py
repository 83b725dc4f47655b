"""A config checked before a run, and how far its numbers can be trusted: `--mode check`."""

import functools
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch

from models.utils import get_model
from score_lib.checks.exact import told_by_time
from score_lib.checks.finding import NOTE, OK, WRONG, Finding, worst
from score_lib.checks.likelihood import log_likelihood
from score_lib.checks.network import cost
from score_lib.checks.process import few_entries, process
from score_lib.checks.sampling import corrector, order, order_of_steps, restoration, sampler
from score_lib.data.loading import DatasetInfo, get_streams
from score_lib.data.public import only_prepared
from score_lib.data.sources import MissingDataError, named
from score_lib.disk.files import write_text
from score_lib.disk.logs import kept_messages
from score_lib.inverse.restoration import build_restoration
from score_lib.metrics.configured import find_statistics
from score_lib.options import complete
from score_lib.runs.nearest import nearest_experiment
from score_lib.runs.quality import cost_of
from score_lib.runs.setup import Run, setup
from score_lib.runs.statistics import data_statistics
from score_lib.samplers.configured import get_sampling_fn
from score_lib.samplers.steps import NoneCorrector, get_corrector, get_predictor
from score_lib.scores import label_at
from score_lib.sdes.chain import Chain, Levels
from score_lib.sdes.process import SDE

# Data that stand for images in checks of processes and samplers.
SMALL = (1, 2, 2)
# Seconds for the measurement of training steps.
BUDGET = 8.0
# Solvers whose samples are a smooth function of the start, so that they have an order.
DETERMINISTIC = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m")


def check(config, workdir: str | os.PathLike = "") -> list[Finding]:
    """Check a config in under a minute, without a download, and print the findings.

    They are also in `check.json` in the workdir, if one is given.
    """
    try:
        run = setup(config)
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        findings = [Finding("config", WRONG, str(error))]
    else:
        parts = (_config, _network, _process, _samplers, _data)
        findings = [finding for part in parts for finding in part(run)]
        findings += _statistics(run, workdir) + _quality(run)
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


def _network(run: Run) -> list[Finding]:
    """Parameters, operations, attention; seconds a step, memory, and days for the whole run."""
    config, options = run.config, run.config.training
    t = torch.full((1,), 0.5 * run.sde.T)
    label = label_at(run.sde, t, **run.reading, dimensions=len(run.shape))
    build = functools.partial(get_model(config.model.name), config)
    condition = run.conditions.of_data(*_zeros(run, 1))
    found = cost(build, run.shape, label, condition)
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
    seconds, how = _seconds_a_step(run, found.operations)
    # Weights, gradients, two moments and the averages, in float32.
    averages = 1 + len(config.model.ema_rates) + len(options.posthoc_profiles)
    memory = (16 + 4 * averages) * found.parameters + found.activations * options.batch_size
    cost_text = (
        f"about {seconds:.3g} s a step of {options.batch_size} images on {run.device} ({how}), "
        f"{seconds * options.n_iters / 86400:.2g} days for {options.n_iters} steps; about "
        f"{memory / 2**30:.2g} GiB (estimated)"
    )
    short = config.optim.warmup >= options.n_iters
    if short:
        cost_text += f"; optim.warmup = {config.optim.warmup} steps are longer than training"
    return [
        Finding("network", NOTE if missing else OK, facts),
        Finding("training", NOTE if short else OK, cost_text),
    ]


def _seconds_a_step(run: Run, operations: int) -> tuple[float, str]:
    """Time of a training step, and how it was found."""
    batch_size = run.config.training.batch_size
    size = 1024
    a = torch.randn(size, size, device=run.device)
    product = min(_seconds(lambda: float((a @ a)[0, 0])) for _ in range(3))
    one = 3 * operations / (2 * size**3 / product)
    images = min(batch_size, max(1, int(BUDGET / 4 / one)))
    if 4 * one * images > 2 * BUDGET:
        return one * batch_size, "estimated from operations and the rate of a matrix product"
    run.add_optimizer()
    train_step, _ = run.step_fns()
    x, labels = _zeros(run, images)
    condition = run.conditions.of_data(x, labels)
    step = functools.partial(train_step, run.state, run.scaler(x), labels, condition)
    times = [_seconds(lambda: float(step())) for _ in range(4)][1:]
    how = f"measured on three steps of {images}"
    return min(times) * batch_size / images, how


def _zeros(run: Run, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Black images in [0, 1] and their labels."""
    images = torch.zeros(count, *run.shape, device=run.device)
    return images, torch.zeros(count, dtype=torch.int64, device=run.device)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _process(run: Run) -> list[Finding]:
    shape = SMALL if len(run.shape) == 3 else few_entries(run.shape)
    findings = process(run.sde, shape=shape, **run.reading)
    return findings + (log_likelihood(run.sde, shape) if run.objective == "score" else [])


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
    findings = sampler(build, sde, SMALL)
    steps = options.num_steps or run.sde.N
    if options.method == "pc":
        predictor = get_predictor(options.predictor)
        findings += order_of_steps(predictor, run.sde, steps, options.probability_flow, SMALL)
    if options.method == "pc" and get_corrector(options.corrector) is not NoneCorrector:
        findings += corrector(get_corrector(options.corrector), run.sde, options.snr, SMALL)
    if options.method in DETERMINISTIC and options.churn == 0:
        findings += order(
            lambda steps: build(exact, (64, *SMALL), steps=steps, denoise=False),
            run.sde,
            steps,
        )
    name = config.control.method

    def constrain(operator, y):
        return build_restoration(name, config, operator, y, 0.0, bounds=(-1.0, 1.0))

    try:
        return findings + restoration(build, sde, constrain)
    except (ValueError, NotImplementedError) as error:
        return [*findings, Finding("restoration", NOTE, str(error))]


def _chain(config, sde: SDE, levels: SDE, shape: tuple[int, ...], constraints=()) -> Callable:
    """The configured sampler of a chain, for an exact score told by the times of its levels."""
    exact = {"parametrization": "score", "clip": False, "constraints": constraints}
    # No exact score has learned variances.
    exact |= {"variance": "small"} if config.sampling.variance == "learned" else {}
    sample = get_sampling_fn(config, sde, shape, lambda x: x, sde.sampling_eps, **exact)
    return lambda score: sample(lambda x, label: score(x, sde.level_time(label.to(x))))


def _data(run: Run) -> list[Finding]:
    """Counts, classes and values of the data, if they are on this machine."""
    options = run.config.training
    try:
        with only_prepared(), kept_messages() as messages:
            _, _, info = get_streams(run.config, evaluation=True)
        if run.needs_labels:
            run.check_labels(info)
        train, test = (info.sources[split] for split in ("train", "test"))
        numbers = range(0, len(train), -(-len(train) // 256))
        pixels = train.images(np.asarray(numbers))
    except MissingDataError as error:
        return [Finding("data", NOTE, f"not looked at: {error}")]
    except (ValueError, OSError, ImportError) as error:
        return [Finding("data", WRONG, str(error))]
    low, high, most = pixels.min().item(), pixels.max().item(), info.levels - 1
    epochs = options.n_iters * options.batch_size / len(train)
    what = "sets of points" if run.kind == "points" else run.kind
    of = "" if run.continuous else f" of {most}"
    text = (
        f"{info.name}: {len(train)} {what} to train on, {len(test)} held out, {_classes(info)}; "
        f"values {low:.6g} to {high:.6g}{of} in a sample of {len(pixels)}; {epochs:.3g} epochs"
    )
    dark = high < most / 2 and not run.continuous
    said = [
        Finding("data", NOTE if message.levelno > logging.INFO else OK, message.getMessage())
        for message in messages
    ]
    text += "; no bright pixels" if dark else ""
    return [Finding("data", NOTE if dark else OK, text), *said]


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
            return [Finding("quality", OK, cost_of(run))]
    except MissingDataError as error:  # conditions of samples are of the data
        return [Finding("quality", NOTE, f"not looked at: {error}")]
    except ValueError as error:
        return [Finding("quality", WRONG, str(error))]
