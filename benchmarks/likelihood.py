"""Bits/dim with everything on the device, against separate passes and a solver on the host.

    python -m benchmarks.likelihood --config ve/cifar10_ncsnpp_continuous --batch_size 128

The first row is how published code goes about it: SciPy's solver on the host, and for each of its
questions one pass of the network for the drift and another, forwards and backwards, for the
divergence.  The others take both from one pass, and the state stays where it is; "+compile" and
precisions other than float32 are choices of whoever calls `likelihood` directly.  "off by" is the
largest difference from the first row in bits/dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.against import compare_all
from benchmarks.variants import (
    OTHER,
    PLAIN,
    Comparison,
    Variant,
    Work,
    arguments,
    chosen,
    comparing,
    configured,
    living_run,
    show_comparison,
    tensors_of,
)
from likelihood import bits_per_dim, get_likelihood_fn
from models.precision import accelerated, matmul_precision
from run_lib import Run
from score_lib.base.tensors import derive_seed
from score_lib.scores import get_score_fn

HOST = "separate passes, SciPy"
VARIANTS = ("tf32", "float32+compile")
LOOSE = 1e3  # a tolerance that takes few steps


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = comparing(arguments(__doc__.splitlines()[0]), VARIANTS)
    parser.set_defaults(rounds=2)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the solver")
    parser.add_argument("--workdir", default="", help="folder of a trained run")
    given = parser.parse_args(argv)
    config, device = configured(given, batch_on_gpu=128)
    run = living_run(config, given.workdir)
    images = run.scaler(drawn(torch.rand, config, run)).to(device)
    probe = drawn(torch.randn, config, run).sign().to(device)
    measured = (run, images, probe, given.tolerance)
    builders: dict[str, Callable] = {HOST: functools.partial(on_host, *measured)}
    for name in chosen(given, device):
        builders[name] = functools.partial(on_device, *measured, Variant.named(name))
    told = {"images": images, "workdir": given.workdir, "tolerance": given.tolerance}
    found = compare_all(builders, given, "likelihood", config, device, **told)
    add_findings(found)
    what = f"likelihood to {given.tolerance:g}"
    show_comparison(what, given, device, found, tolerance=given.tolerance)


def drawn(draw: Callable, config: ConfigDict, run: Run) -> Tensor:
    """Random numbers (B, C, H, W) that are the same on every machine."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, draw.__name__))
    return draw(config.training.batch_size, *run.shape, generator=generator)


def on_device(run: Run, images: Tensor, probe: Tensor, tolerance: float, variant: Variant) -> Work:
    """Drift and divergence from one pass, and a solver on the device."""
    model = accelerated(run.state["model"], variant.precision, variant.compile)
    continuous = run.config.training.continuous

    def call(tolerance=tolerance):
        likelihood_fn = get_likelihood_fn(
            run.sde, run.inverse_scaler, rtol=tolerance, atol=tolerance, continuous=continuous
        )
        with matmul_precision(variant.precision):
            bpd, _, evaluations = likelihood_fn(model, images, noise=lambda _: probe)
        return bpd, evaluations

    return Work(call, lambda: tensors_of(run.state), run.device, lambda: call(LOOSE))


def on_host(run: Run, images: Tensor, probe: Tensor, tolerance: float) -> Work:
    """Drift and divergence from a pass each, and SciPy's solver on the host."""
    from scipy.integrate import solve_ivp

    score_fn = get_score_fn(run.sde, run.state["model"], False, run.config.training.continuous)
    flow = run.sde.reverse(score_fn, probability_flow=True)
    size = images.numel()

    @torch.no_grad()
    def drift_of(x: Tensor, t: Tensor) -> Tensor:
        return flow.sde(x, t)[0]

    def divergence_of(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            along_probe = (flow.sde(x, t)[0] * probe).sum()
        return (torch.autograd.grad(along_probe, x)[0] * probe).flatten(1).sum(1)

    def slope(time: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[:size].reshape(images.shape)).to(images)
        t = x.new_full((len(x),), time)
        parts = drift_of(x, t), divergence_of(x, t)
        return np.concatenate([part.cpu().numpy().reshape(-1) for part in parts])

    def call(tolerance=tolerance):
        start = np.concatenate([images.cpu().numpy().reshape(-1), np.zeros(len(images))])
        with matmul_precision(PLAIN):
            found = solve_ivp(slope, (1e-5, run.sde.T), start, rtol=tolerance, atol=tolerance)
        z = torch.from_numpy(found.y[:size, -1].reshape(images.shape)).to(images)
        log_p = run.sde.prior_logp(z).double().cpu() + torch.from_numpy(found.y[size:, -1])
        return bits_per_dim(log_p, images[0].numel(), run.inverse_scaler), found.nfev

    return Work(call, lambda: tensors_of(run.state), run.device, lambda: call(LOOSE))


def add_findings(found: Comparison) -> None:
    """Add what the host's row is to each: evaluations, time and bits/dim in comparison."""
    host = found.rows[HOST]
    for name, row in found.rows.items():
        if "ms" not in row:
            continue
        if "ms" in host:
            row["against host"] = host["ms"] / row["ms"]
        if name == OTHER:
            continue
        bpd, row["evaluations"] = found.results[name]
        row["ms/evaluation"] = row["ms"] / row["evaluations"]
        row["bits/dim"] = float(bpd.mean())
        if HOST in found.results:
            row["off by"] = float((bpd.cpu() - found.results[HOST][0]).abs().max())


if __name__ == "__main__":
    main()
