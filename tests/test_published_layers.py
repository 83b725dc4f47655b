"""The published names of layers and functions are there, and are those of the networks."""

import functools
import math

import pytest
import torch
from networks import build, fill_weights, images, tiny_config
from torch import nn

import controllable_generation
import sampling
import sde_lib
from models import layers, ncsnv2, normalization, utils
from models.layers import (
    AttnBlock,
    CondCRPBlock,
    ConditionalResidualBlock,
    CondMSFBlock,
    CondRCUBlock,
    CondRefineBlock,
    CRPBlock,
    Downsample,
    MSFBlock,
    RCUBlock,
    RefineBlock,
    ResidualBlock,
    ResnetBlockDDPM,
    Upsample,
    variance_scaling,
)
from op.upfirdn2d import upfirdn2d_native


def check(published, ours, *given, hidden=()):
    """The same names and order of weights, and the same output."""
    assert list(published.state_dict()) == list(ours.state_dict())
    fill_weights(published), fill_weights(ours)
    torch.testing.assert_close(published(*given), ours(*(hidden or given)), rtol=0, atol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_blocks_of_ddpm():
    config = tiny_config("ddpm", nf=32, image_size=8, dropout=0.0)
    network, act = build(config), layers.get_act(config)
    slots, plan = network.all_modules, network.plan
    x, temb = torch.rand(2, 32, 8, 8), torch.rand(2, 128)
    block = plan.encoder[0].blocks[0][0]
    check(ResnetBlockDDPM(act, 32, temb_dim=128, dropout=0.0), slots[block], x, temb)
    widening = slots[plan.encoder[1].blocks[0][0]]
    check(ResnetBlockDDPM(act, 32, 64, temb_dim=128, dropout=0.0), widening, x, temb)
    check(AttnBlock(64), slots[plan.middle[1]], torch.rand(2, 64, 4, 4))
    check(Downsample(32, with_conv=True), slots[plan.encoder[0].down], x)
    check(Upsample(64, with_conv=True), slots[plan.decoder[0].up], torch.rand(2, 64, 4, 4))
    # Without a convolution.
    torch.testing.assert_close(Downsample(32)(x), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(Upsample(32)(x)[..., ::2, ::2], x)


def residual_options():
    """(channels out, resample, dilation) of the blocks of a network."""
    return [(8, None, None), (16, "down", None), (16, "down", 2), (8, None, 2)]


@pytest.mark.parametrize(("out", "resample", "dilation"), residual_options())
def test_residual_blocks(out, resample, dilation):
    x, y = torch.randn(2, 8, 8, 8), torch.tensor([1, 7])
    act = nn.ELU()
    norm = functools.partial(normalization.ConditionalInstanceNorm2dPlus, num_classes=10)
    shape = 8, out, dilation or 1, resample == "down"
    published = ConditionalResidualBlock(8, out, 10, resample, act, dilation=dilation)
    check(published, ncsnv2.ResidualBlock(act, norm, *shape), x, y)
    norm = normalization.InstanceNorm2dPlus
    published = ResidualBlock(8, out, resample, act, normalization=norm, dilation=dilation)
    check(published, ncsnv2.ResidualBlock(act, norm, *shape), x, hidden=(x, None))
    # Norms of PyTorch take no label.
    assert ResidualBlock(8, out, resample, dilation=dilation)(x).isfinite().all()


@pytest.mark.parametrize("name", ("ncsn", "ncsnv2_64"))
def test_refinement_blocks(name):
    network = build(tiny_config(name, image_size=16))
    xs, y = [torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4)], torch.tensor([1, 7])
    first, middle, last = network.refine1, network.refine2, network.refine4
    fine = [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    parts, x, shape = (middle.adapt_convs[0], middle.crp), xs[0], xs[0].shape[2:]
    if name == "ncsn":
        told = 10, normalization.ConditionalInstanceNorm2dPlus
        check(CondRCUBlock(16, 2, 2, *told, network.act), parts[0], x, y)
        check(CondCRPBlock(16, 2, *told, network.act), parts[1], x, y)
        check(CondMSFBlock([16, 16], 16, *told), middle.msf, xs, y, shape, hidden=(xs, y))
    else:
        check(RCUBlock(16, 2, 2, network.act), parts[0], x, hidden=(x, None))
        check(CRPBlock(16, 2, network.act), parts[1], x, hidden=(x, None))
        check(MSFBlock([16, 16], 16), middle.msf, xs, shape, hidden=(xs, None))
    for given, ours, shape, ends in (
        (xs[:1], first, ([16], 16), {"start": True}),
        (xs, middle, ([16, 16], 16), {}),
        (fine, last, ([8, 8], 8), {"end": True}),
    ):
        size = given[0].shape[2:]
        if name == "ncsn":
            norm = normalization.ConditionalInstanceNorm2dPlus
            published = CondRefineBlock(*shape, 10, norm, network.act, **ends)
            check(published, ours, given, y, size, hidden=(given, y))
        else:
            published = RefineBlock(*shape, network.act, **ends)
            check(published, ours, given, size, hidden=(given, y))


def test_blocks_that_no_network_has_are_refused():
    for wrong in (
        lambda: ResidualBlock(8, 16),
        lambda: ResidualBlock(8, 8, "up"),
        lambda: ConditionalResidualBlock(8, 8, 10, adjust_padding=True),
        lambda: RefineBlock([8, 8], 8, start=True),
        lambda: CRPBlock(8, 3),
        lambda: RefineBlock([8], 8, start=True)([torch.rand(1, 8, 4, 4)], (8, 8)),
    ):
        with pytest.raises(ValueError, match=r"down|start = True|n_stages|output_shape"):
            wrong()
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        layers.Missing  # noqa: B018
    assert not hasattr(layers, "Tensors") and not hasattr(layers, "partial")


@pytest.mark.parametrize("mode", ("fan_in", "fan_out", "fan_avg"))
def test_variance_scaling(mode):
    fans = {"fan_in": 32 * 9, "fan_out": 96 * 9, "fan_avg": 64 * 9}
    for distribution in ("normal", "uniform"):
        weights = variance_scaling(2.0, mode, distribution)((96, 32, 3, 3))
        assert weights.var().item() == pytest.approx(2 / fans[mode], rel=0.05)
        swapped = variance_scaling(2.0, mode, distribution, in_axis=0, out_axis=1)((32, 96, 3, 3))
        assert swapped.var().item() == pytest.approx(2 / fans[mode], rel=0.05)
    largest = math.sqrt(6 / fans[mode])
    assert weights.abs().max().item() == pytest.approx(largest, rel=0.01)
    with pytest.raises(ValueError, match="fan_avg"):
        variance_scaling(1.0, "fan", "normal")


def test_the_noise_schedule_of_ddpm_by_name():
    config = tiny_config(num_scales=3, beta_min=0.3, beta_max=1.5)
    found = utils.get_ddpm_params(config)
    alphas = [0.9, 0.7, 0.5]  # 1 - beta, with beta from 0.3 / 3 to 1.5 / 3
    products = [0.9, 0.63, 0.315]
    expected = {
        "betas": [1 - alpha for alpha in alphas],
        "alphas": alphas,
        "alphas_cumprod": products,
        "sqrt_alphas_cumprod": [math.sqrt(p) for p in products],
        "sqrt_1m_alphas_cumprod": [math.sqrt(1 - p) for p in products],
    }
    for name, values in expected.items():
        assert found.pop(name).tolist() == pytest.approx(values, rel=1e-12), name
    assert found == {"beta_min": 0.3, "beta_max": 1.5, "num_diffusion_timesteps": 3}


def test_other_names():
    for name in ("shared_predictor_update_fn", "shared_corrector_update_fn"):
        assert getattr(controllable_generation, name) is getattr(sampling, name)
    assert sampling.get_score_fn is utils.get_score_fn
    config = tiny_config()
    x = images(config)
    assert upfirdn2d_native(x, torch.ones(2, 2), 1, 1, 2, 2, 0, 0, 0, 0).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("kind", ("VESDE", "VPSDE"))
def test_steps_of_ancestral_sampling_by_name(kind):
    sde = getattr(sde_lib, kind)(N=100)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.9])
    name = f"{kind.lower()}_update_fn"
    predictor = sampling.AncestralSamplingPredictor(sde, lambda x, t: -x)
    results = []
    for step in (predictor.update_fn, getattr(predictor, name)):
        torch.manual_seed(0)
        results.append(step(x, t))
    torch.testing.assert_close(*results, rtol=0, atol=0)

    edited = type(
        "Edited", (sampling.AncestralSamplingPredictor,), {name: lambda self, x, t: "own"}
    )
    assert edited(sde, lambda x, t: -x).update_fn(x, t) == "own"
