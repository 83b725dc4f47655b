"""Statistics of other tools, statistics for them, and the record of the images."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch
from metrics_helpers import features, some_statistics
from small_runs import small_config

import evaluation
import run_lib
from datasets import get_streams
from score_lib.disk.arrays import load_arrays, save_arrays
from score_lib.metrics import distances
from score_lib.metrics.pixels import hash_sum, pixel_digest
from score_lib.runs import measures
from score_lib.runs.measures import evaluate_samples
from score_lib.runs.rounds import Job
from score_lib.runs.setup import setup
from score_lib.runs.statistics import data_statistics

VARIANCES = {"a": np.arange(1.0, 7), "b": np.arange(7.0, 1, -1) ** 2}


def moments(kind, suffix="", dtype=np.float64):
    """Those of a Gaussian with independent features."""
    variances = VARIANCES[kind] / (1 if suffix else 4)
    mu = np.full(6, {"a": 0.5, "b": 2.0}[kind])
    return {f"mu{suffix}": mu.astype(dtype), f"sigma{suffix}": np.diag(variances).astype(dtype)}


def write(path, layout, kind):
    """A file in a layout; the images of ADM's are damaged, so that only a reader notices."""
    if layout == "pytorch-fid":
        np.savez(path, **moments(kind))
    elif layout == "float32":
        np.savez(path, **moments(kind, dtype=np.float32))
    elif layout == "adm":
        images = np.full((5, 16, 16, 3), 7, dtype=np.uint8)
        np.savez(path, arr_0=images, arr_1=np.arange(5), **moments(kind), **moments(kind, "_s"))
        contents = bytearray(path.read_bytes())
        contents[contents.index(bytes([7] * 100)) + 50] ^= 1
        path.write_bytes(contents)
        with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile):
            archive.read("arr_0.npy")
    return evaluation.load_statistics(path)


@pytest.mark.parametrize("first", ["pytorch-fid", "float32", "adm"])
@pytest.mark.parametrize("second", ["pytorch-fid", "adm"])
def test_layouts_of_other_tools_give_the_distance_of_gaussians(tmp_path, caplog, first, second):
    a, b = (write(tmp_path / f"{k}.npz", x, k) for k, x in {"a": first, "b": second}.items())
    found = evaluation.metrics(a, b)
    roots = VARIANCES["a"] ** 0.5 - VARIANCES["b"] ** 0.5
    distance = 6 * 1.5**2 + roots @ roots / 4
    assert found.pop("fid") == pytest.approx(distance, rel=1e-9)
    both = first == second == "adm"
    if first == "adm":
        spatial = pytest.approx(6 * 1.5**2 + roots @ roots, rel=1e-9)
        assert found.pop("sfid") == (spatial if both else None)
        assert both or "no sFID: the samples have no spatial features" in caplog.text
    assert set(found.values()) == {None} and "no KID, precision or recall" in caplog.text


@pytest.mark.parametrize(
    "arrays, reason",
    [
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0.4, 1]])}, r"not symmetric, by 0\.1"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [2, 1]])}, "variance would be negative"),
        ({"mu": np.zeros(2), "sigma": np.diag([1, -1e-3])}, "variance would be negative"),
        ({**moments("a"), "mu_s": np.zeros(3)}, "of 'mu_s' and 'sigma_s' there is only one"),
        ({**moments("a"), "mu_s": np.zeros(3), "sigma_s": np.eye(4)}, "mu_s and sigma_s must have"),
        ({"arr_0": np.zeros((5, 4, 4, 3), np.uint8)}, "'sigma', only a batch of images"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=reason) as caught:
        evaluation.load_statistics(tmp_path / "s.npz")
    assert "s.npz is not a file of statistics" in str(caught.value)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", np.longdouble])
def test_floats_of_other_machines_are_read(tmp_path, dtype):
    """Of another byte order, or of more digits than PyTorch has."""
    x = features(30, 6, 1).astype(np.float32)
    samples = some_statistics(extractor="")
    expected = evaluation.metrics(some_statistics(pool_3=x, logits=None, extractor=""), samples)
    np.savez(tmp_path / "f.npz", pool_3=x.astype(dtype))
    assert evaluation.metrics(evaluation.load_statistics(tmp_path / "f.npz"), samples) == expected
    mu, sigma = (np.asarray(value) for value in distances.moments(x))
    np.savez(tmp_path / "m.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype))
    found = evaluation.metrics(evaluation.load_statistics(tmp_path / "m.npz"), samples)
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-5)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"s\.pkl is a pickle, .* with numpy\.savez"):
        evaluation.load_statistics(tmp_path / "s.pkl")


