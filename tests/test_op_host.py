"""The kernels for a CPU: arithmetic, derivatives, when they are taken, how they are compiled."""

import ctypes
import importlib
import logging
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from op_cases import check_types
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from configs.defaults import load
from models import adm_layers
from models.layers import channels_last
from models.layerspp import ResnetBlockBigGANpp, ResnetBlockDDPMpp, Upsample, residual_sum
from models.normalization import GroupNorm, activated
from models.precision import accelerated
from models.utils import create_model
from op import build, dispatch, group_norm_silu, host, repeated_conv, rescaled_sum
from score_lib.options import complete

fused = importlib.import_module("op.group_norm_silu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
HALF = torch.bfloat16
EPS = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the library is compiled, once."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def launched(folder, monkeypatch):
    """The kernels compute; names of those that were called."""
    names, launch = [], host.launch

    def counted(name, *arguments):
        names.append(name)
        return launch(name, *arguments)

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("OP_BACKEND", "cpu")
    monkeypatch.setattr(host, "launch", counted)
    return names


def arguments(shape=(3, 12, 5, 4), dtype=torch.float32, mean=0.0):
    """Images whose channels come last, weight, bias and shift, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape, shape[1], shape[1], shape[:2]
    x, weight, bias, shift = (torch.randn(size, generator=generator) for size in sizes)
    x = channels_last(x + mean).to(dtype)
    return [v.requires_grad_() for v in (x, weight, bias, shift)]


def formula(x, groups, weight, bias, shift, eps=EPS):
    """In float64."""
    parts = (x.double() + shift.double()[:, :, None, None]).reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(parts, dim=2, unbiased=False, keepdim=True)
    n = ((parts - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    z = n * weight.double()[:, None, None] + bias.double()[:, None, None]
    return z / (1 + torch.exp(-z))


def relative(found, expected):
    """Error in root mean square."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


SHAPES = [(3, 12, 5, 4), (1, 24, 9, 9), (2, 6, 1, 1), (7, 32, 28, 28), (1, 4, 70, 3)]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, error", [(torch.float32, 5e-7), (HALF, 2.5e-3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_results_and_derivatives_are_those_of_the_formula(launched, shape, dtype, error, groups):
    x, weight, bias, shift = arguments(shape, dtype)
    result = group_norm_silu(x, groups, weight, bias, EPS, shift)
    assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
    inputs = x, weight, bias, shift
    doubles = [v.detach().double().requires_grad_() for v in inputs]
    expected = formula(doubles[0], groups, *doubles[1:])
    assert relative(result, expected) < error
    # The order in memory of the gradient is not that of x.
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    slopes = torch.autograd.grad(result, inputs, grad)
    of_formula = torch.autograd.grad(expected, doubles, grad.double())
    assert launched == ["group_norm_silu", "group_norm_silu_backward"]
    for slope, exact, given in zip(slopes, of_formula, inputs, strict=True):
        assert slope.dtype == given.dtype
        if exact.norm() > 1e-6:  # the slope of a shift of one group is 0
            assert relative(slope, exact) < error * 5


@needs_compiler
def test_an_output_in_bfloat16_is_rounded_once(launched):
    x, weight, bias, shift = (v.detach() for v in arguments((2, 8, 9, 9), HALF))
    wide = group_norm_silu(x.float(), 2, weight, bias, EPS, shift)
    assert torch.equal(group_norm_silu(x, 2, weight, bias, EPS, shift), wide.to(HALF))
    x, h = x.detach(), channels_last(torch.randn(2, 8, 9, 9)).to(HALF)
    wide = (x.float() + h.float()) / 2**0.5
    assert torch.equal(rescaled_sum(x, h, 2**0.5), wide.to(HALF))
    assert len(launched) == 3


@needs_compiler
def test_bfloat16_rounds_as_pytorch_does(launched):
    """Ties, the largest numbers, subnormal ones and what is no number."""
    kinds = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 3.39e38, 1e-40, 0.0, -0.0]
    kinds += [float("inf"), float("-inf"), float("nan")]
    a = torch.tensor(kinds).to(HALF).repeat(8)
    b = (a.float() * 2**-8).to(HALF)
    expected = ((a.float() + b.float()) / 1.0).to(HALF)
    torch.testing.assert_close(rescaled_sum(a, b, 1.0), expected, rtol=0, atol=0, equal_nan=True)
    assert launched


