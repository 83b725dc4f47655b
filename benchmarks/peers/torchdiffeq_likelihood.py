"""Bits/dim of a trained network by torchdiffeq, as tutorials write it, and by the project.

    runs/peers/env/bin/python -m benchmarks.peers.torchdiffeq_likelihood \\
        --config vp/fashion_mnist_conditional --workdir runs/fashion

Both solve the same flow for the same images and probes, with Hutchinson's trace from one product a
call: torchdiffeq to tolerances, the project in numbers of steps, as an evaluation calls it.  Errors
are root mean square differences, in bits/dim, from the project's solution in four times the largest
number of steps, with the same probes; that of one probe is beside them.  "times as long" compares
times at equal error: ours is interpolated between its numbers of steps, on logarithmic scales.  It
is the median over those batches whose errors lie between errors of ours.  Times are those in which
this process is busy, so that other programs do not count.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import busy_seconds, median_ratio, show
from benchmarks.variants import with_settings
from likelihood import bits_per_dim, get_likelihood_fn
from models.conditioning import Condition, given
from models.utils import get_score_fn
from run_lib import Run, restored
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.tensors import batch_mul
from score_lib.runs.heldout import HeldOut
from score_lib.runs.measures import likelihood_terms

EPS = 1e-5  # the first time, as published
FINER = 4  # times as many steps for the reference; its error is about 1000 times smaller
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Dequantised held-out images in the network's range and a Rademacher probe, (B, *D)."""

    data: Tensor
    probe: Tensor
    condition: Condition
    levels: int


class Found(NamedTuple):
    """Of one solution: seconds, bits/dim (B,), and evaluations of the network."""

    seconds: float
    bits: Tensor
    evaluations: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/fashion_mnist_conditional", help="an experiment")
    parser.add_argument("--workdir", default="runs/fashion", help="folder of a trained run")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96])
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = [f"eval.batch_size={options.batch_size}", "device=cpu", *options.set]
    run = restored(with_settings(options.config, settings), options.workdir)
    run.state["ema"].copy_to(run.state["model"].parameters())
    run.state["model"].eval()
    torch.manual_seed(run.config.seed)
    batches = batches_of(run, options.batches)
    found = solutions(run, batches, sorted(options.tolerances, reverse=True), options.steps)
    error = probe_error(run, batches[0])
    show("likelihood by torchdiffeq", CPU, against(found), error_of_one_probe=error)
    show(
        "likelihood in steps",
        CPU,
        [row("steps", steps, found["ours"][steps]) for steps in options.steps],
    )


def batches_of(run: Run, count: int) -> list[Batch]:
    """The first held-out images, in batches of `eval.batch_size`."""
    held_out = HeldOut(run, "test", True, count=count * run.config.eval.batch_size)
    found = []
    for number in range(count):
        data, _, condition = held_out.read(number)
        found.append(Batch(data, torch.randn_like(data).sign(), condition, held_out.levels))
    return found


def solutions(
    run: Run, batches: list[Batch], tolerances: list[float], steps: list[int]
) -> dict[str, dict[float, list[tuple[Found, float]]]]:
    """Solutions and their errors, one a batch, of "theirs" by tolerance and of "ours" by steps."""
    by_torchdiffeq(run, batches[0], 0.1)  # warm-up
    by_us(run, batches[0], 8)
    theirs = {tolerance: [] for tolerance in tolerances}
    ours = {count: [] for count in steps}
    for batch in batches:
        exact = by_us(run, batch, FINER * max(steps)).bits
        for tolerance, found in theirs.items():
            one = by_torchdiffeq(run, batch, tolerance)
            found.append((one, off(one, exact)))
        for count, found in ours.items():
            one = by_us(run, batch, count)
            found.append((one, off(one, exact)))
    return {"theirs": theirs, "ours": ours}


def off(found: Found, exact: Tensor) -> float:
    """Root mean square error over a batch, in bits/dim."""
    return float((found.bits - exact).square().mean().sqrt())


