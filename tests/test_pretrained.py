"""Extractors beside Inception: DINOv2, CLIP, and a user's own."""

import importlib
import logging
import socket
import sys
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from networks import fill_weights

import evaluation
from evaluation import Extractor
from score_lib.metrics import fidelity, inception
from score_lib.metrics.fidelity import import_torchvision
from score_lib.metrics.inception import FidelityInception
from score_lib.metrics.pretrained import CLIP, DINOv2
from score_lib.metrics.vision_transformer import VisionTransformer

IMAGES = torch.arange(2 * 30 * 40 * 3).reshape(2, 30, 40, 3).mul(7).remainder(256).byte()


def extractor(name, weights="", device="cpu"):
    options = {"extractor": name, "extractor_weights": str(weights)}
    return evaluation.get_extractor(ConfigDict({"data": {"dataset": "X"}, "eval": options}), device)


@pytest.mark.parametrize(
    "hidden, gated, expected",
    [
        (512, False, ([-1.107167, -0.217591, 0.034772], [0.279786, -0.38126, -1.012842])),
        (344, True, ([1.701365, -0.121932, 0.464578], [0.92419, -0.090046, 0.965711])),
    ],
)
def test_vision_transformer_is_the_published_one(hidden, gated, expected):
    """Outputs of the authors' package `dinov2` with these weights, at its own size and another."""
    filled = fill_weights(VisionTransformer(128, 2, 14, 3, hidden, gated)).state_dict()
    network = VisionTransformer.of(filled | {"mask_token": torch.zeros(1, 128)})
    for size, values in zip([(42, 42), (28, 56)], expected, strict=True):
        x = torch.sin(torch.arange(2 * 3 * size[0] * size[1]).double()).reshape(2, 3, *size).float()
        torch.testing.assert_close(network(x)[1, :3], torch.tensor(values), rtol=0, atol=2e-5)


@pytest.fixture
def dinov2_file(tmp_path):
    torch.save(
        fill_weights(VisionTransformer(64, 1, 14, 3, 96, False)).state_dict(), tmp_path / "d"
    )
    return tmp_path / "d"


