"""Mean and variance of the likelihood's loss with uniform times and with times drawn for it.

    python -m benchmarks.objectives runs/ve runs/vp runs/subvp

For the exact score of a mixture of Gaussians under each process, and for the networks of trained
runs on their held-out images.  The variance is that of one draw of time and noise for given data,
averaged over the data; "of uniform" is its share of the variance with uniform times.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import show
from losses import DenoisingLoss, get_sde_loss_fn
from run_lib import Run
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.tensors import batch_mul
from score_lib.data.loading import get_streams
from score_lib.disk.reports import mean_and_error
from score_lib.losses.levels import levels_of
from score_lib.parametrization import Score
from score_lib.runs.start import META
from score_lib.runs.trained import from_checkpoint
from score_lib.sdes.process import LinearSDE
from sde_lib import VESDE, VPSDE, subVPSDE

PROCESSES = {"vesde": VESDE(), "vpsde": VPSDE(), "subvpsde": subVPSDE()}
LEVELS = ("", "likelihood")
AT_ONCE = 1024  # draws in a batch


class Case(NamedTuple):
    """A network and data (N, *D), and its loss by the kind of noise levels."""

    network: Callable
    data: Tensor
    losses: dict[str, DenoisingLoss]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="*", help="folders of trained runs")
    parser.add_argument("--num_data", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1024, help="for each of the data")
    given = parser.parse_args(argv)
    cases = {f"mixture, {name}": mixture(sde, given.num_data) for name, sde in PROCESSES.items()}
    device = torch.device("cpu")
    for workdir in given.workdirs:
        run = from_checkpoint(pathlib.Path(workdir) / META, device)
        name = f"{run.config.data.dataset.lower()}, {run.config.training.sde}"
        cases[name] = trained(run, given.num_data)
    records = [row for name, case in cases.items() for row in rows(name, case, given.draws)]
    show("likelihood-weighted loss", device, records, draws=given.draws, data=given.num_data)


def rows(name: str, case: Case, draws: int) -> list[dict]:
    """Mean, variance and its share of that of uniform times, with standard errors."""
    variances, found = {}, []
    for kind, loss_fn in case.losses.items():
        losses = sampled(loss_fn, case.network, case.data, draws)
        variances[kind] = variance = losses.var(1, ddof=1)
        error = (variance.mean() / losses.size) ** 0.5
        row = {"case": name, "times": kind or "uniform"}
        row |= {"loss": losses.mean(), "loss_standard_error": error}
        found.append(row | mean_and_error("variance", variance))
    shares = share(variances["likelihood"], variances[""])
    return [found[0], found[1] | mean_and_error("of uniform", shares)]


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Values whose mean and standard error are those of the ratio of two paired means."""
    ratio = part.mean() / whole.mean()
    return ratio + (part - ratio * whole) / whole.mean()


@torch.no_grad()
def sampled(
    loss_fn: DenoisingLoss, network: Callable, data: Tensor, draws: int, seed: int = 0
) -> np.ndarray:
    """Losses of at least so many draws for each of the data: (N, draws), float64."""
    torch.manual_seed(seed)
    copies = max(1, AT_ONCE // len(data))
    batch, values = data.repeat(copies, *(1 for _ in data.shape[1:])), []
    for _ in range(-(-draws // copies)):
        losses = loss_fn.per_sample(network, batch, loss_fn.draw(batch)).double()
        values.append(losses.reshape(copies, len(data)))
    return torch.cat(values).T.cpu().numpy()


class _ExactScore(Score):
    """The output is the score, and the label is the time itself."""

    def label(self, sde, t, m, s):
        return t


def mixture(sde: LinearSDE, num_data: int, dimensions: int = 64) -> Case:
    """The exact score of a mixture of eight narrow Gaussians with a standard deviation of 0.5."""
    generator = torch.Generator().manual_seed(0)
    width, centres = 0.1, 0.48 * torch.randn(8, dimensions, generator=generator)
    place = torch.arange(num_data) % len(centres)
    data = centres[place] + width * torch.randn(num_data, dimensions, generator=generator)

    def network(x: Tensor, t: Tensor) -> Tensor:
        m, s = sde.marginal_coeffs(t)
        variance = (m * width) ** 2 + s**2
        apart = m[:, None, None] * centres - x[:, None]
        nearness = torch.softmax(batch_mul(-0.5 / variance, apart.square().sum(2)), 1)
        return batch_mul(1 / variance, (nearness[:, :, None] * apart).sum(1))

    reading = {"continuous": True, "parametrization": _ExactScore()}
    losses = {
        kind: get_sde_loss_fn(
            sde, False, True, likelihood_weighting=True, noise_levels=kind, **reading
        )
        for kind in LEVELS
    }
    return Case(network, data, losses)


def trained(run: Run, num_data: int) -> Case:
    """A run's network, with its averaged weights, on held-out images."""
    config, reading = run.config, run.reading
    config.eval.batch_size = num_data
    dequantize = config.data.uniform_dequantization
    _, held_out, _ = get_streams(config, dequantize, evaluation=True, num_workers=0)
    data = run.scaler(next(iter(held_out))["image"].to(run.device))
    run.state["ema"].copy_to(run.state["model"].parameters())
    losses = {}
    for kind in LEVELS:
        config.training.noise_levels = kind
        options = {"likelihood_weighting": True, "noise_levels": levels_of(config), **reading}
        losses[kind] = get_sde_loss_fn(run.sde, False, True, **options)
    return Case(run.state["model"], data, losses)


if __name__ == "__main__":
    with brief_mistakes():
        main()
