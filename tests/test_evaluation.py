"""Metrics agree with their reference implementations; features know where they came from."""

from __future__ import annotations

import math
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from assets.train_digits_classifier import examples
from configs.data import digits_defaults
from score_lib import metrics as evaluation
from score_lib.base.registry import Registry
from score_lib.data import get_dataset
from score_lib.metrics import Statistics, distances, inception, noise_scales, stats


def features(rows, width, seed, scale=1.0):
    """Correlated, shifted, skewed features, as unlike a standard normal as a network's."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) / math.sqrt(width)
    return scale * np.maximum(rng.standard_normal((rows, width)) @ mixing + 0.3, 0) + 0.01 * seed


# Sizes (N, M, F): full rank; one and both covariances singular; a single block and several.
SIZES = [(300, 250, 24), (300, 20, 32), (30, 25, 48), (1100, 2300, 8)]


@pytest.fixture(scope="module")
def fidelity():
    inception.declare_box_operators()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    names = {}
    for module in (metric_fid, metric_isc, metric_kid, metric_prc):
        names |= vars(module)
    return types.SimpleNamespace(**names)


# Fréchet distance


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


def test_fid_of_gaussians_with_one_shared_null_space():
    # Rank 2 in 50 dimensions: the distance is that of the two dimensions in which there is noise.
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


# Kernel distance


def direct_mmd(a, b):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    def mean_of_pairs(z):
        return np.mean([k(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j])

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_squared_mmd_is_the_mean_over_pairs(monkeypatch):
    a, b = features(13, 5, 1), features(9, 5, 2)
    expected = direct_mmd(a, b)
    assert evaluation.squared_mmd(a, b) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(distances, "_BLOCK", 20)
    assert evaluation.squared_mmd(torch.from_numpy(a), b) == pytest.approx(expected, rel=1e-10)


def test_kid_averages_consecutive_blocks():
    a, b = features(11, 4, 1), features(8, 4, 2)
    blocks = [(a[:3], b[:2]), (a[3:7], b[2:5]), (a[7:], b[5:])]
    values = [direct_mmd(*block) for block in blocks]
    mean, error = evaluation.kid(a, b, max_block_size=4)
    assert mean == pytest.approx(np.mean(values), rel=1e-10)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), rel=1e-10)
    assert math.isnan(evaluation.kid(a, b)[1])


def test_kid_says_when_a_set_is_too_small():
    with pytest.raises(ValueError, match="300 and 5 features do not give 3 blocks"):
        evaluation.kid(features(300, 4, 1), features(5, 4, 2), max_block_size=100)


@pytest.mark.parametrize("subsets, size", [(5, 100), (20, 37)])
def test_kid_equals_torch_fidelity(fidelity, subsets, size):
    a, b = features(160, 16, 1), features(120, 16, 2)
    expected = fidelity.kid_features_to_metric(
        *map(torch.from_numpy, (a, b)),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=7,
        verbose=False,
    )
    ours = evaluation.kid_of_subsets(a, b, subsets=subsets, size=size, seed=7)
    assert ours == pytest.approx(tuple(expected.values()), rel=1e-6)


# Inception Score


def test_inception_score_of_known_predictions():
    assert evaluation.inception_score(np.zeros((20, 7)))[0] == pytest.approx(1, rel=1e-12)
    certain = 1e4 * np.eye(5)[np.arange(50) % 5]
    assert evaluation.inception_score(certain)[0] == pytest.approx(5, rel=1e-12)
    # A sixth class that nothing belongs to, not even by rounding.
    unused = np.concatenate([certain, np.full((50, 1), -1e5)], axis=1)
    assert evaluation.inception_score(unused)[0] == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_equals_torch_fidelity(fidelity, shuffle):
    logits = torch.from_numpy(features(203, 30, 3, scale=4)).float()
    expected = fidelity.isc_features_to_metric(logits, splits=10, shuffle=shuffle, rng_seed=2020)
    ours = evaluation.inception_score(logits, splits=10, seed=2020 if shuffle else None)
    assert ours == pytest.approx(tuple(expected.values()), rel=1e-6)


# Precision and recall


def direct_precision_recall(real, fake, k):
    def share(points, centres):
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        return np.mean([np.any(np.linalg.norm(centres - p, axis=1) <= radii) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [1 << 24, 700])
def test_precision_and_recall_equal_a_direct_computation(monkeypatch, k, block):
    monkeypatch.setattr(distances, "_BLOCK", block)
    real, fake = features(90, 12, 1), features(70, 12, 5)
    fake[:5] = fake[5]  # repeated samples have radius 0
    real[-1] = fake[5]
    expected = direct_precision_recall(real, fake, k)
    assert 0.05 < expected[0] < 0.95 and 0.05 < expected[1] < 0.95
    assert evaluation.precision_recall(real, torch.from_numpy(fake), k) == expected


def test_precision_and_recall_equal_torch_fidelity(fidelity):
    real, fake = (torch.from_numpy(features(120, 8, seed)) for seed in (1, 4))
    expected = fidelity.prc_features_to_metric(fake, real, verbose=False)
    ours = evaluation.precision_recall(real, fake)
    assert ours == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


def test_collapse_has_precision_and_no_recall():
    real = 1000 + features(200, 300, 1)  # far from the origin, where |x|^2 - 2 x.y cancels
    fake = np.repeat(real[:1], 50, axis=0)
    assert evaluation.precision_recall(real, fake) == (1.0, 1 / 200)


def test_equal_features_have_no_distance():
    x = torch.from_numpy(1000 + features(200, 300, 1))
    assert (distances.squared_distances(x, x) == 0).equal(torch.eye(200, dtype=torch.bool))


def test_features_that_cannot_be_compared_are_named():
    with pytest.raises(ValueError, match="features of 4 and of 5 numbers"):
        evaluation.precision_recall(features(9, 4, 1), features(9, 5, 1))
    with pytest.raises(ValueError, match="features of 4 and of 5 numbers"):
        evaluation.fid(features(9, 4, 1), features(9, 5, 1))
    with pytest.raises(ValueError, match="too few for 3 neighbours"):
        evaluation.precision_recall(features(9, 4, 1), features(3, 4, 1))
    with pytest.raises(ValueError, match="not finite"):
        evaluation.fid(features(9, 4, 1), np.full((9, 4), np.nan))
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        evaluation.fid(features(9, 4, 1), features(1, 4, 1))


# TF-GAN


@pytest.fixture(scope="module")
def tfgan():
    tf = pytest.importorskip("tensorflow")
    # TF-GAN asks for a part of TensorFlow that is no more, though not for metrics.
    tf.estimator = types.SimpleNamespace(SessionRunHook=tf.compat.v1.train.SessionRunHook)
    sys.modules["tensorflow_gan.python.estimator"] = types.ModuleType("estimator")
    pytest.importorskip("tensorflow_gan")
    from tensorflow_gan.python.eval import classifier_metrics

    return classifier_metrics


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fid_and_kid_equal_tfgan(tfgan, sizes):
    n, m, width = sizes
    a, b = features(n, width, 1), features(m, width, 2, scale=1.3)
    expected = float(tfgan.frechet_classifier_distance_from_activations(a, b))
    assert evaluation.fid(a, b) == pytest.approx(expected, rel=1e-6)
    for size in (1024, 12):
        pair = tfgan.kernel_classifier_distance_and_std_from_activations(
            *map(_tensor, (a, b)), max_block_size=size
        )
        if min(n, m) >= 2 * math.ceil(max(n, m) / size):
            ours = evaluation.kid(a, b, max_block_size=size)
            assert ours == pytest.approx(tuple(map(float, pair)), rel=1e-6, nan_ok=True)


def _tensor(x):
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


# Noise levels


@pytest.mark.parametrize(
    "sigma_max, image_size, published",
    [(50, 32, 232), (90, 64, 500), (140, 96, 788), (190, 128, 1086)],
)
def test_number_of_scales_is_the_published_one(sigma_max, image_size, published):
    assert evaluation.fitting_num_scales(sigma_max, 0.01, 3 * image_size**2) == published


def test_number_of_scales_gives_the_overlap_that_was_asked_for():
    scales = evaluation.fitting_num_scales(1000, 1e-3, 10_000, overlap=0.3)
    gamma = 1e6 ** (1 / (scales - 1))
    assert noise_scales._overlap(gamma, 10_000) == pytest.approx(0.3, abs=2e-3)
    assert evaluation.fitting_num_scales(2, 1.9, 64) == 2
    assert evaluation.fitting_num_scales(50, 0.01, 1) == 2
    with pytest.raises(ValueError, match="sigma_max > sigma_min"):
        evaluation.fitting_num_scales(1, 2, 3)


@pytest.mark.parametrize("rows", [7, 1024])
def test_largest_pairwise_distance(monkeypatch, rows):
    monkeypatch.setattr(noise_scales, "_ROWS", rows)
    images = torch.rand(50, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = images.flatten(1).double()
    expected = max((x - y).norm().item() for x in flat for y in flat)
    assert evaluation.largest_pairwise_distance(images) == pytest.approx(expected, rel=1e-12)
    assert evaluation.largest_pairwise_distance(images.numpy()[[3, 3]]) == 0
    with pytest.raises(ValueError, match="two images or more, not 1"):
        evaluation.largest_pairwise_distance(images[:1])


# Extractors


def as_bytes(images):
    return (images * 255).round().byte().movedim(1, -1)


@pytest.fixture(scope="module")
def digits():
    """The classifier, and (images (N, 1, 8, 8), labels) of the training and the held-out part."""
    config = digits_defaults()
    info = get_dataset(config, evaluation=True)[2]
    parts = [examples(info.sources[split]) for split in ("train", "test")]
    return evaluation.get_extractor(config, "cpu"), *parts


def test_digits_classifier_knows_held_out_digits(digits):
    extractor, _, (images, labels) = digits
    out = extractor(as_bytes(images).numpy())
    assert out["pool_3"].shape == (len(labels), 64) and out["pool_3"].dtype == torch.float32
    assert (out["logits"].argmax(dim=1) == labels).double().mean() >= 0.97


def test_digits_features_do_not_depend_on_the_batch(digits):
    extractor, _, (images, _) = digits
    images = as_bytes(images)
    one_by_one = torch.cat([extractor(images[i : i + 1])["pool_3"] for i in range(20)])
    torch.testing.assert_close(extractor(images)["pool_3"][:20], one_by_one)


def test_images_that_do_not_fit_are_named(digits):
    extractor = digits[0]
    with pytest.raises(ValueError, match=r"8 x 8.*\(2, 32, 32, 3\).*eval.extractor"):
        extractor(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8 images"):
        extractor(torch.zeros(2, 8, 8, 1))


def test_metrics_tell_digits_from_noise(digits):
    extractor, (train, _), (held_out, _) = digits
    noise = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    collections = [
        evaluation.compute_statistics(extractor, [as_bytes(x)]) for x in (train, held_out, noise)
    ]
    good, bad = (evaluation.metrics(collections[0], x) for x in collections[1:])
    assert good["fid"] < 5 < 50 < bad["fid"]
    assert good["kid"] < 0.5 < 5 < bad["kid"]
    assert good["inception_score"] > 8 > 3 > bad["inception_score"]
    assert good["precision"] > 0.7 > 0.3 > bad["precision"]
    assert good["recall"] > 0.7 > 0.3 > bad["recall"]
    assert list(good) == [
        "fid",
        "inception_score",
        "kid",
        "kid_standard_error",
        "precision",
        "recall",
    ]


class MeanColour(evaluation.Extractor):
    name, resize, digest = "mean_colour", "none", "1"

    def __init__(self, weights="", device="cpu"):
        self.weights, self.device = weights, device

    def features(self, images):
        return images.float().mean(dim=(1, 2)), None


def test_a_users_own_extractor(monkeypatch):
    monkeypatch.setattr(evaluation.extractors, "_EXTRACTORS", Registry("feature extractor"))
    evaluation.register_extractor(MeanColour)
    config = ConfigDict(
        {"data": {"dataset": "X"}, "eval": {"extractor": "mean_colour", "extractor_weights": "w"}}
    )
    extractor = evaluation.get_extractor(config)
    assert extractor.weights == "w"
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    found = evaluation.compute_statistics(extractor, [images, images[:1].numpy()], dataset="X")
    assert found.count == 3 and found.logits is None and found.extractor == "mean_colour"
    assert sorted(found.pool_3[:, 0]) == [22.5, 22.5, 70.5]
    config.eval.extractor = "mean_color"
    with pytest.raises(ValueError, match=r"unknown feature extractor 'mean_color'.*'mean_colour'"):
        evaluation.get_extractor(config)


def test_wrong_files_of_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of Inception weights at"):
        inception.FidelityInception(str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        evaluation.digits.DigitsExtractor(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz does not hold the weights of the digits"):
        evaluation.digits.DigitsExtractor(str(tmp_path / "other.npz"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_are_no_weights_are_refused_and_not_run(fidelity, tmp_path):
    path = tmp_path / "weights.pth"
    for contents in ({"fc.weight": torch.zeros(2)}, [1, 2], Payload(str(tmp_path / "ran"))):
        torch.save(contents, path)
        with pytest.raises(
            ValueError, match=r"weights\.pth does not hold the weights of torch-fid"
        ):
            inception.FidelityInception(str(path))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold") as caught:
        inception.FidelityInception(str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_weights_that_cannot_be_downloaded_are_named(fidelity, tmp_path, monkeypatch):
    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = ConfigDict({"data": {"dataset": "CIFAR10"}, "eval": {}})
    with pytest.raises(
        OSError, match=r"https://.*weights-inception.*--config.eval.extractor_weights"
    ):
        evaluation.get_extractor(config, "cpu")


@pytest.mark.slow
def test_inception_from_a_file_of_weights(fidelity, tmp_path):
    network = blank_inception(tmp_path)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    config = ConfigDict(
        {"data": {"dataset": "CIFAR10"}, "eval": {"extractor": "", "extractor_weights": str(path)}}
    )
    extractor = evaluation.get_extractor(config, "cpu")
    images = torch.randint(256, (3, 32, 40, 3), dtype=torch.uint8)
    out = extractor(images)
    pool_3, logits, biased = network(images.permute(0, 3, 1, 2))
    assert out["pool_3"].shape == (3, 2048) and out["logits"].shape == (3, 1008)
    torch.testing.assert_close(out["pool_3"], pool_3)
    torch.testing.assert_close(out["logits"], logits)
    assert not torch.allclose(logits, biased)
    gray = images[..., :1]
    torch.testing.assert_close(
        extractor(gray)["pool_3"], extractor(gray.expand(-1, -1, -1, 3))["pool_3"]
    )
    with pytest.raises(ValueError, match="3 or 1 channels, not 2"):
        extractor(images[..., :2])
    assert extractor.name == "inception" and len(extractor.digest) == 16


def blank_inception(tmp_path):
    """The network with random weights: as if it had loaded a file."""
    network = inception._fidelity().FeatureExtractorInceptionV3

    class Blank(network):
        def load_state_dict(self, state):
            pass

    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    return Blank("x", ["2048", "logits_unbiased", "logits"], str(tmp_path / "empty.pth"))


# TensorFlow Hub


def saved_model(folder, kind):
    """A small stand-in: four features, the mean of each quarter's first channel; two logits.

    Resizing is "inside" the model, asked for by its signature ("fixed"), or needed because poolings
    leave nothing of a small image ("pooling").
    """
    import tensorflow as tf

    size = 299 if kind == "fixed" else None

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.float32)])
        def __call__(self, x):
            if kind == "inside":
                x = tf.image.resize(x, (2, 2), method="nearest")
            else:
                x = tf.nn.max_pool2d(x, 9, 290, "VALID") if kind == "pooling" else x
                x = tf.image.resize(x, (2, 2), method="nearest")
            pool_3 = tf.reshape(x[..., 0], (-1, 1, 1, 4))
            return {"pool_3": pool_3, "logits": tf.reshape(pool_3, (-1, 4))[:, :2] * 10}

    tf.saved_model.save(Model(), str(folder))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inside", "fixed", "pooling"])
def test_tfgan_inception_from_a_folder(tfgan, tmp_path, kind):
    config = ConfigDict({"data": {"dataset": "CIFAR10"}, "eval": {"extractor": "inception_tfgan"}})
    config.eval.extractor_weights = saved_model(tmp_path / "model", kind)
    extractor = evaluation.get_extractor(config)
    quarters = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8)
    image = quarters.repeat_interleave(16, 0).repeat_interleave(16, 1)[:, :, None].expand(-1, -1, 3)
    out = extractor(torch.stack([image, 255 - image]))
    expected = (quarters.flatten().float() - 127.5) / 127.5
    torch.testing.assert_close(out["pool_3"], torch.stack([expected, -expected]))
    torch.testing.assert_close(out["logits"], 10 * out["pool_3"][:, :2])
    assert out["pool_3"].dtype == torch.float32
    assert extractor.resize == (
        "by the model itself" if kind == "inside" else "bilinear to 299 x 299, not antialiased"
    )
    again = inception.TFGANInception(config.eval.extractor_weights)
    assert again.digest == extractor.digest
    import tensorflow as tf

    assert tf.config.get_visible_devices("GPU") == []


@pytest.mark.slow
def test_models_that_return_something_else_are_explained(tfgan, tmp_path):
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32)])
        def __call__(self, x):
            return {"features": x[:, 0, 0]}

    tf.saved_model.save(Model(), str(tmp_path / "model"))
    extractor = inception.TFGANInception(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"'pool_3' and 'logits', .*not \['features'\]"):
        extractor(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


@pytest.mark.slow
def test_published_way_to_the_inception_model(tfgan, tmp_path, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(inception, "TFGAN_URL", saved_model(tmp_path / "model", "inside"))
    outputs = evaluation.get_inception_model()(tf.ones((2, 32, 32, 3)))
    assert outputs["pool_3"].shape == (2, 1, 1, 4) and outputs["logits"].shape == (2, 2)
    for missing in (str(tmp_path / "none"), "http://127.0.0.1:9/model/1"):
        with pytest.raises(OSError, match=r"cannot be loaded from .*extractor_weights") as caught:
            inception.TFGANInception(missing)
        assert missing in str(caught.value) and "\n" not in str(caught.value)


# Files of statistics


def some_statistics(**changes):
    values = {
        "pool_3": features(40, 6, 1).astype(np.float32),
        "logits": features(40, 3, 2).astype(np.float32),
        "extractor": "digits",
        "resize": "none",
        "digest": "abc",
        "dataset": "DIGITS",
    }
    return Statistics(**{**values, **changes})


def test_statistics_survive_a_file(tmp_path):
    saved = some_statistics()
    evaluation.save_statistics(tmp_path / "new" / "s.npz", saved)
    loaded = evaluation.load_statistics(tmp_path / "new" / "s.npz")
    np.testing.assert_array_equal(loaded["pool_3"], saved.pool_3)
    np.testing.assert_array_equal(loaded["logits"], saved.logits)
    assert loaded.made_by() == saved.made_by() == "'digits' (weights abc, resize: none)"
    assert (loaded.dataset, loaded.count, loaded.hash()) == ("DIGITS", 40, saved.hash())
    with pytest.raises(KeyError, match="no 'mu'"):
        loaded["mu"]


def test_rows_are_in_random_order_that_is_always_the_same():
    images = torch.arange(200, dtype=torch.uint8).reshape(200, 1, 1, 1).expand(-1, 2, 2, 1)
    whole = evaluation.compute_statistics(MeanColour(), [images]).pool_3[:, 0]
    parts = evaluation.compute_statistics(MeanColour(), images.split(33), progress=True).pool_3
    np.testing.assert_array_equal(whole, parts[:, 0])
    assert sorted(whole) == list(range(200))
    assert abs(np.corrcoef(whole, np.arange(200))[0, 1]) < 0.2
    with pytest.raises(ValueError, match="two images or more"):
        evaluation.compute_statistics(MeanColour(), [])


def test_common_layouts_are_read(tmp_path, caplog):
    saved, fake = some_statistics(), some_statistics(pool_3=features(30, 6, 5), logits=None)
    np.savez(tmp_path / "pool.npz", pool_3=saved.pool_3)
    np.savez(
        tmp_path / "moments.npz", mu=saved.pool_3.mean(0), sigma=np.cov(saved.pool_3, rowvar=False)
    )
    expected = evaluation.metrics(saved, fake)
    pool = evaluation.metrics(evaluation.load_statistics(tmp_path / "pool.npz"), fake)
    assert pool == expected and expected["inception_score"] is None
    assert "the statistics of the data do not say which extractor made them" in caplog.text
    moments = evaluation.metrics(evaluation.load_statistics(tmp_path / "moments.npz"), fake)
    assert moments.pop("fid") == pytest.approx(expected["fid"], rel=1e-5)
    assert set(moments.values()) == {None}
    assert "no KID, precision or recall" in caplog.text and "no Inception Score" in caplog.text


def test_few_samples_leave_distances_out(caplog):
    real = some_statistics(pool_3=features(5000, 6, 1), logits=None)
    found = evaluation.metrics(real, some_statistics(pool_3=features(8, 6, 5), logits=None))
    assert found["fid"] > 0 and 0 <= found["precision"] <= 1 and found["kid"] is None
    assert "left out: 5000 and 8 features do not give 5 blocks" in caplog.text
    found = evaluation.metrics(real, some_statistics(pool_3=features(3, 6, 5), logits=None))
    assert found["fid"] > 0 and found["precision"] is None


@pytest.mark.parametrize("change", [{"extractor": "inception"}, {"resize": "x"}, {"digest": "d"}])
def test_features_of_different_extractors_give_no_number(change):
    real, fake = some_statistics(), some_statistics(**change)
    with pytest.raises(ValueError, match="different extractors") as caught:
        evaluation.metrics(real, fake)
    assert real.made_by() in str(caught.value) and fake.made_by() in str(caught.value)


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"mu": np.zeros(3)}, "neither 'pool_3' nor both 'mu' and 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, r"shapes \(F,\) and \(F, F\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "finite"),
        ({"pool_3": np.zeros((4, 2, 2))}, "rows of floating-point numbers"),
        ({"pool_3": np.zeros((4, 2), int)}, "rows of floating-point numbers"),
        ({"pool_3": np.full((4, 2), np.inf)}, "not finite"),
        ({"pool_3": np.zeros((4, 2)), "logits": np.zeros((3, 2))}, "3 rows for 4 images"),
        ({"pool_3": np.zeros((1, 2))}, "two are the least"),
        ({"pool_3": np.zeros((4, 2)), "hash": np.array("0")}, "changed after it was written"),
        ({"pool_3": np.array([{}], dtype=object)}, "damaged or not an .npz of plain arrays"),
    ],
)
def test_wrong_files_are_explained(tmp_path, arrays, reason):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=reason) as caught:
        evaluation.load_statistics(tmp_path / "s.npz")
    assert str(tmp_path / "s.npz") in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_explained(tmp_path):
    path = tmp_path / "s.npz"
    evaluation.save_statistics(path, some_statistics())
    whole = path.read_bytes()
    middle = whole.index(b"pool_3.npy") + 300
    damaged = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "text": b"not a file of statistics\n",
        "empty": b"",
    }
    for contents in damaged.values():
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"s\.npz is damaged"):
            evaluation.load_statistics(path)


def test_where_the_statistics_of_a_data_set_are(tmp_path):
    def name(dataset, image_size=32, **data):
        data = {"dataset": dataset, "image_size": image_size, "num_channels": 3, **data}
        return evaluation.stats_path(ConfigDict({"data": data, "eval": {}})).name

    assert name("CIFAR10") == "cifar10_stats.npz"
    assert name("CELEBA", 64) == "celeba_stats.npz"
    assert name("LSUN", 256, category="bedroom") == "lsun_bedroom_256_stats.npz"
    assert name("FFHQ", 1024) == "ffhq_1024_stats.npz"
    own = [name("IMAGES", (32, 48), path=f"{tmp_path}/{folder}/cats") for folder in "ab"]
    assert own[0] != own[1] and all(n.startswith("images_cats_") for n in own)
    assert own[0].endswith("_32x48_stats.npz")
    assert own[0] != name("IMAGES", (32, 48), path=f"{tmp_path}/a/cats", num_channels=1)


def test_statistics_of_the_configured_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "STATS_FOLDER", tmp_path)
    config = ConfigDict({"data": {"dataset": "CIFAR10"}, "eval": {}})
    with pytest.raises(
        FileNotFoundError, match=r"CIFAR10 at .*--mode fid_stats.*--config.eval.stats"
    ):
        evaluation.load_dataset_stats(config)
    evaluation.save_statistics(tmp_path / "cifar10_stats.npz", some_statistics(dataset="usual"))
    evaluation.save_statistics(tmp_path / "mine.npz", some_statistics(dataset="mine"))
    assert evaluation.load_dataset_stats(config).dataset == "usual"
    config.eval.stats = str(tmp_path / "mine.npz")
    assert evaluation.load_dataset_stats(config).dataset == "mine"
