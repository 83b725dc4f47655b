"""The training step as the switches of the config make it, against plain float32.

    python -m benchmarks.train --config ve/cifar10_ncsnpp_continuous --batch_size 128

Every variant makes the steps of `main.py --mode train`, on random images.  "speed-up", "memory"
and "against other" are ratios to the plain step and to another implementation's; "of matmul" is
the share of the rate at which the machine multiplies large matrices in the same precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.against import compare_all
from benchmarks.measure import operations
from benchmarks.variants import (
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
    given = comparing(arguments(__doc__.splitlines()[0]), VARIANTS).parse_args(argv)
    config, device = configured(given, batch_on_gpu=128)
    builders = {
        name: functools.partial(training, config, Variant.named(name))
        for name in chosen(given, device)
    }
    found = compare_all(builders, given, "train", config, device)
    count = operations(training(config, Variant()))
    add_rates(found, count)
    show_comparison("training step", given, device, found, gflop_per_step=count / 1e9)


def training(config: ConfigDict, variant: Variant) -> Work:
    """The training step of a variant, from a state of its own."""
    run, call = training_step(config, variant)
    return Work(call, lambda: tensors_of(run.state), run.device)


def training_step(config: ConfigDict, variant: Variant) -> tuple[Run, Callable[[], Tensor]]:
    """A run, and a function that makes its next training step, on random images."""
    run = living_run(variant.of(config, "training"))
    run.add_optimizer()
    step, _ = run.step_fns()
    size = config.training.batch_size
    images = torch.rand(size, *run.shape, device=run.device)
    labels = torch.zeros(size, dtype=torch.int64, device=run.device)

    def call():
        with matmul_precision(variant.precision):
            return step(run.state, run.scaler(images), labels)

    return run, call


if __name__ == "__main__":
    main()
