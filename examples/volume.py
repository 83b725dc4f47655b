"""Volumes whose statistics and density are known: log-normal random fields of 8 x 8 x 8 voxels.

    python -m examples.volume --workdir runs/volume

Trains `configs/vp/volumes.py`, an ADM in three dimensions, and prints nats per dimension of
held-out fields beside the true ones, and distances and the error of the power spectrum of samples
beside those of training fields.  Draws slices and spectra.  Started again, it resumes.
"""

import dataclasses
import logging
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from configs.vp.volumes import get_config
from datasets import get_streams
from examples.common import save_data, workdir_of
from examples.short_runs import set_short_run
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.tensors import SampleNoise
from score_lib.disk.reports import markdown_table, mean_and_error, new_figure, save_figure
from score_lib.metrics.samples import sample_metrics
from score_lib.runs.measures import likelihood_terms

_SIDE = 8
# Deviation of the logarithm, and the length over which it is correlated, in voxels.
_DEVIATION, _LENGTH = 0.5, 2.0
_SHOWN = ("sliced_w2", "energy_distance")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: fields, steps of training and their batch, samples, their steps, and
    held-out fields of which the density is measured."""

    examples: int = 10_000
    steps: int = 800
    batch: int = 16
    samples: int = 200
    sampling_steps: int = 15
    measured: int = 16


def main() -> None:
    """Learn the fields, then print and draw the comparison."""
    workdir = workdir_of(__doc__.splitlines()[0], "runs/volume")
    start = time.perf_counter()
    tables, picture = demonstrate(workdir)
    logging.info("done in %.0f s", time.perf_counter() - start)
    print("", *map(markdown_table, tables), picture, sep="\n")


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list, pathlib.Path]:
    """Learn the fields in a folder.

    Returns:
        rows of log-likelihoods and rows of distances, and the picture's file.
    """
    config = settings(workdir, sizes)
    run_lib.train(config, workdir)
    run = run_lib.restored(config, workdir)
    samples = run.draw(range(sizes.samples), progress=True).cpu()
    sources = get_streams(config, evaluation=True)[2].sources
    train, held_out = (sources[part].images(np.arange(sizes.samples)) for part in ("train", "test"))
    likelihoods = nats(run, held_out[: sizes.measured])
    distances = [
        compare(run, name, x, held_out) for name, x in (("samples", samples), ("train", train))
    ]
    picture = workdir / "volume.png"
    draw(picture, samples, held_out)
    return [likelihoods, distances], picture


def settings(workdir: pathlib.Path, sizes: Sizes) -> ConfigDict:
    """Write the data, and return the config that trains with them."""
    config, path = get_config(), workdir / "examples.npy"
    save_data(path, fields(sizes.examples))
    config.data.path = str(path)
    # One level of a U-Net is enough for so small a volume.
    config.model.update(ch_mult=(1,), attn_resolutions=(), ema_rate=0.99)
    set_short_run(config, steps=sizes.steps, sampling_steps=sizes.sampling_steps)
    config.training.batch_size = sizes.batch
    return config


def log_spectrum() -> Tensor:
    """Variance of each Fourier mode of the logarithm, (S, S, S), of mean `_DEVIATION`^2.

    A Matérn spectrum, (1 + (k l)^2)^-2.
    """
    k = 2 * math.pi * torch.fft.fftfreq(_SIDE, dtype=torch.float64)
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
    power = (1 + _LENGTH**2 * square) ** -2
    return _DEVIATION**2 * power / power.mean()


def fields(count: int) -> np.ndarray:
    """exp of periodic Gaussian fields of the spectrum `log_spectrum`: (count, 1, S, S, S)."""
    noise = torch.randn(
        (count, *(_SIDE,) * 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    modes = torch.fft.fftn(noise, dim=(1, 2, 3)) * log_spectrum().sqrt()
    return torch.fft.ifftn(modes, dim=(1, 2, 3)).real.exp()[:, None].float().numpy()


def true_log_prob(x: Tensor) -> Tensor:
    """log density of fields (B, 1, S, S, S), in closed form, in nats: (B,)."""
    logs, power = x[:, 0].double().log(), log_spectrum()
    square = torch.fft.fftn(logs, dim=(1, 2, 3), norm="ortho").abs() ** 2
    terms = square / power + (2 * math.pi * power).log()
    # The last term is the Jacobian of the logarithm.
    return -0.5 * terms.flatten(1).sum(1) - logs.flatten(1).sum(1)


def nats(run: run_lib.Run, x: Tensor) -> list[dict]:
    """-log p per dimension of the truth, of the model, and their difference, of fields x."""
    noise = SampleNoise(run.config.seed, range(len(x)), run.device)
    with run.state["ema"].applied(run.state["model"].parameters()):
        found = likelihood_terms(run, run.scaler(x.to(run.device)), run.levels, noise)["nats"]
    size, true = x[0].numel(), -true_log_prob(x).numpy()
    values = {"true": true, "model": found, "model - true": found - true}
    return [
        {"held-out fields": name} | mean_and_error("nats per dimension", value / size)
        for name, value in values.items()
    ]


def known_spectrum() -> Tensor:
    """Variance of each Fourier mode of the fields themselves, (S, S, S), in closed form.

    Of logarithms with the covariance c, log-normal values have m^2 (exp(c) - 1), with mean m.
    """
    covariance = torch.fft.ifftn(log_spectrum()).real
    return torch.fft.fftn(mean_value() ** 2 * torch.expm1(covariance)).real


def mean_value() -> float:
    """Mean of the fields."""
    return math.exp(_DEVIATION**2 / 2)


def by_wavenumber(power: Tensor) -> tuple[Tensor, Tensor]:
    """Means over modes (S, S, S) of equal wavenumber.

    Returns:
        wavenumbers in cycles per voxel, without 0, and means, both (K,).
    """
    k = torch.fft.fftfreq(_SIDE, d=1 / _SIDE, dtype=torch.float64).long() ** 2
    square = k[:, None, None] + k[:, None] + k
    found, shell = square.unique(return_inverse=True)
    sums = torch.zeros(2, len(found), dtype=torch.float64)
    sums.index_add_(1, shell.flatten(), torch.stack([power.flatten(), torch.ones(power.numel())]))
    return found[1:].double().sqrt() / _SIDE, (sums[0] / sums[1])[1:]


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean power of fields (B, 1, S, S, S), as in `by_wavenumber`."""
    modes = torch.fft.fftn(x[:, 0].double() - mean_value(), dim=(1, 2, 3), norm="ortho")
    return by_wavenumber((modes.abs() ** 2).mean(0))