def test_dinov2_prepares_images_as_torch_fidelity(dinov2_file, monkeypatch):
    import_torchvision()
    library = pytest.importorskip("torch_fidelity.feature_extractor_dinov2")
    ours = extractor("dinov2", dinov2_file)
    monkeypatch.setattr(torch.hub, "load", lambda *names: ours.network)
    theirs = library.FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    (expected,) = theirs(IMAGES.movedim(-1, 1))
    found = ours(IMAGES)
    torch.testing.assert_close(found["pool_3"], expected, rtol=1e-4, atol=1e-5)
    assert found["logits"] is None and ours.distance == "fd" and isinstance(ours, DINOv2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_clip_is_that_of_torch_fidelity(tmp_path):
    import_torchvision()
    library = pytest.importorskip("torch_fidelity.feature_extractor_clip")
    network = library.CLIPVisual(
        5, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16
    )
    fill_weights(network.visual)
    network.text_projection = torch.nn.Parameter(torch.zeros(2, 5))
    network.forward = network.visual.forward
    traced = torch.jit.trace(network.eval(), torch.zeros(1, 3, 32, 32))
    torch.jit.save(traced, tmp_path / "clip.pt")
    ours = extractor("clip", tmp_path / "clip.pt")
    name, path = "clip-vit-b-32", str(tmp_path / "clip.pt")
    theirs = library.FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=path)
    assert torch.equal(ours(IMAGES)["pool_3"], theirs(IMAGES.movedim(-1, 1))[0])
    assert ours(IMAGES)["pool_3"].shape == (2, 5) and "32 x 32" in ours.resize
    assert isinstance(ours, CLIP) and ours.distance == "fd" and len(ours.digest) == 16


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_weights_that_are_missing_or_others_are_told_in_one_line(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"cannot be downloaded from https.*extractor_weights=FILE"):
        extractor(name)
    with pytest.raises(FileNotFoundError, match=r"no file of .* weights at .*none"):
        extractor(name, tmp_path / "none")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of a") as caught:
        extractor(name, tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_downloaded_weights_are_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def download(url, path, progress):
        calls.append(url)
        torch.save(1, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    paths = [fidelity.weights_file("", "https://example.org/w.pth", "X") for _ in range(2)]
    assert paths == [tmp_path / "checkpoints" / "w.pth"] * 2
    assert calls == ["https://example.org/w.pth"]


@pytest.mark.parametrize("by", ["PyTorch", "TensorFlow Hub"])
def test_a_server_that_says_nothing_is_told(by, tmp_path, monkeypatch):
    """It was waited for without end."""
    monkeypatch.setattr(fidelity, "SILENCE", 0.1)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth"
        if by == "PyTorch":
            load, said = lambda: fidelity.weights_file("", url, "X"), "cannot be downloaded"
        else:  # downloads as PyTorch does
            hub = types.SimpleNamespace(load=urllib.request.urlopen)
            tensorflow = types.SimpleNamespace(errors=types.SimpleNamespace(OpError=OSError))
            monkeypatch.setattr(inception, "_hub", lambda: hub)
            monkeypatch.setattr(inception, "_tensorflow", lambda: tensorflow)
            load, said = lambda: inception._hub_model(url), "cannot be loaded"
        with pytest.raises(OSError, match=rf"{said} from http.*timed out"):
            load()
    assert socket.getdefaulttimeout() is None


OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(value))

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.device == self.scale.device
        return images.float().mean(dim=(1, 2)) * self.scale

def build(device, weights=""):
    return Net(float(open(weights).read()) if weights else 2.0).to(device)

def both(device):
    return lambda images: {"pool_3": images[:, 0, 0].double(), "logits": images[:, 0, 0].float()}

def with_digest(device):
    def features(images):
        return images[:, 0, 0].float()
    features.digest, features.resize, features.batch_size = "mine", "none", 1
    return features

def flat(device):
    return lambda images: images.float().mean(dim=(1, 2, 3))

def unnamed(device):
    return lambda images: {"features": images[:, 0, 0].float()}

def failing(device):
    raise RuntimeError("no such\\nlayer")

class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(images.float().mean(dim=(1, 2)) + 1)

def noisy(device):
    return Noisy()

def exported(device):
    images = torch.zeros(2, 30, 40, 3, dtype=torch.uint8)
    return torch.export.export(Noisy().eval(), (images,)).module()

nothing, number = (lambda device: None), 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the module `own_features`; a second time, with other source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text=OWN):
        sys.modules.pop("own_features", None)
        (tmp_path / "own_features.py").write_text(text)
        importlib.invalidate_caches()

    write()
    return write


def test_own_extractor(own, tmp_path):
    ours = extractor("own_features:build")
    found = ours(IMAGES)
    torch.testing.assert_close(found["pool_3"], 2 * IMAGES.float().mean(dim=(1, 2)))
    assert found["logits"] is None and ours.name == "own_features:build" and ours.distance == "fd"
    both = extractor("own_features:both")(IMAGES)
    assert torch.equal(both["pool_3"], both["logits"]) and both["logits"].dtype == torch.float32
    named = extractor("own_features:with_digest")
    assert (named.digest, named.resize, named.batch_size) == ("mine", "none", 1)
    assert evaluation.compute_statistics(named, [IMAGES]).made_by() == named.identity


METHODS = """
class Small:
    def resize(self, images):
        return images[:, ::2, ::2].float()

    def batch_size(self):
        return 3

    def digest(self):
        return "abc"

    def __call__(self, images):
        return self.resize(images).mean(dim=(1, 2))

def small(device):
    return Small()

def none_at_once(device):
    network = lambda images: images.float().mean(dim=(1, 2))
    network.batch_size = 0
    return network
"""


