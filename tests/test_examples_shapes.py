"""The examples of points, volumes and spectrograms run from end to end, with little data."""

import itertools
import math

import numpy as np
import pytest
import torch

from examples import point_cloud, spectrogram, volume


@pytest.mark.slow
def test_point_cloud(tmp_path):
    sizes = point_cloud.Sizes(examples=200, steps=2, samples=20, sampling_steps=2)
    records, picture = point_cloud.demonstrate(tmp_path, sizes)
    found = {record["sets"]: record["nearest_neighbour_accuracy"] for record in records}
    assert list(found) == ["samples", "train", "mixed"]
    # Untrained samples are easily told from data, training sets are not.
    assert found["train"] < 0.75 < found["samples"]
    assert picture.is_file()


@pytest.mark.slow
def test_volume(tmp_path):
    sizes = volume.Sizes(40, steps=2, batch=2, samples=4, sampling_steps=2, measured=2)
    (likelihoods, distances), picture = volume.demonstrate(tmp_path, sizes)
    true, model, difference = (record["nats per dimension"] for record in likelihoods)
    assert true < model and difference == pytest.approx(model - true)
    far, near = (record["to the known spectrum, dB"] for record in distances)
    assert near < 5 < far
    assert picture.is_file()


def test_density_and_spectrum_of_volumes():
    x = torch.from_numpy(volume.fields(400))
    # The covariance of logarithms, one row for each place.
    first = torch.fft.ifftn(volume.log_spectrum()).real
    places = itertools.product(range(8), repeat=3)
    rows = torch.stack([first.roll(place, (0, 1, 2)).flatten() for place in places])
    normal = torch.distributions.MultivariateNormal(torch.zeros(512).double(), rows)
    logs = x[:4].double().flatten(1).log()
    expected = normal.log_prob(logs) - logs.sum(1)
    torch.testing.assert_close(volume.true_log_prob(x[:4]), expected)
    found, known = volume.spectrum(x)[1], volume.by_wavenumber(volume.known_spectrum())[1]
    torch.testing.assert_close(found, known, rtol=0.2, atol=0)


@pytest.mark.slow
def test_spectrogram(tmp_path):
    sizes = spectrogram.Sizes(examples=200, steps=2, samples=5, sampling_steps=2)
    records, picture = spectrogram.demonstrate(tmp_path, sizes)
    held_out, *others = (record["recognised"] for record in records)
    assert held_out > 0.7 and len(others) == 2 and all(math.isfinite(x) for x in others)
    assert picture.is_file()


def test_tones_are_in_their_bands():
    for hertz, band in ((100, 1), (1000, 7), (3900, 15)):
        # 16 bands of equal width in mel, 2595 log10(1 + f / 700), up to 4000 Hz.
        sound = np.cos(2 * np.pi * hertz * np.arange(2176) / 8000)
        found = spectrogram.spectrogram(sound)
        assert found.shape == (16, 16) and (found.argmax(0) == band).all()
