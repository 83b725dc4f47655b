"""Distances between samples of any shape equal closed forms, and their errors are right."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import evaluation
from score_lib.base.pairs import mean_over_pairs
from score_lib.metrics.sliced import _Transport
from score_lib.metrics.two_sample import two_sample


def sliced(order):
    def measure(x, y, seed=0):
        return evaluation.sliced_wasserstein(x, y, order=order, num_projections=32, seed=seed)

    return measure


DISTANCES = {
    "energy": lambda x, y, seed=0: evaluation.energy_distance(x, y),
    "mmd": lambda x, y, seed=0: evaluation.squared_gaussian_mmd(x, y),
    "sw1": sliced(1),
    "sw2": sliced(2),
}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeated(measure, dimension, shift, scale=1.0, sizes=(60, 80), repeats=200):
    """Values and standard errors of a measure over independent draws and seeds, (R,) each."""
    n, m = sizes
    found = []
    for k in range(repeats):
        draws = normal(n + m, dimension, seed=k)
        found.append(measure(draws[:n] + shift, draws[n:] * scale, seed=k)[:2])
    return torch.tensor(found, dtype=torch.float64).unbind(1)


def assert_within(estimate, truth, smallest=0.05):
    """A check against the truth that is worth something: the error is small, and it covers."""
    assert estimate[1] < smallest * abs(truth)
    assert abs(estimate[0] - truth) < 4 * estimate[1]


# --- sliced Wasserstein ---


@pytest.mark.parametrize("sizes", [(7, 7), (7, 5), (4, 9), (6, 9)], ids=str)
@pytest.mark.parametrize("order", [1, 2, 1.5])
def test_one_dimension_is_the_distance_of_sorted_copies(sizes, order):
    n, m = sizes
    x, y = normal(n, 1, seed=1), normal(m, 1, seed=2) * 2 + 1
    # n m equal masses on each side.
    a, b = (v.flatten().repeat(k).sort().values for v, k in ((x, m), (y, n)))
    expected = (a - b).abs().pow(order).mean() ** (1 / order)
    found = evaluation.sliced_wasserstein(x, y, order=order)
    assert found.value == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)], ids=str)
def test_a_shift_moves_each_projection_by_its_part(shape):
    x, shift = normal(50, *shape, seed=1), 2 * normal(*shape, seed=2)
    size, d = shift.norm().item(), shift.numel()
    # E (u.m)^2 = |m|^2 / D and E |u.m| = |m| Gamma(D / 2) / (sqrt(pi) Gamma((D + 1) / 2)).
    mean = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    for order, expected in ((1, size * mean), (2, size / math.sqrt(d))):
        found = evaluation.sliced_wasserstein(x, x + shift, order=order, num_projections=4000)
        # Exact for any x, but for the spread of 4,000 projections, 1% of the distance.
        assert found.value == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sliced_distance_of_isotropic_gaussians(scale):
    """W_2^2 of N(0, 1) and N(u.m, s^2) is (u.m)^2 + (s - 1)^2."""
    x, y = normal(4000, 4, seed=3), normal(3000, 4, seed=4) * scale + 1.5
    expected = math.sqrt(1.5**2 + (scale - 1) ** 2)
    assert_within(evaluation.sliced_wasserstein(x, y, num_projections=200), expected)


def test_potentials_solve_the_dual_problem():
    for n, m, order in ((5, 8, 2), (6, 4, 1), (5, 5, 2)):
        a, b = (normal(1, k, seed=k).sort().values for k in (n, m + 10))
        b = b[:, :m]
        plan = _Transport.between(n, m, a.device)
        phi, psi = plan.potentials(a, b, order)
        slack = (a[0, :, None] - b[0]).abs() ** order - phi[0, :, None] - psi[0]
        tight = slack[plan.source, plan.target]
        torch.testing.assert_close(tight, tight[:1].expand_as(tight))
        assert (slack > tight[0] - 1e-12).all()
        dual = phi.mean() + psi.mean() + tight[0]
        torch.testing.assert_close(dual, plan.cost(a, b, order)[0])


def test_projections_depend_on_the_seed_alone():
    x, y = normal(30, 5, seed=1), normal(20, 5, seed=2)
    found = [evaluation.sliced_wasserstein(x, y, seed=k, num_projections=20) for k in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    # Block sizes change the last bits of sums at most.
    blocks = evaluation.sliced_wasserstein(x, y, num_projections=20, block=20)
    assert blocks == pytest.approx(found[0], rel=1e-12)


# --- energy distance and MMD ---


def direct(kernel, x, y):
    """The U-statistic by its definition."""
    k = {
        (i, j): [[kernel(np.linalg.norm(a - b)) for b in v] for a in u]
        for i, u in enumerate((x, y))
        for j, v in enumerate((x, y))
    }

    def within(values):
        n = len(values)
        return (np.sum(values) - np.trace(values)) / (n * (n - 1))

    return within(k[0, 0]) + within(k[1, 1]) - 2 * np.mean(k[0, 1])


@pytest.mark.parametrize("block", [1 << 24, 20])
def test_pairs_are_averaged_by_definition(block):
    x, y = normal(9, 2, 3, seed=1), normal(6, 2, 3, seed=2) + 0.5
    flat = [v.flatten(1).numpy() for v in (x, y)]
    expected = direct(lambda d: -d, *flat)
    assert evaluation.energy_distance(x, y, block=block)[0] == pytest.approx(expected, rel=1e-12)
    expected = direct(lambda d: math.exp(-(d**2) / (2 * 1.3**2)), *flat)
    found = evaluation.squared_gaussian_mmd(x, y, bandwidth=1.3, block=block)
    assert found[0] == pytest.approx(expected, rel=1e-12) and found.bandwidth == 1.3
    whole = evaluation.squared_gaussian_mmd(x, y, bandwidth=1.3)
    assert found == pytest.approx(whole, rel=1e-10)


# Values without effects: rows have the sum 0.  Of 4 examples in a ring, 4 pairs are +-1 and their
# variance is 4 / (4 * 1 / 2) = 2; of 6, 12 pairs, with 12 / (6 * 3 / 2) = 4 / 3.
RING_OF_4 = torch.tensor([[0, 1, 0, -1], [1, 0, -1, 0], [0, -1, 0, 1], [-1, 0, 1, 0]]).double()
RING_OF_6 = torch.tensor([[(0, 1, -1, 0, -1, 1)[j - i] for j in range(6)] for i in range(6)])


def test_errors_of_pairs_are_of_effects_and_rest():
    effects = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()  # of variance 14 / 3
    rows = 2 * effects[:, None].expand(4, 4) + RING_OF_4
    mean, error = mean_over_pairs(rows + torch.diag(effects * math.nan))
    # 4 (14 / 3 - 2 / 2) / 4 of the effects, and 2 * 2 / (4 * 3) of the rest.
    assert (mean.item(), error.item()) == pytest.approx((4.0, 2.0))
    assert mean_over_pairs(RING_OF_4)[1].item() == pytest.approx(math.sqrt(1 / 3))


@pytest.mark.parametrize("block", [4, 1 << 10])
def test_the_error_of_a_distance_is_of_effects_and_rest(block):
    """A kernel that is a table: constants, effects of 4 and 6 examples, and a rest."""
    e, f = torch.tensor([-2.0, -1, 0, 3]), torch.tensor([1.0, 1, -3, 1])
    g, h = torch.tensor([0.0, 4, -4, 1, 1, -2]), torch.tensor([2.0, -2, 1, -1, 3, -3])
    table = 7 * torch.eye(10)  # an example with itself does not count
    table[:4, :4] += 3 + e[:, None] + e + RING_OF_4
    table[4:, 4:] += 5 + h[:, None] + h + RING_OF_6
    signs = torch.tensor([1.0, -1, 1, -1])[:, None] * torch.tensor([1.0, 1, 1, -1, -1, -1])
    table[:4, 4:] = 1 + f[:, None] + g + signs  # 24 / (3 * 5) of the rest
    table[4:, :4] = table[:4, 4:].T

    def kernel(a, b):
        return table.double()[a.long(), b.long().T]

    found = two_sample(*torch.arange(10.0)[:, None].split((4, 6)), kernel, block)
    of_x = (e - f).var() - 2 / 2 - 8 / 5 / 6
    of_y = (h - g).var() - 4 / 3 / 4 - 8 / 5 / 4
    rest = 2 * 2 / (4 * 3) + 2 * (4 / 3) / (6 * 5) + 4 * (8 / 5) / (4 * 6)
    variance = 4 * (of_x / 4 + of_y / 6) + rest
    assert found == pytest.approx((3 + 5 - 2 * 1, math.sqrt(variance)), rel=1e-6)


def mean_distance(mu, variance):
    """E |z| of z ~ N(mu, variance)."""
    s = math.sqrt(variance)
    tail = NormalDist().cdf(-mu / s)
    return s * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * variance)) + mu * (1 - 2 * tail)


def test_energy_distance_of_gaussians():
    x, y = normal(1500, seed=1), normal(1200, seed=2) * 2 + 1
    expected = 2 * mean_distance(1, 5) - mean_distance(0, 2) - mean_distance(0, 8)
    assert_within(evaluation.energy_distance(x, y), expected, smallest=0.1)


def test_mmd_of_gaussians():
    """E k(x, y) = (h^2 / (h^2 + v))^(D / 2) exp(-|m|^2 / 2 (h^2 + v)), x - y ~ N(m, v)."""
    h, s, d, shift = 1.7, 1.5, 3, 0.6

    def mean(v, m):
        return (h**2 / (h**2 + v)) ** (d / 2) * math.exp(-d * m**2 / (2 * (h**2 + v)))

    expected = mean(2, 0) + mean(2 * s**2, 0) - 2 * mean(1 + s**2, shift)
    x, y = normal(1200, d, seed=1), normal(1500, d, seed=2) * s + shift
    assert_within(evaluation.squared_gaussian_mmd(x, y, bandwidth=h), expected, smallest=0.1)


def test_the_bandwidth_is_the_median_distance_of_the_data():
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # 1, 2, 3, 4, 6, 7
    found = evaluation.squared_gaussian_mmd(10 * normal(5, 1, seed=1), data)
    assert found.bandwidth == 3.0
    many = normal(1500, 8, seed=1)
    assert evaluation.squared_gaussian_mmd(many[:10], many).bandwidth == pytest.approx(
        torch.pdist(many).median().item(), rel=0.02
    )


def test_the_bandwidth_of_data_that_are_mostly_equal_is_of_those_that_differ():
    """Two values 2 apart, of which one is rare: a kernel exp(-1 / 2) between them."""
    data, samples = torch.zeros(40, 1), torch.zeros(40, 1)
    data[:4], samples[:20] = 2, 2
    found = evaluation.sample_metrics(samples, data)
    # Shares of pairs that differ, within and between: 1 less (1 - exp(-1 / 2)) of them.
    within = [2 * 20 * 20 / (40 * 39), 2 * 4 * 36 / (40 * 39)]
    between = (20 * 36 + 20 * 4) / 1600
    expected = (2 * between - sum(within)) * (1 - math.exp(-0.5))
    assert found["mmd_bandwidth"] == 2 and found["mmd"] == pytest.approx(expected)
    assert found["energy_distance"] == pytest.approx((2 * between - sum(within)) * 2)


def test_the_bandwidth_is_of_all_classes_where_they_come_in_turn():
    data = normal(4000, 2, seed=1)
    for k in range(4):
        data[k::4] += 10 * k
    found = evaluation.squared_gaussian_mmd(data[:10], data)
    assert found.bandwidth == pytest.approx(torch.pdist(data).median().item(), rel=0.05)


@pytest.mark.parametrize("name", DISTANCES)
def test_order_of_examples_and_rotations_change_nothing(name):
    x, y = normal(40, 3, seed=1) + 1, normal(30, 3, seed=2)
    found = DISTANCES[name](x, y)
    assert DISTANCES[name](x.flip(0), y.roll(7, 0)) == pytest.approx(found, rel=1e-12)
    assert DISTANCES[name](x + 5, y + 5) == pytest.approx(found, rel=1e-9)
    if name in ("energy", "mmd"):
        rotation = torch.linalg.qr(normal(3, 3, seed=5))[0]
        assert DISTANCES[name](x @ rotation, y @ rotation) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("name", ["energy", "mmd"])
def test_equal_distributions_have_distance_zero_on_average(name):
    values, errors = repeated(DISTANCES[name], 8, 0.0)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    # The first term of the decomposition has no variance here: this is the second.
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.25)


@pytest.mark.parametrize(
    "draws", [{"dimension": 1}, {"dimension": 5, "scale": 2.0, "sizes": (90, 25)}], ids=str
)
@pytest.mark.parametrize("name", DISTANCES)
def test_standard_errors_are_the_spread_over_draws(name, draws):
    values, errors = repeated(DISTANCES[name], shift=0.7, **draws)
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.25)


def test_the_spread_over_projections_counts():
    """Distant groups: what the projections add is much more than the examples do."""
    x, y = normal(200, 2, seed=1) * 0.01, normal(200, 2, seed=2) * 0.01
    y[:, 0] += 1
    found = [evaluation.sliced_wasserstein(x, y, num_projections=10, seed=k) for k in range(200)]
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.25)


def test_all_metrics_by_name():
    x, y = normal(30, 2, 4, seed=1), normal(40, 2, 4, seed=2) + 1
    found = evaluation.sample_metrics(x, y.numpy(), seed=3)
    mmd = evaluation.squared_gaussian_mmd(x, y)
    assert found == {
        **evaluation.sliced_wasserstein(x, y, order=1, seed=3).named("sliced_w1"),
        **evaluation.sliced_wasserstein(x, y, order=2, seed=3).named("sliced_w2"),
        **evaluation.energy_distance(x, y).named("energy_distance"),
        "mmd": mmd.value,
        "mmd_standard_error": mmd.standard_error,
        "mmd_bandwidth": mmd.bandwidth,
    }
    assert "sliced_w2_standard_error" in found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_in_double_precision(dtype):
    x, y = normal(30, 4, seed=1).to(dtype), normal(40, 4, seed=2).to(dtype)
    assert evaluation.sample_metrics(x, y) == evaluation.sample_metrics(x.double(), y.double())


def test_distances_far_from_0_are_exact_to_the_rounding_of_the_values():
    x, y = normal(300, 4, seed=1), normal(200, 4, seed=2)
    far, near = (evaluation.energy_distance(x + at, y + at) for at in (1e5, 0))
    assert far == pytest.approx(near, rel=1e-8)


@pytest.mark.parametrize("name", DISTANCES)
def test_wrong_samples_are_refused(name):
    x = normal(9, 4, seed=1)
    measure = DISTANCES[name]
    for wrong, message in (
        (normal(9, 5, seed=1), r"should have one shape, not \(5,\) and \(4,\)"),
        (normal(1, 4, seed=1), "samples should be . or more examples, not 1"),
        (x.where(x < 0.5, torch.nan), "samples should be finite numbers"),
        (x.to(torch.complex64), "samples should hold real numbers"),
        (x.to(torch.int64), "samples should hold floating-point numbers"),
        (x[0, 0], r"samples should have the shape \(N, \*D\), not \(\)"),
        (x[:, :0], r"not \(9, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(wrong, x)
    with pytest.raises(ValueError, match="data should be"):
        measure(x, x[:1])


def test_wrong_settings_are_refused():
    x = normal(9, 4, seed=1)
    for order in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"finite order.*{order=}"):
            evaluation.sliced_wasserstein(x, x + 3, order=order)
    with pytest.raises(ValueError, match="num_projections=1"):
        evaluation.sliced_wasserstein(x, x, num_projections=1)
    with pytest.raises(ValueError, match=r"positive, not 0\.0: give a bandwidth"):
        evaluation.squared_gaussian_mmd(x, torch.ones(5, 4))