def test_methods_of_own_extractors_are_not_their_attributes(own):
    """The text of a method has an address, so that no other process had the same extractor."""
    own(METHODS)
    found = extractor("own_features:small")
    assert (found.resize, found.batch_size) == ("its own", Extractor.batch_size)
    assert found.identity == extractor("own_features:small").identity and len(found.digest) == 16
    expected = IMAGES[:, ::2, ::2].float().mean(dim=(1, 2))
    torch.testing.assert_close(found(IMAGES)["pool_3"], expected)
    with pytest.raises(ValueError, match="batch_size = 0, which should be 1 or more"):
        extractor("own_features:none_at_once")


@pytest.mark.parametrize("name", ["noisy", "exported"])
def test_own_extractor_is_not_used_as_in_training(own, name):
    """An exported program is as it was exported, and refuses another mode."""
    found = extractor(f"own_features:{name}")(IMAGES)["pool_3"]
    torch.testing.assert_close(found, IMAGES.float().mean(dim=(1, 2)) + 1)


def test_own_extractor_is_identified_by_source_state_and_weights(own, tmp_path):
    weights = tmp_path / "w.txt"
    weights.write_text("2.0")
    places = ["own_features:build", "own_features:both"]
    digests = [extractor(place).digest for place in places]
    again = [extractor(place).digest for place in places]
    assert digests == again and len(set(digests)) == 2
    digests.append(extractor(places[0], weights).digest)
    weights.write_text("3.0")
    digests.append(extractor(places[0], weights).digest)
    own(OWN + "\n")
    digests.append(extractor(places[0]).digest)
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    "place, reason",
    [
        ("no_such_module_here:build", "'no_such_module_here' cannot be imported: ModuleNotFound"),
        ("own_features:missing", "own_features has no function 'missing'"),
        ("own_features:number", "own_features has no function 'number'"),
        ("own_features:failing", r"failed: RuntimeError: no such layer"),
        ("own_features:nothing", "must return a callable, .* not NoneType"),
        ("own_features:flat", r"pool_3 of shape \(2, F\) for 2 images, not torch.Size\(\[2\]\)"),
        ("own_features:unnamed", "'pool_3', not one with .*features"),
    ],
)
def test_mistakes_in_own_extractors_are_told_in_one_line(own, place, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        extractor(place)(IMAGES)
    assert place in str(caught.value) and "\n" not in str(caught.value)


def test_statistics_of_an_own_extractor_are_not_compared_with_others(own, caplog):
    first = evaluation.compute_statistics(extractor("own_features:build"), [IMAGES])
    own(OWN + "\n")
    second = evaluation.compute_statistics(extractor("own_features:build"), [IMAGES])
    with pytest.raises(ValueError, match=r"different extractors.*'own_features:build'"):
        evaluation.metrics(first, second)
    with caplog.at_level(logging.ERROR):
        found = evaluation.metrics(first, first, distance="fd")
    assert found["fd"] == pytest.approx(0, abs=1e-6) and "fid" not in found


def test_spatial_features_are_those_of_adm():
    """Seven channels of a map, in TensorFlow's order, only where they are asked for."""
    layer, network = torch.nn.Conv2d(3, 9, 1), torch.nn.Module()
    network.Mixed_6d = torch.nn.Module()
    network.Mixed_6d.branch1x1 = layer
    network.forward = lambda x: (layer(x.float()).mean(dim=(2, 3)), None)
    ours, images = object.__new__(FidelityInception), IMAGES[:, :4, :5]
    ours.network, ours.device, ours.digest = network, torch.device("cpu"), "1"
    assert ours(images).keys() == {"pool_3", "logits"}
    ours.with_spatial = ours.has_spatial
    stats = evaluation.compute_statistics(ours, [images[:1], images[1:]])
    maps = layer(images.movedim(-1, 1).float()).detach().numpy()
    rows = np.stack([maps[:, c] for c in range(7)], axis=-1).reshape(2, 4 * 5 * 7)
    np.testing.assert_allclose(stats.mu_s, rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.sigma_s, np.cov(rows, rowvar=False), rtol=1e-4, atol=1e-3)
    assert not layer._forward_hooks
