"""Score networks: recorded outputs, layout of checkpoints, options, wrong arguments."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random

import pytest
import torch
from ml_collections import ConfigDict
from networks import (
    build,
    fill_weights,
    golden_networks,
    images,
    layout,
    out_and_gradient,
    tiny_config,
)
from recordings import load_json
from torch import nn

from models import layerspp
from models import up_or_down_sampling as resampling
from models.ncsnpp import NCSNpp
from models.utils import get_model

GOLDENS = golden_networks()
PUBLISHED = load_json("published_configs.json")
MANIFESTS = load_json("state_dicts.json")

REFINE_NETS = ["ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256"]

# Options of NCSN++ that change its structure, and those that do not.
STRUCTURE = {
    "embedding_type": ("fourier", "positional"),
    "resblock_type": ("ddpm", "biggan"),
    "fir": (True, False),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "conditional": (True, False),
    "resamp_with_conv": (True, False),
    "skip_rescale": (True, False),
}
DETAILS = {
    "nonlinearity": ("elu", "relu", "lrelu", "swish"),
    "scale_by_sigma": (True, False),
    "centered": (True, False),
    "fir_kernel": ((1, 3, 3, 1), (1, 2, 1)),
    "num_channels": (1, 3, 4),
    "image_size": (8, (8, 12)),
}


def every_combination(options: dict) -> list[dict]:
    return [dict(zip(options, row, strict=True)) for row in itertools.product(*options.values())]


def draw(options: dict, generator: random.Random) -> dict:
    return {key: generator.choice(values) for key, values in options.items()}


def every_pair(options: dict) -> list[dict]:
    """A few combinations that contain every pair of values of two options."""

    def pairs(row: dict) -> set:
        return set(itertools.combinations(row.items(), 2))

    generator = random.Random(0)
    missing = {
        pair
        for a, b in itertools.combinations(options.items(), 2)
        for pair in itertools.product([(a[0], v) for v in a[1]], [(b[0], v) for v in b[1]])
    }
    rows = []
    while missing:
        # A missing pair, with the other values that cover most missing pairs.
        start = dict(min(missing, key=str))
        tries = [{**draw(options, generator), **start} for _ in range(50)]
        rows.append(max(tries, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


def noise_labels(config, *, index: int = 3) -> torch.Tensor:
    """Labels of two images: noise levels for Fourier features, otherwise indices."""
    fourier = config.model.get("embedding_type") == "fourier" and config.model.name == "ncsnpp"
    return torch.tensor([0.5, 3.0]) * (index + 1) if fourier else torch.tensor([index, index + 5])


def check_forward_and_backward(config) -> None:
    """Shape and dtype; every weight has a gradient; the noise level has an effect if it should."""
    model = fill_weights(build(config)).eval()
    x, labels = images(config), noise_labels(config)
    out = model(x, labels)
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    out.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Layers for the noise level, where the network is not told it.
    unused = {name for name, parameter in trained.items() if parameter.grad is None}
    assert unused == {n for n in trained if "Dense_0" in n and not config.model.conditional}
    assert bool(unused) is model.has_idle_parameters
    # A constant added to all keys shifts all logits of a query alike.
    idle = {name for name in trained.keys() - unused if not trained[name].grad.any()}
    assert all(name.endswith("NIN_1.b") for name in idle), idle
    by_noise_level = config.model.conditional or config.model.scale_by_sigma
    with torch.no_grad():
        other = model(x, noise_labels(config, index=1))
    assert torch.equal(out, other) is not by_noise_level


# Fidelity to the published networks.


@pytest.mark.parametrize("case", GOLDENS)
def test_recorded_networks(case):
    """Layout of the state dict, output, and gradient with respect to the image."""
    golden = GOLDENS[case]
    model = fill_weights(get_model(golden.name)(golden.config)).eval()
    assert layout(model) == golden.state_dict
    assert sum(p.numel() for p in model.parameters()) == golden.num_params

    def error(value, expected):
        """Per image, relative to the largest value."""
        return (value - expected).abs().flatten(1).amax(dim=1) / expected.abs().max()

    def run(x):
        return out_and_gradient(model, x, golden.labels, cotangent=golden.cotangent)

    out, grad = run(golden.x)
    assert out.dtype == torch.float32
    assert error(out, golden.out).max() < 1e-5
    wrong = error(grad, golden.grad_x)
    # Max pooling passes the gradient to the largest of 25 values.  In these cases two of them are
    # equal up to rounding, so the choice depends on the processor: accept the gradient of any
    # input that is equal up to rounding.
    generator = torch.Generator().manual_seed(0)
    for _ in range(32 if golden.name.startswith("ncsnv2") else 0):
        if wrong.max() < 2e-4:
            break
        nearby = golden.x + 1e-6 * torch.randn(golden.x.shape, generator=generator)
        wrong = torch.minimum(wrong, error(run(nearby)[1], golden.grad_x))
    assert wrong.max() < (2e-4 if golden.name.startswith("ncsnv2") else 1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_of_the_published_checkpoints(name):
    """Names, shapes, dtypes and order where a checkpoint is published; every config builds."""
    with torch.device("meta"):
        model = build(ConfigDict(PUBLISHED[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6
    if name not in MANIFESTS["by_config"]:
        return
    entries = MANIFESTS["manifests"][MANIFESTS["by_config"][name]]["entries"]
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    found = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch."), key in trainable]
        for key, value in model.state_dict().items()
    ]
    assert found == entries
    # Averaged weights are saved as a bare list in this order.
    assert trainable == [key for key, _, _, is_trainable in entries if is_trainable]


@pytest.mark.parametrize("name", ("ddpm", "ncsnpp"))
@pytest.mark.parametrize("kind", ("ddpm", "biggan"))
def test_unconditional_networks_have_the_published_layers(name, kind):
    """The same blocks, with layers for the noise level that nothing uses; no embedding of it."""
    options = {"resblock_type": kind, "num_res_blocks": 2}
    told = build(tiny_config(name, **options)).state_dict()
    layers = build(tiny_config(name, conditional=False, **options)).state_dict()
    embedding = [key for key in told if key.startswith(("all_modules.0.", "all_modules.1."))]
    assert len(embedding) == 4 and [tuple(v.shape) for v in layers.values()] == [
        tuple(value.shape) for key, value in told.items() if key not in embedding
    ]
    names = [key.split(".", 2)[-1] for key in told if key not in embedding]
    assert [key.split(".", 2)[-1] for key in layers] == names and "Dense_0.weight" in names


# Every option.


def case_id(options: dict) -> str:
    return "-".join(str(value).replace(" ", "") for value in options.values())


@pytest.mark.parametrize("options", every_pair({**STRUCTURE, **DETAILS}), ids=case_id)
def test_any_two_options_of_ncsnpp_work_together(options):
    check_forward_and_backward(tiny_config(**options))


def is_another_network(options: dict) -> bool:
    """False if an option has no effect beside the others and is not at its first value."""
    combines = options["progressive_input"] == "input_skip"
    convolves = options["resblock_type"] == "ddpm"
    return (combines or options["progressive_combine"] == "sum") and (
        convolves or options["resamp_with_conv"]
    )


# Half of all combinations, in which each two values meet.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("embedding_type", "resblock_type", "fir"),
    [
        ("fourier", "biggan", True),
        ("fourier", "ddpm", False),
        ("positional", "biggan", False),
        ("positional", "ddpm", True),
    ],
)
def test_all_options_of_ncsnpp_work_together(embedding_type, resblock_type, fir):
    fixed = {"embedding_type": embedding_type, "resblock_type": resblock_type, "fir": fir}
    others = {key: values for key, values in STRUCTURE.items() if key not in fixed}
    generator = random.Random(0)
    for options in every_combination(others):
        if is_another_network({**fixed, **options}):
            check_forward_and_backward(tiny_config(**fixed, **options, **draw(DETAILS, generator)))


def test_order_of_the_layers_with_residual_pyramids():
    """Layer by layer, since no published checkpoint has a residual output pyramid."""
    options = {"progressive": "residual", "progressive_input": "residual", "conditional": False}
    config = tiny_config(attn_resolutions=(), centered=True, **options)
    model, x = fill_weights(build(config)).eval(), images(config)
    layer = model.all_modules

    def add(a, b):
        return (a + b) / math.sqrt(2)

    def join(a, b):
        return torch.cat([a, b], dim=1)

    skips = [layer[0](x)]
    skips.append(layer[1](skips[0]))
    padded = nn.functional.pad(x, (0, 1, 0, 1))
    skips.append(add(layer[3].Conv_0(padded), layer[2](skips[1])))
    skips.append(layer[4](skips[2]))
    h = layer[7](layer[6](layer[5](skips[3])))
    h = layer[9](join(layer[8](join(h, skips[3])), skips[2]))
    pyramid = layer[11](model.act(layer[10](h)))
    h = layer[14](join(layer[13](join(layer[12](h), skips[1])), skips[0]))
    enlarged, conv = resampling.naive_upsample_2d(pyramid), layer[15].Conv_0
    h = add(nn.functional.conv2d(enlarged, conv.weight, conv.bias, padding=1), h)
    expected = layer[17](model.act(layer[16](h)))
    assert len(layer) == 18
    torch.testing.assert_close(model(x, torch.zeros(2)), expected)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("resamp_with_conv", [True, False])
@pytest.mark.parametrize("scale_by_sigma", [True, False])
def test_options_of_ddpm(conditional, resamp_with_conv, scale_by_sigma):
    for details in every_pair({key: DETAILS[key] for key in ("num_channels", "image_size")}):
        options = {"conditional": conditional, "resamp_with_conv": resamp_with_conv}
        config = tiny_config("ddpm", scale_by_sigma=scale_by_sigma, **options, **details)
        check_forward_and_backward(config)


@pytest.mark.parametrize("name", REFINE_NETS)
@pytest.mark.parametrize("norm", ["InstanceNorm", "InstanceNorm++", "VarianceNorm"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_options_of_the_ncsn_family(name, norm, interpolation):
    details = {"normalization": norm, "interpolation": interpolation, "image_size": (17, 22)}
    config = tiny_config(name, nf=4, num_channels=1, scale_by_sigma=True, **details)
    model = fill_weights(build(config))
    x, labels = images(config), torch.tensor([3, 8])
    out = model(x, labels)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(model(x, labels.float()), out)
    assert not torch.equal(model(x, labels - 1), out)


def test_only_ncsn_depends_on_the_noise_level_beyond_the_scale():
    x = torch.rand(2, 3, 16, 16)
    for name in REFINE_NETS:
        model = fill_weights(build(tiny_config(name, nf=4, image_size=16)))
        outs = [model(x, torch.tensor([i, i])) for i in (1, 7)]
        assert torch.equal(*outs) is (name != "ncsn")


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp"])
@pytest.mark.parametrize("nf", [4, 6, 10, 20, 36])
def test_any_width_works(name, nf):
    config = tiny_config(name, nf=nf, ch_mult=(1, 3))
    assert build(config)(images(config), torch.tensor([1, 2])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", "mlp"])
def test_networks_without_room_for_the_time_are_refused(name):
    """Without a sine and a cosine of the time step, all times look the same."""
    options = {"embedding_type": "positional", "norm_groups": 0, "attn_resolutions": ()}
    with pytest.raises(ValueError, match=r"model\.nf = 1 leaves no room .* choose at least 2"):
        build(tiny_config(name, nf=1, **options))
    config = tiny_config(name, nf=2, **options)
    model, x = fill_weights(build(config)).eval(), images(config)
    early, late = (model(x, torch.full((len(x),), t)) for t in (1.0, 500.5))
    assert not torch.allclose(early, late)


def test_attention_goes_by_the_height_of_the_images():
    def attention_layers(image_size):
        model = build(tiny_config(image_size=image_size, attn_resolutions=(8,)))
        return sum(isinstance(layer, layerspp.AttnBlockpp) for layer in model.all_modules)

    middle, on_one_level = 1, 2  # one block down and the end of the level up
    assert attention_layers((16, 8)) == middle + on_one_level
    assert attention_layers((8, 16)) == middle + on_one_level
    assert attention_layers((4, 8)) == middle


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("ncsnpp", {"nonlinearity": "gelu"}, "nonlinearity is 'gelu'.*'swish'"),
        ("ncsnpp", {"embedding_type": "fourrier"}, "embedding_type is 'fourrier'.*'fourier'"),
        ("ncsnpp", {"resblock_type": "resnet"}, "resblock_type is 'resnet'.*'biggan', 'ddpm'"),
        ("ncsnpp", {"progressive": "skip"}, "progressive is 'skip'.*'output_skip'"),
        ("ncsnpp", {"progressive_input": "skip"}, "progressive_input is 'skip'.*'input_skip'"),
        (
            "ncsnpp",
            {"progressive_input": "input_skip", "progressive_combine": "add"},
            "progressive_combine is 'add'.*'cat', 'sum'",
        ),
        ("ncsnpp", {"normalization": "BatchNorm"}, "normalization is 'BatchNorm'.*'GroupNorm'"),
        ("ncsnpp", {"conv_size": 5}, r"conv_size is 5.*\[3\]"),
        ("ncsnpp", {"attention_type": "linear"}, "attention_type is 'linear'.*'ddpm'"),
        ("ncsnpp", {"image_size": 9}, "9x9, which cannot be halved 1 times.*multiples of 2"),
        ("ddpm", {"image_size": (8, 6), "ch_mult": (1, 1, 1)}, "8x6.*multiples of 4"),
        ("ddpm", {"normalization": "InstanceNorm"}, "normalization is 'InstanceNorm'"),
        ("ncsn", {"interpolation": "linear"}, "interpolation is 'linear'.*'bilinear'"),
        ("ncsn", {"normalization": "GroupNorm"}, "normalization .*is 'GroupNorm'.*'InstanceNorm"),
        ("ncsnv2_64", {"normalization": "GroupNorm"}, "is 'GroupNorm', but .*'InstanceNorm"),
        ("ncsnv2_64", {"nf": 1}, "nf is 1.*at least 2"),
        ("ncsn", {"nf": 1}, "nf is 1.*at least 2"),
        ("ncsnv2_256", {"image_size": (32, 15)}, "32x15.*at least 16x16"),
    ],
)
def test_wrong_options_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(name, **changes))


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", *REFINE_NETS])
def test_inputs_of_the_wrong_shape_are_refused(name):
    model = build(tiny_config(name, nf=4, image_size=16))
    x, labels = torch.rand(2, 3, 16, 16), torch.zeros(2)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*num_channels = 3.*\(2, 1, 16, 16\)"):
        model(x[:, :1], labels)
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\)"):
        model(x[0], labels)
    with pytest.raises(ValueError, match=r"one label per image, \(2,\).*\(3,\)"):
        model(x, torch.zeros(3))
    if name in ("ddpm", "ncsnpp"):
        with pytest.raises(ValueError, match=r"multiples of 2.*\(2, 3, 16, 15\)"):
            model(x[..., :15], labels)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("options", "continuous", "expected"),
    [
        ({"scale_by_sigma": True}, True, True),
        ({"scale_by_sigma": True, "embedding_type": "fourier"}, True, False),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_whether_labels_are_numbers_of_noise_levels(options, continuous, expected):
    """Weights that were trained with another table are refused if so."""
    config = tiny_config(**options)
    config.training = ConfigDict({"sde": "vesde", "continuous": continuous})
    assert build(config).uses_sigmas is expected


@pytest.mark.parametrize("size", (24, 48, (24, 32)))
def test_attention_at_resolutions_that_do_not_exist_is_told(size, caplog):
    build(tiny_config(image_size=size, ch_mult=(1, 1, 1), attn_resolutions=(16, 12)))
    heights = "24, 12, 6" if size != 48 else "48, 24, 12"
    assert "no attention at 16:" in caplog.text and heights in caplog.text
    caplog.clear()
    build(tiny_config(image_size=size, ch_mult=(1, 1, 1), attn_resolutions=(12,)))
    build(tiny_config(image_size=size, ch_mult=(1, 1, 1), attn_resolutions=()))
    assert not caplog.text


# Networks as objects.


@pytest.fixture
def pyramids():
    """A network with filters, pyramids, attention and random features."""
    options = {"embedding_type": "fourier", "fir": True, "scale_by_sigma": True}
    options |= {"progressive": "residual", "progressive_input": "input_skip"}
    return fill_weights(build(tiny_config(**options))).eval()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(pyramids, duplicate):
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    before, other = pyramids(x, labels), duplicate(pyramids)
    assert torch.equal(other(x, labels), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x, labels).any()
    assert torch.equal(pyramids(x, labels), before)


def test_a_layer_can_be_replaced(pyramids):
    class Silence(nn.Module):
        def forward(self, h):
            return torch.zeros(len(h), 3, *h.shape[2:])

    pyramids.all_modules[pyramids.plan.head.conv] = Silence()
    assert not pyramids(torch.rand(2, 3, 8, 8), torch.tensor([0.5, 2.0])).any()


def test_other_dtypes(pyramids):
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    expected = pyramids(x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = pyramids(x, labels)
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    exact = pyramids.double()(x.double(), labels.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), expected, rtol=1e-4, atol=1e-4)


def test_other_image_sizes_run_as_well(pyramids):
    assert pyramids(torch.rand(1, 3, 16, 12), torch.ones(1)).shape == (1, 3, 16, 12)


def test_networks_have_their_names():
    assert get_model("ncsnpp") is NCSNpp
    names = {get_model(name).__name__ for name in ("ddpm", "ncsnpp", *REFINE_NETS)}
    assert names == {"DDPM", "NCSNpp", "NCSN", "NCSNv2", "NCSNv2_128", "NCSNv2_256"}


def test_a_pyramid_of_one_level_says_that_its_first_layers_are_idle():
    config = tiny_config("ncsnpp", ch_mult=(1,), progressive="residual", attn_resolutions=())
    model = fill_weights(build(config))
    model(images(config), noise_labels(config)).square().mean().backward()
    assert any(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.has_idle_parameters


def test_multiples_may_be_written_as_fractions():
    whole, fractions = (
        build(tiny_config("ncsnpp", ch_mult=ch_mult)) for ch_mult in ((1, 2), (1.0, 2.0))
    )
    assert [p.shape for p in whole.parameters()] == [p.shape for p in fractions.parameters()]
