"""Filtered resampling and the fused activation, against the formulas they stand for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from models import up_or_down_sampling as resampling
from op import FusedLeakyReLU, fused_leaky_relu, upfirdn2d
from op.upfirdn2d import upfirdn2d_native

FILTERS = [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1]]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def zeros_inserted(x: torch.Tensor, up: int) -> torch.Tensor:
    out = x.new_zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
    out[:, :, ::up, ::up] = x
    return out


def direct_upfirdn2d(x, kernel, up, down, pad):
    """The definition, one output pixel at a time."""
    u = F.pad(zeros_inserted(x, up), (pad[0], pad[1], pad[0], pad[1]))
    (h, w), flipped = kernel.shape, kernel.flip(0, 1)
    rows = range(0, u.shape[2] - h + 1, down)
    columns = range(0, u.shape[3] - w + 1, down)
    pixels = [(u[:, :, i : i + h, j : j + w] * flipped).sum((2, 3)) for i in rows for j in columns]
    return torch.stack(pixels, dim=2).reshape(*x.shape[:2], len(rows), len(columns))


@pytest.mark.parametrize(
    "pad", [(0, 0), (2, 1), (1, 3), (-1, 2), (2, -1), (-1, -2), (5, 4)], ids=str
)
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 4), (2, 5)], ids=str)
def test_upfirdn2d_equals_its_definition(shape, up, down, pad):
    x, kernel = double(2, 3, 8, 9), double(*shape)
    expected = direct_upfirdn2d(x, kernel, up, down, pad)
    torch.testing.assert_close(upfirdn2d(x, kernel, up, down, pad), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "size, taps, up, down, pad",
    [
        ((3, 1), (2, 1), 1, 2, (2, -2)),
        ((1, 1), (4, 2), 3, 1, (-2, 4)),
        ((4, 2), (1, 3), 1, 2, (4, -2)),
    ],
)
def test_a_crop_may_take_more_than_the_image(size, taps, up, down, pad):
    """And some of the zeros on the other side."""
    x, kernel = double(1, 2, *size).requires_grad_(), double(*taps).requires_grad_()
    u = zeros_inserted(x.detach(), up)
    padded = F.pad(F.pad(u, [max(side, 0) for side in pad * 2]), [min(side, 0) for side in pad * 2])
    expected = direct_upfirdn2d(padded, kernel.detach(), 1, down, (0, 0))
    found = upfirdn2d(x, kernel, up, down, pad)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
    assert gradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    sides = (up, up, down, down, *pad, *pad)
    torch.testing.assert_close(upfirdn2d_native(x, kernel, *sides), found)


@pytest.mark.parametrize(
    "up, down, pad", [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 3, (-1, 3))]
)
def test_upfirdn2d_can_be_differentiated_twice(up, down, pad):
    x, kernel = double(1, 2, 4, 5).requires_grad_(), double(4, 4).requires_grad_()
    assert gradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    assert gradgradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))


def test_upfirdn2d_keeps_the_dtype_of_the_image():
    assert upfirdn2d(double(1, 1, 4, 4), torch.ones(2, 2)).dtype == torch.float64
    assert upfirdn2d(torch.ones(1, 1, 4, 4).bfloat16(), torch.ones(2, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch.uint8, to which the taps .* pass input.float"):
        resampling.downsample_2d(torch.ones(1, 1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "x, kernel, options, message",
    [
        ((3, 4, 4), (2, 2), {}, r"not shapes \(3, 4, 4\)"),
        ((1, 3, 4, 4), (2,), {}, r"not shapes .* and \(2,\)"),
        ((1, 3, 4, 4), (2, 2), {"up": 0}, "up=0"),
        ((1, 3, 4, 4), (2, 2), {"pad": (1, 1, 1, 1)}, r"pad=\(1, 1, 1, 1\)"),
        ((1, 3, 4, 4), (6, 6), {}, "6 taps do not fit"),
    ],
)
def test_upfirdn2d_refuses_invalid_arguments(x, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        upfirdn2d(torch.ones(x), torch.ones(kernel), **options)


def test_fused_leaky_relu():
    x, bias = torch.tensor([[[1.0, -3.0], [2.0, -1.0]]]), torch.tensor([1.0, -1.0])
    expected = torch.tensor([[[2.0, -0.4], [1.0, -0.4]]]) * math.sqrt(2)
    torch.testing.assert_close(fused_leaky_relu(x, bias), expected)
    torch.testing.assert_close(fused_leaky_relu(x, bias, 0.5, 2.0)[0, 0], torch.tensor([4.0, -2.0]))
    torch.testing.assert_close(fused_leaky_relu(x[..., 0], bias), expected[..., 0])
    layer = FusedLeakyReLU(2)
    assert torch.equal(layer.bias, torch.zeros(2))
    layer.bias.data = bias
    torch.testing.assert_close(layer(x), expected)
    layer(torch.randn(5, 2, 4, 4)).sum().backward()
    assert layer.bias.grad.abs().min() > 0
    with pytest.raises(ValueError, match="bias"):
        fused_leaky_relu(x, torch.zeros(3))


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("k", [None, *FILTERS], ids=str)
def test_filters_of_any_length_give_the_right_size(k, factor):
    x, w = double(1, 2, 12, 24), double(5, 2, 3, 3)
    larger, smaller = (12 * factor, 24 * factor), (12 // factor, 24 // factor)
    assert resampling.upsample_2d(x, k, factor).shape == (1, 2, *larger)
    assert resampling.downsample_2d(x, k, factor).shape == (1, 2, *smaller)
    assert resampling.upsample_conv_2d(x, w, k, factor).shape == (1, 5, *larger)
    assert resampling.conv_downsample_2d(x, w, k, factor).shape == (1, 5, *smaller)


@pytest.mark.parametrize(
    "k, message",
    [
        ([1, -2, 1], r"sum to 0"),
        ([1, math.inf], r"finite"),
        ([], r"not of shape \(0, 0\)"),
        ([[1, 2]], r"not of shape \(1, 2\)"),
        ([[[1]]], r"not of shape \(1, 1, 1\)"),
    ],
)
def test_a_filter_that_cannot_be_normalised_is_refused(k, message):
    """It would make every pixel infinite, or no number."""
    with pytest.raises(ValueError, match=message):
        resampling.downsample_2d(double(1, 1, 4, 4), k)
    with pytest.raises(ValueError, match=message):
        resampling.resampler(up=True, k=k)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_box_filter_equals_naive_resampling(factor):
    x = double(2, 3, 6, 12)
    torch.testing.assert_close(
        resampling.upsample_2d(x, None, factor), resampling.naive_upsample_2d(x, factor)
    )
    torch.testing.assert_close(
        resampling.downsample_2d(x, None, factor), resampling.naive_downsample_2d(x, factor)
    )


def test_naive_resampling():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert resampling.naive_upsample_2d(x)[0, 0, 1].tolist() == [1, 1, 2, 2]
    assert resampling.naive_downsample_2d(x).item() == 3


@pytest.mark.parametrize("k", FILTERS[1:], ids=str)
def test_a_flat_image_stays_flat_inside(k):
    flat, inside = torch.ones(1, 1, 12, 12, dtype=torch.float64), (..., slice(4, -4), slice(4, -4))
    for gain in (1, 3):
        up = resampling.upsample_2d(flat, k, gain=gain)[inside]
        down = resampling.downsample_2d(flat, k, gain=gain)[..., 2:-2, 2:-2]
        torch.testing.assert_close(up, torch.full_like(up, gain))
        torch.testing.assert_close(down, torch.full_like(down, gain))


def test_a_filter_of_even_length_keeps_the_image_in_place():
    ramp = torch.arange(16, dtype=torch.float64).expand(1, 1, 16, 16)
    # Pixel centres of the finer image lie a quarter of a pixel to the left and right.
    fine = resampling.upsample_2d(ramp, [1, 3, 3, 1])[0, 0, 8, 2:-2]
    torch.testing.assert_close(fine, torch.arange(28, dtype=torch.float64) / 2 + 0.75)
    coarse = resampling.downsample_2d(ramp, [1, 3, 3, 1])[0, 0, 4, 1:-1]
    torch.testing.assert_close(coarse, torch.arange(6, dtype=torch.float64) * 2 + 2.5)


@pytest.mark.parametrize("k", FILTERS, ids=str)
def test_upsampling_fused_with_a_convolution(k):
    """Insert zeros, convolve with all overlaps, then filter once with gain 4."""
    x, w = double(2, 3, 5, 6), double(4, 3, 3, 3)
    taps = torch.tensor(k, dtype=torch.float64)
    kernel = 4 * torch.outer(taps, taps) / taps.sum() ** 2
    p = len(k) - 4
    full = F.conv2d(zeros_inserted(x, 2)[..., :-1, :-1], w, padding=2)
    expected = direct_upfirdn2d(full, kernel, 1, 1, ((p + 1) // 2 + 1, p // 2 + 1))
    torch.testing.assert_close(resampling.upsample_conv_2d(x, w, k), expected)


@pytest.mark.parametrize("k", FILTERS[:4], ids=str)
def test_downsampling_fused_with_a_convolution(k):
    """Away from the border: filter, convolve, then drop every other pixel."""
    x, w = double(2, 3, 12, 12), double(4, 3, 3, 3)
    taps = torch.tensor(k, dtype=torch.float64)
    p = len(k)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    filtered = direct_upfirdn2d(x, kernel, 1, 1, ((p + 1) // 2, p // 2))
    expected = F.conv2d(filtered, w)[:, :, ::2, ::2]
    torch.testing.assert_close(resampling.conv_downsample_2d(x, w, k), expected)


@pytest.mark.parametrize("up, down", [(False, False), (True, False), (False, True)])
def test_convolution_layer(up, down):
    layer = resampling.Conv2d(3, 5, 3, up=up, down=down).double()
    layer.bias.data = double(5)
    x = double(2, 3, 8, 6)
    if up:
        expected = resampling.upsample_conv_2d(x, layer.weight, [1, 3, 3, 1])
    elif down:
        expected = resampling.conv_downsample_2d(x, layer.weight, [1, 3, 3, 1])
    else:
        expected = F.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x), expected + layer.bias.reshape(1, 5, 1, 1))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_convolution_layer_takes_an_initializer_and_refuses_invalid_arguments():
    layer = resampling.Conv2d(3, 5, 1, use_bias=False, kernel_init=torch.ones)
    assert torch.equal(layer.weight, torch.ones(5, 3, 1, 1)) and layer.bias is None
    with pytest.raises(ValueError, match="kernel=2"):
        resampling.Conv2d(3, 5, 2)
    with pytest.raises(ValueError, match="not both"):
        resampling.Conv2d(3, 5, 3, up=True, down=True)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        resampling.upsample_2d(torch.ones(1, 1, 4, 4), torch.ones(2, 3))


@pytest.mark.parametrize("fused", [resampling.upsample_conv_2d, resampling.conv_downsample_2d])
def test_convolutions_that_resample_are_square(fused):
    with pytest.raises(ValueError, match=r"are \(C', C, n, n\), not \(1, 1, 3, 5\)"):
        fused(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 3, 5))


def test_filters_follow_their_layer_and_are_not_saved():
    layer = resampling.Resample2d([1, 3, 3, 1], up=True)
    assert not layer.state_dict()
    other = copy.deepcopy(layer).double()
    assert (layer.kernel.dtype, other.kernel.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(
        other(double(1, 2, 4, 4)), resampling.upsample_2d(double(1, 2, 4, 4), [1, 3, 3, 1])
    )
    with torch.device("meta"):
        assert resampling.Resample2d([1, 3, 3, 1], up=False)(torch.ones(1, 2, 4, 4)).shape[2] == 2


def test_native_upfirdn2d_takes_settings_for_each_axis():
    x, kernel = double(2, 3, 8, 9), double(3, 4)
    found = upfirdn2d_native(x, kernel, 2, 2, 3, 3, 1, 2, 1, 2)
    torch.testing.assert_close(found, upfirdn2d(x, kernel, 2, 3, (1, 2)))
    assert upfirdn2d_native(x, kernel, 2, 1, 1, 2, 3, 0, 2, 0).shape == (2, 3, 4, 18)
