"""Spectra and autocorrelations of series with known ones, and their distances."""

import math

import pytest
import torch

import evaluation


def autoregressive(count, length, phi, *, seed, channels=1):
    """x_t = phi x_(t - 1) + noise of variance 1, stationary: (N, C, L)."""
    noise = torch.randn(length, count, channels, generator=torch.Generator().manual_seed(seed))
    x = [noise[0] / math.sqrt(1 - phi**2)]
    for z in noise[1:]:
        x.append(phi * x[-1] + z)
    return torch.stack(x, dim=2).double()


def sines(length, parts, count=16):
    """Sums of A cos(2 pi k t / L + phase), with phases whose products average out: (N, L)."""
    t = torch.arange(length).double()
    turns = 2 * math.pi * torch.arange(count).double()[:, None] / count
    return sum(
        size * torch.cos(2 * math.pi * k * t / length + (number + 1) * turns)
        for number, (k, size) in enumerate(parts)
    )


def expected_power(phi, length, frequency):
    """Expected periodogram of an AR(1): the transform of (1 - |k| / L) gamma_k."""
    k = torch.arange(1, length).double()
    gamma = phi**k / (1 - phi**2)
    waves = torch.cos(2 * math.pi * frequency[:, None] * k)
    return 1 / (1 - phi**2) + 2 * (waves * (1 - k / length) * gamma).sum(dim=1)


def test_spectrum_of_sines():
    found = evaluation.power_spectrum(sines(32, [(3, 2.0), (10, 0.5)]))
    torch.testing.assert_close(found.at, torch.arange(17).double() / 32)
    expected = torch.zeros(1, 17).double()
    expected[0, 3], expected[0, 10] = 32 * 2.0**2 / 4, 32 * 0.5**2 / 4
    torch.testing.assert_close(found.mean, expected)
    torch.testing.assert_close(found.standard_error, torch.zeros_like(expected), rtol=0, atol=1e-9)


def test_autocorrelation_of_sines():
    found = evaluation.autocorrelation(sines(24, [(3, 2.0), (5, 1.0)]), max_lag=23)
    lag = torch.arange(24).double()
    waves = [size * torch.cos(2 * math.pi * k * lag / 24) for k, size in ((3, 4.0), (5, 1.0))]
    torch.testing.assert_close(found.at, torch.arange(24))
    torch.testing.assert_close(found.mean[0], sum(waves) / 5)


def test_spectrum_of_an_autoregressive_process():
    found = evaluation.power_spectrum(autoregressive(4000, 32, 0.7, seed=1, channels=2))
    expected = expected_power(0.7, 32, found.at)
    assert (found.standard_error < 0.03 * expected).all()
    assert ((found.mean - expected).abs() < 4 * found.standard_error).all()


def test_autocorrelation_of_an_autoregressive_process():
    series = 5 + 3 * autoregressive(4000, 32, 0.7, seed=2, channels=2)
    found = evaluation.autocorrelation(series)
    assert found.at.tolist() == list(range(9))  # a quarter of 32
    assert (found.mean[:, 0] == 1).all() and (found.standard_error[:, 0] == 0).all()
    assert (found.standard_error < 0.01).all()
    error = (found.mean - 0.7**found.at)[:, 1:].abs()
    assert (error < 4 * found.standard_error[:, 1:]).all()


def test_channels_do_not_mix():
    a, b = autoregressive(20, 16, 0.5, seed=1)[:, 0], 7 * autoregressive(20, 16, 0.9, seed=2)[:, 0]
    for curve in (evaluation.power_spectrum, evaluation.autocorrelation):
        both = curve(torch.stack([a, b], dim=1))
        for channel, alone in enumerate((a, b)):
            torch.testing.assert_close(both.mean[channel], curve(alone).mean[0])
            torch.testing.assert_close(both.standard_error[channel], curve(alone).standard_error[0])


def test_errors_of_curves_are_their_spread_over_draws():
    for curve in (evaluation.power_spectrum, evaluation.autocorrelation):
        found = [curve(autoregressive(60, 24, 0.6, seed=k)) for k in range(200)]
        spread = torch.stack([c.mean[0, 1:] for c in found]).std(dim=0)
        error = torch.stack([c.standard_error[0, 1:] for c in found]).mean(dim=0)
        torch.testing.assert_close(error, spread, rtol=0.2, atol=0)


# --- distances ---


def test_a_gain_is_its_decibels():
    x = autoregressive(20, 16, 0.5, seed=1, channels=2)
    for decibels in (6.0, -3.0):
        found = evaluation.log_spectral_distance(10 ** (decibels / 20) * x, x)
        assert found.value == pytest.approx(abs(decibels), rel=1e-10)
    assert evaluation.log_spectral_distance(x, x) == (0, 0)


