"""ADM: recorded outputs, the layout of published checkpoints, and the network in runs."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import DATA, build, fill_weights, load_json, tiny_config
from small_runs import small_config
from torch import nn

import models.adm
import run_lib
from configs import data, parts
from models.adm import EncoderUNetModel, SuperResModel, UNetModel
from models.adm_layers import GroupNorm32, timestep_embedding
from score_lib.options import checked
from utils import restore_checkpoint

CASES = load_json("golden_adm.json")
SMALL = dict(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1)
SMALL |= dict(attention_resolutions=(2,), channel_mult=(1, 2))
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


@functools.cache
def golden(case):
    """The arrays of a recorded case."""
    with np.load(DATA / "golden_adm.npz") as file:
        named = [key.rpartition("/") for key in file.files]
        arrays = {name: file[f"{key}/{name}"] for key, _, name in named if key == case}
    return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def network(case, **changes):
    """The network of a recorded case, with its weights."""
    entry = CASES[case]
    model = getattr(models.adm, entry["class"])(**{**entry["arguments"], **changes})
    return fill_weights(model).eval()


def call(model, case, x=None):
    """The output for a recorded input, or for x in place of its signals."""
    arrays = vars(golden(case))
    others = {name: arrays[name] for name in ("y", "low_res") if name in arrays}
    return model(arrays["x"] if x is None else x, arrays["timesteps"], **others)


def output_and_grad(model, case):
    x = golden(case).x.clone().requires_grad_()
    out = call(model, case, x)
    return out.detach(), torch.autograd.grad((out * golden(case).cotangent).sum(), x)[0]


def error(value, expected):
    """Relative to the largest value."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


def layout(model):
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def small(kind=UNetModel, **options):
    if kind is EncoderUNetModel:
        options.setdefault("num_head_channels", 16)
    return fill_weights(kind(**{**SMALL, **options})).eval()


# --- Recorded networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_recorded_networks(case):
    model = network(case)
    assert layout(model) == [(name, tuple(shape)) for name, shape in CASES[case]["state_dict"]]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in layout(model)]
    assert sum(p.numel() for p in model.parameters()) == CASES[case]["parameters"]
    out, grad = output_and_grad(model, case)
    assert out.dtype == torch.float32 and out.shape == golden(case).out.shape
    assert error(out, golden(case).out) < 2e-5 and error(grad, golden(case).grad_x) < 2e-5


# --- Published checkpoints -----------------------------------------------------------------------

# Side, channels in, model_channels, num_res_blocks, channel_mult, sides with attention, classes,
# parameters.
_256 = (1, 1, 2, 2, 4, 4)
_512 = (0.5, 1, 1, 2, 2, 4, 4)
PUBLISHED = {
    "64x64": (64, 3, 192, 3, (1, 2, 3, 4), (32, 16, 8), 1000, 295_904_454),
    "128x128": (128, 3, 256, 2, (1, 1, 2, 3, 4), (32, 16, 8), 1000, 421_529_606),
    "256x256": (256, 3, 256, 2, _256, (32, 16, 8), 1000, 553_838_086),
    "256x256_uncond": (256, 3, 256, 2, _256, (32, 16, 8), None, 552_814_086),
    "512x512": (512, 3, 256, 2, _512, (32, 16, 8), 1000, 558_997_638),
    "64_256_upsampler": (256, 6, 192, 2, _256, (32, 16, 8), 1000, 311_795_910),
    "128_512_upsampler": (512, 6, 192, 2, (1, 1, 2, 2, 4, 4), (32, 16), 1000, 308_835_270),
}
CLASSIFIERS = {
    64: (4, (1, 2, 3, 4), 65_438_568),
    128: (2, (1, 1, 2, 3, 4), 42_568_040),
    256: (2, _256, 54_096_360),
    512: (2, _512, 54_448_360),
}


