"""The noise-conditional classifier: size, layout, output, training, wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from networks import fill_weights
from torch import Tensor, nn

from models.utils import get_model
from models.wideresnet import WideBlock
from score_lib.base.tensors import batch_mul

NOISE_LEVEL = ("fourier.", "embed_0.", "embed_1.", "Dense_0.")  # layers that embed and add it


def config(*, num_channels: int = 1, num_classes: int = 10, **model) -> ConfigDict:
    """A classifier that runs in milliseconds; `model` overrides options of that section."""
    tiny = {
        "name": "wideresnet_noise_conditional",
        "nf": 4,
        "blocks_per_group": 1,
        "channel_multiplier": 2,
        "fourier_scale": 1.0,
        "dropout": 0.0,
        "nonlinearity": "swish",
    }
    data = {"num_channels": num_channels, "num_classes": num_classes}
    return ConfigDict({"data": data, "model": {**tiny, **model}})


def build(**options) -> nn.Module:
    settings = config(**options)
    return get_model(settings.model.name)(settings)


def filled(**options) -> nn.Module:
    """In evaluation mode, with no weights near 0."""
    return fill_weights(build(**options)).eval()


def noisy_images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and noise levels from 0.01 to 50, (B,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=dtype)
    return x, torch.logspace(-2, math.log10(50), shape[0], dtype=dtype)


# Size and layout.


def test_images_may_be_described_by_the_shape_of_the_data():
    settings = config(num_channels=3)
    settings.data.shape = (2, 8, 16)
    model = get_model(settings.model.name)(settings)
    assert model(*noisy_images(3, 2, 8, 16)).shape == (3, 10)
    settings.data.shape = (2, 16)
    with pytest.raises(ValueError, match=r"images are needed.*\(2, 16\)"):
        get_model(settings.model.name)(settings)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 32, 32), (2, 2, 5, 12), (4, 4, 1, 7)])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_one_logit_per_class_for_images_of_any_size(shape, num_classes):
    model = filled(num_channels=shape[1], num_classes=num_classes)
    logits = model(*noisy_images(*shape))
    assert logits.shape == (shape[0], num_classes) and logits.isfinite().all()
    logits.square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {"fourier.W"}


def size_of_a_wide_resnet(blocks: int, factor: int, channels: int, classes: int, nf: int) -> int:
    """Weights of convolutions, scales and shifts of normalisations, and the last affine map."""
    total, ch = 9 * channels * nf, nf
    for group, width in enumerate((nf * factor, 2 * nf * factor, 4 * nf * factor)):
        first = 2 * ch + 9 * ch * width + 2 * width + 9 * width**2
        if group > 0 or ch != width:
            first += ch * width
        total, ch = total + first + (blocks - 1) * (4 * width + 18 * width**2), width
    return total + 2 * ch + (ch + 1) * classes


@pytest.mark.parametrize(
    "blocks, factor, channels, classes, nf, millions",  # as the paper of wide ResNets says
    [(4, 10, 3, 10, 16, 36.5), (6, 1, 3, 10, 16, 0.6), (2, 3, 1, 7, 5, None)],
)
def test_as_many_weights_as_a_wide_resnet(blocks, factor, channels, classes, nf, millions):
    options = {"blocks_per_group": blocks, "channel_multiplier": factor, "nf": nf}
    with torch.device("meta"):
        model = build(num_channels=channels, num_classes=classes, **options)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count = sum(n for name, n in sizes.items() if not any(part in name for part in NOISE_LEVEL))
    assert count == size_of_a_wide_resnet(blocks, factor, channels, classes, nf)
    assert millions in (None, round(count / 1e6, 1))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in layers) == 6 * blocks + 1
    # With channels last, oneDNN writes out of bounds in strided 1x1 convolutions of few channels.
    assert {layer.stride for layer in layers if layer.kernel_size == (1, 1)} <= {(1, 1)}


def test_layout_of_a_checkpoint():
    model, E = build(blocks_per_group=2, num_channels=3), 32
    expected = [("fourier.W", (E // 2,))]
    for name, out in [("embed_0", E), ("embed_1", E)]:
        expected += [(f"{name}.weight", (out, E)), (f"{name}.bias", (out,))]
    expected += [("stem.weight", (4, 3, 3, 3))]
    widths = [(4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]
    for i, (ch, width) in enumerate(widths):
        block = [
            ("GroupNorm_0.weight", (ch,)),
            ("GroupNorm_0.bias", (ch,)),
            ("Conv_0.weight", (width, ch, 3, 3)),
            ("Dense_0.weight", (width, E)),
            ("Dense_0.bias", (width,)),
            ("GroupNorm_1.weight", (width,)),
            ("GroupNorm_1.bias", (width,)),
            ("Conv_1.weight", (width, width, 3, 3)),
        ]
        block += [("Conv_2.weight", (width, ch, 1, 1))] if ch != width else []
        expected += [(f"blocks.{i}.{name}", shape) for name, shape in block]
    expected += [("norm.weight", (32,)), ("norm.bias", (32,))]
    expected += [("head.weight", (10, 32)), ("head.bias", (10,))]
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == expected
    # Averaged weights are saved as a bare list in this order.
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [name for name, _ in expected if name != "fourier.W"]


def test_same_seed_same_weights():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(nf=16, fourier_scale=5.0).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fourier.W"], other["fourier.W"])
    assert first["fourier.W"].std().item() == pytest.approx(5, rel=0.3)


def test_blocks_start_as_their_shortcuts():
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    same, wider = WideBlock(nn.SiLU(), 8, 8, 16, 1, 0.0), WideBlock(nn.SiLU(), 8, 12, 16, 2, 0.0)
    torch.testing.assert_close(same(x, temb), x, atol=1e-3, rtol=0)
    shortcut = wider.Conv_2(F.silu(F.group_norm(x, 2, eps=1e-6))[:, :, ::2, ::2])
    torch.testing.assert_close(wider(x, temb), shortcut, atol=1e-3, rtol=0)
    assert shortcut.std() > 0.1
    assert same.Conv_1.weight.any()  # or it would never learn


# Output.


def logits_layer_by_layer(w: dict[str, Tensor], x: Tensor, noise_std: Tensor) -> Tensor:
    """The network of two blocks in each group, from its weights."""

    def affine(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def activated(h, name):
        groups = h.shape[1] // 4
        return F.silu(F.group_norm(h, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6))

    angles = 2 * math.pi * torch.log(noise_std)[:, None] * w["fourier.W"]
    temb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    temb = F.silu(affine(F.silu(affine(temb, "embed_0")), "embed_1"))
    h = F.conv2d(x, w["stem.weight"], padding=1)
    for i, stride in enumerate([1, 1, 2, 1, 2, 1]):
        name = f"blocks.{i}"
        start = activated(h, f"{name}.GroupNorm_0")
        middle = F.conv2d(start, w[f"{name}.Conv_0.weight"], stride=stride, padding=1)
        middle = middle + affine(temb, f"{name}.Dense_0")[..., None, None]
        end = F.conv2d(
            activated(middle, f"{name}.GroupNorm_1"), w[f"{name}.Conv_1.weight"], padding=1
        )
        if i % 2 == 0:
            h = F.conv2d(start, w[f"{name}.Conv_2.weight"], stride=stride)
        h = h + end
    return affine(activated(h, "norm").mean(dim=(2, 3)), "head")


def test_logits_are_those_of_the_layers_one_by_one():
    model = filled(blocks_per_group=2, num_channels=3, num_classes=4).double()
    x, noise_std = noisy_images(5, 3, 9, 6, dtype=torch.float64)
    expected = logits_layer_by_layer(model.state_dict(), x, noise_std)
    torch.testing.assert_close(model(x, noise_std), expected)


def test_logits_depend_on_the_noise_level_of_their_own_image():
    model = filled()
    x, noise_std = noisy_images(4, 1, 8, 8)
    logits = model(x, noise_std)
    noise_std[1] *= 1.5
    changed = (model(x, noise_std) - logits).abs().amax(dim=1)
    assert changed[1] > 1e-2 and changed[[0, 2, 3]].max() < 1e-5


def test_logits_of_an_image_do_not_depend_on_the_rest_of_the_batch():
    model = filled(blocks_per_group=2).double()
    x, noise_std = noisy_images(6, 1, 8, 8, dtype=torch.float64)
    for train in (False, True):
        together = model.train(train)(x, noise_std)
        alone = torch.cat([model(x[i : i + 1], noise_std[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(alone, together)


def test_gradients_with_respect_to_the_image_exist_twice():
    model = filled(num_classes=3).double()
    x, noise_std = noisy_images(2, 1, 4, 3, dtype=torch.float64)
    x.requires_grad_()

    def log_p(x):
        return F.log_softmax(model(x, noise_std), dim=1)

    (grad,) = torch.autograd.grad(log_p(x)[:, 0].sum(), x)
    assert grad.isfinite().all() and grad.flatten(1).any(dim=1).all()
    assert torch.autograd.gradcheck(log_p, x)
    assert torch.autograd.gradgradcheck(log_p, x)


def test_dropout_acts_in_training_only():
    x, noise_std = noisy_images(4, 1, 8, 8)
    model = filled(dropout=0.5)
    plain = filled()
    torch.testing.assert_close(model(x, noise_std), plain(x, noise_std))
    model.train()
    assert (model(x, noise_std) - model(x, noise_std)).abs().amax(dim=1).min() > 1e-3
    torch.testing.assert_close(plain.train()(x, noise_std), plain.eval()(x, noise_std))


@pytest.mark.parametrize("nonlinearity", ["elu", "relu", "lrelu", "swish"])
def test_activation_is_the_one_of_the_config(nonlinearity):
    x, noise_std = noisy_images(2, 1, 8, 8)
    logits = filled(nonlinearity=nonlinearity)(x, noise_std)
    others = [
        filled(nonlinearity=other)(x, noise_std)
        for other in ("elu", "relu", "lrelu", "swish")
        if other != nonlinearity
    ]
    assert all((logits - other).abs().max() > 1e-2 for other in others)


def test_logits_come_in_the_dtype_of_the_images():
    model = filled()
    x, noise_std = noisy_images(3, 1, 8, 8)
    logits = model(x, noise_std.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(x, noise_std), atol=1e-4, rtol=1e-4)
    assert model.double()(x.double(), noise_std).dtype == torch.float64


# Training.


def two_classes(mu: Tensor, noise_std: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = x_0 + s z with x_0 ~ N(mu, I) for label 1 and N(-mu, I) for label 0, and the label."""
    labels = torch.randint(2, noise_std.shape)
    x_0 = batch_mul(2.0 * labels - 1, mu.expand(len(labels), -1, -1, -1))
    x_0 = x_0 + torch.randn_like(x_0)
    return x_0 + batch_mul(noise_std, torch.randn_like(x_0)), labels


