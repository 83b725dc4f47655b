"""ADM: recorded outputs, and the function of each option."""

import functools
from types import SimpleNamespace

import pytest
import torch
from adm_helpers import POOLS, small
from networks import error, fill_weights, layout, out_and_gradient
from recordings import load_json, load_tensors
from torch.autograd import forward_ad

import models.adm
from models.adm import EncoderUNetModel, SuperResModel, UNetModel
from models.adm_layers import AttentionBlock, GroupNorm32, ResBlock, timestep_embedding

CASES = load_json("golden_adm.json")


def golden(case):
    """The arrays of a recorded case."""
    named = {key.rpartition("/"): array for key, array in load_tensors("golden_adm.npz").items()}
    return SimpleNamespace(**{name: array for (of, _, name), array in named.items() if of == case})


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


# --- Recorded networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_recorded_networks(case):
    model = network(case)
    assert layout(model) == [(name, tuple(shape)) for name, shape in CASES[case]["state_dict"]]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in layout(model)]
    assert sum(p.numel() for p in model.parameters()) == CASES[case]["parameters"]
    recorded, cotangent = functools.partial(call, model, case), golden(case).cotangent
    out, grad = out_and_gradient(recorded, golden(case).x, cotangent=cotangent)
    assert out.dtype == torch.float32 and out.shape == golden(case).out.shape
    assert error(out, golden(case).out) < 2e-5 and error(grad, golden(case).grad_x) < 2e-5


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


@pytest.mark.parametrize("transformed", [True, False])
def test_forward_mode_with_channels_last(transformed):
    model = small(resblock_updown=True, num_heads=2).double()
    x, t = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1.0, 77.5]).double()
    direction = torch.randn_like(x)
    _, expected = torch.func.jvp(lambda x: model(x, t), (x,), (direction,))
    x = x.contiguous(memory_format=torch.channels_last)
    if transformed:
        _, found = torch.func.jvp(lambda x: model(x, t), (x,), (direction,))
    else:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction), t)).tangent
    assert error(found, expected) < 1e-9


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


@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
def test_the_first_and_the_last_layers_are_exact_under_autocast(kind):
    model, x, t, seen = small(kind), torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), []
    layers = model.time_embed, model.input_blocks[0][0], model.out
    for layer in layers:
        layer.register_forward_hook(lambda _, given, found: seen.append((given[0], found)))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t)
    for layer, (given, found) in zip(layers, tuple(seen), strict=True):
        torch.testing.assert_close(found, layer(given.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_blocks_leave_their_input_as_it_is(dtype):
    """Also where autocast gives the branch, which starts at 0, another dtype."""
    block = ResBlock(32, 32, 8, dropout=0.0, dims=2, scale_shift=True)
    attend, x, temb = AttentionBlock(32, 1, True), torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(block(x, temb), x) and torch.equal(attend(x), x)


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