def row(setting: str, value: float, found: list[tuple[Found, float]]) -> dict[str, float]:
    """Medians over batches."""
    return {
        setting: f"{value:g}",
        "s": float(np.median([one.seconds for one, _ in found])),
        "evaluations": float(np.median([one.evaluations for one, _ in found])),
        "1e-3 bits/dim": 1e3 * float(np.median([error for _, error in found])),
    }


def against(found: dict) -> list[dict]:
    """A row for each tolerance of theirs, with the ratio of times at equal error."""
    records = []
    for tolerance, theirs in found["theirs"].items():
        record, ratios = row("tolerance", tolerance, theirs), []
        for number, (one, error) in enumerate(theirs):
            ours = [batches[number] for batches in found["ours"].values()]
            time = time_at(error, [e for _, e in ours], [o.seconds for o, _ in ours])
            ratios += [] if time is None else [one.seconds / time]
        if ratios:
            value, spread = median_ratio(ratios)
            record |= {"times as long": value, "batches": len(ratios)}
            record |= {"times as long_standard_error": spread} if len(ratios) > 1 else {}
        records.append(record)
    return records


def time_at(error: float, errors: list[float], times: list[float]) -> float | None:
    """The time at which an error is reached, between neighbouring ones; None outside of them."""
    order = np.argsort(errors)
    known, taken = np.log(np.array(errors)[order]), np.log(np.array(times)[order])
    if not known[0] <= math.log(error) <= known[-1]:
        return None
    return float(np.exp(np.interp(math.log(error), known, taken)))


def timed(work: Callable[[], tuple[Tensor, int]]) -> Found:
    """The result of a call, with its time."""
    kept = []
    seconds = busy_seconds(lambda: kept.append(work()), CPU)
    bits, evaluations = kept[0]
    return Found(seconds, bits.double(), evaluations)


def by_us(run: Run, batch: Batch, steps: int) -> Found:
    """By the project, as an evaluation calls it."""
    likelihood_fn = get_likelihood_fn(
        run.sde, run.inverse_scaler, levels=batch.levels, eps=EPS, steps=steps, **run.reading
    )
    network = run.network(batch.condition)

    def work() -> tuple[Tensor, int]:
        bits, _, evaluations = likelihood_fn(network, batch.data, noise=lambda _: batch.probe)
        return bits, evaluations

    return timed(work)


def by_torchdiffeq(run: Run, batch: Batch, tolerance: float) -> Found:
    """By `odeint` with dopri5, over the state of images and log density."""
    from torchdiffeq import odeint

    data, probe, count = batch.data, batch.probe, 0
    score_fn = get_score_fn(run.sde, given(run.state["model"], batch.condition), **run.reading)

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            times = t.expand(len(x))
            drift, diffusion = run.sde.sde(x, times)
            drift = drift - 0.5 * batch_mul(diffusion**2, score_fn(x, times))
            (product,) = torch.autograd.grad(drift, x, probe)
        return drift.detach(), (product * probe).flatten(1).sum(1)

    def work() -> tuple[Tensor, int]:
        start, times = (data, data.new_zeros(len(data))), torch.tensor([EPS, run.sde.T])
        x, change = odeint(slope, start, times, rtol=tolerance, atol=tolerance, method="dopri5")
        log_p = run.sde.prior_logp(x[-1]) + change[-1]
        return bits_per_dim(log_p, data[0].numel(), run.inverse_scaler, batch.levels), count

    return timed(work)


def probe_error(run: Run, batch: Batch, probes: int = 4) -> float:
    """Root mean square error of bits/dim of an image by one probe, from the spread of several."""
    run.config.eval.num_probes = probes
    terms = likelihood_terms(run, batch.data, batch.levels, torch.randn_like, batch.condition)
    nats = terms["standard_error"] * math.sqrt(probes)
    return float(np.sqrt(np.mean(nats**2)) / (batch.data[0].numel() * math.log(2)))


if __name__ == "__main__":
    with brief_mistakes():
        main()
