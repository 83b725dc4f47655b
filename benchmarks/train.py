"""The training step in several precisions, compiled or not, against plain float32.

    python -m benchmarks.train --config ve/cifar10_ncsnpp_continuous --batch_size 128

Every variant makes the steps of `main.py --mode train`, on random images.  "speed-up", "memory"
and "against other" are ratios to plain float32 and to another implementation; "of matmul" is the
share of the rate of a large matrix product in the same precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.measure import operations
from benchmarks.variants import Variant, Work, arguments, chosen, configured, drawn, living_run
from models.precision import matmul_precision
from run_lib import Run

VARIANTS = (
    "tf32",
    "bfloat16",
    "bfloat16+checkpoint",
    "float32+compile",
    "bfloat16+compile",
    "bfloat16+graphs",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    given = arguments(__doc__.splitlines()[0], VARIANTS).parse_args(argv)
    config, device = configured(given, batch_on_gpu=128)

    def build(name: str = "float32") -> Work:
        return Work(*training_step(config, Variant.named(name), given.workdir))

    builders = {name: functools.partial(build, name) for name in chosen(given, device)}
    found = compare(builders, given, "train", config, device)
    count = operations(build())
    found.add_rates(count)
    found.show("training step", given, device, gflop_per_step=count / 1e9)


def training_step(
    config: ConfigDict, variant: Variant, workdir: str = ""
) -> tuple[Run, Callable[[], Tensor]]:
    """A run, and a function that makes its next training step, on random images."""
    run = living_run(variant.of(config, "training"), workdir)
    run.add_optimizer()
    step, _ = run.step_fns()
    images = drawn(run)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)

    def call():
        with matmul_precision(variant.precision):
            return step(run.state, run.scaler(images), labels)

    return run, call


if __name__ == "__main__":
    main()
