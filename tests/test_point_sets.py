"""Measures of sets of points equal their definitions, and 1-NN accuracy its known values."""

import pytest
import torch

import evaluation


def clouds(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(x, y):
    return torch.cdist(x, x), torch.cdist(x, y), torch.cdist(y, y)


def direct_chamfer(a, b):
    apart = [[float((p - q).square().sum()) for q in b] for p in a]
    there = sum(map(min, apart)) / len(a)
    return there + sum(map(min, zip(*apart, strict=True))) / len(b)


@pytest.mark.parametrize("block", [1 << 24, 100])
def test_chamfer_distances_by_definition(block):
    x, y = clouds(3, 7, 3, seed=1), clouds(4, 5, 3, seed=2) + 10
    expected = [[direct_chamfer(a, b) for b in y] for a in x]
    found = evaluation.chamfer_distances(x, y.numpy(), block=block)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    single = evaluation.chamfer_distances(x.float(), y.float(), block=block)
    torch.testing.assert_close(single, found, rtol=1e-5, atol=0)


def test_chamfer_distance_of_single_points_is_twice_their_squared_distance():
    x, y = clouds(4, 1, 2, seed=1), clouds(3, 1, 2, seed=2)
    expected = 2 * torch.cdist(x[:, 0], y[:, 0]).square()
    torch.testing.assert_close(evaluation.chamfer_distances(x, y), expected)


def test_order_of_points_changes_nothing():
    x, y = clouds(6, 8, 3, seed=1), clouds(5, 9, 3, seed=2)
    found = evaluation.point_set_metrics(x, y)
    mixed = evaluation.point_set_metrics(x[:, torch.randperm(8)], y.flip(1))
    assert mixed == pytest.approx(found, rel=1e-12)
    order = evaluation.point_set_metrics(x.flip(0), y.roll(2, 0))
    assert order == pytest.approx(found, rel=1e-12)


def test_all_measures_by_name():
    x, y = clouds(12, 6, 2, seed=1), clouds(9, 5, 2, seed=2) * 1.5
    xx, yy = (evaluation.chamfer_distances(v, v) for v in (x, y))
    xy = evaluation.chamfer_distances(x, y)
    assert evaluation.point_set_metrics(x, y) == {
        **evaluation.nearest_neighbour_accuracy(xx, xy, yy).named("nearest_neighbour_accuracy"),
        "coverage": evaluation.coverage(xy),
        **evaluation.matching_distance(xy).named("matching_distance"),
    }


# --- 1-NN accuracy ---


def test_accuracy_by_definition():
    x, y = clouds(8, 2, seed=1), clouds(5, 2, seed=2) + 0.5
    joint, labels = torch.cat([x, y]), [0] * 8 + [1] * 5
    right = [[], []]
    for k, (point, label) in enumerate(zip(joint, labels, strict=True)):
        apart = [float((point - q).norm()) if j != k else 1e9 for j, q in enumerate(joint)]
        right[label].append(labels[apart.index(min(apart))] == label)
    expected = sum(sum(r) / len(r) for r in right) / 2
    found = evaluation.nearest_neighbour_accuracy(*distances(x, y))
    assert found.value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", [(600, 600), (800, 400)], ids=str)
def test_two_parts_of_one_distribution_cannot_be_told_apart(sizes):
    n, m = sizes
    both = clouds(n + m, 3, seed=4)
    found = evaluation.nearest_neighbour_accuracy(*distances(both[:n], both[n:]))
    assert found.standard_error < 0.03
    assert abs(found.value - 0.5) < 3 * found.standard_error


def test_separated_sets_are_told_apart_and_twins_never():
    x = clouds(20, 4, 3, seed=1)
    far = evaluation.point_set_metrics(x, x + 50)
    assert far["nearest_neighbour_accuracy"] == 1
    assert far["nearest_neighbour_accuracy_standard_error"] == 0
    twins = evaluation.point_set_metrics(x, x + 1e-4)
    assert twins["nearest_neighbour_accuracy"] == 0
    assert twins["coverage"] == 1


@pytest.mark.parametrize("shift", [0.0, 0.8])
@pytest.mark.parametrize("sizes", [(80, 80), (100, 60)], ids=str)
def test_error_of_the_accuracy_is_its_spread_over_draws(shift, sizes):
    found = []
    for k in range(200):
        x, y = clouds(sum(sizes), 2, seed=k).split(sizes)
        found.append(evaluation.nearest_neighbour_accuracy(*distances(x + shift, y)))
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.15)


# --- coverage and matching distance ---


def test_coverage_and_matching_distance_of_a_known_matrix():
    between = torch.tensor([[1.0, 2.0, 9.0, 4.0], [0.5, 3.0, 5.0, 6.0], [7.0, 8.0, 2.0, 9.0]])
    assert evaluation.coverage(between) == 2 / 4  # the nearest data are 0, 0 and 2
    found = evaluation.matching_distance(between.double())
    least = torch.tensor([0.5, 2.0, 2.0, 4.0]).double()
    assert found.value == pytest.approx(least.mean().item())
    assert found.standard_error == pytest.approx(least.std().item() / 2)


def test_mode_collapse_is_seen():
    data = clouds(25, 6, 3, seed=1)
    found = evaluation.point_set_metrics(data[:1].expand(10, -1, -1), data)
    assert found["coverage"] == 1 / 25
    same = evaluation.point_set_metrics(data, data)
    assert same["coverage"] == 1 and same["matching_distance"] == 0


def test_error_of_the_matching_distance_is_its_spread_over_data():
    samples, found = clouds(30, 6, 3, seed=1), []
    for k in range(200):
        data = clouds(20, 5, 3, seed=k + 10) * 1.3
        between = evaluation.chamfer_distances(samples, data)
        found.append(evaluation.matching_distance(between))
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.2)


def test_wrong_sets_are_refused():
    x = clouds(4, 5, 3)
    for wrong, message in (
        (x[0], r"samples should have the shape \(N, P, C\), not \(5, 3\)"),
        (x[:1], "samples should be 2 or more examples, not 1"),
        (x[..., :2], "points of 2 and of 3 coordinates have no distance"),
        (x / 0, "samples should be finite"),
        (x.to(torch.complex64), "real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.point_set_metrics(wrong, x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_distances_that_are_not_finite_are_refused(value):
    """All nan had an accuracy of 0.5, as if samples and data could not be told apart."""
    within, between, other = distances(clouds(4, 2), clouds(3, 2, seed=1))
    own = within.clone().fill_diagonal_(value)  # of an example from itself
    expected = evaluation.nearest_neighbour_accuracy(within, between, other)
    assert evaluation.nearest_neighbour_accuracy(own, between, other) == expected
    for k in range(3):
        wrong = [within.clone(), between.clone(), other.clone()]
        wrong[k][2, 1] = value
        with pytest.raises(ValueError, match="finite numbers"):
            evaluation.nearest_neighbour_accuracy(*wrong)
    for measure in (evaluation.coverage, evaluation.matching_distance):
        with pytest.raises(ValueError, match="finite numbers"):
            measure(wrong[2])
        with pytest.raises(ValueError, match=r"a matrix \(N, M\), not \(3,\)"):
            measure(other[0])
    with pytest.raises(ValueError, match=r"within 4 examples should have the shape \(4, 4\)"):
        evaluation.nearest_neighbour_accuracy(other, between, within)
