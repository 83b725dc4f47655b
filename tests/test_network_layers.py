"""Layers of the networks, and their initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from networks import build, fill_weights, images, tiny_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import layers, layerspp, normalization
from models import up_or_down_sampling as resampling

# Initial weights.


def test_variance_scaling():
    for shape, scale in [((64, 32, 3, 3), 1.0), ((100, 300), 0.1)]:
        fan = (shape[0] + shape[1]) / 2 * math.prod(shape[2:])
        weights = layers.default_init(scale)(shape)
        assert weights.var().item() == pytest.approx(scale / fan, rel=0.05)
        assert weights.abs().max().item() == pytest.approx(math.sqrt(3 * scale / fan), rel=0.01)
    nothing = layers.default_init(0)((64, 64)).abs().max().item()
    assert nothing == pytest.approx(math.sqrt(3e-10 / 64), rel=0.01)


def test_initial_weights_of_the_u_nets():
    options = {"embedding_type": "fourier", "fourier_scale": 5, "fir": True}
    options |= {"progressive": "output_skip", "progressive_input": "residual"}
    for name, value in build(tiny_config(nf=64, **options)).all_modules.state_dict().items():
        if name == "0.W":
            assert value.std().item() == pytest.approx(5, rel=0.3)
        elif value.dim() == 1:
            start = torch.zeros if name.endswith(("bias", ".b")) else torch.ones
            assert torch.equal(value, start(value.shape)), name
        else:
            # The last layers of branches, and of the network, start near 0.
            ends = "Conv_1." in name or "NIN_3." in name or len(value) == 3
            scale = 1e-10 if ends else 0.1 if "NIN_" in name else 1.0
            fan = (value.shape[0] + value.shape[1]) / 2 * math.prod(value.shape[2:])
            assert value.abs().max().item() == pytest.approx(math.sqrt(3 * scale / fan), rel=0.02)


def test_a_network_starts_near_zero():
    config = tiny_config()
    assert build(config)(images(config), torch.tensor([1, 2])).abs().max() < 1e-3


def test_initial_weights_of_the_ncsn_family():
    torch.manual_seed(0)  # the largest of 64 biases is near the bound in most cases only
    conv = layers.ncsn_conv3x3(64, 64)
    for parameter in conv.parameters():  # the bound of PyTorch, 1 / sqrt(fan-in)
        assert parameter.abs().max().item() == pytest.approx(1 / 24, rel=0.05)
    assert layers.ncsn_conv1x1(64, 64, init_scale=0).weight.abs().max() < 1e-10
    plus = normalization.InstanceNorm2dPlus(4000)
    for parameter in (plus.alpha, plus.gamma):
        assert parameter.mean().item() == pytest.approx(1, abs=0.002)
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
    assert not plus.beta.any()
    embed = normalization.ConditionalInstanceNorm2dPlus(400, num_classes=10).embed.weight
    assert embed.shape == (10, 1200) and not embed[:, 800:].any()
    assert embed[:, :800].mean().item() == pytest.approx(1, abs=0.002)
    assert embed[:, :800].std().item() == pytest.approx(0.02, rel=0.1)


def test_activations():
    x = torch.tensor([-1.0, 2.0])
    expected = {
        "elu": [math.exp(-1) - 1, 2.0],
        "relu": [0.0, 2.0],
        "lrelu": [-0.2, 2.0],
        "swish": [-1 / (1 + math.e), 2 / (1 + math.exp(-2))],
    }
    for name, values in expected.items():
        act = layers.get_act(tiny_config(nonlinearity=name))
        torch.testing.assert_close(act(x), torch.tensor(values))


def test_timestep_embedding():
    t = torch.tensor([0, 2])
    embedding = layers.get_timestep_embedding(t, 7)
    frequencies = [1.0, 1e-2, 1e-4]
    expected = [math.sin(2 * f) for f in frequencies] + [math.cos(2 * f) for f in frequencies] + [0]
    torch.testing.assert_close(embedding[1], torch.tensor(expected))
    torch.testing.assert_close(embedding[0], torch.tensor([0.0] * 3 + [1.0] * 3 + [0.0]))
    assert layers.get_timestep_embedding(t, 2).isfinite().all()
    half_a_step = layers.get_timestep_embedding(torch.tensor([0.5], dtype=torch.float64), 4)
    assert half_a_step[0, 0].item() == pytest.approx(math.sin(0.5), abs=1e-12)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        layers.get_timestep_embedding(t[None], 4)


def test_fourier_features():
    layer = layerspp.GaussianFourierProjection(embedding_size=2, scale=16.0)
    layer.W.data = torch.tensor([0.25, 1.0])
    torch.testing.assert_close(layer(torch.tensor([1.0])), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert not layer.W.requires_grad
    W = layerspp.GaussianFourierProjection().W
    assert W.shape == (256,) and W.std().item() == pytest.approx(1, rel=0.1)


def test_fourier_features_are_of_the_logarithm_or_of_the_label_itself():
    """A label that is a logarithm already may be negative."""
    options = {"embedding_type": "fourier", "dropout": 0.0}
    published, of_label = (build(tiny_config(**options, fourier_log=log)) for log in (True, False))
    of_label.load_state_dict(fill_weights(published).state_dict())
    x, log_sigma = images(tiny_config()), torch.tensor([-1.2, 0.7])
    expected = published(x, log_sigma.exp())
    torch.testing.assert_close(of_label(x, log_sigma), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(of_label(x, log_sigma.exp()), expected, rtol=1e-2, atol=1e-2)


def test_network_in_network_is_a_matrix_product():
    layer = layers.NIN(3, 5)
    layer.b.data.normal_()
    x = torch.randn(2, 3, 4, 6)
    expected = torch.einsum("bchw,cd->bdhw", x, layer.W) + layer.b[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.on_tokens(x.movedim(1, -1)).movedim(-1, 1), expected)


@pytest.mark.parametrize("skip_rescale", [True, False])
def test_attention_is_softmax_of_scaled_products(skip_rescale):
    block = fill_weights(layerspp.AttnBlockpp(8, skip_rescale=skip_rescale)).double()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    h = block.GroupNorm_0(x)
    q, k, v = (nin(h).flatten(2) for nin in (block.NIN_0, block.NIN_1, block.NIN_2))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8), dim=-1)
    h = block.NIN_3(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    expected = (x + h) / math.sqrt(2) if skip_rescale else x + h
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x, torch.zeros(2, 4)), expected)


def test_attention_has_higher_derivatives_with_the_plain_kernel():
    block = fill_weights(layerspp.AttnBlockpp(4)).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(block, x)


def test_blocks_as_users_call_them():
    act, x, temb = nn.SiLU(), torch.randn(2, 8, 8, 8), torch.randn(2, 16)
    ddpm, biggan = layerspp.ResnetBlockDDPMpp, layerspp.ResnetBlockBigGANpp
    assert biggan(act, 8).skip_rescale and not ddpm(act, 8).skip_rescale
    taps = biggan(act, 8, up=True, fir=True).resample.kernel[0]
    torch.testing.assert_close(taps, torch.tensor([1.0, 3, 3, 1]) / 16)
    assert ddpm(act, 8)(x).shape == x.shape
    wider = ddpm(act, 8, 12, 16, True, dropout=0.0)
    assert wider(x, temb).shape == (2, 12, 8, 8) and wider.Conv_2.kernel_size == (3, 3)
    assert ddpm(act, 8, 12).NIN_0.W.shape == (8, 12)
    for fir in (True, False):
        assert biggan(act, 8, temb_dim=16, up=True, fir=fir)(x, temb).shape == (2, 8, 16, 16)
        assert biggan(act, 8, 12, 16, down=True, fir=fir)(x, temb).shape == (2, 12, 4, 4)
        assert layerspp.Upsample(8, 6, True, fir)(x).shape == (2, 6, 16, 16)
        assert layerspp.Downsample(8, with_conv=True, fir=fir)(x, temb).shape == (2, 8, 4, 4)
        assert layerspp.Upsample(fir=fir)(x).shape == (2, 8, 16, 16)
        assert layerspp.Downsample(fir=fir)(x).shape == (2, 8, 4, 4)
    assert layerspp.Combine(8, 4)(x, x[:, :4]).shape == (2, 8, 8, 8)
    assert layerspp.Combine(8, 4, method="sum")(x, x[:, :4]).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="not both"):
        biggan(act, 8, up=True, down=True)
    with pytest.raises(ValueError, match="in_ch"):
        layerspp.Upsample(with_conv=True)


def test_resampling_layers():
    x, fir_kernel = torch.randn(2, 3, 8, 6), (1, 4, 6, 4, 1)
    up, down = (layer(3, 5, with_conv=True) for layer in (layerspp.Upsample, layerspp.Downsample))
    enlarged = resampling.naive_upsample_2d(x)
    expected = nn.functional.conv2d(enlarged, up.Conv_0.weight, up.Conv_0.bias, padding=1)
    torch.testing.assert_close(up(x), expected)
    # Zeros come after the image, none before.
    inside = nn.functional.conv2d(x, down.Conv_0.weight, down.Conv_0.bias, stride=2)
    torch.testing.assert_close(down(x)[:, :, :-1, :-1], inside)
    options = {"fir": True, "fir_kernel": fir_kernel}
    up, down = (layer(**options) for layer in (layerspp.Upsample, layerspp.Downsample))
    torch.testing.assert_close(up(x), resampling.upsample_2d(x, fir_kernel))
    torch.testing.assert_close(down(x), resampling.downsample_2d(x, fir_kernel))
    options |= {"in_ch": 3, "out_ch": 5, "with_conv": True}
    up, down = (layer(**options).Conv2d_0 for layer in (layerspp.Upsample, layerspp.Downsample))
    expected = resampling.upsample_conv_2d(x, up.weight, fir_kernel)
    torch.testing.assert_close(up(x), expected)
    expected = resampling.conv_downsample_2d(x, down.weight, fir_kernel)
    torch.testing.assert_close(down(x), expected)


def test_convolutions_as_users_call_them():
    x = torch.randn(1, 4, 8, 8)
    assert layers.ddpm_conv3x3(4, 6, 2, False, padding=0)(x).shape == (1, 6, 3, 3)
    assert layers.ncsn_conv3x3(4, 6, dilation=2, padding=2)(x).shape == (1, 6, 8, 8)
    assert layers.ddpm_conv1x1(4, 6, stride=2)(x).shape == (1, 6, 4, 4)
    assert layers.ncsn_conv1x1(4, 6, bias=False).bias is None


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"stride": 2}, {"padding": 0}, {"groups": 2}, {"kernel_size": 2}]
)
def test_convolutions_of_repeated_pixels_refuse_arguments_they_would_ignore(options):
    with pytest.raises(ValueError, match=r"odd square kernel, .* unlike RepeatedConv2d\(4, 4"):
        layers.RepeatedConv2d(4, 4, **{"kernel_size": 3, "padding": 1, **options})


@pytest.mark.parametrize(
    "channels, groups", [(27, 3), (6, 1), (1, 1), (16, 4), (20, 5), (48, 12), (130, 26)]
)
def test_groups_of_group_norm(channels, groups):
    assert normalization.group_norm(channels).num_groups == groups
    assert normalization.group_norm(128 * channels).num_groups == 32


def test_outputs_are_divided_by_the_noise_level_at_the_whole_part_of_a_step():
    h, sigmas = torch.ones(3, 1), torch.tensor([8.0, 4.0, 2.0])
    for labels in (torch.tensor([0, 1.9, 2]), torch.tensor([0, 1, 2])):
        found = layers.divided_by_sigma(h, labels, sigmas)
        assert found[:, 0].tolist() == [1 / 8, 1 / 4, 1 / 2]
    for label, given in ((-1, "-1 to 0"), (3, "0 to 3")):
        with pytest.raises(ValueError, match=f"from 0 to 2 name, but the labels .* from {given}$"):
            layers.divided_by_sigma(h, torch.tensor([label, 0, 0]), sigmas)


def test_normalization_by_name():
    names = {"InstanceNorm", "InstanceNorm++", "VarianceNorm", "GroupNorm"}
    x, y = torch.randn(3, 4, 6, 6) + 2, torch.tensor([0, 2, 1])
    for name in names:
        config = tiny_config("ncsn", normalization=name)
        norm = normalization.get_normalization(config)
        layer = norm(2, 4) if name == "GroupNorm" else norm(4)
        assert layer(x).shape == x.shape
        if name != "GroupNorm":
            conditional = normalization.get_normalization(config, conditional=True)(4)
            assert conditional(x, y).shape == x.shape
            assert conditional.embed.num_embeddings == config.model.num_scales
    with pytest.raises(ValueError, match=r"'LayerNorm'.*'GroupNorm', 'InstanceNorm'"):
        normalization.get_normalization(tiny_config("ncsn", normalization="LayerNorm"))


def test_statistics_of_nearly_flat_images_are_kept_from_zero_by_their_epsilon():
    """Of variance v, deviations are divided by sqrt(v + 1e-5)."""
    size, root = 1e-3, (1e-6 + 1e-5) ** 0.5
    wave = size * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()  # of mean 0
    x = torch.stack([wave, 3 + wave])[None]
    torch.testing.assert_close(normalization.InstanceNorm2d(2)(x)[0, 0], wave / root)
    norm = normalization.VarianceNorm2d(2).double()
    norm.alpha.data.fill_(1)
    unbiased = (4 / 3 * 1e-6 + 1e-5) ** 0.5
    torch.testing.assert_close(norm(x)[0], x[0] / unbiased)
    norm = normalization.InstanceNorm2dPlus(2).double()
    for parameter, number in zip((norm.alpha, norm.gamma, norm.beta), (1, 2, 5), strict=True):
        parameter.data.fill_(number)
    means = size * torch.tensor([-1.0, 1.0]).double()  # of the channels, of variance 2e-6
    flat = (1 + means)[None, :, None, None].expand(1, 2, 2, 2)
    expected = 5 + 2 * means / (2e-6 + 1e-5) ** 0.5
    torch.testing.assert_close(norm(flat)[0, :, 0, 0], expected)


def test_conditional_norms_pick_the_coefficients_of_the_noise_level():
    x, y = torch.randn(3, 4, 6, 6), torch.tensor([0, 2, 1])
    for name, parts in [
        ("InstanceNorm", ("gamma", "beta")),
        ("InstanceNorm++", ("gamma", "alpha", "beta")),
        ("VarianceNorm", ("alpha",)),
    ]:
        config = tiny_config("ncsn", normalization=name)
        conditional = normalization.get_normalization(config, conditional=True)(4)
        conditional.embed.weight.data.normal_()
        for i in range(3):
            row = dict(zip(parts, conditional.embed.weight[y[i]].chunk(len(parts)), strict=True))
            plain = normalization.get_normalization(config)(4)
            for key, parameter in plain.named_parameters():
                parameter.data = row[key]
            expected = plain(x[i : i + 1])
            if name == "InstanceNorm":
                expected = row["gamma"][:, None, None] * expected + row["beta"][:, None, None]
            torch.testing.assert_close(conditional(x, y)[i : i + 1], expected)
