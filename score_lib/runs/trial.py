"""A few steps of a config, timed, and the memory that they take: for estimates before a run."""

import bisect
import functools
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.precision import matmul_precision
from score_lib.base.memory import held_memory, peak_memory, reset_peak, total_memory
from score_lib.base.tensors import SampleNoise, derive_seed
from score_lib.base.threads import cores
from score_lib.checks.network import Cost
from score_lib.data.stream import ImageStream
from score_lib.disk.checkpoints import contents_of, write_contents
from score_lib.likelihood import value_and_divergence
from score_lib.runs.samples import save_samples
from score_lib.runs.setup import Run
from score_lib.scores import get_data_score_fn

# Seconds that the largest trial may take: four times a step of the batch that is tried.
BUDGET = 8.0
# Seconds for repetitions beyond three.
PATIENCE = 2.0
# Share of the memory of a machine that a trial may take.
SHARE = 0.5
# Evaluations of an adaptive solver on a trained network, which depend on the data.
LIKELIHOOD = 150
# A checkpoint of more bytes is written in part, and without a trial at so many bytes a second.
_WRITTEN, _WRITING = 64 << 20, 5e8


class Trial(NamedTuple):
    """Seconds and bytes of the parts of a run; "a datum" is an image or what the data are."""

    how: str
    step: float
    """A training step of a whole batch, with its data."""
    forward: float
    """An evaluation of the network for a datum, without gradients."""
    sampling: float
    """The same in the configured sampler, with what it computes itself."""
    likelihood: float
    """The same with the divergence that log-likelihoods need; 0: no measure needs it."""
    checkpoint: float
    pictures: float
    """Files of `sampling.num_samples` samples."""
    memory: int
    """The largest at one time: of the process on a CPU, of tensors on a GPU."""


def try_out(run: Run, cost: Cost, stream: ImageStream | None) -> Trial:
    """Make steps of as many data as the budget and the memory of the machine allow.

    Args:
        run: gets an optimiser; its weights change, and its step count does not.
        cost: of the network for one datum.
        stream: of the training data; None: they are not on this machine.
    """
    reset_peak(run.device)
    options, rate = run.config.training, _product_rate(run.device)
    state, kept = _bytes_of_state(run, cost)
    each = max(1, cost.activations) / options.grad_accumulation
    one = 3 * max(1, cost.operations) / rate  # a step is three forward passes
    room = SHARE * total_memory(run.device) - held_memory(run.device) - state
    count = min(options.batch_size, int(BUDGET / 4 / one), int(room / each))
    count = max(count, options.grad_accumulation)
    # The writer of checkpoints holds a copy on the host.
    copy = kept if run.device.type == "cpu" else 0
    if 4 * one * count > 2 * BUDGET or each * count > room:
        how = "estimated from operations and the rate of a matrix product"
        memory = held_memory(run.device) + state + int(each * options.batch_size) + copy
        step, written = one * options.batch_size, kept / _WRITING
        return Trial(how, step, one / 3, one / 3, one, written, 0.0, memory)
    run.add_optimizer()
    # Gradients and moments are added in the first step.
    before = held_memory(run.device) + 12 * cost.parameters
    step, number = _step(run, count, stream)
    memory = peak_memory(run.device)
    if count < options.batch_size:
        more = max(memory - before, int(each * count))
        memory = before + more * options.batch_size // count
    forward, sampling = _forward(run, count), _sampling(run, count)
    written, pictures = _checkpoint(run), _pictures(run)
    memory = max(memory, peak_memory(run.device)) + copy
    how, likelihood = f"measured on {number} steps of {count}", _likelihood(run, count, forward)
    return Trial(how, step, forward, sampling, likelihood, written, pictures, memory)


def _bytes_of_state(run: Run, cost: Cost) -> tuple[int, int]:
    """Weights, gradients, two moments and averages in float32; those of them in a checkpoint."""
    config = run.config
    averages = 1 + len(config.model.ema_rates) + len(config.training.posthoc_profiles)
    return (16 + 4 * averages) * cost.parameters, (12 + 4 * averages) * cost.parameters


