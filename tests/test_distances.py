"""Distances between features equal definitions and reference implementations."""

import math
import types

import numpy as np
import pytest
import torch
from metrics_helpers import features

import evaluation
from score_lib.metrics import distances
from score_lib.metrics.fidelity import import_torchvision

# Sizes (N, M, F): full rank; one and both covariances singular; a single block and several.
SIZES = [(300, 250, 24), (300, 20, 32), (30, 25, 48), (1100, 2300, 8)]


@pytest.fixture(scope="module")
def fidelity():
    import_torchvision()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    names = {}
    for module in (metric_fid, metric_isc, metric_kid, metric_prc):
        names |= vars(module)
    return types.SimpleNamespace(**names)


def test_frechet_distance_of_commuting_covariances():
    a = (torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    b = (torch.tensor([1.0, 2.0, 2.0]), torch.diag(torch.tensor([9.0, 4.0, 16.0])))
    # |mu|^2 + (1 - 3)^2 + (2 - 2)^2 + (0 - 4)^2
    assert evaluation.frechet_distance(a, b) == pytest.approx(9 + 4 + 0 + 16, rel=1e-12)
    assert evaluation.frechet_distance(b, a) == pytest.approx(29, rel=1e-12)


@pytest.mark.parametrize("rows", [500, 20])
def test_fid_of_equal_features_is_zero(rows):
    x = features(rows, 64, 0)
    assert evaluation.fid(x, x[::-1].copy()) < 1e-12 * np.square(x).sum(axis=1).mean()


@pytest.mark.parametrize("rows", [400, 30])
def test_fid_of_a_shift_is_its_square(rows):
    x = features(rows, 64, 0)
    assert evaluation.fid(x, x + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)


@pytest.mark.parametrize("sizes", [(5, 9), (40, 2), (39, 40)])
def test_fid_of_few_rows_takes_no_matrix_of_all_features(sizes, monkeypatch):
    """As of a class of ImageNet, of which 1,000 took two hours on one core."""
    a, b = (100 + features(rows, 40, seed) for seed, rows in enumerate(sizes))
    expected = evaluation.frechet_distance(distances.moments(a), distances.moments(b))
    monkeypatch.setattr(distances, "_factor", lambda *_: pytest.fail("a matrix of all features"))
    assert evaluation.fid(a, b) == pytest.approx(expected, rel=1e-10)
    assert evaluation.fid(a, a) == pytest.approx(0, abs=1e-9)


def test_fid_of_gaussians_with_one_shared_null_space():
    # Rank 2 in 50 dimensions: the distance is that in the two dimensions with noise.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((50, 2)))[0]
    x, y = rng.standard_normal((40, 2)), rng.standard_normal((30, 2)) @ np.array([[2, 1], [0, 1]])
    assert evaluation.fid(x @ basis.T, y @ basis.T) == pytest.approx(evaluation.fid(x, y), rel=1e-9)


def test_fid_of_singular_covariances_is_exact():
    # From the few features instead of their large covariances: with S = C' C, the trace of the root
    # of the product is the sum of the singular values of C_a C_b'.
    a, b = features(40, 300, 1), features(60, 300, 2)
    ca, cb = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    shared = np.linalg.norm(ca @ cb.T, "nuc")
    means = np.square(a.mean(0) - b.mean(0)).sum()
    expected = means + np.square(ca).sum() + np.square(cb).sum() - 2 * shared
    assert evaluation.fid(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fid_equals_torch_fidelity(fidelity, sizes):
    n, m, width = sizes
    a, b = features(n, width, 1), features(m, width, 2, scale=1.3)
    fitted = [fidelity.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    (expected,) = fidelity.fid_statistics_to_metric(*fitted, False).values()
    assert evaluation.fid(a, b) == pytest.approx(expected, rel=1e-6)


def direct_mmd(a, b):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    def mean_of_pairs(z):
        return np.mean([k(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j])

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_squared_mmd_is_the_mean_over_pairs():
    a, b = features(13, 5, 1), features(9, 5, 2)
    expected = direct_mmd(a, b)
    assert evaluation.squared_mmd(a, b) == pytest.approx(expected, rel=1e-10)
    blocks = evaluation.squared_mmd(torch.from_numpy(a), b, block=20)
    assert blocks == pytest.approx(expected, rel=1e-10)


def test_kid_averages_consecutive_blocks():
    a, b = features(11, 4, 1), features(8, 4, 2)
    blocks = [(a[:3], b[:2]), (a[3:7], b[2:5]), (a[7:], b[5:])]
    values = [direct_mmd(*block) for block in blocks]
    mean, error = evaluation.kid(a, b, max_block_size=4)
    assert mean == pytest.approx(np.mean(values), rel=1e-10)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), rel=1e-10)
    assert math.isnan(evaluation.kid(a, b)[1])


def test_kid_of_too_few_features_is_refused():
    with pytest.raises(ValueError, match=r"300 and 5 features .* at least 6 of each"):
        evaluation.kid(features(300, 4, 1), features(5, 4, 2), max_block_size=100)


def test_inception_score_of_known_predictions():
    assert evaluation.inception_score(np.zeros((20, 7)))[0] == pytest.approx(1, rel=1e-12)
    certain = 1e4 * np.eye(5)[np.arange(50) % 5]
    assert evaluation.inception_score(certain)[0] == pytest.approx(5, rel=1e-12)
    # A sixth class without images, whose probability is exactly 0.
    unused = np.concatenate([certain, np.full((50, 1), -1e5)], axis=1)
    assert evaluation.inception_score(unused)[0] == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_equals_torch_fidelity(fidelity, shuffle):
    logits = torch.from_numpy(features(203, 30, 3, scale=4)).float()
    expected = fidelity.isc_features_to_metric(logits, splits=10, shuffle=shuffle, rng_seed=2020)
    ours = evaluation.inception_score(logits, splits=10, seed=2020 if shuffle else None)
    assert ours == pytest.approx(tuple(expected.values()), rel=1e-6)


def direct_precision_recall(real, fake, k):
    def share(points, centres):
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        return np.mean([np.any(np.linalg.norm(centres - p, axis=1) <= radii) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [1 << 24, 700])
def test_precision_and_recall_equal_a_direct_computation(k, block):
    real, fake = features(90, 12, 1), features(70, 12, 5)
    fake[:5] = fake[5]  # repeated samples have radius 0
    real[-1] = fake[5]
    expected = direct_precision_recall(real, fake, k)
    assert 0.05 < expected[0] < 0.95 and 0.05 < expected[1] < 0.95
    assert evaluation.precision_recall(real, torch.from_numpy(fake), k, block=block) == expected


def test_precision_and_recall_equal_torch_fidelity(fidelity):
    real, fake = (torch.from_numpy(features(120, 8, seed)) for seed in (1, 4))
    expected = fidelity.prc_features_to_metric(fake, real, verbose=False)
    ours = evaluation.precision_recall(real, fake)
    assert ours == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_mode_collapse_has_precision_and_no_recall():
    real = 1000 + features(200, 300, 1)  # far from the origin, where |x|^2 - 2 x.y cancels
    fake = np.repeat(real[:1], 50, axis=0)
    assert evaluation.precision_recall(real, fake) == (1.0, 1 / 200)


def test_distance_of_equal_features_is_exactly_zero():
    x = torch.from_numpy(1000 + features(200, 300, 1))
    assert (distances.squared_distances(x, x) == 0).equal(torch.eye(200, dtype=torch.bool))


def test_features_of_wrong_shape_or_value_are_refused():
    with pytest.raises(ValueError, match="features of widths 4 and 5"):
        evaluation.precision_recall(features(9, 4, 1), features(9, 5, 1))
    with pytest.raises(ValueError, match="features of widths 4 and 5"):
        evaluation.fid(features(9, 4, 1), features(9, 5, 1))
    with pytest.raises(ValueError, match="too few for 3 neighbours"):
        evaluation.precision_recall(features(9, 4, 1), features(3, 4, 1))
    with pytest.raises(ValueError, match="not finite"):
        evaluation.fid(features(9, 4, 1), np.full((9, 4), np.nan))
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        evaluation.fid(features(9, 4, 1), features(1, 4, 1))


def test_settings_out_of_range_are_refused():
    x, y = features(9, 4, 1), features(9, 4, 2)
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"whole number of neighbours, 1 or more, not {k}"):
            evaluation.precision_recall(x, y, k)
    for size in (0, -1, 1, math.nan):
        with pytest.raises(ValueError, match=f"2 or more, not {size}"):
            evaluation.kid(x, y, max_block_size=size)
    assert evaluation.kid(x, y, max_block_size=math.inf)[0] == evaluation.squared_mmd(x, y)
    assert evaluation.kid(x.tolist(), y.tolist()) == pytest.approx(
        evaluation.kid(x, y), nan_ok=True
    )


@pytest.mark.parametrize(
    ("mu", "sigma", "reason"),
    [
        (np.zeros(3), -np.eye(3), "a negative variance, -1"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "symmetric, not off by 1"),
        (np.zeros(3), np.ones(3), r"not \(3,\) and \(3,\)"),
        (np.zeros((1, 3)), np.eye(3), r"not \(1, 3\) and \(3, 3\)"),
        (np.full(3, np.nan), np.eye(3), "not finite"),
        (np.zeros(3), np.full((3, 3), np.inf), "not finite"),
        (np.zeros(4), np.eye(4), "features of widths 4 and 3"),
    ],
)
def test_moments_of_no_gaussian_are_refused(mu, sigma, reason):
    """The first two had the distance 0 from a standard normal distribution."""
    with pytest.raises(ValueError, match=reason):
        evaluation.frechet_distance((mu, sigma), (np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_samples_that_are_all_the_same_have_a_distance(value):
    """That of a point to a Gaussian; their covariance is rounding errors alone."""
    mu, sigma = distances.moments(features(50, 5, 1))
    shift = (np.full(5, value) - mu.numpy()) ** 2
    error = value * np.random.default_rng(0).uniform(-1e-16, 1e-16, (5, 5)) * value
    found = evaluation.frechet_distance((np.full(5, value), error), (mu, sigma))
    assert found == pytest.approx(shift.sum() + float(sigma.trace()), rel=1e-6)


def test_kid_equals_torch_fidelity(fidelity):
    """For a subset of all rows, torch-fidelity's KID is the squared MMD."""
    a, b = features(100, 16, 1), features(100, 16, 2)
    expected = fidelity.kid_features_to_metric(
        *map(torch.from_numpy, (a, b)), kid_subsets=1, kid_subset_size=100, verbose=False
    )
    (mean, _) = expected.values()
    assert evaluation.kid(a, b)[0] == pytest.approx(mean, rel=1e-6)
    assert evaluation.squared_mmd(a, b) == pytest.approx(mean, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fid_and_kid_equal_tfgan(tfgan, sizes):
    n, m, width = sizes
    a, b = features(n, width, 1), features(m, width, 2, scale=1.3)
    expected = float(tfgan.frechet_classifier_distance_from_activations(a, b))
    assert evaluation.fid(a, b) == pytest.approx(expected, rel=1e-6)
    for size in (1024, 12):
        pair = tfgan.kernel_classifier_distance_and_std_from_activations(
            *map(as_tensor, (a, b)), max_block_size=size
        )
        if min(n, m) >= 2 * math.ceil(max(n, m) / size):
            ours = evaluation.kid(a, b, max_block_size=size)
            assert ours == pytest.approx(tuple(map(float, pair)), rel=1e-6, nan_ok=True)


def as_tensor(x):
    import tensorflow as tf

    return tf.constant(x)


@pytest.mark.slow
def test_inception_score_equals_tfgan(tfgan):
    logits = features(203, 30, 3, scale=4)
    expected = float(tfgan.classifier_score_from_logits(logits))
    assert evaluation.inception_score(logits)[0] == pytest.approx(expected, rel=1e-6)
    single = logits.astype(np.float32)
    expected = float(tfgan.classifier_score_from_logits(single))
    assert evaluation.inception_score(single)[0] == pytest.approx(expected, rel=1e-6)
