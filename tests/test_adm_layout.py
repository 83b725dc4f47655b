"""ADM: names, shapes and order of the weights in published checkpoints."""

import pytest
import torch
from adm_helpers import POOLS, small
from networks import build, layout
from torch import nn

from configs.defaults import load
from models.adm import EncoderUNetModel, UNetModel
from models.adm_layers import AttentionBlock, AttentionPool
from score_lib.options import complete

# Side, channels in, model_channels, num_res_blocks, channel_mult, sides with attention, classes,
# parameters.
_256 = (1, 1, 2, 2, 4, 4)
_512 = (0.5, 1, 1, 2, 2, 4, 4)
PUBLISHED = {
    "imagenet64": (64, 3, 192, 3, (1, 2, 3, 4), (32, 16, 8), 1000, 295_904_454),
    "imagenet128": (128, 3, 256, 2, (1, 1, 2, 3, 4), (32, 16, 8), 1000, 421_529_606),
    "imagenet256": (256, 3, 256, 2, _256, (32, 16, 8), 1000, 553_838_086),
    "imagenet256_uncond": (256, 3, 256, 2, _256, (32, 16, 8), None, 552_814_086),
    "imagenet512": (512, 3, 256, 2, _512, (32, 16, 8), 1000, 558_997_638),
    "imagenet64_to_256": (256, 6, 192, 2, _256, (32, 16, 8), 1000, 311_795_910),
    "imagenet128_to_512": (512, 6, 192, 2, (1, 1, 2, 2, 4, 4), (32, 16), 1000, 308_835_270),
}
CLASSIFIERS = {
    64: (4, (1, 2, 3, 4), 65_438_568),
    128: (2, (1, 1, 2, 3, 4), 42_568_040),
    256: (2, _256, 54_096_360),
    512: (2, _512, 54_448_360),
}


def describe_decoder(block, attention, layer, widths, skips, ch, n, rates, resblock_updown, dims):
    """The way up, from the coarsest level on; the channels that come out."""
    k = 0
    for i in reversed(range(len(widths))):
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
    return ch


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
    if has_decoder:
        given = widths, skips, ch, n, rates, resblock_updown, dims
        ch = describe_decoder(block, attention, layer, *given)
    return found, ch, sum(skips) + ch


def affine(name, *shape):
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_of_the_published_checkpoints(name):
    """The networks of the shipped configs."""
    side, in_ch, base, n, mult, sides, classes, parameters = PUBLISHED[name]
    rates = [side // s for s in sides]
    with torch.device("meta"):
        model = build(complete(load(f"adm/{name}")))
    expected, ch, _ = described((in_ch, base, n, mult, rates, classes, True))
    expected += affine("out.0", ch) + affine("out.2", 6, ch, 3, 3)
    assert layout(model) == expected
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in expected]
    assert sum(p.numel() for p in model.parameters()) == parameters
    heads = {block.heads for block in model.modules() if isinstance(block, AttentionBlock)}
    levels = [i for i in range(len(mult)) if side >> i in sides] + [-1]
    widths = {int(base * mult[i]) for i in levels}
    four = name in ("imagenet128", "imagenet64_to_256")
    assert heads == ({4} if four else {width // 64 for width in widths})


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("pool", POOLS[::-1])
@pytest.mark.parametrize("side", CLASSIFIERS)
def test_layout_of_the_published_classifiers(side, pool):
    n, mult, parameters = CLASSIFIERS[side]
    rates = [side // s for s in (32, 16, 8)]
    config = complete(load(f"adm/imagenet{side}_classifier"))
    config.model.pool = pool
    with torch.device("meta"):
        model = build(config)
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
    if pool.startswith("spatial"):
        assert isinstance(model.out[-2], nn.ReLU if pool == "spatial" else nn.SiLU)
    if pool == "attention":
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_widths_and_pools_that_are_not_asked_for():
    for kind in (UNetModel, EncoderUNetModel):
        with torch.device("meta"):
            model = kind(8, 3, 32, 3, 1, ())
        assert model.skip_channels == [32, 32, 32, 64, 64, 128, 128, 256]
    assert model.pool == "adaptive"
    positions = AttentionPool(3, 400, 1, 5).positional_embedding
    assert positions.shape == (400, 3 * 3 + 1)
    assert positions.std().item() == pytest.approx(1 / 20, rel=0.1)


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
