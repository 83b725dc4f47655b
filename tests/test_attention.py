"""Attention has derivatives of every order and mode, and the fast kernels where they suffice."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import build, fill_weights, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import attention
from models.layerspp import AttnBlockpp
from models.precision import InBfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(shape=(2, 1, 6, 8), dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def network():
    """Attention at 4 px and in the middle; in float64."""
    return fill_weights(build(tiny_config(image_size=8))).double().eval()


def test_derivatives_of_both_orders():
    given = tokens((1, 1, 3, 4))
    assert torch.autograd.gradcheck(attention, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attention, given)
    block = AttnBlockpp(4, init_scale=1.0).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_first_derivatives_are_those_of_the_kernel(dtype):
    given = tokens(dtype=dtype)
    weight = torch.randn(2, 1, 6, 8, dtype=dtype)
    ours = torch.autograd.grad((attention(*given) * weight).sum(), given)
    theirs = torch.autograd.grad((F.scaled_dot_product_attention(*given) * weight).sum(), given)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    # With a graph, up to rounding.
    ours = torch.autograd.grad((attention(*given) * weight).sum(), given, create_graph=True)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_only_some_arguments_need_gradients():
    query, key, value = tokens()
    for given in ((query, key.detach(), value.detach()), (query.detach(), key, value.detach())):
        (wanted,) = (x for x in given if x.requires_grad)
        (first,) = torch.autograd.grad(attention(*given).sin().sum(), wanted, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), wanted)
        assert second.abs().sum() > 0
    with torch.no_grad():
        assert attention(query, key, value).grad_fn is None


def test_a_network_in_forward_mode():
    model, labels = network(), torch.tensor([3.0, 5.0], dtype=torch.float64)
    x, v = (torch.rand(2, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    value, change = torch.func.jvp(lambda x: model(x, labels), (x,), (v,))
    torch.testing.assert_close(value, model(x, labels), rtol=1e-10, atol=1e-10)
    step = 1e-6
    expected = (model(x + step * v, labels) - model(x - step * v, labels)) / (2 * step)
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-6)


def test_transforms_of_a_network():
    model = network()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def total(image):
        return model(image[None], torch.full((1,), 3.0, dtype=torch.float64)).square().sum()

    slopes = torch.func.vmap(torch.func.grad(total))(x)
    (expected,) = torch.autograd.grad(total(x[0]) + total(x[1]), x)
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-9)

    def outputs(scale):
        return model(scale * x[:1], torch.ones(1, dtype=torch.float64)).sum((2, 3))[0]

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    jacobian = torch.func.jacrev(outputs)(scale)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(outputs)(scale), rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_a_network():
    """The gradient of a squared gradient, as in sliced score matching, against differences."""
    model, labels = network(), torch.tensor([3.0], dtype=torch.float64)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)

    def squared_gradient(x):
        (slope,) = torch.autograd.grad(model(x, labels).sin().sum(), x, create_graph=True)
        return slope.square().sum()

    (slope,) = torch.autograd.grad(squared_gradient(x), x)
    step = 1e-6
    ahead, behind = (squared_gradient(x + sign * step * v) for sign in (1, -1))
    expected = float((ahead - behind).detach()) / (2 * step)
    assert float((slope * v).sum()) == pytest.approx(expected, rel=1e-6)


def test_autocast_and_recomputed_blocks_have_them_too():
    config = tiny_config(image_size=8, checkpoint_activations=True)
    model = fill_weights(build(config)).train()
    x, labels = torch.rand(1, 3, 8, 8, requires_grad=True), torch.tensor([3.0])
    plain = fill_weights(build(tiny_config(image_size=8, dropout=0.0))).train()
    for network in (InBfloat16(plain), plain, model):
        (slope,) = torch.autograd.grad(network(x, labels).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        assert second.isfinite().all() and second.abs().sum() > 0


def test_other_kernels_agree():
    given = tokens(dtype=torch.float32)
    expected = attention(*given)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(attention(*given), expected, rtol=1e-5, atol=1e-6)


def test_a_dropped_graph_is_gone_at_once():
    """It holds no reference to itself, which would wait for the garbage collector."""
    gc.disable()
    try:
        query, key, value = (x * 1 for x in tokens())
        gone = weakref.ref(query)
        result = attention(query, key, value)
        del query, key, value, result
        assert gone() is None
    finally:
        gc.enable()
