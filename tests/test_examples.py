"""The examples: their exact answers are right, and they run from end to end with few steps."""

import math

import pytest
import torch
from small_runs import small_config

import run_lib
from datasets import get_streams
from examples import digits, inverse_problem, series, two_dimensions
from score_lib.disk.arrays import save_arrays
from score_lib.inverse.measurements import build_operator
from score_lib.inverse.operators import measure
from score_lib.metrics.series import power_spectrum
from score_lib.runs.heldout import DataBytes


@pytest.mark.parametrize("name", two_dimensions.DENSITIES)
def test_noisy_densities_are_those_of_noisy_samples(name):
    """The integral is 1, and second moments are those of scale x_0 + std z."""
    density = two_dimensions.DENSITIES[name]
    std = torch.tensor([0.3, 0.2], dtype=torch.float64)
    points, area = two_dimensions.grid(80)
    mass = density.log_prob(points, 0.5, std).exp() * area
    torch.testing.assert_close(mass.sum().item(), 1.0, rtol=0, atol=1e-9)
    x = density.sample(20_000, torch.Generator().manual_seed(0))
    squares = (0.5 * x).square()
    error = squares.std(dim=0) / math.sqrt(len(x))
    moments = (mass[:, None] * points.square()).sum(dim=0)
    assert (moments - squares.mean(dim=0) - std**2).abs().lt(4 * error).all()


def test_known_spectrum_is_that_of_the_sines():
    curve = power_spectrum(series.sines(2000))
    difference = curve.mean[0] - series.known_spectrum()
    assert difference.abs().lt(4 * curve.standard_error[0]).all()


@pytest.mark.parametrize("operator", ["random_mask", "blur"])
def test_exact_posterior_is_calibrated(operator):
    """Errors of the mean, in units of the posterior's deviation, are standard normal."""
    config = inverse_problem.get_config()
    config.control.update(operator=operator, **inverse_problem._MEASUREMENTS[operator])
    length = inverse_problem._LENGTH
    mean = torch.full((1, length), inverse_problem._MEAN, dtype=torch.float64)
    prior = inverse_problem.Posterior(mean, inverse_problem.covariance())
    torch.manual_seed(0)
    truth = inverse_problem.draws(prior, 2000)[0]
    measured = build_operator(operator, config, (1, length))
    y = measure(measured, truth[:, None], inverse_problem._NOISE)
    exact = inverse_problem.posterior(config, y)
    scaled = (truth - exact.mean) / exact.covariance.diagonal().sqrt()
    # The share of values has a deviation of sqrt(0.1 0.9 / 2000) at each place.
    inside = (scaled.abs() < 1.644854).double().mean(dim=0)
    assert (inside - 0.9).abs().max() < 4 * math.sqrt(0.09 / 2000)
    summary = inverse_problem.of_gaussian(exact)
    half = (summary.high - summary.low) / 2
    torch.testing.assert_close((summary.high - exact.mean) / half, torch.ones_like(truth))


@pytest.mark.slow
def test_densities_of_the_plane(tmp_path, monkeypatch):
    monkeypatch.setattr(two_dimensions, "DENSITIES", {"ring": two_dimensions.Ring()})
    sizes = two_dimensions.Sizes(examples=200, steps=3, fresh=20, side=6)
    records, picture = two_dimensions.demonstrate(tmp_path, sizes)
    [(density, *values)] = [record.values() for record in records]
    assert density == "ring" and all(map(math.isfinite, values))
    assert picture.is_file()


@pytest.mark.slow
def test_series(tmp_path):
    sizes = series.Sizes(examples=100, steps=2, samples=4, sampling_steps=2)
    records, picture = series.demonstrate(tmp_path, sizes)
    assert [record["series"] for record in records] == ["sines", "sines", "neuron", "neuron"]
    # Training series are near the known spectrum, samples of an untrained network are not.
    samples, training = (record["to the known spectrum, dB"] for record in records[:2])
    assert training < samples
    assert picture.is_file()


@pytest.mark.slow
def test_inverse_problem(tmp_path):
    sizes = inverse_problem.Sizes(examples=200, steps=2, signals=2, results=2, sampling_steps=2)
    records, picture = inverse_problem.demonstrate(tmp_path, sizes)
    assert [record["posterior"] for record in records] == ["samples", "exact samples", "exact"] * 2
    assert all(record["rmse to the exact mean"] == 0 for record in records[2::3])
    assert picture.is_file()


@pytest.mark.slow
def test_digits_are_compared_by_the_results_of_the_evaluation(tmp_path, monkeypatch):
    """Its samples are held-out digits here, so that two rows have the same distances."""
    run = run_lib.setup(small_config())
    _, _, info = get_streams(run.config, evaluation=True)
    held_out = torch.cat(list(DataBytes(run.config, info.sources["test"])))
    save_arrays(tmp_path / "ckpt_1" / "samples_0.npz", samples=held_out.numpy())

    def mean_grey(run, x, levels, noise):
        assert len(x) == 128 and levels == 17
        return {"bpd": x.flatten(1).mean(1).double().numpy()}

    monkeypatch.setattr(digits, "likelihood_terms", mean_grey)
    report = {"bpd": 1.25, "bpd_standard_error": 0.5, "fid": 7.0}
    table = digits.compare(run, report, tmp_path, tmp_path / "picture.png")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    names, _, samples, real, noise = cells
    assert names[1] == "bits/dim" and real[1] == "1.2500 ± 0.5000"
    assert samples[2:] == real[2:] != noise[2:]
    # Digits are black on the whole; noise is grey.
    expected = held_out[:64].double().mean() / 255 * 2 - 1
    assert abs(float(samples[1].split()[0]) - expected) < 0.07
    assert abs(float(noise[1].split()[0])) < 0.05
    assert (tmp_path / "picture.png").is_file()
