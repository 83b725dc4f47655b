"""Forward pass and training step of NCSN++ against a large float32 matrix product.

python -m benchmarks.network
"""

from __future__ import annotations

import argparse

import torch

import run_lib
from benchmarks.measure import alternating, matrix_product, operations, show
from configs.defaults import load


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="ve/cifar10_ncsnpp_continuous")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    run = run_lib.setup(load(arguments.config))
    train_step, _ = run_lib.step_fns(run)
    images = torch.rand(arguments.batch_size, *run.shape, device=run.device)
    t = torch.full((arguments.batch_size,), 0.5, device=run.device)
    labels = run.sde.noise_label(t, run.config.training.continuous)
    model = run.state["model"]

    @torch.no_grad()
    def forward():
        model.eval()
        return model(images, labels)

    product, product_operations = matrix_product(run.device)
    works = {
        "matrix product": product,
        "forward": forward,
        "training step": lambda: train_step(run.state, run.scaler(images)),
    }
    times = alternating(works, run.device)
    rate = product_operations / times["matrix product"]
    forward_rate = operations(forward) / times["forward"]
    records = [
        {"work": name, "seconds": time, "GFLOP/s": "", "ratio": ""} for name, time in times.items()
    ]
    records[0] |= {"GFLOP/s": rate / 1e9, "ratio": 1.0}
    records[1] |= {"GFLOP/s": forward_rate / 1e9, "ratio": forward_rate / rate}
    records[2] |= {"ratio": times["training step"] / times["forward"]}
    show(f"{arguments.config}, batch {arguments.batch_size}", run.device, records)
    print("ratio: of the forward pass, its rate to the product's; of the step, its time to forward")


if __name__ == "__main__":
    main()