def described(arguments, resblock_updown=True, dims=2):
    """Names and shapes up to the last layers, written down from the published description.

    Args:
        arguments: (channels in, model_channels, num_res_blocks, channel_mult, rates with attention,
            classes, whether there is a way up).
    """
    in_ch, base, n, mult, rates, classes, has_decoder = arguments
    found, temb = [], 4 * base

    def layer(name, *shape):
        found.extend([(f"{name}.weight", shape), (f"{name}.bias", shape[:1])])

    def block(name, ch, out):
        layer(f"{name}.in_layers.0", ch)
        layer(f"{name}.in_layers.2", out, ch, *(3,) * dims)
        layer(f"{name}.emb_layers.1", 2 * out, temb)
        layer(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, *(3,) * dims)
        if ch != out:
            layer(f"{name}.skip_connection", out, ch, *(1,) * dims)

    def attention(name, ch):
        layer(f"{name}.norm", ch)
        layer(f"{name}.qkv", 3 * ch, ch, 1)
        layer(f"{name}.proj_out", ch, ch, 1)

    layer("time_embed.0", temb, base)
    layer("time_embed.2", temb, temb)
    if classes is not None:
        found.append(("label_emb.weight", (classes, temb)))
    widths = [int(m * base) for m in mult]
    ch, skips, k = widths[0], [widths[0]], 1
    layer("input_blocks.0.0", ch, in_ch, *(3,) * dims)
    for i, width in enumerate(widths):
        for j in range(n + (i + 1 < len(widths))):
            if j < n:
                block(f"input_blocks.{k}.0", ch, width)
                ch = width
                if 2**i in rates:
                    attention(f"input_blocks.{k}.1", ch)
            elif resblock_updown:
                block(f"input_blocks.{k}.0", ch, ch)
            else:
                layer(f"input_blocks.{k}.0.op", ch, ch, *(3,) * dims)
            skips.append(ch)
            k += 1
    block("middle_block.0", ch, ch)
    attention("middle_block.1", ch)
    block("middle_block.2", ch, ch)
    k = 0
    for i in reversed(range(len(widths) if has_decoder else 0)):
        for j in range(n + 1):
            block(f"output_blocks.{k}.0", ch + skips.pop(), widths[i])
            ch, inner = widths[i], 1
            if 2**i in rates:
                attention(f"output_blocks.{k}.1", ch)
                inner = 2
            if j == n and i > 0:
                if resblock_updown:
                    block(f"output_blocks.{k}.{inner}", ch, ch)
                else:
                    layer(f"output_blocks.{k}.{inner}.conv", ch, ch, *(3,) * dims)
            k += 1
    return found, ch, sum(skips) + ch


