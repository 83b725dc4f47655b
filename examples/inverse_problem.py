"""Inverse problems with credible intervals, beside the exact posterior of a Gaussian process.

    python -m examples.inverse_problem --workdir runs/inverse_problem

Trains `configs/vp/vectors.py` on signals of a Gaussian process, and samples signals given a few
noisy points, or a blurred and noisy copy, with `--mode control`.  Of both it prints how often the
90 % interval holds the truth, and the errors of the posterior mean, beside those of the exact
posterior.  Started again, it resumes.
"""

import copy
import dataclasses
import math
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

import run_lib
from configs.vp.vectors import get_config
from examples.common import present, save_data
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import load_arrays
from score_lib.disk.reports import mean_and_error, new_figure, save_figure
from score_lib.inverse.measurements import build_operator

_LENGTH = 64
_MEAN, _STD, _SCALE = 20.0, 3.0, 6.0
# Noise of measurements, in the units of the signal.
_NOISE = 0.3
_MEASUREMENTS = {
    "random_mask": {"keep": 0.2},
    "blur": {"blur_std": 3.0},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: examples of the data, steps of training, measured signals, samples for
    each, and steps of sampling."""

    examples: int = 50_000
    steps: int = 4000
    signals: int = 20
    results: int = 100
    sampling_steps: int = 20


class Posterior(NamedTuple):
    """The exact posterior: mean (n, L), and covariance (L, L), the same for all measurements."""

    mean: Tensor
    covariance: Tensor


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list[dict], pathlib.Path]:
    """Train, restore by each operator, and compare.

    Returns:
        rows of figures, three for each operator, and the picture's file.
    """
    common = trained(workdir, sizes)
    figure = new_figure(8, 2.1 * len(_MEASUREMENTS))
    panels = figure.subplots(len(_MEASUREMENTS), 2, squeeze=False, sharex=True, sharey=True)
    records = []
    for row, (operator, options) in zip(panels, _MEASUREMENTS.items(), strict=True):
        config = copy.deepcopy(common)
        config.control.update(operator=operator, name=operator, **options)
        found = load_arrays(run_lib.control(config, workdir) / "arrays.npz")
        arrays = {key: torch.from_numpy(found[key]).double() for key in ("input", "result", "y")}
        exact = posterior(config, arrays["y"])
        records += compare(operator, arrays["input"], arrays["result"], exact)
        for number, axes in enumerate(row):
            of_signal = {key: value[number] for key, value in arrays.items()}
            draw(axes, of_signal, Summary(*(part[number] for part in of_gaussian(exact))))
            axes.set_title(f"{operator}, signal {number + 1}")
    panels[0, 0].legend(fontsize=7, loc="upper right")
    picture = workdir / "intervals.png"
    save_figure(picture, figure)
    return records, picture


def trained(workdir: pathlib.Path, sizes: Sizes):
    """The config of a network that has learned the signals, for `run_lib.control`."""
    config, path = get_config(), workdir / "values.npy"
    torch.manual_seed(0)
    prior = Posterior(torch.full((1, _LENGTH), _MEAN), covariance())
    save_data(path, draws(prior, sizes.examples)[0, :, None].float().numpy())
    config.data.update(path=str(path), shape=(1, _LENGTH), standardize="all")
    config.model.update(parametrization="edm", embedding_type="fourier", fourier_log=False)
    config.model.update(nf=96, num_res_blocks=1)
    # Guidance needs the network's derivative at all noise levels of the process.
    config.training.update(noise_levels="lognormal", lognormal_mean=-0.3, lognormal_std=1.8)
    config.training.weighting = "output"
    config.training.update(n_iters=sizes.steps, snapshot_freq=sizes.steps, snapshot_sampling=False)
    config.sampling.num_steps = sizes.sampling_steps
    # Exact for Gaussian data, if the network is.
    config.control.update(task="restore", method="tweedie", iterations=12, noise_std=_NOISE)
    config.control.update(num_images=sizes.signals, num_results=sizes.results)
    run_lib.train(config, workdir)
    return config


def covariance() -> Tensor:
    """Of a signal, (L, L): a Matérn kernel of smoothness 3/2, whose draws have a derivative."""
    steps = torch.arange(_LENGTH, dtype=torch.float64)
    r = math.sqrt(3) * (steps[:, None] - steps).abs() / _SCALE
    return _STD**2 * (1 + r) * torch.exp(-r)


def posterior(config, y: Tensor) -> Posterior:
    """Of signals given measurements y (n, *M), in closed form."""
    operator = build_operator(config.control.operator, config, (1, _LENGTH))
    unit = torch.eye(_LENGTH, dtype=torch.float64)
    matrix = operator.apply(unit[:, None]).flatten(1).T
    prior, mean = covariance(), torch.full((_LENGTH,), _MEAN, dtype=torch.float64)
    # A mask gives 0, without noise, where x is open: no measurement.
    kept = matrix.abs().sum(dim=1) > 0
    matrix, y = matrix[kept], y.flatten(1)[:, kept]
    noise = _NOISE**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = torch.linalg.solve(matrix @ prior @ matrix.T + noise, matrix @ prior).T
    return Posterior(mean + (y - matrix @ mean) @ gain.T, prior - gain @ matrix @ prior)


def draws(posterior: Posterior, count: int) -> Tensor:
    """Independent samples for each measurement, (n, count, L), by the global generator."""
    values, axes = torch.linalg.eigh(posterior.covariance)
    noise = torch.randn(len(posterior.mean), count, _LENGTH, dtype=torch.float64)
    return posterior.mean[:, None] + noise * values.clamp(min=0).sqrt() @ axes.T


class Summary(NamedTuple):
    """Of a posterior: its mean and the ends of its central interval of 90 %, each (n, L)."""

    mean: Tensor
    low: Tensor
    high: Tensor


def of_samples(samples: Tensor) -> Summary:
    """The summary of samples (n, count, L)."""
    ends = torch.tensor([0.05, 0.95], dtype=samples.dtype)
    return Summary(samples.mean(dim=1), *samples.quantile(ends, dim=1))


def of_gaussian(posterior: Posterior) -> Summary:
    """The summary in closed form."""
    half = 1.644854 * posterior.covariance.diagonal().sqrt()
    return Summary(posterior.mean, posterior.mean - half, posterior.mean + half)


def compare(operator: str, truth: Tensor, results: Tensor, exact: Posterior) -> list[dict]:
    """Figures of the samples, of as many exact ones, and of the exact posterior.

    Args:
        truth: (n, 1, L).
        results: (n, samples, 1, L).
    """
    torch.manual_seed(1)
    truth, results = truth.flatten(1), results.flatten(2)
    kinds = {
        "samples": of_samples(results),
        "exact samples": of_samples(draws(exact, results.shape[1])),
        "exact": of_gaussian(exact),
    }
    records = []
    for kind, summary in kinds.items():
        inside = (truth >= summary.low) & (truth <= summary.high)
        record = {"operator": operator, "posterior": kind}
        record |= mean_and_error("inside the 90 % interval", inside.double().mean(dim=1).numpy())
        record["its mean width"] = (summary.high - summary.low).mean().item()
        record["rmse of the mean"] = rmse(summary.mean, truth)
        record["rmse to the exact mean"] = rmse(summary.mean, exact.mean)
        records.append(record)
    return records


def rmse(estimate: Tensor, truth: Tensor) -> float:
    """Root of the mean square error of signals (n, L)."""
    return (estimate - truth).square().mean().sqrt().item()


def draw(axes, of_signal: dict[str, Tensor], exact: Summary) -> None:
    """Truth, measurement, samples, their interval, and the exact one, of one signal.

    Args:
        of_signal: "input" (1, L), "result" (samples, 1, L) and "y" (1, L), by the names of
            `--mode control`.
        exact: its fields are (L,).
    """
    samples, y = of_signal["result"][:, 0], of_signal["y"][0]
    found = of_samples(samples[None])
    places = range(_LENGTH)
    axes.fill_between(places, found.low[0], found.high[0], alpha=0.3, label="interval of samples")
    axes.plot(samples[:3].T, color="C0", linewidth=0.4)
    for end, label in ((exact.low, "exact interval"), (exact.high, None)):
        axes.plot(end, "k--", linewidth=0.8, label=label)
    axes.plot(of_signal["input"][0], color="C1", linewidth=1.5, label="truth")
    known = y != 0  # it is 0 where a mask is open
    axes.plot(torch.arange(_LENGTH)[known], y[known], "r.", markersize=4, label="measurement")


if __name__ == "__main__":
    with brief_mistakes():
        present(__doc__, demonstrate)