def test_rounding_noise_beside_a_line_does_not_count():
    x = sines(32, [(3, 1.0)])
    found = evaluation.log_spectral_distance(2 * x, x)
    expected = 20 * math.log10(2) / math.sqrt(17)  # at one of 17 frequencies
    assert found.value == pytest.approx(expected, rel=1e-9)
    other = evaluation.log_spectral_distance(sines(32, [(4, 1.0)]), x)
    assert other.value == pytest.approx(100 * math.sqrt(2 / 17), rel=1e-9)


def test_log_spectral_distance_of_equal_processes():
    x, y = (autoregressive(n, 64, 0.0, seed=n) for n in (400, 600))
    expected = 4.343 * math.sqrt(1 / 400 + 1 / 600)
    assert evaluation.log_spectral_distance(x, y).value == pytest.approx(expected, rel=0.3)


def test_autocorrelation_distance_of_sines():
    x, y = sines(24, [(3, 2.0)]), sines(24, [(5, 0.1)])
    lag = torch.arange(1, 11).double()
    difference = torch.cos(2 * math.pi * 3 * lag / 24) - torch.cos(2 * math.pi * 5 * lag / 24)
    found = evaluation.autocorrelation_distance(x, y, max_lag=10)
    assert found.value == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-10)
    assert evaluation.autocorrelation_distance(3 * x + 1, x).value < 1e-12


def test_distances_of_autoregressive_processes():
    x, y = autoregressive(3000, 32, 0.8, seed=1), autoregressive(2000, 32, 0.3, seed=2)
    lag = torch.arange(1, 9).double()
    expected = (0.8**lag - 0.3**lag).square().mean().sqrt().item()
    found = evaluation.autocorrelation_distance(x, y)
    assert found.standard_error < 0.02 * expected
    assert abs(found.value - expected) < 4 * found.standard_error
    frequency = torch.arange(17).double() / 32
    powers = [expected_power(phi, 32, frequency) for phi in (0.8, 0.3)]
    expected = 10 * (powers[0] / powers[1]).log10().square().mean().sqrt().item()
    found = evaluation.log_spectral_distance(x, y)
    assert found.standard_error < 0.02 * expected
    assert abs(found.value - expected) < 4 * found.standard_error


@pytest.mark.parametrize("name", ["log_spectral_distance", "autocorrelation_distance"])
def test_errors_of_distances_are_their_spread_over_draws(name):
    found = []
    for k in range(200):
        x, y = autoregressive(60, 24, 0.8, seed=k), autoregressive(80, 24, 0.4, seed=k + 1000)
        found.append(getattr(evaluation, name)(x, y))
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.2)


def test_all_metrics_by_name():
    x = autoregressive(20, 16, 0.5, seed=1, channels=2)
    y = autoregressive(30, 16, 0.7, seed=2, channels=2)
    found = evaluation.series_metrics(x, y.numpy(), seed=5)
    assert found == {
        **evaluation.log_spectral_distance(x, y).named("log_spectral_distance"),
        **evaluation.autocorrelation_distance(x, y).named("autocorrelation_distance"),
        **evaluation.sample_metrics(x, y, seed=5),
    }
    single = evaluation.series_metrics(x[:, 0], y[:, :1].squeeze(1))
    assert single == evaluation.series_metrics(x[:, :1], y[:, :1])


def test_order_of_series_changes_nothing():
    x, y = autoregressive(20, 16, 0.5, seed=1), autoregressive(30, 16, 0.7, seed=2)
    found = evaluation.series_metrics(x, y)
    assert evaluation.series_metrics(x.flip(0), y.roll(3, 0)) == pytest.approx(found, rel=1e-9)


def test_wrong_series_are_refused():
    x = autoregressive(6, 8, 0.5, seed=1)
    for wrong, message in (
        (
            x[..., None],
            r"samples should have the shape \(N, C, L\) or \(N, L\), not \(6, 1, 8, 1\)",
        ),
        (x[..., :5], r"should have one shape, not \(1, 5\) and \(1, 8\)"),
        (x[..., :1], "samples should have two or more steps, not 1"),
        (x[:1], "samples should be 2 or more examples, not 1"),
        (x / 0, "samples should be finite"),
        (x.to(torch.complex64), "real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.series_metrics(wrong, x)
    with pytest.raises(ValueError, match="constant, so it has no autocorrelation"):
        evaluation.autocorrelation(torch.full((4, 8), 0.1))
    for lag in (0, 8):
        with pytest.raises(ValueError, match=f"max_lag should be from 1 to 7, not {lag}"):
            evaluation.autocorrelation(x, lag)
