"""Group normalisation of images in both orders of memory, with its derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from models import group_normalization
from models.group_normalization import group_normalized
from models.normalization import GroupNorm

ORDERS = pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])


def arguments(order=torch.channels_last, shape=(3, 12, 5, 4), mean=0.0, dtype=torch.float64):
    """x in an order of memory, 3 groups, weight, bias and epsilon."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=dtype) for size in (shape, shape[1], shape[1])
    )
    return (x + mean).contiguous(memory_format=order), 3, weight, bias, 1e-6


def exact(x, groups, weight, bias, eps):
    """By the formula, in float64."""
    parts = x.double().reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(parts, dim=2, unbiased=False, keepdim=True)
    flat = ((parts - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    ones = (1, -1) + (1,) * (x.dim() - 2)
    return flat * weight.double().view(ones) + bias.double().view(ones)


@pytest.fixture
def by_channels(monkeypatch):
    """How often the sums over channels were taken."""
    calls, plain = [], group_normalization._by_channels

    def counted(*given):
        calls.append(1)
        return plain(*given)

    monkeypatch.setattr(group_normalization, "_by_channels", counted)
    return calls


@ORDERS
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_both_orders_give_the_formula_and_keep_their_order(order, eps, by_channels):
    x, *others, _ = arguments(order)
    result = group_normalized(x, *others, eps)
    torch.testing.assert_close(result, exact(x, *others, eps))
    assert result.is_contiguous(memory_format=order)
    assert bool(by_channels) == (order is torch.channels_last)


@pytest.mark.parametrize("mean", [0, 100])
@ORDERS
def test_statistics_are_exact_where_the_mean_is_large(order, mean):
    """PyTorch's kernel for channels that come last is off by hundredths there."""
    given = arguments(order, (8, 12, 28, 28), mean, torch.float32)
    torch.testing.assert_close(group_normalized(*given).double(), exact(*given), atol=4e-5, rtol=0)


@pytest.mark.parametrize("shape", [(4, 12), (4, 12, 7), (2, 12, 3, 2, 5), (2, 12, 1, 1)])
def test_any_number_of_dimensions(shape):
    given = arguments(torch.contiguous_format, shape)
    torch.testing.assert_close(group_normalized(*given), exact(*given))


def test_derivatives_of_first_and_second_order(by_channels):
    x, groups, weight, bias, eps = arguments(shape=(2, 6, 2, 3))
    inputs = [v.requires_grad_() for v in (x, weight, bias)]

    def norm(x, weight, bias):
        return group_normalized(x, groups, weight, bias, eps)

    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)
    assert by_channels


@pytest.mark.parametrize("of", [0, 2, 3])
@pytest.mark.parametrize("create_graph", [False, True])
def test_derivatives_with_respect_to_one_argument(of, create_graph):
    given = list(arguments())
    given[of].requires_grad_()
    # The slope's order of memory is not that of x.
    slope = torch.randn(given[0].shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(norm(*given), given[of], slope, create_graph=create_graph)[0]
        for norm in (group_normalized, exact)
    )
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == create_graph or of == 3


def test_transforms_and_forward_mode_go_by_the_kernel():
    x, *others = arguments()
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(lambda x: exact(x, *others), (x,), (tangent,))[1]
    found = torch.func.jvp(lambda x: group_normalized(x, *others), (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), tangent)
        found = forward_ad.unpack_dual(group_normalized(dual, *others)).tangent
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(lambda x: group_normalized(x, *others))(x.detach()[:, None])
    torch.testing.assert_close(each[:, 0], exact(x, *others))


def test_a_compiled_call_goes_by_the_kernel(by_channels):
    """Which a compiler fuses with what follows."""
    given = arguments()
    compiled = torch.compile(group_normalized, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), exact(*given))
    assert not by_channels


@ORDERS
def test_bfloat16_is_rounded_once(order):
    """Gradients reach float32 weights."""
    x, groups, weight, bias, eps = arguments(order, (2, 12, 28, 28), 2, torch.float32)
    given = x.bfloat16(), groups, weight.bfloat16().float(), bias.bfloat16().float(), eps
    weight = given[2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = group_normalized(*given)
    assert result.dtype == torch.bfloat16 and result.is_contiguous(memory_format=order)
    torch.testing.assert_close(result.double(), exact(*given), atol=0.02, rtol=2**-8)
    result.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_features_are_not_changed_in_place():
    x, *others = arguments()
    before = x.clone()
    group_normalized(x, *others)
    assert torch.equal(x, before)


def test_the_layer_passes_its_settings_on():
    layer = GroupNorm(3, 12, eps=0.1).double()
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    x = arguments()[0]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.group_norm(x, 3, layer.weight, layer.bias, 0.1))
