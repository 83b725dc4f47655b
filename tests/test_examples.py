"""The examples run from end to end, with little data and few steps."""

import math

import pytest

from examples import inverse_problem, series, two_dimensions


@pytest.mark.slow
def test_densities_of_the_plane(tmp_path):
    sizes = two_dimensions.Sizes(examples=200, steps=3, fresh=20, side=6)
    records, picture = two_dimensions.demonstrate(tmp_path, sizes)
    assert [record["density"] for record in records] == list(two_dimensions.DENSITIES)
    assert all(math.isfinite(v) for record in records for v in list(record.values())[1:])
    assert picture.is_file()


@pytest.mark.slow
def test_series(tmp_path):
    sizes = series.Sizes(examples=100, steps=2, samples=8, sampling_steps=2)
    records, picture = series.demonstrate(tmp_path, sizes)
    assert [record["series"] for record in records] == ["sines", "sines", "neuron", "neuron"]
    # Untrained samples are far from the data, training series are near.
    far, near = (record["log_spectral_distance"] for record in records[:2])
    assert near < 5 < far
    assert picture.is_file()


@pytest.mark.slow
def test_inverse_problem(tmp_path):
    sizes = inverse_problem.Sizes(examples=200, steps=2, signals=40, results=4, sampling_steps=2)
    records, picture = inverse_problem.demonstrate(tmp_path, sizes)
    exact = [record for record in records if record["posterior"] == "exact"]
    assert [record["operator"] for record in exact] == ["random_mask", "blur"]
    for record in exact:
        error = 4 * record["inside the 90 % interval_standard_error"]
        assert record["inside the 90 % interval"] == pytest.approx(0.9, abs=error)
    assert picture.is_file()
