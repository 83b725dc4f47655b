"""Sampling as the switches of the config make it, against plain float32.

    python -m benchmarks.sampling --config ve/cifar10_ncsnpp_continuous --batch_size 512

Every variant draws the same samples as `main.py --mode sample` would, in few steps; a step is what
the predictor and the corrector evaluate at one time.  "difference" is that of the samples from the
plain ones, relative, in the root mean square: what lower precision costs.  Without the weights of a
run (--workdir) it is that of a network with random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from ml_collections import ConfigDict

from benchmarks.against import compare_all
from benchmarks.measure import operations
from benchmarks.variants import (
    OTHER,
    PLAIN,
    Comparison,
    Variant,
    Work,
    add_rates,
    arguments,
    chosen,
    comparing,
    configured,
    living_run,
    show_comparison,
    tensors_of,
)
from models.precision import matmul_precision
from run_lib import Run

VARIANTS = ("tf32", "bfloat16", "float32+compile", "bfloat16+compile", "bfloat16+graphs")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = comparing(arguments(__doc__.splitlines()[0]), VARIANTS)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--workdir", default="", help="folder of a trained run")
    given = parser.parse_args(argv)
    config, device = configured(given, batch_on_gpu=512)
    in_steps(config, given.steps)
    builders = {
        name: functools.partial(drawing, config, Variant.named(name), given.workdir)
        for name in chosen(given, device)
    }
    told = {"workdir": given.workdir, "steps": given.steps}
    found = compare_all(builders, given, "sampling", config, device, **told)
    evaluations, count = cost(living_run(config, given.workdir), given.batch_size)
    add_rates(found, evaluations * count)
    add_steps(found, given.steps, given.batch_size)
    show_comparison(
        f"sampling in {given.steps} steps",
        given,
        device,
        found,
        steps=given.steps,
        evaluations=evaluations,
        gflop_per_evaluation=count / 1e9,
    )


def in_steps(config: ConfigDict, steps: int) -> None:
    """Let a whole run of the sampler be in a number of steps."""
    if config.training.continuous:
        config.sampling.num_steps = steps
    else:  # a chain that has as many noise levels
        config.model.num_scales = steps


def drawing(config: ConfigDict, variant: Variant, workdir: str) -> Work:
    """Sampling by a variant."""
    run = living_run(variant.of(config, "sampling"), workdir)
    indices = range(config.training.batch_size)
    return Work(lambda: run.sample(indices, config.seed), lambda: tensors_of(run.state), run.device)


def cost(run: Run, size: int) -> tuple[int, int]:
    """Evaluations of the network for a batch of samples, and operations of one evaluation."""
    network = run.state["model"].eval()
    images = torch.rand(size, *run.shape, device=run.device)
    t = torch.full((size,), 0.5 * run.sde.T, device=run.device)
    labels = run.sde.noise_label(t, run.config.training.continuous)
    with torch.no_grad(), matmul_precision(PLAIN):
        count = operations(lambda: network(images, labels))
    calls = []
    with network.register_forward_hook(lambda *_: calls.append(None)):
        run.sample(range(1), run.config.seed)
    return len(calls), count


def add_steps(found: Comparison, steps: int, size: int) -> None:
    """Add the time of a step, and how far the samples are from those of the plain network."""
    plain = found.results.get(PLAIN)
    for name, row in found.rows.items():
        if "ms" not in row:
            continue
        row |= {"ms/step": row["ms"] / steps, "us/step/image": 1e3 * row["ms"] / steps / size}
        if name != OTHER and plain is not None:  # who draws noise of its own
            change = found.results[name] - plain
            row["difference"] = float(change.norm() / plain.norm())


if __name__ == "__main__":
    main()
