"""Spectrograms of five vowels by condition: pulses of a gliding pitch through known formants.

    python -m examples.spectrogram --workdir runs/spectrogram

Trains `configs/vp/fields.py` on labelled log spectrograms, draws samples of given vowels with and
without guidance, and prints how many of them a linear classifier recognises, beside held-out data.
Draws data and samples of each vowel.  Started again, it resumes.
"""

import dataclasses
import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from configs.vp.fields import get_config
from datasets import get_streams
from examples.common import present
from examples.short_runs import set_short_run
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.arrays import save_arrays
from score_lib.disk.reports import mean_and_error, new_figure, save_figure
from score_lib.metrics.samples import energy_distance

# First three formants of men, in Hz.  [Peterson & Barney 1952, Table II]
VOWELS = {
    "heed": (270, 2290, 3010),
    "head": (530, 1840, 2480),
    "hod": (730, 1090, 2440),
    "hawed": (570, 840, 2410),
    "who'd": (300, 870, 2240),
}
# Bandwidths of the formants and the sampling rate, in Hz.
_WIDTHS, _RATE = (60, 90, 150), 8000
# Bands, frames, and samples of a frame, 32 ms, of which each overlaps the next by half.
_SIDE, _WINDOW = 16, 256
_SCALES = (1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: spectrograms, steps of training, samples, and their steps."""

    examples: int = 6000
    steps: int = 800
    samples: int = 200
    sampling_steps: int = 12


class Labelled(NamedTuple):
    """Spectrograms (n, 1, bands, frames) in dB, and the numbers of their vowels (n,)."""

    x: Tensor
    labels: Tensor


def main() -> None:
    """Learn spectrograms, then print and draw the comparison."""
    present(__doc__, demonstrate)


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list[dict], pathlib.Path]:
    """Learn the spectrograms in a folder.

    Returns:
        a row of figures for held-out data and for samples of each scale of guidance, and the
        picture's file.
    """
    config = settings(workdir, sizes)
    run_lib.train(config, workdir)
    run = run_lib.restored(config, workdir)
    sources = get_streams(config, evaluation=True)[2].sources
    train, held_out = (Labelled(*sources[p].read(np.arange(len(sources[p])))) for p in sources)
    shown = {"held-out": held_out}
    for scale in _SCALES:
        run.config.sampling.guidance_scale = scale
        numbers = range(sizes.samples)
        labels = torch.tensor(numbers) % len(VOWELS)  # classes in turns
        samples = Labelled(run.draw(numbers, progress=True).cpu(), labels)
        shown[f"samples, guidance {scale}"] = samples
    records = compare(train, held_out, shown)
    picture = workdir / "spectrogram.png"
    draw(picture, shown)
    return records, picture


def settings(workdir: pathlib.Path, sizes: Sizes) -> ConfigDict:
    """Write the data, and return the config that trains with them."""
    config, path = get_config(), workdir / "examples.npz"
    generator = np.random.default_rng(0)
    labels = generator.integers(len(VOWELS), size=sizes.examples)
    found = np.stack([spectrogram(speak(formants, generator)) for formants in chosen(labels)])
    save_arrays(path, spectrograms=found[:, None].astype(np.float32), labels=labels)
    config.data.update(path=str(path), shape=(1, _SIDE, _SIDE), num_classes=len(VOWELS))
    config.training.update(condition="classes", condition_dropout=0.1, batch_size=32)
    config.model.update(ch_mult=(1, 1), ema_rate=0.99)
    set_short_run(config, steps=sizes.steps, sampling_steps=sizes.sampling_steps)
    return config


def chosen(labels: np.ndarray) -> np.ndarray:
    """Formants of vowels (n,), in Hz: (n, 3)."""
    return np.array(list(VOWELS.values()), dtype=float)[labels]


def speak(formants: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A vowel of a random voice, from glottal pulses and a resonance for each formant: (samples,).

    The pitch glides between two random ones from 100 to 400 Hz.  Formants are scaled by the length
    of the throat, with a deviation of 12 %, and by 5 % each; the voice is of random loudness.
    """
    from scipy.signal import lfilter

    steps = _WINDOW // 2 * (_SIDE + 1)
    pitch = np.geomspace(*np.exp(generator.uniform(math.log(100), math.log(400), 2)), steps)
    phase = generator.uniform() + np.cumsum(pitch) / _RATE
    sound = np.diff(np.floor(phase), prepend=0) > 0
    sound = sound + 0.01 * generator.standard_normal(steps)
    voice = 1 + 0.12 * generator.standard_normal()
    for formant, width in zip(formants, _WIDTHS, strict=True):
        centre = formant * voice * (1 + 0.05 * generator.standard_normal())
        pole = np.exp(math.pi * (-width + 2j * centre) / _RATE)
        poles = np.array([1, -2 * pole.real, abs(pole) ** 2])
        sound = lfilter([poles.sum()], poles, sound)
    breath = 1e-3 * generator.standard_normal(steps)
    return math.exp(0.5 * generator.standard_normal()) * (sound + breath)


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """Power in bands of equal width in mel, and in frames, (bands, frames), in dB."""
    mel = np.linspace(0, 2595 * math.log10(1 + _RATE / 2 / 700), _SIDE + 1)[:-1]
    edges = np.ceil(700 * (10 ** (mel / 2595) - 1) * _WINDOW / _RATE).astype(int)
    widths = np.diff(edges, append=_WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[:: _WINDOW // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW))[:, :-1]) ** 2
    return 10 * np.log10(np.add.reduceat(power, edges, axis=1) / widths).T


def compare(train: Labelled, held_out: Labelled, shown: dict[str, Labelled]) -> list[dict]:
    """The share that a classifier of training data recognises, and distances to training data."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    classifier.fit(train.x.flatten(1).numpy(), train.labels.numpy())
    records = []
    for name, found in shown.items():
        right = classifier.predict(found.x.flatten(1).numpy()) == found.labels.numpy()
        records.append(
            {"spectrograms": name}
            | mean_and_error("recognised", right.astype(float))
            | energy_distance(found.x, train.x[: len(found.x)]).named("energy distance, dB")
        )
    return records


def draw(path: pathlib.Path, shown: dict[str, Labelled]) -> None:
    """A row for each kind with three spectrograms of each vowel."""
    figure = new_figure(12, 1.1 * len(shown))
    panels = figure.subplots(len(shown), len(VOWELS), squeeze=False)
    low, high = np.quantile(shown["held-out"].x, (0.001, 0.999))
    for row, (name, found) in zip(panels, shown.items(), strict=True):
        for k, (axes, vowel) in enumerate(zip(row, VOWELS, strict=True)):
            ones = F.pad(found.x[found.labels == k][:3, 0], (0, 1), value=math.nan)
            axes.imshow(torch.cat(list(ones), dim=1).numpy(), origin="lower", vmin=low, vmax=high)
            axes.set(title=vowel, xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(", ", "\n"))
    save_figure(path, figure)


if __name__ == "__main__":
    with brief_mistakes():
        main()