def test_covariances_with_rounding_errors_are_read(tmp_path):
    """Of fewer images than features, in float32: half of the eigenvalues are rounding errors."""
    rows = features(20, 40, 1).astype(np.float32)
    sigma = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(sigma).min() < 0
    for name, values in {"few": sigma, "none": np.zeros((40, 40))}.items():
        np.savez(tmp_path / f"{name}.npz", mu=rows.mean(0), sigma=values)
        assert evaluation.load_statistics(tmp_path / f"{name}.npz").width == 40


def test_digest_of_pixels_depends_on_images_and_not_on_batches():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    whole = pixel_digest([hash_sum(images)])
    parts = torch.from_numpy(images[::-1].copy()).split(4)
    assert pixel_digest(map(hash_sum, parts)) == whole and len(whole) == 32
    changed = images.copy()
    changed[3, 1, 2, 0] ^= 1
    others = [changed, images[1:], images.reshape(9, 6, 4, 3), np.concatenate([images, images[:1]])]
    assert len({whole, *(pixel_digest([hash_sum(x)]) for x in others)}) == 5


class Corners(evaluation.Extractor):
    """Four pixels as features, and four others as spatial features."""

    name, resize, digest, has_spatial = "corners", "none", "1", True

    def __init__(self, weights="", device="cpu"):
        pass

    def features(self, images):
        values = images[..., 0].float()
        spatial = (values[:, :2, :2].flatten(1),) if self.with_spatial else ()
        return values[:, ::4, ::4].flatten(1), None, *spatial


@pytest.fixture
def own_images(tmp_path):
    """`write(extractor, ...)`: a config with 20 gray images of the user's own."""
    evaluation.register_extractor(Corners)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "mine.npy", images)

    def write(extractor="corners", stats="stats.npz", **options):
        return small_config(
            data__dataset="IMAGES",
            data__path=str(tmp_path / "mine.npy"),
            data__levels=256,
            eval__extractor=extractor,
            eval__stats=str(tmp_path / stats),
            eval__num_samples=6,
            eval__batch_size=4,
            **options,
        )

    return write


def sampled(config, folder, **options):
    """The measures of samples of an untrained network."""
    return evaluate_samples(Job(setup(config), folder, "1", "fingerprint", folder), **options)


def test_statistics_for_other_tools(own_images, tmp_path):
    """They hold what NumPy computes of the features, and give the same distance."""
    config = own_images()
    run_lib.fid_stats(config)
    whole = evaluation.load_statistics(tmp_path / "stats.npz")
    usual = sampled(config, tmp_path / "usual")
    config = own_images(stats="moments.npz", eval__stats_format="moments")
    run_lib.fid_stats(config)
    with np.load(tmp_path / "moments.npz") as file:
        arrays = dict(file)
    assert not {"pool_3", "logits", "labels"} & arrays.keys()
    np.testing.assert_allclose(arrays["mu"], whole.pool_3.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], np.cov(whole.pool_3, rowvar=False), rtol=1e-5)
    found = sampled(config, tmp_path / "found")
    assert found["fid"] == pytest.approx(usual["fid"], rel=1e-9) and found["kid"] is None
    assert found["sfid"] > 0 and "sfid" not in usual and usual["precision"] is not None


def test_report_says_which_statistics_samples_were_compared_with(own_images, tmp_path, caplog):
    caplog.set_level("INFO")
    config = own_images()
    run_lib.fid_stats(config)
    record = sampled(config, tmp_path / "run")["statistics"]
    stats = evaluation.load_statistics(tmp_path / "stats.npz")
    images = get_streams(config, evaluation=True)[2].sources["train"].images(range(18))
    assert record == {
        "file": str(tmp_path / "stats.npz"),
        "images": 18,
        "dataset": "IMAGES",
        "place": "mine.npy",
        "size": "8 x 8 x 1",
        "pixels": stats.pixels,
        "extractor": "'corners' (weights 1, resize: none)",
    }
    assert "the number and pixels of images agree" in caplog.text
    assert stats.pixels == stats.sample == pixel_digest([hash_sum(images.movedim(1, -1))])


def test_agreement_of_pixels_is_told(own_images, tmp_path, caplog):
    caplog.set_level("INFO")
    config = own_images()
    path, run = run_lib.fid_stats(config), setup(config)
    older = dataclasses.replace(evaluation.load_statistics(path), pixels="", sample="")
    images = np.load(tmp_path / "mine.npy")
    images[0, 0, 0] ^= 1
    np.save(tmp_path / "mine.npy", images)
    data_statistics(run, None)
    assert "mean colours of images agree; some pixels differ, as by rounding" in caplog.text
    evaluation.save_statistics(path, older)
    data_statistics(run, None)
    assert "the file has no digest of pixels" in caplog.text
    np.savez(path, **moments("a"))
    data_statistics(run, None)
    assert "they do not record images" in caplog.text