def _product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a matrix product."""
    size = 1024
    a = torch.randn(size, size, device=device)
    return 2 * size**3 / min(_seconds(lambda: float((a @ a)[0, 0])) for _ in range(3))


def _step(run: Run, count: int, stream: ImageStream | None) -> tuple[float, int]:
    """Seconds of a training step of the whole batch, and how many steps were made for it."""
    config, (train_step, _) = run.config, run.step_fns()
    state = dict(run.state)  # these steps are none of the run's
    whole = count == config.training.batch_size
    batches = iter(stream) if whole and stream is not None else itertools.repeat(run.zeros(count))

    def step() -> float:
        torch.manual_seed(derive_seed(config.seed, "train", state["step"]))
        return float(train_step(state, *run.arguments(next(batches))))

    with matmul_precision(config.training.precision):
        taken, number = _median(step, PATIENCE / 2)
    if whole:
        return max(taken, _reading(run, stream)), number
    model, optimizer = run.state["model"], run.state["optimizer"]
    averages = [run.state["ema"], *([run.state["averages"]] if "averages" in run.state else ())]

    def update():  # whose time does not depend on the batch
        optimizer.step()
        for average in averages:
            average.update(model.parameters())

    fixed = min(taken, _median(update, PATIENCE / 16)[0])
    taken = fixed + (taken - fixed) * config.training.batch_size / count
    return max(taken, _reading(run, stream)), number


def _reading(run: Run, stream: ImageStream | None) -> float:
    """Seconds between two batches of the processes that read data."""
    if stream is None:
        return 0.0
    numbers = itertools.cycle(np.arange(len(stream.source)))
    size, workers = stream.batch_size, min(stream.num_workers, cores())

    def read():
        stream.source.read(np.fromiter(itertools.islice(numbers, size), dtype=np.int64))

    return _median(read, PATIENCE / 16)[0] / max(1, workers)


def _forward(run: Run, count: int) -> float:
    """Seconds of an evaluation of the network for a datum, in the loss of an evaluation."""
    _, eval_step = run.step_fns()
    x, labels, condition = run.arguments(run.zeros(count))
    with matmul_precision("float32"):
        work = functools.partial(eval_step, run.state, x, labels, condition)
        return _median(lambda: float(work()), PATIENCE / 8)[0] / count


def _sampling(run: Run, count: int) -> float:
    """Seconds of an evaluation in the sampler, for a datum."""
    if run.objective != "score":
        return 0.0
    count = min(count, run.config.sampling.num_samples)
    sampler = run.sampler(count, short=True)
    noise = SampleNoise(run.config.seed, range(count), run.device)
    condition = run.arguments(run.zeros(count))[2]

    def sample() -> int:
        with run.sampling_network() as network:
            return sampler(run.conditioned(network, condition), noise=noise)[1]

    return _median(sample, PATIENCE / 4)[0] / max(1, sample()) / count


def _likelihood(run: Run, count: int, forward: float) -> float:
    """Seconds of an evaluation with the divergence, for a datum; 0 if no measure needs it."""
    config = run.config
    if run.objective != "score" or not config.eval.enable_bpd:
        return 0.0
    exact = config.eval.hutchinson_type == "exact"
    number = math.prod(run.shape) if exact else config.eval.num_probes
    # A backward pass takes twice the time of a forward pass.
    count = max(1, min(count, int(BUDGET / 16 / (forward * (1 + 2 * number)))))
    x, _, condition = run.arguments(run.zeros(count))
    t, probes = torch.full((count,), run.sde.T, device=run.device), torch.ones(number, *x.shape)
    score_fn = get_data_score_fn(run.sde, run.network(condition), **run.reading)
    with matmul_precision("float32"):
        work = functools.partial(value_and_divergence, score_fn, x, t, probes.to(x))
        return _median(work, 0.0)[0] / count


def _pictures(run: Run) -> float:
    """Seconds to write the files of a snapshot's samples."""
    if run.objective != "score" or not run.config.training.snapshot_sampling:
        return 0.0
    samples = torch.zeros(run.config.sampling.num_samples, *run.shape)
    with tempfile.TemporaryDirectory() as folder:
        return _median(lambda: save_samples(pathlib.Path(folder) / "samples", samples, run), 0.0)[0]


def _checkpoint(run: Run) -> float:
    """Seconds to write the state, by a file of its first tensors."""
    tensors = [x for x in _tensors(contents_of(run.state)) if x.numel()]
    ends = list(itertools.accumulate(x.nbytes for x in tensors))
    part = max(1, bisect.bisect_right(ends, _WRITTEN))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint.pth"
        taken = _seconds(lambda: write_contents(path, {"part": tensors[:part]}))
    return taken * ends[-1] / ends[part - 1]


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _median(work: Callable[[], object], budget: float) -> tuple[float, int]:
    """Median seconds of calls after the first, and their number: three, or more in the budget."""
    work()
    taken, start = [], time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - start < budget and len(taken) < 100):
        taken.append(_seconds(work))
    return statistics.median(taken), len(taken)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