def compare(run: run_lib.Run, name: str, x: Tensor, held_out: Tensor) -> dict:
    """Distances of fields to held-out ones, and the error of their spectrum and mean."""
    found = sample_metrics(*(run.scaler(part.to(run.device)) for part in (x, held_out)))
    ratio = 10 * torch.log10(spectrum(x)[1] / by_wavenumber(known_spectrum())[1])
    return {
        "fields": name,
        **{key: found[key] for key in _SHOWN},
        **{f"{key}_standard_error": found[f"{key}_standard_error"] for key in _SHOWN},
        "to the known spectrum, dB": ratio.square().mean().sqrt().item(),
        **mean_and_error("mean", x.flatten(1).mean(1).double().numpy()),
    }


def draw(path: pathlib.Path, samples: Tensor, held_out: Tensor) -> None:
    """All slices of four samples and of four held-out fields, and spectra."""
    figure = new_figure(11, 3.4)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    high = np.quantile(held_out, 0.999)
    for axes, name, x in zip(panels, ("samples", "held-out"), (samples, held_out), strict=False):
        rows = F.pad(x[:4, 0], (0, 1, 0, 1), value=math.nan)
        axes.imshow(rows.transpose(1, 2).flatten(0, 1).flatten(1).numpy(), vmin=0, vmax=high)
        axes.set(title=f"{name}: a row of slices each", xticks=[], yticks=[])
    for name, x in (("held-out", held_out), ("samples", samples)):
        panels[2].plot(*spectrum(x), ".-", linewidth=0.8, label=name)
    panels[2].plot(*by_wavenumber(known_spectrum()), "k--", linewidth=0.8, label="known")
    panels[2].set(yscale="log", title="power spectrum", xlabel="cycles per voxel")
    panels[2].legend()
    save_figure(path, figure)


if __name__ == "__main__":
    with brief_mistakes():
        main()