def affine(name, *shape):
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_of_the_published_checkpoints(name):
    side, in_ch, base, n, mult, sides, classes, parameters = PUBLISHED[name]
    rates = [side // s for s in sides]
    kind = SuperResModel if in_ch == 6 else UNetModel
    with torch.device("meta"):
        model = kind(
            side, 3, base, 6, n, rates, channel_mult=mult, num_classes=classes,
            num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
        )  # fmt: skip
    expected, ch, _ = described((in_ch, base, n, mult, rates, classes, True))
    expected += affine("out.0", ch) + affine("out.2", 6, ch, 3, 3)
    assert layout(model) == expected
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in expected]
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("pool", POOLS[::-1])
@pytest.mark.parametrize("side", CLASSIFIERS)
def test_layout_of_the_published_classifiers(side, pool):
    n, mult, parameters = CLASSIFIERS[side]
    rates = [side // s for s in (32, 16, 8)]
    with torch.device("meta"):
        model = EncoderUNetModel(
            side, 3, 128, 1000, n, rates, channel_mult=mult, num_head_channels=64,
            use_scale_shift_norm=True, resblock_updown=True, pool=pool,
        )  # fmt: skip
    expected, ch, features = described((3, 128, n, mult, rates, None, False))
    tokens = (side // 2 ** (len(mult) - 1)) ** 2 + 1
    expected += {
        "adaptive": affine("out.0", ch) + affine("out.3", 1000, ch, 1, 1),
        "attention": [
            *affine("out.0", ch),
            ("out.2.positional_embedding", (ch, tokens)),
            *affine("out.2.qkv_proj", 3 * ch, ch, 1),
            *affine("out.2.c_proj", 1000, ch, 1),
        ],
        "spatial": affine("out.0", 2048, features) + affine("out.2", 1000, 2048),
        "spatial_v2": affine("out.0", 2048, features)
        + affine("out.1", 2048)
        + affine("out.3", 1000, 2048),
    }[pool]
    assert layout(model) == expected
    if pool == "attention":
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("conv_resample", [True, False])
def test_layout_where_layers_resample(dims, conv_resample):
    model = small(dims=dims, conv_resample=conv_resample, use_scale_shift_norm=True)
    expected, ch, _ = described((3, 32, 1, (1, 2), (2,), None, True), False, dims)
    expected += affine("out.0", ch) + affine("out.2", 3, ch, *(3,) * dims)
    resampling = (".op.weight", ".op.bias", ".conv.weight", ".conv.bias")
    if not conv_resample:
        expected = [entry for entry in expected if not entry[0].endswith(resampling)]
    assert layout(model) == expected


# --- The function --------------------------------------------------------------------------------


def test_embedding_has_cosines_first():
    t = torch.tensor([0.0, 2.5])
    found = timestep_embedding(t, 5)
    angles = torch.tensor([2.5, 2.5 / 100])
    expected = torch.cat([torch.cos(angles), torch.sin(angles), torch.zeros(1)])
    torch.testing.assert_close(found[1], expected)
    assert found[0].tolist() == [1, 1, 0, 0, 0]
    assert timestep_embedding(t.double(), 4).dtype == torch.float64
    assert timestep_embedding(t, 1).tolist() == [[0], [0]]


def test_normalisation_is_computed_in_float32():
    norm, x = GroupNorm32(32), 1e-3 * torch.randn(2, 32, 8)
    expected = x / torch.sqrt(x.var(dim=2, keepdim=True, correction=0) + 1e-5)
    torch.testing.assert_close(norm(x), expected - expected.mean(dim=2, keepdim=True))
    # Squares of these numbers are infinite in float16.
    large = (1000 * torch.randn(2, 32, 8)).half()
    assert norm(large).dtype == torch.float16
    torch.testing.assert_close(norm(large), norm(large.float()).half(), rtol=0, atol=0)


@pytest.mark.parametrize("heads", [{"num_heads": 4}, {"num_head_channels": 8}])
def test_reordered_rows_turn_one_order_of_attention_into_the_other(heads):
    options = {"attention_resolutions": (1, 2), **heads}
    legacy, new = small(**options), small(**options, use_new_attention_order=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    assert error(new(x, t), legacy(x, t)) > 1e-3
    weights = legacy.state_dict()
    for name, value in weights.items():
        if ".qkv." in name:
            count = 4 if "num_heads" in heads else value.shape[0] // 24
            split = value.unflatten(0, (count, 3, -1))
            weights[name] = split.transpose(0, 1).flatten(0, 2)
    new.load_state_dict(weights)
    assert error(new(x, t), legacy(x, t)) < 1e-6


@pytest.mark.parametrize("dims, sides, coarse", [(1, (8,), (4,)), (3, (3, 8, 4), (3, 4, 2))])
@pytest.mark.parametrize("options", [{}, {"conv_resample": False}, {"resblock_updown": True}])
def test_other_dimensions(dims, sides, coarse, options):
    """Of three sides, the first keeps its length."""
    model = small(dims=dims, **options)
    x, t = torch.randn(2, 3, *sides), torch.tensor([3.0, 500.0])
    assert model(x, t).shape == x.shape
    features = model.get_feature_vectors(x, t)
    assert features["middle"].shape == (2, 64, *coarse)
    encoder = small(EncoderUNetModel, dims=dims, **options)
    assert encoder(x, t).shape == (2, 3)


def test_feature_vectors_are_those_of_the_forward_pass():
    model, x, t = small(), torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    features = model.get_feature_vectors(x, t)
    assert [h.shape[1:] for h in features["down"]] == [
        (32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4)
    ]  # fmt: skip
    assert [h.shape[1:] for h in features["up"]] == [
        (64, 4, 4), (64, 8, 8), (32, 8, 8), (32, 8, 8)
    ]  # fmt: skip
    assert torch.equal(model.out(features["up"][-1]), model(x, t))
    enlarging = small(SuperResModel)
    low_res = torch.randn(2, 3, 2, 2)
    features = enlarging.get_feature_vectors(x, t, low_res=low_res)
    assert torch.equal(enlarging.out(features["up"][-1]), enlarging(x, t, low_res=low_res))


def test_pools_of_all_resolutions_see_the_means():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    model = small(EncoderUNetModel, pool="spatial")
    unet = small(num_head_channels=16)
    unet.load_state_dict({**unet.state_dict(), **_without_out(model)})
    features = unet.get_feature_vectors(x, t)
    means = [h.mean(dim=(2, 3)) for h in [*features["down"], features["middle"]]]
    torch.testing.assert_close(model(x, t), model.out(torch.cat(means, dim=1)))


def _without_out(model):
    return {key: v for key, v in model.state_dict().items() if not key.startswith("out.")}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("resblock_updown", [True, False])
def test_every_pool_has_gradients(pool, resblock_updown):
    model = small(EncoderUNetModel, out_channels=5, pool=pool, resblock_updown=resblock_updown)
    logits = model(torch.randn(2, 3, 8, 8), torch.tensor([3, 500]))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("case", ["class_cond_new_order", "super_res", "attention_pool", "dims3"])
def test_recomputing_changes_no_value(case):
    """Nor does dropout, which is drawn again as it was."""
    plain, recomputing = (
        network(case, use_checkpoint=flag, dropout=0.3).train() for flag in (False, True)
    )
    calls = []
    recomputing.middle_block[0].register_forward_hook(lambda *_: calls.append(1))
    found = []
    for model in (plain, recomputing):
        torch.manual_seed(0)
        (call(model, case) * golden(case).cotangent).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == 2
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    with torch.no_grad():
        call(recomputing, case)
    assert len(calls) == 3


def test_configured_networks_recompute_in_training_only():
    model = fill_weights(build(adm_config(checkpoint_activations=True)))
    x, labels, calls = torch.rand(2, 3, 8, 8), torch.tensor([1, 2]), []
    model.middle_block[0].register_forward_hook(lambda *_: calls.append(1))
    for train, passes in ((True, 2), (False, 1)):
        calls.clear()
        model.train(train)(x, labels).sum().backward()
        assert len(calls) == passes


def test_dropout_acts_in_training_only():
    model, x, t = small(dropout=0.37), torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.37}
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}])
def test_second_derivatives(options):
    model = small(**options, resblock_updown=True, num_heads=2).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    direction, t = torch.randn_like(x), torch.tensor([77.5], dtype=torch.float64)

    def slope(x):
        at = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(at, t).square().sum(), at, create_graph=True)
        return at, grad

    at, grad = slope(x)
    (second,) = torch.autograd.grad((grad * direction).sum(), at)
    ahead, behind = (slope(x + h * direction)[1].detach() for h in (1e-5, -1e-5))
    assert error(second, (ahead - behind) / 2e-5) < 1e-6
    _, forward = torch.func.jvp(lambda x: slope_of(model, x, t), (x,), (direction,))
    assert error(second, forward) < 1e-9


