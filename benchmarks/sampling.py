"""Sampling in several precisions, compiled or not, against plain float32.

    python -m benchmarks.sampling --config ve/cifar10_ncsnpp_continuous --batch_size 512

Every variant draws the same samples as `main.py --mode sample`, in few steps; a step evaluates the
predictor and the corrector at one time.  "difference" is the relative root mean square distance of
the samples from those of plain float32: the error of a lower precision.  Without a trained run
(--workdir) it is that of random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from benchmarks.compare import OTHER, Comparison, compare
from benchmarks.measure import operations
from benchmarks.variants import Variant, Work, arguments, chosen, configured, drawn, living_run
from models.precision import matmul_precision
from run_lib import Run

VARIANTS = ("tf32", "bfloat16", "float32+compile", "bfloat16+compile", "bfloat16+graphs")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__.splitlines()[0], VARIANTS)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    given = parser.parse_args(argv)
    config, device = configured(given, batch_on_gpu=512)
    if config.training.continuous:
        config.sampling.num_steps = given.steps
    else:  # a chain has as many steps as noise levels
        config.model.num_scales = given.steps

    def build(name: str) -> Work:
        run = living_run(Variant.named(name).of(config, "sampling"), given.workdir)
        return Work(run, lambda: run.draw(range(given.batch_size)))

    builders = {name: functools.partial(build, name) for name in chosen(given, device)}
    found = compare(builders, given, "sampling", config, device)
    evaluations, count = cost(living_run(config, given.workdir))
    found.add_rates(evaluations * count)
    add_steps(found, given.steps, given.batch_size)
    facts = {"steps": given.steps, "evaluations": evaluations, "gflop_per_evaluation": count / 1e9}
    found.show(f"sampling in {given.steps} steps", given, device, **facts)


def cost(run: Run) -> tuple[int, int]:
    """Evaluations of the network for a batch of samples, and operations of one evaluation."""
    network, images = run.state["model"].eval(), drawn(run)
    t = images.new_full((len(images),), 0.5 * run.sde.T)
    labels = run.sde.noise_label(t, run.config.training.continuous)
    with torch.no_grad(), matmul_precision("float32"):
        count = operations(lambda: network(images, labels))
    calls = []
    with network.register_forward_hook(lambda *_: calls.append(None)):
        run.draw(range(1))
    return len(calls), count


def add_steps(found: Comparison, steps: int, size: int) -> None:
    """Add the time of a step, and the distance of the samples from those of plain float32."""
    plain = found.results.get("float32")
    for name, row in found.timed().items():
        row |= {"ms/step": row["ms"] / steps, "us/step/image": 1e3 * row["ms"] / steps / size}
        if name != OTHER and plain is not None:  # the other draws its own noise
            row["difference"] = float((found.results[name] - plain).norm() / plain.norm())


if __name__ == "__main__":
    main()
