"""Feature extractors: the digits classifier and the two Inception networks."""

import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from metrics_helpers import MeanColour
from ml_collections import ConfigDict

import evaluation
from assets.train_classifiers import examples
from configs.data import digits_defaults
from datasets import get_streams
from score_lib.metrics import inception
from score_lib.metrics.classifiers import DigitsExtractor, FashionExtractor
from score_lib.metrics.fidelity import import_torchvision
from score_lib.metrics.fidelity import resized as fidelity_resized


def extractor_config(dataset="CIFAR10", **options):
    return ConfigDict({"data": {"dataset": dataset}, "eval": options})


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's Inception network."""
    import_torchvision()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


def as_bytes(images):
    return (images * 255).round().byte().movedim(1, -1)


@pytest.fixture(scope="module")
def digits():
    """The classifier, and (images (N, 1, 8, 8), labels) of the training and held-out splits."""
    config = digits_defaults()
    info = get_streams(config, evaluation=True)[2]
    parts = [examples(info.sources[split]) for split in ("train", "test")]
    return evaluation.get_extractor(config, "cpu"), *parts


def test_digits_classifier_knows_held_out_digits(digits):
    extractor, _, (images, labels) = digits
    out = extractor(as_bytes(images).numpy())
    assert out["pool_3"].shape == (len(labels), 64) and out["pool_3"].dtype == torch.float32
    assert (out["logits"].argmax(dim=1) == labels).double().mean() >= 0.97


def test_digits_features_are_independent_of_the_batch(digits):
    extractor, _, (images, _) = digits
    images = as_bytes(images)
    one_by_one = torch.cat([extractor(images[i : i + 1])["pool_3"] for i in range(20)])
    torch.testing.assert_close(extractor(images)["pool_3"][:20], one_by_one)


def test_images_of_wrong_shape_or_dtype_are_refused(digits):
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


def test_extractor_options(monkeypatch):
    @evaluation.register_extractor
    class Own(MeanColour):
        name = "own_colour"

    for name in ("own_colour", "OWN_COLOUR"):
        config = extractor_config("X", extractor=name, extractor_weights="w")
        extractor = evaluation.get_extractor(config, "cpu")
        assert isinstance(extractor, Own)
        assert (extractor.weights, extractor.device) == ("w", torch.device("cpu"))
    assert evaluation.get_extractor(extractor_config("X", extractor="own_colour")).weights == ""
    with pytest.raises(ValueError, match=r"unknown feature extractor 'own_color'.*'own_colour'"):
        evaluation.get_extractor(extractor_config("X", extractor="own_color"))


def test_extractor_with_its_own_options():
    @evaluation.register_extractor(name="scaled", options={"weights": "eval.my_scale"})
    class Scaled(MeanColour):
        pass

    config = extractor_config("X", extractor="scaled", my_scale=3)
    assert evaluation.get_extractor(config).weights == 3


def test_missing_and_wrong_files_of_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of Inception weights at"):
        inception.FidelityInception(str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        DigitsExtractor(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz does not hold the weights of the digits"):
        DigitsExtractor(str(tmp_path / "other.npz"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_hostile_and_damaged_weights_are_refused_and_not_executed(fidelity, tmp_path):
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


def test_failed_download_of_weights_is_explained(fidelity, tmp_path, monkeypatch):
    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        OSError, match=r"https://.*weights-inception.*--config.eval.extractor_weights"
    ):
        evaluation.get_extractor(extractor_config(), "cpu")


@pytest.mark.slow
def test_inception_from_a_file_of_weights(fidelity, tmp_path):
    network = random_inception(fidelity, tmp_path)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = evaluation.get_extractor(extractor_config(extractor_weights=str(path)), "cpu")
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
    extractor.with_spatial = True
    found = extractor(images)
    assert torch.equal(found["pool_3"], out["pool_3"]) and found["spatial"].shape == (3, 2023)
    x = (fidelity_resized(images.movedim(-1, 1), 299, "inception") - 128) / 128
    for name, layer in network.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    expected = network.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).reshape(3, -1)
    torch.testing.assert_close(found["spatial"], expected)


def random_inception(fidelity, tmp_path):
    """The network with random weights."""

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    return Random("x", ["2048", "logits_unbiased", "logits"], str(tmp_path / "empty.pth"))


def saved_model(folder, kind):
    """A small substitute: four features, from the first channel of each quarter, and two logits.

    Images are resized "inside" the model, must be because its signature has one size ("fixed"), or
    must be because it pools small images down to nothing ("pooling").
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
    weights = saved_model(tmp_path / "model", kind)
    config = extractor_config(extractor="inception_tfgan", extractor_weights=weights)
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
    again = inception.TFGANInception(weights)
    assert again.digest == extractor.digest
    import tensorflow as tf

    assert tf.config.get_visible_devices("GPU") == []


@pytest.mark.slow
def test_models_with_other_outputs_are_refused(tfgan, tmp_path):
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
def test_get_inception_model_returns_the_hub_model(tfgan, tmp_path, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(inception, "TFGAN_URL", saved_model(tmp_path / "model", "inside"))
    outputs = evaluation.get_inception_model()(tf.ones((2, 32, 32, 3)))
    assert outputs["pool_3"].shape == (2, 1, 1, 4) and outputs["logits"].shape == (2, 2)
    images = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8)
    config = extractor_config(extractor="inception_tfgan")
    expected = evaluation.get_extractor(config)(images)
    for parts in (1, 2):
        model = evaluation.get_inception_model()
        found = evaluation.run_inception_distributed(images, model, num_batches=parts)
        torch.testing.assert_close(found, expected)
    large = evaluation.run_inception_distributed(
        images, lambda x: tf.reduce_mean(x, axis=(1, 2)), inceptionv3=True
    )
    torch.testing.assert_close(large["pool_3"], images.double().div(255).mean((1, 2)).float())
    assert large["logits"] is None
    for missing in (str(tmp_path / "none"), "http://127.0.0.1:9/model/1"):
        with pytest.raises(OSError, match=r"cannot be loaded from .*extractor_weights") as caught:
            inception.TFGANInception(missing)
        assert missing in str(caught.value) and "\n" not in str(caught.value)


def test_the_classifier_of_clothing_that_comes_along():
    """The weights are the recorded ones; trousers that were drawn by hand are told."""
    extractor = FashionExtractor()
    image = torch.zeros(1, 28, 28, 1, dtype=torch.uint8)
    image[:, 1:27, 8:13] = image[:, 1:27, 15:20] = image[:, 1:7, 8:20] = 200
    found = extractor(image)
    assert found["pool_3"].shape == (1, 64) and found["logits"].shape == (1, 10)
    assert found["logits"].argmax() == 1 and found["logits"].softmax(1).max() > 0.9
    with pytest.raises(ValueError, match="the fashion_mnist classifier takes gray images of 28 x"):
        extractor(image[:, :8, :8])


FAKE_TORCHVISION = """
import torch
if {works}:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
elif not hasattr(torch.ops.torchvision, "nms"):
    raise RuntimeError("operator torchvision::nms does not exist")
"""


@pytest.mark.slow
@pytest.mark.parametrize("works", (True, False))
def test_a_torchvision_is_imported_with_its_compiled_part_or_without(works, tmp_path):
    """Operators that are declared twice abort the process."""
    (tmp_path / "torchvision.py").write_text(FAKE_TORCHVISION.format(works=works))
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from score_lib.metrics.fidelity import import_torchvision\n"
        "import_torchvision(); import_torchvision(); import torchvision\n"
        "assert torchvision.__file__.startswith(sys.path[0])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
