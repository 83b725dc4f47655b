"""Series: sines in noise, whose spectrum is known, and a recording of a neuron.

    python -m examples.series --workdir runs/series

Trains `configs/vp/series.py` on both, draws samples, and prints their distances to held-out series
beside those of training series: of spectra in dB, and of autocorrelations.  Draws samples, and
spectra beside the known one.  The recording is `membrane.dat`, which comes with Matplotlib under
its licence.  Started again, it resumes.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import run_lib
from configs.vp.series import get_config
from datasets import get_streams
from examples.common import present, save_data
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import load_arrays
from score_lib.disk.reports import new_figure, save_figure
from score_lib.metrics.series import Curve, power_spectrum, series_metrics

_LENGTH = 64
# Amplitude and frequency, in cycles per step, of each sine; deviation of the noise.
_SINES = ((1.0, 0.05), (0.7, 0.14), (0.4, 0.3))
_NOISE = 0.2
# The part of the recording in which the neuron fires regularly, and how much of it is kept.
_FIRING, _EVERY = slice(2000, 7200), 4
_SHOWN = ("log_spectral_distance", "autocorrelation_distance", "energy_distance")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: series of sines, steps of training, samples, and their steps."""

    examples: int = 20_000
    steps: int = 1000
    samples: int = 500
    sampling_steps: int = 20


class Series(NamedTuple):
    """Samples and data, (n, 1, L), in the data's units."""

    samples: Tensor
    train: Tensor
    held_out: Tensor


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list[dict], pathlib.Path]:
    """Learn each kind of series in a folder of its own.

    Returns:
        two rows of figures for each kind, and the picture's file.
    """
    figure = new_figure(12, 2.6 * len(_KINDS))
    panels = figure.subplots(len(_KINDS), 3, squeeze=False)
    records = []
    for row, (name, make) in zip(panels, _KINDS.items(), strict=True):
        found = learned(make(sizes.examples), workdir / name, sizes)
        records += compare(name, found)
        draw(row, name, found)
    picture = workdir / "series.png"
    save_figure(picture, figure)
    return records, picture


def sines(count: int) -> np.ndarray:
    """Sums of `_SINES` with random phases and white noise, (count, 1, L)."""
    generator = np.random.default_rng(0)
    steps = np.arange(_LENGTH)
    series = _NOISE * generator.standard_normal((count, _LENGTH))
    for amplitude, frequency in _SINES:
        phases = generator.uniform(0, 2 * math.pi, (count, 1))
        series += amplitude * np.cos(2 * math.pi * frequency * steps + phases)
    return series[:, None].astype(np.float32)


def known_spectrum() -> Tensor:
    """The mean periodogram of `sines` at the frequencies k / L, (L // 2 + 1,), in closed form."""
    at = torch.fft.rfftfreq(_LENGTH, dtype=torch.float64)
    power = torch.full_like(at, _NOISE**2)
    for amplitude, frequency in _SINES:
        for shift in (at - frequency, at + frequency):
            power += amplitude**2 / 4 * fejer(shift)
    return power


def fejer(frequency: Tensor) -> Tensor:
    """|sum_t exp(-2 pi i f t)|^2 / L, the periodogram of a complex wave of frequency 0 at f."""
    angles = 2 * math.pi * frequency[:, None] * torch.arange(_LENGTH)
    return (angles.cos().sum(1) ** 2 + angles.sin().sum(1) ** 2) / _LENGTH


def windows_of_recording(count: int = 0) -> np.ndarray:
    """All windows of every fourth value of the recording, (n, 1, L), in their order."""
    from matplotlib.cbook import get_sample_data

    recording = np.fromfile(get_sample_data("membrane.dat", asfileobj=False), np.float32)[_FIRING]
    windows = np.lib.stride_tricks.sliding_window_view(recording, _EVERY * _LENGTH)
    return windows[:, None, ::_EVERY]


_KINDS: dict[str, Callable] = {"sines": sines, "neuron": windows_of_recording}


def learned(data: np.ndarray, workdir: pathlib.Path, sizes: Sizes) -> Series:
    """Samples of a network that is trained on all but the last tenth, and both parts."""
    config, path = get_config(), workdir / "values.npy"
    save_data(path, data)
    config.data.update(path=str(path), shape=(1, _LENGTH), split="last")
    # An error of v is none of the mean where there is little but noise, as one of the noise is.
    config.model.ch_mult = (1, 1)
    config.training.update(n_iters=sizes.steps, snapshot_freq=sizes.steps, snapshot_sampling=False)
    config.sampling.num_steps = sizes.sampling_steps
    config.eval.update(enable_loss=False, enable_bpd=False, num_samples=sizes.samples)
    run_lib.train(config, workdir)
    run_lib.evaluate(config, workdir)
    samples = load_arrays(workdir / "eval" / "ckpt_1" / "samples_0.npz")["samples"]
    sources = get_streams(config, evaluation=True)[2].sources
    parts = (evenly(source, sizes.samples) for source in (sources["train"], sources["test"]))
    return Series(torch.from_numpy(samples), *parts)


def evenly(source, most: int) -> Tensor:
    """Up to so many examples of a source, at equal distances."""
    count = min(most, len(source))
    return source.images(np.arange(count) * len(source) // count)


def compare(name: str, series: Series) -> list[dict]:
    """Distances of samples and of training series to held-out ones."""
    records = []
    for kind in ("samples", "train"):
        found = series_metrics(getattr(series, kind), series.held_out)
        errors = [f"{key}_standard_error" for key in _SHOWN]
        shown = {key: found[key] for key in (*_SHOWN, *errors)}
        records.append({"series": name, "to held-out series": kind} | shown)
    if name == "sines":
        for record, kind in zip(records, ("samples", "train"), strict=True):
            power = power_spectrum(getattr(series, kind)).mean[0]
            ratio = 10 * torch.log10(power / known_spectrum())
            record["to the known spectrum, dB"] = ratio.square().mean().sqrt().item()
    return records


def draw(row, name: str, series: Series) -> None:
    """Three panels: samples, held-out series, and spectra with bands of two standard errors."""
    for axes, title in ((row[0], "samples"), (row[1], "held_out")):
        shown = getattr(series, title)
        lines = shown[:: max(1, len(shown) // 4)][:4, 0]
        step = 1.2 * float(series.held_out.max() - series.held_out.min())
        axes.plot((lines + step * torch.arange(len(lines))[:, None]).T, linewidth=0.8)
        axes.set(title=f"{name}: {title.replace('_', '-')}", xlabel="step", yticks=[])
    for label in ("held_out", "samples"):
        band(row[2], power_spectrum(getattr(series, label)), label.replace("_", "-"))
    if name == "sines":
        at = torch.fft.rfftfreq(_LENGTH)
        row[2].plot(at, known_spectrum(), "k--", linewidth=0.8, label="known")
    row[2].set(yscale="log", title="power spectrum", xlabel="cycles per step")
    row[2].legend(fontsize=7)


def band(axes, curve: Curve, label: str) -> None:
    """Plot a spectrum with a band of two standard errors."""
    mean, error = curve.mean[0], curve.standard_error[0]
    axes.plot(curve.at, mean, linewidth=0.8, label=label)
    axes.fill_between(curve.at, (mean - 2 * error).clamp(min=1e-12), mean + 2 * error, alpha=0.3)


if __name__ == "__main__":
    with brief_mistakes():
        present(__doc__, demonstrate)