def slope_of(model, x, t):
    return torch.func.grad(lambda x: model(x, t).square().sum())(x)


# --- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
@pytest.mark.parametrize(
    "convert, dtype", [("convert_to_fp16", torch.float16), ("convert_to_bf16", torch.bfloat16)]
)
def test_conversion_takes_the_convolutions_of_blocks(kind, convert, dtype):
    options = {"pool": "attention"} if kind is EncoderUNetModel else {"num_classes": 4}
    model = small(kind, **options)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    y = {} if kind is EncoderUNetModel else {"y": torch.tensor([0, 3])}
    exact = model(x, t, **y)
    getattr(model, convert)()
    for name, parameter in model.named_parameters():
        within = name.startswith(("input_blocks", "middle_block", "output_blocks"))
        others = ("in_layers.0", "emb_layers", "out_layers.0", ".norm.")
        converted = within and not any(other in name for other in others)
        assert parameter.dtype == (dtype if converted else torch.float32), name
    seen = []
    model.middle_block[1].register_forward_hook(lambda layer, x, h: seen.append(h.dtype))
    rounded = model(x, t, **y)
    assert seen == [dtype] and rounded.dtype == torch.float32
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    assert 0 < error(rounded, exact) < tolerance
    model.convert_to_fp32()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0 < error(model(x, t, **y), exact) < tolerance


