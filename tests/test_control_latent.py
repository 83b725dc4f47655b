"""`--mode control` along the probability flow, which is known in closed form for a Gaussian."""

import numpy as np
import pytest
import torch
from control_runs import Runs
from oracles import S0

from controllable_generation import interpolate
from sampling import SampleNoise
from sde_lib import VPSDE

SDE = VPSDE()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def mean(runs, name):
    """The mean of the images that a network has learned, in its range [-1, 1]."""
    contents = torch.load(runs.checkpoint(name), weights_only=True)
    return contents["ema"]["shadow_params"][0].numpy()


def stretch():
    """(m, m_T, std_T / std): the flow maps m mu + d to m_T mu + d std_T / std."""
    scale, std = SDE.marginal_coeffs(torch.tensor([SDE.sampling_eps, SDE.T]).double())
    spread = ((scale * S0) ** 2 + std**2).sqrt()
    return *scale.tolist(), float(spread[1] / spread[0])


def exact_codes(images, mu):
    first, last, ratio = stretch()
    return last * mu + (2 * images - 1 - first * mu) * ratio


def exact_images(codes, mu):
    first, last, ratio = stretch()
    return (first * mu + (codes - last * mu) / ratio + 1) / 2


def test_reconstructing(runs):
    arrays, (figures,), _ = runs.control("reconstruct", tolerance=1e-5)
    expected = exact_codes(arrays["input"], mean(runs, "gaussian"))
    np.testing.assert_allclose(arrays["codes"], expected, atol=1e-3)
    np.testing.assert_allclose(arrays["result"], arrays["input"], atol=1e-3)
    error = arrays["result"] - arrays["input"]
    assert figures["largest_error"] == pytest.approx(np.abs(error).max())
    assert figures["root_mean_square_error"] == pytest.approx(np.sqrt((error**2).mean()))


def test_tolerance_arrives(runs):
    errors = [
        runs.control("reconstruct", tolerance=tolerance)[1][0]["largest_error"]
        for tolerance in (1e-2, 1e-5)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_the_code_of_an_image_does_not_depend_on_its_batch(runs):
    """At a tolerance by which steps of one length for a whole batch are other steps."""
    codes = [
        runs.control("reconstruct", tolerance=0.1, training__batch_size=size)[0]["codes"]
        for size in (4, 1)
    ]
    np.testing.assert_allclose(*codes, atol=1e-5)


def test_interpolating(runs):
    """From the first image to the second, and from the third to the fourth."""
    arrays, (figures,), _ = runs.control("interpolate", num_interpolations=3, tolerance=1e-5)
    assert arrays["result"].shape == (2, 3, 1, 8, 8)
    mu = mean(runs, "gaussian")
    ends = [torch.tensor(exact_codes(arrays[key], mu)) for key in ("first", "second")]
    codes = interpolate(*ends, [0.0, 0.5, 1.0]).movedim(0, 1).numpy()
    np.testing.assert_allclose(arrays["codes"], codes, atol=2e-3)
    np.testing.assert_allclose(arrays["result"], exact_images(codes, mu), atol=2e-3)
    assert figures["largest_error_at_ends"] < 1e-3


def test_temperatures(runs):
    arrays, figures, _ = runs.control("temperature", temperatures=(0.5, 1.0), tolerance=1e-5)
    noise = SampleNoise(runs.config("gaussian").seed, range(4))(torch.empty(4, 1, 8, 8)).numpy()
    mu = mean(runs, "gaussian")
    for row, temperature in enumerate((0.5, 1.0)):
        expected = exact_images(temperature * noise, mu)
        np.testing.assert_allclose(arrays["result"][row], expected, atol=1e-3)
        assert figures[row]["temperature"] == temperature
        spread = expected.clip(0, 1).std(axis=0, ddof=1).mean()
        assert figures[row]["spread_between_images"] == pytest.approx(spread, rel=1e-2)


def test_comparing_codes(runs):
    """Of a network with itself, and with one that has learned another mean."""
    _, (same,), _ = runs.control("compare_codes", other=runs.checkpoint("gaussian"))
    assert same["correlation_same_image"] == pytest.approx(1) and same["relative_distance"] < 1e-6
    arrays, (differ,), _ = runs.control("compare_codes", other=runs.checkpoint("other_gaussian"))
    own, others = mean(runs, "gaussian"), mean(runs, "other_gaussian")
    ours, theirs = exact_codes(arrays["input"], own), exact_codes(arrays["input"], others)
    np.testing.assert_allclose(arrays["codes"], ours, atol=0.05)
    np.testing.assert_allclose(arrays["codes_of_the_other"], theirs, atol=0.05)
    np.testing.assert_allclose(arrays["own"], arrays["input"], atol=0.02)
    np.testing.assert_allclose(arrays["by_the_other"], exact_images(ours, others), atol=0.05)
    ours, theirs = ours.reshape(4, -1), theirs.reshape(4, -1)
    correlation = np.corrcoef(ours, theirs)[:4, 4:].diagonal().mean()
    assert differ["correlation_same_image"] == pytest.approx(correlation, rel=0.05)
    distance = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert differ["relative_distance"] == pytest.approx(distance.mean(), rel=0.05)


def test_the_ode_sampler_can_be_guided(runs):
    """With the exact score, known pixels are met and the others follow the learned distribution."""
    options = {"sampling__method": "ode", "model__num_scales": 1000, "noise_std": 0.01}
    options |= {"num_images": 2, "num_results": 8, "data_std": S0 / 2}
    arrays, (figures,), _ = runs.control("inpaint", **options)
    assert 0 < figures["residual"] < 0.011  # estimates are clipped to [0, 1]
    open_pixels = 2 * arrays["result"][..., 4:] - 1 - mean(runs, "gaussian")[..., 4:]
    assert open_pixels.std() == pytest.approx(S0, rel=0.15)
