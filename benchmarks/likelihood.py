"""Bits/dim on the device with one pass, against separate passes and a solver on the host.

    python -m benchmarks.likelihood --config ve/cifar10_ncsnpp_continuous --batch_size 128

The first row is the method of published code: SciPy's solver on the host, with one pass of the
network for the drift and another, forwards and backwards, for the divergence.  The others take both
from one pass and solve on the device.  "off by" is the largest difference from the first row in
bits/dim.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks import variants
from benchmarks.variants import PLAIN, Variant, Work, drawn
from likelihood import bits_per_dim, get_likelihood_fn
from models.precision import accelerated, matmul_precision
from run_lib import Run
from score_lib.base.mistakes import brief_mistakes
from score_lib.scores import get_score_fn

HOST = "separate passes, SciPy"
LOOSE = 1e3  # a tolerance with few steps


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = variants.arguments(__doc__.splitlines()[0], ("tf32", "float32+compile"))
    parser.set_defaults(rounds=2)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the solver")
    given = parser.parse_args(argv)
    config, device = variants.configured(given, batch_on_gpu=128)
    run = variants.living_run(config, given.workdir)
    host = {HOST: functools.partial(on_host, run, given.tolerance)}
    build = functools.partial(on_device, run, given.tolerance)
    found = variants.compare(given, device, build, first=host)
    for name, row in found.timed().items():
        bpd, row["evaluations"] = found.results[name]
        row["ms/evaluation"] = row["ms"] / row["evaluations"]
        row["bits/dim"] = float(bpd.mean())
        if HOST in found.timed():
            row["against host"] = found.rows[HOST]["ms"] / row["ms"]
            row["off by"] = float((bpd.cpu() - found.results[HOST][0]).abs().max())
    title = f"likelihood to {given.tolerance:g}"
    found.show(title, given, device, tolerance=given.tolerance)


def data_of(run: Run) -> tuple[Tensor, Tensor]:
    """Images in the network's range and a Rademacher probe, (B, C, H, W)."""
    return run.scaler(drawn(run)), drawn(run, torch.randn).sign()


def on_device(run: Run, tolerance: float, name: str) -> Work:
    """Drift and divergence from one pass, and a solver on the device."""
    (images, probe), variant = data_of(run), Variant.named(name)
    model = accelerated(run.state["model"], variant.precision, variant.compile)

    def call(tolerance=tolerance):
        options = {"rtol": tolerance, "atol": tolerance, **run.reading}
        likelihood_fn = get_likelihood_fn(run.sde, run.inverse_scaler, **options)
        with matmul_precision(variant.precision):
            bpd, _, evaluations = likelihood_fn(model, images, noise=lambda _: probe)
        return bpd, evaluations

    return Work(run, call, lambda: call(LOOSE))


def on_host(run: Run, tolerance: float) -> Work:
    """Drift and divergence from a pass each, and SciPy's solver on the host."""
    from scipy.integrate import solve_ivp

    images, probe = data_of(run)
    score_fn = get_score_fn(run.sde, accelerated(run.state["model"], PLAIN), **run.reading)
    flow = run.sde.reverse(score_fn, probability_flow=True)
    size = images.numel()

    def slope(time: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[:size].reshape(images.shape)).to(images)
        t = x.new_full((len(x),), time)
        with torch.no_grad():
            drift = flow.sde(x, t)[0]
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((flow.sde(x, t)[0] * probe).sum(), x)
        parts = drift, (gradient * probe).flatten(1).sum(1)
        return np.concatenate([part.cpu().numpy().reshape(-1) for part in parts])

    def call(tolerance=tolerance):
        start = np.concatenate([images.cpu().numpy().reshape(-1), np.zeros(len(images))])
        with matmul_precision(PLAIN):
            found = solve_ivp(slope, (1e-5, run.sde.T), start, rtol=tolerance, atol=tolerance)
        z = torch.from_numpy(found.y[:size, -1].reshape(images.shape)).to(images)
        log_p = run.sde.prior_logp(z).double().cpu() + torch.from_numpy(found.y[size:, -1])
        return bits_per_dim(log_p, images[0].numel(), run.inverse_scaler), found.nfev

    return Work(run, call, lambda: call(LOOSE))


if __name__ == "__main__":
    with brief_mistakes():
        main()