@needs_compiler
@pytest.mark.parametrize("mean", [0, 100])
def test_statistics_are_exact_where_the_mean_is_large(launched, mean):
    x, weight, bias, shift = (v.detach() for v in arguments((4, 12, 28, 28), mean=mean))
    found = group_norm_silu(x, 3, weight, bias, EPS, shift)
    torch.testing.assert_close(
        found.double(), formula(x, 3, weight, bias, shift), atol=6e-5, rtol=0
    )
    assert launched


@needs_compiler
def test_epsilon_arrives(launched):
    x, weight, bias, shift = (v.detach() for v in arguments())
    found = group_norm_silu(x, 3, weight, bias, 0.7, shift)
    torch.testing.assert_close(
        found.double(), formula(x, 3, weight, bias, shift, 0.7), atol=1e-6, rtol=1e-6
    )


@needs_compiler
def test_vectors_with_gaps_in_memory_are_read_without_them(launched):
    x, *dense = arguments()
    gaps = [v.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for v in dense]
    found = []
    for weight, bias, shift in (dense, gaps):
        y = group_norm_silu(x, 3, weight, bias, EPS, shift)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias, shift))])
    assert len(launched) == 4 and all(map(torch.equal, *found))


@needs_compiler
def test_silu_is_exact_far_from_0_and_tells_what_is_no_number(launched):
    """The weights are 0, so that the bias is the argument."""
    kinds = [-1e30, -200.0, -88.5, -87.0, -20.0, -1e-3, 0.0, 1e-3, 5.0, 87.0, 200.0, 1e30]
    bias = torch.tensor([*kinds, float("nan"), float("inf")])
    x = channels_last(torch.randn(2, len(bias), 3, 3))
    found = group_norm_silu(x, 1, torch.zeros(len(bias)), bias, EPS)[0, :, 0, 0]
    exact = F.silu(bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=1e-36, equal_nan=True)
    x[1, 0, 1, 1] = float("nan")
    found = group_norm_silu(x, 7, torch.ones(len(bias)), torch.zeros(len(bias)), EPS)
    assert found[1, :2].isnan().all()  # its group, and nothing else
    assert not found[0].isnan().any() and not found[1, 2:].isnan().any()