@pytest.mark.parametrize(
    "stats, reason",
    [
        (some_statistics(), "different extractors cannot be compared: the data's come from 'digi"),
        (
            some_statistics(extractor=""),
            r"6 features \(pool_3\), and the extractor 'corners' gives 4",
        ),
        (
            some_statistics(
                pool_3=features(9, 4, 1), extractor="", logits=None, **moments("a", "_s")
            ),
            r"6 features \(spatial\), and the extractor 'corners' gives 4",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_sampling(
    own_images, tmp_path, monkeypatch, stats, reason
):
    evaluation.save_statistics(tmp_path / "stats.npz", stats)
    monkeypatch.setattr("score_lib.runs.setup.Run.draw", None)
    with pytest.raises(ValueError, match=reason):
        sampled(own_images(), tmp_path / "run")


def test_cached_features_of_another_extractor_are_not_used(
    own_images, tmp_path, monkeypatch, caplog
):
    """An extractor that has changed since: its features are computed anew, of the same samples."""
    caplog.set_level("INFO")
    config, run = own_images(), tmp_path / "run"
    run_lib.fid_stats(config)
    before = sampled(config, run)
    monkeypatch.setattr("score_lib.runs.setup.Run.draw", None)
    assert sampled(config, run) == before and "made again" not in caplog.text

    changed = Corners.features
    monkeypatch.setattr(Corners, "features", lambda *given: (3 * changed(*given)[0], None))
    monkeypatch.setattr(Corners, "digest", "2")
    run_lib.fid_stats(config)
    assert sampled(config, run)["fid"] == pytest.approx(9 * before["fid"])
    said = "made with 'corners' (weights 1, resize: none) are made again with 'corners' (weights 2"
    assert caplog.text.count(said) == 1
    path = run / "ckpt_1/statistics_0.npz"
    arrays = load_arrays(path)
    assert arrays.pop("basis") and len(arrays["pool_3"]) == 4
    save_arrays(path, **arrays | {"pool_3": 0 * arrays["pool_3"]})
    assert sampled(config, run)["fid"] == pytest.approx(9 * before["fid"])
    assert "made with an older version are made again" in caplog.text


def test_errors_are_of_the_present_statistics(own_images, tmp_path, monkeypatch):
    """Statistics of the same images and extractor, but of other values, such as corrected ones."""
    config = own_images()
    path = run_lib.fid_stats(config)
    before = sampled(config, tmp_path / "run", errors=True)
    stats = evaluation.load_statistics(path)
    evaluation.save_statistics(path, dataclasses.replace(stats, pool_3=stats.pool_3 / 5 + 90))
    found = sampled(config, tmp_path / "run", errors=True)
    fresh = sampled(config, tmp_path / "fresh", errors=True)
    for name in ("fid", "fid_standard_error"):
        assert found[name] == fresh[name] != before[name]
    monkeypatch.setattr(measures, "sampling_errors", dict)  # it is not needed again
    assert sampled(config, tmp_path / "run", errors=True) == found


def test_spatial_features_are_added_to_cached_ones(own_images, tmp_path):
    config = own_images()
    run_lib.fid_stats(config)
    assert "sfid" not in sampled(config, tmp_path / "run")
    config.eval.stats_format = "moments"
    run_lib.fid_stats(config)
    assert sampled(config, tmp_path / "run")["sfid"] > 0


def test_distances_of_other_features_have_another_name(own_images, tmp_path, monkeypatch):
    monkeypatch.setattr(Corners, "distance", "fd")
    run_lib.fid_stats(own_images())
    found = sampled(own_images(), tmp_path / "run")
    assert found["fd"] > 0 and "fid" not in found
    with np.load(tmp_path / "run" / "report_1.npz") as file:
        assert file["fd"] == found["fd"] and "fid" not in file


def test_statistics_of_another_extractor_or_other_images_make_way(own_images, tmp_path):
    """Only the same ones made again, or perhaps the same on another machine, are written over."""
    aside = tmp_path / "set_aside"

    def kept(extractor="corners", **options):
        """How many files are set aside once statistics are written, and the last one's bytes."""
        before = (tmp_path / "stats.npz").read_bytes() if (tmp_path / "stats.npz").exists() else b""
        run_lib.fid_stats(own_images(extractor, **options))
        return len([*aside.glob("*")]), before in [file.read_bytes() for file in aside.glob("*")]

    assert kept() == kept() == (0, False)
    assert kept("digits") == (1, True)
    assert kept("digits", eval__stats_format="moments") == (2, True)
    images = np.load(tmp_path / "mine.npy")
    images[0, 0, 0] ^= 1
    np.save(tmp_path / "mine.npy", images)
    assert kept("digits", eval__stats_format="moments") == (3, True)
    (tmp_path / "stats.npz").write_bytes(b"of the user's own")
    assert kept("digits") == (4, True) and kept("digits") == (4, False)
