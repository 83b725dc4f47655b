"""Group normalisation of channels last on a CPU, against PyTorch's kernel.

    python -m benchmarks.group_norm

At the levels of a network, without gradients and with the backward pass: how many times as long the
kernel takes; and the largest error of both, in millionths, for features whose mean is 0 or 100
deviations.
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import ratio_in_pairs, show
from configs.defaults import load
from models.group_normalization import group_normalized
from models.layers import channels_last
from models.normalization import GroupNorm, group_norm
from score_lib.base.memory import keep_freed_memory
from score_lib.base.mistakes import brief_mistakes

CPU = torch.device("cpu")
MEANS = 0, 100
CALLS = 10  # in a measured time


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/fashion_mnist_conditional")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args(argv)
    keep_freed_memory()
    config = load(given.config)
    records = []
    for level, multiple in enumerate(config.model.ch_mult):
        side, channels = config.data.image_size >> level, config.model.nf * multiple
        x = channels_last(torch.randn(given.batch_size, channels, side, side))
        records.append(record(x, group_norm(channels), given.rounds))
    show(f"group norm, {given.config}, batch {given.batch_size}", CPU, records)


def record(x: Tensor, layer: GroupNorm, rounds: int) -> dict:
    """One row of the table."""
    works = {
        "kernel": with_weights(F.group_norm, layer),
        "ours": with_weights(group_normalized, layer),
    }
    row = {"features": " x ".join(map(str, x.shape))}
    for name, both_passes in (("forward", False), ("with backward", True)):
        slow, fast = (functools.partial(run, work, x, both_passes) for work in works.values())
        found = ratio_in_pairs(slow, fast, CPU, rounds)
        row |= {name: found.value, f"{name}_standard_error": found.standard_error}
    formula = with_weights(F.group_norm, layer, torch.float64)
    for name, work in works.items():
        for mean in MEANS:
            shifted = channels_last(x + mean)
            with torch.no_grad():
                error = (work(shifted) - formula(shifted.double().contiguous())).abs().amax()
            row[f"1e6 error of {name}, mean {mean}"] = 1e6 * float(error)
    return row


def with_weights(
    norm: Callable[..., Tensor], layer: GroupNorm, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """A function of features, with the weights of the layer."""
    weight, bias = (v.to(dtype) for v in (layer.weight, layer.bias))
    return lambda x: norm(x, layer.num_groups, weight, bias, layer.eps)


def run(work: Callable[[Tensor], Tensor], x: Tensor, both_passes: bool) -> None:
    """Some calls, with their backward passes if asked for."""
    with torch.set_grad_enabled(both_passes):
        for _ in range(CALLS):
            result = work(x.detach().requires_grad_(both_passes))
            if both_passes:
                result.backward(x)


if __name__ == "__main__":
    with brief_mistakes():
        main()
