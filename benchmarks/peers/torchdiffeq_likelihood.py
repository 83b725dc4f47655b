"""Bits/dim of a trained network by torchdiffeq, as tutorials write it, and by the project.

    runs/peers/env/bin/python -m benchmarks.peers.torchdiffeq_likelihood --workdir runs/peers

Both solve the same flow for the same images and probes, with Hutchinson's trace from one product a
call: torchdiffeq to tolerances, the project in numbers of steps.  Errors are root mean square
differences, in bits/dim, from the project's own adaptive solution in float64 to a hundredth of the
smallest tolerance, with the same probes; that of one probe is beside them.  "times as long"
compares times at equal error: ours is interpolated between its numbers of steps, on logarithmic
scales.  It is the median over those batches whose errors lie between errors of ours.  Times are
those in which this process is busy, so that other programs do not count.
"""

import argparse
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.measure import busy_seconds, median_ratio, show
from benchmarks.peers import shared
from benchmarks.peers.plain_loop import EPS, marginal
from likelihood import bits_per_dim, get_likelihood_fn
from run_lib import Run, restored
from score_lib.options import complete
from score_lib.runs.measures import likelihood_terms

FINER = 100  # times the tolerance of the reference
CPU = torch.device("cpu")


class Found(NamedTuple):
    """Of one solution: seconds, bits/dim (B,), and evaluations of the network."""

    seconds: float
    bits: Tensor
    evaluations: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/peers", help="folder of a comparison")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96])
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    workdir = pathlib.Path(given.workdir)
    config: ConfigDict = complete(json.loads((workdir / "config.json").read_text()))
    run = restored(config, workdir / "ours")
    run.state["ema"].copy_to(run.state["model"].parameters())
    run.state["model"].eval()
    images = shared.load_images(workdir / "images.npz")
    torch.manual_seed(config.seed)
    batches = [batch_of(run, images, given.batch_size, k) for k in range(given.batches)]
    tolerances = sorted(given.tolerances, reverse=True)
    found = solutions(run, images.levels, batches, tolerances, given.steps)
    error = probe_error(run, images.levels, batches[0][0])
    show("likelihood by torchdiffeq", CPU, against(found), error_of_one_probe=error)
    show(
        "likelihood in steps",
        CPU,
        [row("steps", steps, found["ours"][steps]) for steps in given.steps],
    )


def batch_of(run: Run, images: shared.Images, size: int, number: int) -> tuple[Tensor, Tensor]:
    """Dequantised held-out images in the network's range and a Rademacher probe, (B, C, H, W)."""
    grey = images.test[number * size : (number + 1) * size].float()
    if len(grey) < size:
        raise ValueError(f"there are fewer than {(number + 1) * size} held-out images")
    data = run.scaler((grey + torch.rand_like(grey)) / images.levels)
    return data, torch.randn_like(data).sign()


def solutions(
    run: Run,
    levels: int,
    batches: list[tuple[Tensor, Tensor]],
    tolerances: list[float],
    steps: list[int],
) -> dict[str, dict[float, list[tuple[Found, float]]]]:
    """Solutions and their errors, one a batch, of "theirs" by tolerance and of "ours" by steps."""
    by_torchdiffeq(run, levels, *batches[0], tolerance=0.1)  # warm-up
    by_us(run, levels, *batches[0], steps=8)
    theirs = {tolerance: [] for tolerance in tolerances}
    ours = {count: [] for count in steps}
    for data, probe in batches:
        exact = reference(run, levels, data, probe, tolerances[-1] / FINER)
        for tolerance, found in theirs.items():
            one = by_torchdiffeq(run, levels, data, probe, tolerance=tolerance)
            found.append((one, off(one, exact)))
        for count, found in ours.items():
            one = by_us(run, levels, data, probe, steps=count)
            found.append((one, off(one, exact)))
    return {"theirs": theirs, "ours": ours}


def off(found: Found, exact: Tensor) -> float:
    """Root mean square error over a batch, in bits/dim."""
    return float((found.bits - exact).square().mean().sqrt())


def reference(run: Run, levels: int, data: Tensor, probe: Tensor, tolerance: float) -> Tensor:
    """Bits/dim in double precision, where rounding does not limit the steps."""
    network = run.state["model"]
    try:
        network.double()
        solver = {"rtol": tolerance, "atol": tolerance}
        return by_us(run, levels, data.double(), probe.double(), **solver).bits
    finally:
        network.float()


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


def by_us(run: Run, levels: int, data: Tensor, probe: Tensor, **solver) -> Found:
    """By the project."""
    likelihood_fn = get_likelihood_fn(
        run.sde, run.inverse_scaler, levels=levels, eps=EPS, **solver, **run.reading
    )

    def work() -> tuple[Tensor, int]:
        bits, _, evaluations = likelihood_fn(run.state["model"], data, noise=lambda _: probe)
        return bits, evaluations

    return timed(work)


def by_torchdiffeq(
    run: Run, levels: int, data: Tensor, probe: Tensor, *, tolerance: float
) -> Found:
    """By `odeint` with dopri5, over the state of images and log density."""
    from torchdiffeq import odeint

    network, model, count = run.state["model"], run.config.model, 0

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            beta = model.beta_min + t * (model.beta_max - model.beta_min)
            std = marginal(t[None], model)[1]
            drift = -0.5 * beta * (x - network(x, 999 * t.expand(len(x))) / std)
            (product,) = torch.autograd.grad(drift, x, probe)
        return drift.detach(), (product * probe).flatten(1).sum(1)

    def work() -> tuple[Tensor, int]:
        start, times = (data, data.new_zeros(len(data))), torch.tensor([EPS, run.sde.T])
        x, change = odeint(slope, start, times, rtol=tolerance, atol=tolerance, method="dopri5")
        log_p = run.sde.prior_logp(x[-1]) + change[-1]
        return bits_per_dim(log_p, data[0].numel(), run.inverse_scaler, levels), count

    return timed(work)


def probe_error(run: Run, levels: int, data: Tensor, probes: int = 4) -> float:
    """Root mean square error of bits/dim of an image by one probe, from the spread of several."""
    run.config.eval.num_probes = probes
    terms = likelihood_terms(run, data, levels, torch.randn_like)
    nats = terms["standard_error"] * math.sqrt(probes)
    return float(np.sqrt(np.mean(nats**2)) / (data[0].numel() * math.log(2)))


if __name__ == "__main__":
    main()
