"""Statistics of images, their files, and noise levels that suit a data set."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from metrics_helpers import MeanColour, features, some_statistics
from ml_collections import ConfigDict

import evaluation
from score_lib.metrics import configured, distances, noise_scales
from score_lib.metrics.jackknife import sampling_errors
from score_lib.metrics.shares import warn_of_shares
from score_lib.metrics.stats import class_metrics, class_text


@pytest.mark.parametrize(
    "sigma_max, image_size, published",
    [(50, 32, 232), (90, 64, 500), (140, 96, 788), (190, 128, 1086)],
)
def test_number_of_scales_is_the_published_one(sigma_max, image_size, published):
    assert evaluation.fitting_num_scales(sigma_max, 0.01, 3 * image_size**2) == published


def test_number_of_scales_gives_the_requested_overlap():
    scales = evaluation.fitting_num_scales(1000, 1e-3, 10_000, overlap=0.3)
    gamma = 1e6 ** (1 / (scales - 1))
    assert noise_scales.neighbour_overlap(gamma, 10_000) == pytest.approx(0.3, abs=2e-3)
    assert evaluation.fitting_num_scales(2, 1.9, 64) == 2
    assert evaluation.fitting_num_scales(50, 0.01, 1) == 2
    for sigma_max, sigma_min in ((1, 2), (np.inf, 1), (np.nan, 1)):
        with pytest.raises(ValueError, match="sigma_max > sigma_min"):
            evaluation.fitting_num_scales(sigma_max, sigma_min, 3)


@pytest.mark.parametrize("rows", [7, 1024])
def test_largest_pairwise_distance(rows):
    images = torch.rand(50, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = images.flatten(1).double()
    expected = max((x - y).norm().item() for x in flat for y in flat)
    found = evaluation.largest_pairwise_distance(images, rows=rows)
    assert found == pytest.approx(expected, rel=1e-12)
    assert evaluation.largest_pairwise_distance(images.numpy()[[3, 3]]) == 0
    with pytest.raises(ValueError, match="two or more images, not 1"):
        evaluation.largest_pairwise_distance(images[:1])


def test_statistics_of_a_users_own_extractor():
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    batches = [images, images[:1].numpy()]
    found = evaluation.compute_statistics(MeanColour(), batches, dataset="X")
    assert found.count == 3 and found.logits is None and found.extractor == "mean_colour"
    assert sorted(found.pool_3[:, 0]) == [22.5, 22.5, 70.5] and found.dataset == "X"


def test_saved_statistics_are_loaded_unchanged(tmp_path):
    saved = some_statistics()
    evaluation.save_statistics(tmp_path / "new" / "s.npz", saved)
    loaded = evaluation.load_statistics(tmp_path / "new" / "s.npz")
    np.testing.assert_array_equal(loaded["pool_3"], saved.pool_3)
    np.testing.assert_array_equal(loaded["logits"], saved.logits)
    assert loaded.made_by() == saved.made_by() == "'digits' (weights abc, resize: none)"
    assert (loaded.dataset, loaded.count, loaded.hash()) == ("DIGITS", 40, saved.hash())
    with pytest.raises(KeyError, match="no 'mu'"):
        loaded["mu"]


def test_rows_are_shuffled_with_a_fixed_seed():
    images = torch.arange(200, dtype=torch.uint8).reshape(200, 1, 1, 1).expand(-1, 2, 2, 1)
    whole = evaluation.compute_statistics(MeanColour(), [images]).pool_3[:, 0]
    parts = evaluation.compute_statistics(MeanColour(), images.split(33), progress=True).pool_3
    np.testing.assert_array_equal(whole, parts[:, 0])
    assert sorted(whole) == list(range(200))
    assert abs(np.corrcoef(whole, np.arange(200))[0, 1]) < 0.2
    with pytest.raises(ValueError, match="two or more images"):
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
    assert "the statistics of the data do not name their extractor" in caplog.text
    moments = evaluation.metrics(evaluation.load_statistics(tmp_path / "moments.npz"), fake)
    assert moments.pop("fid") == pytest.approx(expected["fid"], rel=1e-5)
    assert set(moments.values()) == {None}
    assert "no KID, precision or recall" in caplog.text and "no Inception Score" in caplog.text


def test_distances_that_need_more_samples_are_left_out(caplog):
    real = some_statistics(pool_3=features(500, 6, 1), logits=None)
    found = evaluation.metrics(real, some_statistics(pool_3=features(3, 6, 5), logits=None))
    assert found["fid"] > 0 and found["kid"] and found["precision"] is None
    assert "left out: 500 real and 3 fake features are too few" in caplog.text


@pytest.mark.parametrize("change", [{"extractor": "inception"}, {"resize": "x"}, {"digest": "d"}])
def test_features_of_different_extractors_are_not_compared(change):
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
        ({"pool_3": np.zeros((1, 2))}, "two or more"),
        ({"pool_3": np.zeros((4, 2)), "hash": np.array("0")}, "changed after it was written"),
        ({"pool_3": np.array([{}], dtype=object)}, "damaged or not an .npz of plain arrays"),
    ],
)
def test_files_of_wrong_contents_are_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=reason) as caught:
        evaluation.load_statistics(tmp_path / "s.npz")
    assert str(tmp_path / "s.npz") in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path):
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


def test_names_of_statistics_files(tmp_path):
    def name(dataset, image_size=32, **data):
        data = {"dataset": dataset, "image_size": image_size, "num_channels": 3, **data}
        return evaluation.stats_path(ConfigDict({"data": data, "eval": {}})).name

    assert name("CIFAR10") == "cifar10_stats.npz"
    assert name("CIFAR10", 16) == "cifar10_16_stats.npz"
    assert name("CELEBA", 64) == "celeba_stats.npz"
    assert name("CELEBA", 128) == "celeba_128_stats.npz"
    assert name("LSUN", 256, category="bedroom") == "lsun_bedroom_256_stats.npz"
    assert name("FFHQ", 1024) == "ffhq_1024_stats.npz"
    own = [name("IMAGES", (32, 48), path=f"{tmp_path}/{folder}/cats") for folder in "ab"]
    assert own[0] != own[1] and all(n.startswith("images_cats_") for n in own)
    assert own[0].endswith("_32x48_stats.npz")
    assert own[0] != name("IMAGES", (32, 48), path=f"{tmp_path}/a/cats", num_channels=1)


def test_statistics_of_the_configured_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(configured, "STATS_FOLDER", tmp_path)
    config = ConfigDict({"data": {"dataset": "CIFAR10", "image_size": 32}, "eval": {}})
    with pytest.raises(
        FileNotFoundError, match=r"CIFAR10 at .*--mode fid_stats.*--config.eval.stats"
    ):
        evaluation.load_dataset_stats(config)
    evaluation.save_statistics(tmp_path / "cifar10_stats.npz", some_statistics(dataset="usual"))
    evaluation.save_statistics(tmp_path / "mine.npz", some_statistics(dataset="mine"))
    assert evaluation.load_dataset_stats(config).dataset == "usual"
    config.eval.stats = str(tmp_path / "mine.npz")
    assert evaluation.load_dataset_stats(config).dataset == "mine"


def test_statistics_are_found_in_the_run_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(configured, "STATS_FOLDER", tmp_path / "assets")
    config = ConfigDict({"data": {"dataset": "CIFAR10", "image_size": 32}, "eval": {}})
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"run/stats/cifar10_.* or .*assets/cifar10_"):
        evaluation.load_dataset_stats(config, run)
    places = {"assets": tmp_path / "assets", "run": run / "stats"}
    for place, folder in places.items():
        evaluation.save_statistics(folder / "cifar10_stats.npz", some_statistics(dataset=place))
        assert evaluation.load_dataset_stats(config, run).dataset == place
    assert evaluation.load_dataset_stats(config).dataset == "assets"


def test_statistics_of_another_size_are_refused(tmp_path, caplog):
    path = str(tmp_path / "s.npz")
    config = ConfigDict({"data": {"dataset": "CELEBA", "image_size": 64}, "eval": {"stats": path}})
    caplog.set_level("INFO")
    evaluation.save_statistics(path, some_statistics(shape="64 x 64 x 3", dataset="CELEBA"))
    evaluation.load_dataset_stats(config)
    assert "s.npz: 40 images of CELEBA, 64 x 64 x 3, features by 'digits'" in caplog.text
    config.data.image_size = 128
    with pytest.raises(ValueError, match=r"of 64 x 64 x 3, .* 128 x 128 x 3 .*--mode fid_stats"):
        evaluation.load_dataset_stats(config)


def test_unknown_facts_of_published_statistics_are_said(tmp_path, caplog):
    caplog.set_level("INFO")
    np.savez(tmp_path / "s.npz", pool_3=features(40, 6, 1))
    data, stats = {"dataset": "CIFAR10", "image_size": 32}, {"stats": str(tmp_path / "s.npz")}
    evaluation.load_dataset_stats(ConfigDict({"data": data, "eval": stats}))
    (line,) = [r.getMessage() for r in caplog.records if "s.npz" in r.getMessage()]
    assert "40 images of unknown data, of unknown size, features by an unknown network" in line


def test_hash_of_older_files_is_unchanged(tmp_path):
    """Files without a record of their images keep their hash."""
    assert some_statistics().hash() != some_statistics(shape="8 x 8 x 1").hash()
    evaluation.save_statistics(tmp_path / "s.npz", some_statistics())
    arrays = dict(np.load(tmp_path / "s.npz"))
    older = {k: v for k, v in arrays.items() if k not in ("place", "shape")}
    np.savez(tmp_path / "older.npz", **older)
    assert evaluation.load_statistics(tmp_path / "older.npz").hash() == str(arrays["hash"])


@pytest.mark.parametrize("num_batches", [1, 3])
def test_published_call_for_features(num_batches):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    for values in (images, torch.from_numpy(images)):
        found = evaluation.run_inception_distributed(values, MeanColour(), num_batches)
        expected = torch.from_numpy(images).float().mean(dim=(1, 2))
        assert torch.equal(found["pool_3"], expected) and found["logits"] is None
    with pytest.raises(ValueError, match="uint8"):
        evaluation.run_inception_distributed(images / 255, MeanColour())


@pytest.fixture
def no_neighbours(monkeypatch):
    """Leave precision and recall out, which take most of the time."""
    monkeypatch.setattr(distances, "precision_recall", lambda *_: (None, None))


def test_the_kernel_distance_is_over_all_pairs_in_any_order(no_neighbours):
    """By blocks, rows that are stored or drawn class by class, or in turn, would not be at random,
    and few samples beside many data would not do."""
    rng = np.random.default_rng(0)
    centres, labels = 3 * rng.standard_normal((10, 8)), np.arange(1500) % 10
    real, samples = (
        (centres[k] + rng.standard_normal((len(k), 8))).astype(np.float32)
        for k in (rng.integers(10, size=3000), labels)
    )
    found = [
        evaluation.metrics(*(some_statistics(pool_3=x, logits=None) for x in pair))
        for pair in [
            (real, samples),
            (real[real[:, 0].argsort()], samples[labels.argsort()]),
            (real, samples[:3]),
        ]
    ]
    assert found[0]["kid"] == pytest.approx(evaluation.squared_mmd(real, samples), rel=1e-9)
    for name in ("kid", "kid_standard_error"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-9)
    assert abs(found[0]["kid"]) < 3 * found[0]["kid_standard_error"]
    assert found[2]["kid"] == pytest.approx(evaluation.squared_mmd(real, samples[:3]), rel=1e-9)
    assert found[2]["kid_standard_error"] is None


@pytest.mark.parametrize("sizes", [(120, 90), (1030, 60)])
def test_the_error_of_a_kernel_distance_is_its_spread_over_other_sets(sizes, no_neighbours):
    rng = np.random.default_rng(0)

    def found():
        pool_3 = (rng.standard_normal((count, 4)) + 0.3 * k for k, count in enumerate(sizes))
        return evaluation.metrics(*(some_statistics(pool_3=x, logits=None) for x in pool_3))

    drawn = [found() for _ in range(40)]
    values, errors = (np.array([f[name] for f in drawn]) for name in ("kid", "kid_standard_error"))
    assert errors.min() > values.std() / 4 and errors.max() < 4 * values.std()
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.4)


def test_the_jackknife_of_classes_in_turn_is_of_samples_of_these_classes():
    """Beside the spread of the distance over other sets with the same classes.  It was three times
    as large with samples in random order, whose groups have other shares of the classes."""
    rng = np.random.default_rng(0)
    centres, labels = 3 * rng.standard_normal((10, 4)), np.arange(1000) % 10

    def of(labels):
        return centres[labels] + rng.standard_normal((len(labels), 4))

    real = some_statistics(pool_3=of(rng.integers(10, size=5000)), logits=None)
    sets = [some_statistics(pool_3=of(labels), logits=None, labels=labels) for _ in range(60)]
    spread = np.std([distances.frechet_distance(real.moments(), one.moments()) for one in sets])
    found = [sampling_errors(real, one)["fid_standard_error"] for one in sets[:4]]
    assert 0.8 * spread < np.mean(found) < 1.8 * spread


def test_shuffled_rows_stay_together():
    rows = np.arange(60, dtype=np.float32).reshape(20, 3)
    stats = some_statistics(pool_3=rows, logits=2 * rows, labels=np.arange(20))
    found = stats.shuffled()
    assert np.array_equal(found.pool_3, rows[found.labels])
    assert np.array_equal(found.logits, 2 * rows[found.labels])
    assert sorted(found.labels) == list(range(20)) != list(found.labels)
    assert dataclasses.replace(stats, labels=None).by_class().pool_3 is rows


def test_rows_by_class_keep_their_order_within_it():
    rows = np.arange(18, dtype=np.float32).reshape(6, 3)
    stats = some_statistics(pool_3=rows, logits=None, labels=np.array([1, 0, 2, 0, 1, 2]))
    assert np.array_equal(stats.by_class().pool_3, rows[[1, 3, 0, 4, 2, 5]])


def test_statistics_keep_the_record_of_their_features():
    """Names of classes, above all: without them other classes of the same number are compared."""
    extractor = types.SimpleNamespace(name="digits", resize="none", digest="9f31")
    labels, spatial = torch.tensor([2, 0, 1, 0]), torch.randn(4, 3)
    names = class_text({"cat": 0, "dog": 1})
    found = evaluation.Statistics.of(
        extractor, torch.randn(4, 2), None, "pets", labels, spatial, "aa", names
    )
    assert found.made_by() == "'digits' (weights 9f31, resize: none)"
    assert (found.dataset, found.pixels, found.classes) == ("pets", "aa", names)
    assert found.labels.tolist() == [2, 0, 1, 0]
    assert found.mu_s == pytest.approx(spatial.mean(0).numpy(), abs=1e-6)
    assert found.sigma_s == pytest.approx(spatial.T.cov().numpy(), abs=1e-6)


def test_other_classes_of_the_same_number_are_not_compared(tmp_path, caplog):
    """Unless one of both records no names, as older files do."""
    labels = np.arange(40) % 2
    fake = some_statistics(labels=labels, classes=class_text({"cat": 0, "dog": 1}))
    for names in ({}, {"dog": 1, "cat": 0}):
        path = tmp_path / "s.npz"
        evaluation.save_statistics(path, some_statistics(labels=labels, classes=class_text(names)))
        real = evaluation.load_statistics(path)
        assert class_metrics(real, fake, False)["fid_within_classes"] == pytest.approx(0, abs=1e-6)
    other = some_statistics(labels=labels, classes=class_text({"dog": 0, "eel": 1}))
    assert class_metrics(other, fake, False) == {}
    assert 'are of the classes {"dog": 0, "eel": 1}, and the network has' in caplog.text


def test_labels_of_images_are_theirs():
    """Arrays as well as tensors; too many labels in a batch would shift those of later ones."""
    images = np.random.default_rng(0).integers(256, size=(12, 4, 4, 3), dtype=np.uint8)
    labels, extractor = np.arange(12), MeanColour()
    halves = [(images[:6], labels[:6]), (images[6:], torch.from_numpy(labels[6:]))]
    stats = evaluation.compute_statistics(extractor, halves)
    np.testing.assert_allclose(stats.pool_3, images.mean(axis=(1, 2))[stats.labels], rtol=1e-6)
    for wrong, reason in (
        ([(images[:6], labels[:7]), (images[6:], labels[6:])], "6 images .* as many labels, not 7"),
        ([(images[:6], labels[:6]), images[6:]], "some batches of images have labels, and others"),
    ):
        with pytest.raises(ValueError, match=reason):
            evaluation.compute_statistics(extractor, wrong)
    same = evaluation.Statistics(pool_3=torch.from_numpy(stats.pool_3), labels=stats.labels)
    assert same.hash() == evaluation.Statistics(pool_3=stats.pool_3, labels=stats.labels).hash()


def test_other_shares_of_classes_than_the_data_s_are_told(caplog):
    """A perfect network of two classes, drawn in turn: a distance that is that of their shares."""
    rng = np.random.default_rng(0)

    def drawn(labels):
        rows = 6.0 * labels[:, None] + rng.normal(size=(len(labels), 2))
        return some_statistics(pool_3=rows, logits=None, labels=labels)

    data, number = drawn(np.arange(2000) % 4 // 3), np.arange(2000)
    means = 2 * (6 * (1 / 2 - 1 / 4)) ** 2
    for labels, told in ((number % 2, True), (np.array([0, 0, 0, 1])[number % 4], False)):
        caplog.clear()
        warn_of_shares(labels, data.labels)
        expected = "class 0 has a share of 0.75 of the data and 0.5 of the samples"
        assert (expected in caplog.text) == told and bool(caplog.records) == told
        found = evaluation.metrics(data, drawn(labels))["fid"]
        assert found == pytest.approx(means + 0.6, rel=0.2) if told else found < 0.05
    caplog.clear()
    for count, classes in ((60, 10), (300, 10), (5000, 1000)):
        warn_of_shares(np.arange(10_000) % classes, rng.integers(classes, size=count))
    assert not caplog.records
    warn_of_shares(np.arange(500), np.arange(20_000) % 1000)  # half of the classes are not drawn
    assert caplog.records