def test_autocast_and_float64():
    model, x, t = small(), torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    exact = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, t)
    assert rounded.dtype == torch.float32 and 0 < error(rounded, exact) < 5e-2
    precise = model.double()(x.double(), t)
    assert precise.dtype == torch.float64 and error(precise.float(), exact) < 1e-5


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (UNetModel, {"model_channels": 48}, r"model_channels .* = 48 .*\(48, 96\).*multiple of 32"),
        (UNetModel, {"channel_mult": (0.5, 1)}, r"widths \(16, 32\)"),
        (UNetModel, {"channel_mult": ()}, r"widths \(\)"),
        (UNetModel, {"num_heads": 5}, "64 channels cannot have num_heads = 5: .* divide 64"),
        (UNetModel, {"num_heads_upsample": 3}, "64 channels cannot have num_heads = 3"),
        (UNetModel, {"num_head_channels": 48}, "64 channels cannot have num_head_channels = 48"),
        (UNetModel, {"num_head_channels": 0}, "cannot have num_head_channels = 0"),
        (UNetModel, {"dims": 4}, r"dims is 4.*\[1, 2, 3\]"),
        (SuperResModel, {"dims": 1}, "dims is 1, but must be 2"),
        (EncoderUNetModel, {"pool": "mean"}, "pool is 'mean'.*'adaptive', 'attention', 'spatial'"),
        (
            EncoderUNetModel,
            {"pool": "attention", "num_head_channels": -1},
            "pool 'attention' needs .*num_head_channels is -1",
        ),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        small(kind, **options)


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({}, {"x": torch.zeros(2, 1, 8, 8)}, r"\(B, 3, H, W\).*\(2, 1, 8, 8\)"),
        ({"dims": 1}, {}, r"\(B, 3, W\).*\(2, 3, 8, 8\)"),
        ({}, {"x": torch.zeros(2, 3, 8, 7)}, r"multiples of 2, .*\(2, 3, 8, 7\)"),
        ({}, {"timesteps": torch.zeros(3)}, r"one time per signal, \(2,\).*\(3,\)"),
        ({}, {"y": torch.tensor([0, 1])}, "knows no classes.*leave y out"),
        ({"num_classes": 4}, {}, r"y of shape \(2,\).*below 4, but was given none"),
        ({"num_classes": 4}, {"y": torch.tensor([0])}, r"given shape \(1,\)"),
    ],
)
def test_wrong_arguments_are_refused(options, arguments, message):
    given = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **arguments}
    with pytest.raises(ValueError, match=message):
        small(**options)(**given)


def test_images_that_do_not_fit_are_refused():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    for low_res, message in ((None, "given none"), (x[:1], r"\(2, 3, h, w\).*\(1, 3, 8, 8\)")):
        with pytest.raises(ValueError, match=f"low_res.*{message}"):
            small(SuperResModel)(x, t, low_res=low_res)
    with pytest.raises(ValueError, match=r"16 positions, .*\(8, 8\)"):
        small(EncoderUNetModel, pool="attention")(torch.zeros(2, 3, 16, 16), t)


# --- By config -----------------------------------------------------------------------------------


def adm_config(**options):
    return tiny_config("adm", **{"nf": 32, **options})