@needs_compiler
@pytest.mark.parametrize("images", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(launched, images):
    x, weight, bias, shift = arguments((images, 24, 40, 40))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y = group_norm_silu(x, 6, weight, bias, EPS, shift)
            grads = torch.autograd.grad(y.square().sum(), (x, weight, bias, shift))
            found.append([y, *grads, rescaled_sum(x, y, 3.0)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
def test_pytorchs_number_of_threads_is_used(launched, monkeypatch):
    class Library:
        rescaled_sum = staticmethod(lambda *given: calls.append(given))

    calls = []
    monkeypatch.setattr(host, "kernels", Library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for numbers, threads in ((2**15 - 1, 1), (2**15, 5)):
        x = torch.ones(numbers, dtype=HALF)
        host.launch("rescaled_sum", x, x, 3, 1.0)
        assert calls.pop() == (1, x.data_ptr(), 3, 1.0, threads)


@needs_compiler
def test_derivatives_can_be_differentiated_again(launched):
    x, weight, bias, shift = arguments((2, 6, 2, 3))

    def curvature(norm):
        slopes = torch.autograd.grad(
            norm().square().sum(), (x, weight, bias, shift), create_graph=True
        )
        total = sum(slope.pow(2).sum() for slope in slopes)
        return torch.autograd.grad(total, (x, weight, bias, shift))

    found = curvature(lambda: group_norm_silu(x, 3, weight, bias, EPS, shift))
    expected = curvature(lambda: formula(x, 3, weight, bias, shift))
    assert launched == ["group_norm_silu", "group_norm_silu_backward"]  # of the result itself
    for slope, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(slope, exact, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_only_what_is_asked_for_is_differentiated(launched):
    x, weight, bias, shift = arguments()
    for create_graph in (False, True):
        y = group_norm_silu(x.detach(), 3, weight, bias.detach(), EPS, shift).square().sum()
        found = torch.autograd.grad(y, (weight, shift), create_graph=create_graph)
        exact = formula(x.detach(), 3, weight, bias.detach(), shift).square().sum()
        for slope, expected in zip(found, torch.autograd.grad(exact, (weight, shift)), strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_batched_gradients_equal_single_ones(launched):
    """A backward pass under `vmap` of a forward pass recorded without it."""
    inputs = arguments()
    x, weight, bias, shift = inputs
    y = rescaled_sum(group_norm_silu(x, 3, weight, bias, EPS, shift), x, 2.0)
    grads = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(1))
    options = {"retain_graph": True}
    found = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, **options)
    expected = [torch.autograd.grad(y, inputs, grad, **options) for grad in grads]
    for together, one_by_one in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_function_transforms_use_functions_of_pytorch(launched):
    x, weight, bias, shift = (v.detach() for v in arguments())

    def network(x):
        return rescaled_sum(group_norm_silu(x, 3, weight, bias, EPS, shift), x, 2.0)

    def exact(x):
        return (formula(x, 3, weight, bias, shift) + x) / 2

    _, slope = torch.func.jvp(network, (x,), (x.cos(),))
    _, expected = torch.func.jvp(exact, (x,), (x.cos(),))
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-5)
    found = torch.vmap(torch.func.grad(lambda x: network(x).sum()))(x.expand(2, *x.shape))
    whole = torch.func.grad(lambda x: exact(x).sum())(x)
    torch.testing.assert_close(found[1].double(), whole.double(), rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(network(forward_ad.make_dual(x, x.cos())))
    torch.testing.assert_close(dual.tangent.double(), expected, rtol=1e-4, atol=1e-5)
    assert not launched


@needs_compiler
@pytest.mark.slow
def test_operators_pass_opcheck(launched):
    x, weight, bias, shift = arguments()
    calls = [
        (fused.operator, (x, shift, weight, bias, 3, EPS)),
        (importlib.import_module("op.rescaled_sum").operator, (x, x.detach(), 2.0)),
    ]
    for operator, given in calls:
        found = torch.library.opcheck(operator, given)
        assert found and set(found.values()) == {"SUCCESS"}


@needs_compiler
@pytest.mark.slow
def test_compiled_networks_use_functions_of_pytorch(launched):
    x, weight, bias, shift = (v.detach() for v in arguments())
    compiled = torch.compile(
        lambda x: rescaled_sum(group_norm_silu(x, 3, weight, bias, EPS, shift), x, 2.0),
        backend="aot_eager",
        fullgraph=True,
    )
    expected = (formula(x, 3, weight, bias, shift) + x) / 2
    torch.testing.assert_close(compiled(x).double(), expected.double(), rtol=1e-4, atol=1e-5)
    assert not launched


OTHERS = {
    "channels that come first": lambda x: x.contiguous(),
    "float64": lambda x: x.double(),
    "no images": lambda x: x[:0],
    "a slice": lambda x: x[:, :, :, ::2],
    "sequences": lambda x: x[:, :, 0],
}


@needs_compiler
@pytest.mark.parametrize("kind", OTHERS)
def test_other_features_are_left_to_pytorch(launched, kind):
    x, weight, bias, shift = (v.detach() for v in arguments())
    x, shift = OTHERS[kind](x), shift[: len(OTHERS[kind](x))]
    found = group_norm_silu(x, 3, weight.to(x.dtype), bias.to(x.dtype), EPS, shift.to(x.dtype))
    moved = x + shift.to(x.dtype).reshape(*shift.shape, *(1,) * (x.dim() - 2))
    affine = weight.to(x.dtype), bias.to(x.dtype)
    torch.testing.assert_close(found, F.silu(F.group_norm(moved, 3, *affine, EPS)))
    assert not launched


@needs_compiler
def test_weights_in_float64_or_elsewhere_are_left_to_pytorch(launched):
    x, weight, bias, _ = (v.detach() for v in arguments())
    assert not fused.has_kernel(x, weight.double(), bias)
    assert not fused.has_kernel(x, weight, bias.to("meta"))
    assert fused.has_kernel(x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("h", ["another order", "another dtype", "another shape", "a slice"])
def test_sums_of_unlike_features_are_left_to_pytorch(launched, h):
    x = channels_last(torch.randn(2, 4, 6, 6))
    wide = torch.randn(2, 4, 6, 12)
    others = {
        "another order": wide[..., :6].contiguous(),
        "another dtype": channels_last(wide[..., :6]).double(),
        "another shape": wide[:1, :, :, :6],
        "a slice": wide[..., ::2],
    }
    expected = (x + others[h]) / 1.5
    assert torch.equal(rescaled_sum(x, others[h], 1.5), expected)
    assert torch.equal(rescaled_sum(others[h], x, 1.5), expected)
    slices = others["a slice"], torch.randn(2, 4, 6, 12)[..., ::2]  # alike, with gaps between
    assert torch.equal(rescaled_sum(*slices, 1.5), sum(slices) / 1.5)
    assert not launched
    rescaled_sum(x, channels_last(wide[..., :6]), 1.5)
    assert launched == ["rescaled_sum"]


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 5},
        {"weight": torch.ones(11)},
        {"bias": torch.ones(1, 12)},
        {"shift": torch.ones(12)},
        {"x": torch.ones(12)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_wrong_shapes_are_refused(change):
    x, weight, bias, shift = arguments()
    given = {"x": x, "groups": 3, "weight": weight, "bias": bias, "eps": EPS, "shift": shift}
    with pytest.raises(ValueError, match=r"group_norm_silu takes x \(B, C, \*S\)"):
        group_norm_silu(**given | change)


@needs_compiler
@pytest.mark.parametrize("rescale", [True, False])
def test_blocks_use_the_kernels_with_their_own_numbers(launched, rescale):
    """Groups, epsilon, weights and the shift of a layer arrive, and the divisor is sqrt(2)."""
    x, weight, bias, shift = (v.detach() for v in arguments())
    norm = GroupNorm(4, 12, eps=0.3)
    norm.weight.data, norm.bias.data = weight, bias
    with torch.no_grad():
        found = activated(torch.nn.SiLU(), norm, x, shift)
        expected = formula(x, 4, weight, bias, shift, 0.3)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        found = residual_sum(x, found, rescale)
    expected = (x + expected) / (2**0.5 if rescale else 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert launched == ["group_norm_silu", *["rescaled_sum"] * rescale]


class Other(GroupNorm):
    """A subclass may compute anything."""


@needs_compiler
@pytest.mark.parametrize(
    "act, norm",
    [(torch.nn.ELU(), GroupNorm), (torch.nn.SiLU(), Other), (torch.nn.SiLU(), torch.nn.GroupNorm)],
    ids=["ELU", "a subclass", "PyTorch's"],
)
def test_other_layers_are_called_themselves(launched, act, norm):
    x, *_, shift = (v.detach() for v in arguments())
    layer = norm(3, 12)
    found = activated(act, layer, x, shift)
    assert torch.equal(found, act(layer(x + shift[:, :, None, None])))
    assert not launched


@needs_compiler
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
@pytest.mark.parametrize("layer", ["norm", "act"])
def test_hooks_of_the_layers_are_called(launched, register, layer):
    x, *_, shift = arguments()
    layers = {"norm": GroupNorm(3, 12), "act": torch.nn.SiLU()}
    calls = []

    def hook(*_):
        calls.append(1)

    handle = getattr(layers[layer], register)(hook)
    activated(layers["act"], layers["norm"], x, shift).sum().backward()
    assert calls == [1] and not launched
    handle.remove()
    activated(layers["act"], layers["norm"], x, shift)
    assert calls == [1] and launched == ["group_norm_silu"]


def repeated_arguments(taps, shape=(2, 3, 4, 3)):
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (6, shape[1], taps, taps), (6,)
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in sizes]


@pytest.mark.parametrize("backend", ("cpu", "plain"))
@pytest.mark.parametrize("taps", (3, 1, 5))
def test_a_convolution_of_repeated_pixels(taps, backend, monkeypatch):
    monkeypatch.setenv("OP_BACKEND", backend)
    x, weight, bias = given = repeated_arguments(taps)
    large = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(large, weight, bias, padding=taps // 2)
    torch.testing.assert_close(repeated_conv(*given), expected)
    assert torch.autograd.gradcheck(repeated_conv, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(repeated_conv, given, fast_mode=True)


def operations_of(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = call()
    return counter.get_total_flops(), y


@pytest.mark.parametrize("taps, left", ((3, 4 / 9), (1, 1 / 4), (5, 9 / 25)))
def test_repeated_pixels_share_products(taps, left, monkeypatch):
    given, counts = repeated_arguments(taps, (4, 3, 30, 30)), {}
    for backend in ("plain", "cpu"):
        monkeypatch.setenv("OP_BACKEND", backend)
        counts[backend] = operations_of(lambda: repeated_conv(*given))[0]
    assert counts["plain"] == 2 * 4 * 60 * 60 * 6 * 3 * taps**2
    assert counts["cpu"] == pytest.approx(left * counts["plain"], rel=0.01)


ENLARGING = {
    "layer": lambda: Upsample(32, 32, with_conv=True),
    "block": lambda: ResnetBlockBigGANpp(torch.nn.SiLU(), 32, 48, up=True),
    "ADM's layer": lambda: adm_layers.Upsample(32, dims=2, with_conv=True),
    "ADM's block": lambda: adm_layers.ResBlock(
        *(32, 32, 8),
        **{"dropout": 0.0, "dims": 2, "scale_shift": True},
        resample=adm_layers.Upsample(32, dims=2, with_conv=False),
    ),
    "ADM's block, other channels": lambda: adm_layers.ResBlock(
        *(32, 64, 8),
        **{"dropout": 0.0, "dims": 2, "scale_shift": False},
        resample=adm_layers.Upsample(32, dims=2, with_conv=False),
    ),
}


@pytest.mark.parametrize("kind", ENLARGING)
def test_layers_that_repeat_pixels_share_products(kind, launched, monkeypatch):
    torch.manual_seed(0)
    layer, found = ENLARGING[kind]().eval(), {}
    for weight in layer.parameters():  # some of a new one are 0
        torch.nn.init.normal_(weight, std=0.2)
    x, temb = torch.randn(2, 32, 16, 20), torch.randn(2, 8)
    given = (x, temb) if isinstance(layer, adm_layers.ResBlock) else (x,)
    for backend in ("plain", "cpu"):
        monkeypatch.setenv("OP_BACKEND", backend)
        found[backend] = operations_of(lambda: layer(*given))
    (plain, expected), (shared, y) = found["plain"], found["cpu"]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert shared < 0.8 * plain


def test_an_enlargement_with_a_convolution_is_made_before_both_branches():
    resample, calls = adm_layers.Upsample(32, dims=2, with_conv=True), []
    resample.conv.register_forward_hook(lambda *_: calls.append(1))
    options = {"dropout": 0.0, "dims": 2, "scale_shift": True}
    block = adm_layers.ResBlock(32, 32, 8, resample=resample, **options)
    assert block(torch.randn(1, 32, 4, 4), torch.randn(1, 8)).shape == (1, 32, 8, 8)
    assert len(calls) == 2


@needs_compiler
def test_hooks_of_all_layers_are_called(launched):
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        act, norm = torch.nn.SiLU(), GroupNorm(3, 12)
        activated(act, norm, arguments()[0])
    finally:
        handle.remove()
    assert calls == [norm, act] and not launched


def test_by_default_nothing_is_compiled(monkeypatch):
    monkeypatch.delenv("OP_BACKEND", raising=False)
    monkeypatch.setattr(host, "kernels", lambda: pytest.fail("compiled"))
    x, weight, bias, shift = (v.detach() for v in arguments())
    group_norm_silu(x, 3, weight, bias, EPS, shift)
    monkeypatch.setenv("OP_BACKEND", "cuda")
    group_norm_silu(x, 3, weight, bias, EPS, shift)
    rescaled_sum(x, x, 2.0)


def test_functions_are_called_with_the_types_that_they_declare():
    check_types(host)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder for libraries, in a process that has not compiled yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "of" / "extensions"))
    monkeypatch.setenv("OP_BACKEND", "cpu")
    host._kernels.cache_clear()
    yield tmp_path / "of" / "extensions" / "score_lib_host"
    host._kernels.cache_clear()


@pytest.mark.slow
@needs_compiler
def test_a_library_is_compiled_once_for_each_source_and_processor(fresh, tmp_path, monkeypatch):
    first = host.compiled(host.SOURCE)
    assert [str(path) for path in fresh.iterdir()] == [first]  # nothing else is left
    monkeypatch.setattr(host.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert host.compiled(host.SOURCE) == first
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(fresh.parent))
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" int answer() { return 42; }')
    assert host.compiled(other) != first
    assert ctypes.CDLL(host.compiled(other)).answer() == 42
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert host.compiled(other) not in (first, host.compiled(host.SOURCE))
    assert len(list(fresh.iterdir())) == 4


def broken(tmp_path, monkeypatch):
    (tmp_path / "broken.cpp").write_text("out of order")
    monkeypatch.setattr(host, "SOURCE", tmp_path / "broken.cpp")


def without_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))


def without_a_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))


@needs_compiler
@pytest.mark.parametrize(
    "fault, reason",
    [
        (broken, "error: .*out"),
        (without_compiler, "No such file.*no compiler"),
        (without_a_place, "Not a directory|File exists"),
    ],
)
def test_without_kernels_pytorch_computes_and_one_line_is_logged(
    fresh, fault, reason, tmp_path, monkeypatch, caplog
):
    fault(tmp_path, monkeypatch)
    x, weight, bias, _ = (v.detach() for v in arguments())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = group_norm_silu(x, 3, weight, bias, EPS)
    torch.testing.assert_close(found, F.silu(F.group_norm(x, 3, weight, bias, EPS)))
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("no CPU kernels, falling back to PyTorch: ")
    assert re.search(reason, message) and "\n" not in message


def test_the_backend_is_checked(monkeypatch):
    monkeypatch.setenv("OP_BACKEND", "fast")
    x = torch.ones(1, 2, 2, 2)
    with pytest.raises(ValueError, match="OP_BACKEND is 'fast': set it to plain, cuda or cpu"):
        rescaled_sum(x, x, 2.0)


def test_kernels_of_a_gpu_are_not_those_of_a_cpu(monkeypatch):
    monkeypatch.setenv("OP_BACKEND", "cpu")
    assert not dispatch.has_kernel(torch.ones(2))
    assert build.SOURCE != host.SOURCE


@needs_compiler
@pytest.mark.parametrize("precision, error", [("float32", 1e-5), ("bfloat16", 0.03)])
def test_networks_compute_the_same_by_the_kernels(launched, monkeypatch, precision, error):
    """All blocks, and the layer before the last convolution, take them in both passes."""
    config = complete(load("vp/digits"))
    config.model.update(nf=16, ch_mult=(1, 2), dropout=0.0)
    torch.manual_seed(0)
    network = create_model(config, "cpu")
    for weight in network.parameters():  # the last layers of a new one are near 0
        torch.nn.init.normal_(weight, std=0.2)
    accelerated_network = accelerated(network, precision)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([10.0, 300.0, 990.0])

    def both_passes(network):
        network.zero_grad()
        y = network(x, labels)
        y.square().mean().backward()
        grads = torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None])
        return y.detach(), grads

    found = both_passes(accelerated_network)
    blocks = sum(isinstance(m, ResnetBlockDDPMpp | ResnetBlockBigGANpp) for m in network.modules())
    assert launched.count("group_norm_silu") == 2 * blocks + 1
    assert launched.count("group_norm_silu_backward") == 2 * blocks + 1
    assert launched.count("rescaled_sum") >= blocks  # attention has one as well
    monkeypatch.setenv("OP_BACKEND", "plain")
    for one, other in zip(found, both_passes(network), strict=True):
        assert 0 < relative(one, other.double()) < error
