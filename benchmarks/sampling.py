"""Sampling in several precisions, compiled or not, against plain float32.

    python -m benchmarks.sampling --config ve/cifar10_ncsnpp_continuous --batch_size 512

Every variant draws the same samples as `main.py --mode sample`, in few steps; a step evaluates the
predictor and the corrector at one time.  "difference" is the relative root mean square distance of
the samples from those of plain float32: the error of a lower precision.  Without a trained run
(--workdir) it is that of random weights.
"""

import functools
from collections.abc import Sequence

import torch
from ml_collections import ConfigDict

from benchmarks import variants
from benchmarks.measure import operations
from benchmarks.variants import PLAIN, Variant, Work, drawn, living_run
from models.conditioning import given
from models.precision import matmul_precision
from run_lib import Run
from score_lib.base.mistakes import brief_mistakes
from score_lib.scores import label_at

VARIANTS = (
    "tf32",
    "bfloat16",
    "float32+kernels",
    "bfloat16+kernels",
    "float32+compile",
    "bfloat16+compile",
    "bfloat16+graphs",
    "bfloat16+cudagraphs",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = variants.arguments(__doc__.splitlines()[0], VARIANTS)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    given = parser.parse_args(argv)
    config, device = variants.configured(given, batch_on_gpu=512)
    if config.training.continuous:
        config.sampling.num_steps = given.steps
    else:  # a chain has as many steps as noise levels
        config.model.num_scales = given.steps
    build = functools.partial(drawing, config, given.workdir)
    found = variants.compare(given, device, build)
    evaluations, count = cost(living_run(config, given.workdir))
    found.add_rates(evaluations * count)
    plain = found.results.get(PLAIN)
    for name, row in found.timed().items():
        step = row["ms"] / given.steps
        row |= {"ms/step": step, "us/step/image": 1e3 * step / given.batch_size}
        if plain is not None:
            row["difference"] = float((found.results[name] - plain).norm() / plain.norm())
    facts = {"steps": given.steps, "evaluations": evaluations, "gflop_per_evaluation": count / 1e9}
    found.show(f"sampling in {given.steps} steps", given, device, **facts)


def drawing(config: ConfigDict, workdir: str, name: str) -> Work:
    """Sampling by a variant."""
    run = living_run(Variant.named(name).of(config, "sampling"), workdir)
    return Work(run, lambda: run.draw(range(config.training.batch_size)))


def cost(run: Run) -> tuple[int, int]:
    """Evaluations of the network for each sample, and operations of one evaluation of a batch.

    With guidance a step evaluates a sample twice: with its condition, and without.
    """
    network, images = run.state["model"].eval(), drawn(run)
    t = images.new_full((len(images),), 0.5 * run.sde.T)
    labels = label_at(run.sde, t, **run.reading, dimensions=len(run.shape))
    condition = run.conditions.of_samples(range(len(images)), run.state["class_to_idx"])
    with torch.no_grad(), matmul_precision(PLAIN):
        count = operations(lambda: given(network, condition)(images, labels))
    rows = []
    with network.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0]))):
        run.draw(range(1))
    return sum(rows), count


if __name__ == "__main__":
    with brief_mistakes():
        main()