def test_config_and_keywords_agree():
    options = {"nf": 64, "num_head_channels": 16, "checkpoint_activations": True, "dropout": 0.2}
    by_config = build(adm_config(**options, centered=True))
    by_keywords = UNetModel(
        8, 3, 64, 3, 1, (2,), 0.2, (1, 2), use_checkpoint=True, num_head_channels=16,
        use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    assert repr(by_config).replace("ADM(", "UNetModel(", 1) == repr(by_keywords)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    by_keywords.load_state_dict(fill_weights(by_config).state_dict())
    assert torch.equal(by_config.eval()(x, t), by_keywords.eval()(x, t))
    assert by_config.use_checkpoint and by_config.middle_block[1].heads == 8


def test_options_of_the_config_arrive():
    names = [key for key, _ in layout(build(adm_config(resblock_type="ddpm")))]
    assert "input_blocks.2.0.op.weight" in names and "output_blocks.1.2.conv.weight" in names
    naive = build(adm_config(resblock_type="ddpm", resamp_with_conv=False)).state_dict()
    assert not any(".op." in key or "conv" in key for key in naive)
    added = build(adm_config(scale_shift_norm=False))
    assert added.middle_block[0].emb_layers[1].out_features == 64
    assert build(adm_config(num_heads=4)).middle_block[1].heads == 4
    attending = build(adm_config(image_size=(16, 8), attn_resolutions=(16,), ch_mult=(1, 1, 1)))
    assert len(attending.input_blocks[1]) == 2 and len(attending.input_blocks[3]) == 1


def test_images_that_are_not_centred_are_centred_first():
    raw, centred = (
        fill_weights(build(adm_config(centered=centered))).eval() for centered in (False, True)
    )
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([1, 2])
    torch.testing.assert_close(raw(x, labels), centred(2 * x - 1, labels))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nf": 8}, r"model.nf\) = 8 .*\(8, 16\).*multiple of 32"),
        ({"num_heads": 3}, "num_heads = 3"),
        ({"image_size": 9}, "9x9, which cannot be halved 1 times.*multiples of 2"),
        ({"resblock_type": "resnet"}, "resblock_type is 'resnet'.*'biggan', 'ddpm'"),
        ({"scale_by_sigma": True}, "scale_by_sigma = True should be False.*VP or sub-VP"),
        ({"conditional": False}, "conditional = False should be True"),
        ({"nonlinearity": "elu"}, "nonlinearity = 'elu' should be 'swish'"),
        ({"normalization": "InstanceNorm"}, "should be 'GroupNorm'"),
    ],
)
def test_wrong_options_of_a_config_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(adm_config(**options))


def test_shapes_that_a_config_does_not_describe_are_refused(caplog):
    model = build(adm_config(attn_resolutions=(4, 7)))
    assert "no attention at 7:" in caplog.text
    with pytest.raises(ValueError, match=r"num_channels = 3.*\(2, 1, 8, 8\)"):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="multiples of 2"):
        model(torch.zeros(2, 3, 8, 7), torch.zeros(2))


def test_the_part_of_configs_is_complete():
    config = data.cifar10_defaults()
    parts.vp_sde(config, continuous=True)
    parts.adm(config, nf=64)
    parts.pc_sampling(config, predictor="euler_maruyama")
    config, unknown = checked(config)
    with torch.device("meta"):
        model = build(config)
    assert unknown == [] and model.middle_block[1].heads == 2


def test_a_run_trains_and_samples_digits(tmp_path):
    config = small_config(
        model__name="adm", model__nf=32, model__num_heads=2, training__n_iters=2,
        training__snapshot_freq=2, training__log_freq=1, training__eval_freq=2,
    )  # fmt: skip
    run = run_lib.setup(config)
    before = copy.deepcopy(run.state["model"].state_dict())
    run_lib.train(config, tmp_path)
    restore_checkpoint(tmp_path / "checkpoints" / "checkpoint_1.pth", run.state, "cpu")
    after = run.state["model"].state_dict()
    assert before.keys() == after.keys() and run.state["step"] == 2
    assert not torch.equal(after["out.2.weight"], before["out.2.weight"])
    assert (tmp_path / "samples" / "iter_2" / "sample.png").exists()
    images = run.draw(range(2))
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()