@pytest.mark.slow
def test_accuracy_comes_close_to_that_of_bayes_at_any_noise_level():
    torch.manual_seed(0)
    mu = 0.5 * torch.randn(1, 4, 4).sign()  # |mu| = 2
    model, lr, steps = build(num_classes=2, channel_multiplier=1), 1e-2, 250
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        noise_std = 0.1 * 40 ** torch.rand(64)
        x, labels = two_classes(mu, noise_std)
        optimizer.zero_grad()
        F.cross_entropy(model(x, noise_std), labels).backward()
        optimizer.step()
    for std in (0.2, 2.0):
        noise_std = torch.full((10000,), std)
        x, labels = two_classes(mu, noise_std)
        with torch.no_grad():
            accuracy = (model(x, noise_std).argmax(dim=1) == labels).double().mean().item()
        bayes = torch.special.ndtr(mu.norm() / math.sqrt(1 + std**2)).item()
        assert bayes - 0.03 < accuracy < bayes + 0.015  # half a point is three standard errors


# Wrong arguments.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 1}, "num_classes is 1, but .* at least two"),
        ({"num_classes": 0}, "num_classes is 0, but .* at least two"),
        ({"blocks_per_group": 0}, "blocks_per_group = 0 and .*channel_multiplier = 2 .*at least 1"),
        ({"channel_multiplier": 0}, "blocks_per_group = 1 and .*channel_multiplier = 0"),
        ({"nonlinearity": "gelu"}, "nonlinearity is 'gelu'.*'swish'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_inputs_of_the_wrong_shape_or_kind_are_refused():
    model = build(num_channels=3)
    x, noise_std = noisy_images(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*num_channels = 3.*\(2, 1, 8, 8\)"):
        model(x[:, :1], noise_std)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\)"):
        model(x[0], noise_std)
    for wrong in (torch.ones(3), torch.ones(2, 1), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"one label per image, \(2,\)"):
            model(x, wrong)
    with pytest.raises(ValueError, match=r"standard deviation.*torch\.int64"):
        model(x, torch.tensor([3, 700]))
