"""The training step in several precisions, compiled or not, against plain float32.

    python -m benchmarks.train --config ve/cifar10_ncsnpp_continuous --batch_size 128

Every variant makes the steps of `main.py --mode train`, on random images.  "speed-up" and "memory"
are ratios to plain float32; "of matmul" is the share of the rate of a large matrix product in the
same precision.
"""

import functools
from collections.abc import Sequence

import torch
from ml_collections import ConfigDict

from benchmarks.measure import operations
from benchmarks.variants import Variant, Work, arguments, compare, configured, drawn, living_run
from models.precision import matmul_precision
from score_lib.base.mistakes import brief_mistakes

COMPILED = ("float32+compile", "bfloat16+compile", "bfloat16+graphs", "bfloat16+cudagraphs")
KERNELS = ("float32+kernels", "bfloat16+kernels")
VARIANTS = ("tf32", "bfloat16", "bfloat16+checkpoint", *KERNELS, *COMPILED)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = arguments(__doc__.splitlines()[0], VARIANTS).parse_args(argv)
    config, device = configured(given, batch_on_gpu=128)
    build = functools.partial(training, config, given.workdir)
    found = compare(given, device, build)
    count = operations(build().call)
    found.add_rates(count)
    found.show("training step", given, device, gflop_per_step=count / 1e9)


def training(config: ConfigDict, workdir: str = "", name: str = "float32") -> Work:
    """The training step of a variant, on random images, from a state of its own."""
    variant = Variant.named(name)
    run = living_run(variant.of(config, "training"), workdir)
    run.add_optimizer()
    step, _ = run.step_fns()
    images = drawn(run)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    batch = run.arguments({"image": images, "label": labels})

    def call():
        with matmul_precision(variant.precision):
            return step(run.state, *batch)

    return Work(run, call)


if __name__ == "__main__":
    with brief_mistakes():
        main()
