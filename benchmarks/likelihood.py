"""Drift and divergence from one forward pass, against separate passes for each.

python -m benchmarks.likelihood
"""

from __future__ import annotations

import argparse

import torch

import run_lib
from benchmarks.measure import alternating, show
from configs.defaults import load
from likelihood import get_div_fn, value_and_divergence
from models.utils import get_score_fn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="vp/digits")
    parser.add_argument("--batch_size", type=int, default=128)
    arguments = parser.parse_args()
    run = run_lib.setup(load(arguments.config))
    x = torch.randn(arguments.batch_size, *run.shape, device=run.device)
    t = torch.full((arguments.batch_size,), 0.5, device=run.device)
    probe = torch.randn_like(x)
    score_fn = get_score_fn(run.sde, run.state["model"], continuous=True)
    flow = run.sde.reverse(score_fn, probability_flow=True)

    def drift(x, t):
        return flow.sde(x, t)[0]

    def separate():
        with torch.no_grad():
            drift(x, t)
        return get_div_fn(drift)(x, t, probe)

    works = {
        "separate passes": separate,
        "one pass": lambda: value_and_divergence(drift, x, t, probe[None]),
    }
    times = alternating(works, run.device, rounds=20)
    records = [
        {"work": name, "seconds": time, "speed-up": times["separate passes"] / time}
        for name, time in times.items()
    ]
    name = f"likelihood, {arguments.config}, batch {arguments.batch_size}"
    show(name, run.device, records)


if __name__ == "__main__":
    main()
