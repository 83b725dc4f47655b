"""The CUDA kernels without a GPU: arithmetic, registration, derivatives.

`kernels.cu` is also plain C++.  Compiled for the host, and with the CPU registered as a platform,
everything but the launch itself runs here.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import subprocess
import time
import types

import pytest
import torch
from op_cases import check_types, random_tensor, some_resamplings
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from op import FusedLeakyReLU, build, dispatch, fused_leaky_relu, upfirdn2d

resampling = importlib.import_module("op.upfirdn2d")
activation = importlib.import_module("op.fused_act")
HEADERS = "/usr/local/cuda/include"

# PyTorch itself, when it compiles.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None, reason="needs g++ and ninja"
)


class Host(dispatch.Gpu):
    """The CPU in the place of a GPU; counts launches by name."""

    def __init__(self, library):
        self.library, self.launched = library, {"upfirdn2d": 0, "leaky_relu": 0}

    def kernels(self, device):
        return self.library and self

    def active(self, device):
        return contextlib.nullcontext()

    def index_and_stream(self, device):
        return 0, None

    def __getattr__(self, name):
        self.launched[name] += 1
        return getattr(self.library, name)


def test_functions_are_called_with_the_types_that_they_declare():
    check_types(build)


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        monkeypatch.setenv("CPATH", HEADERS)
        return build.compiled(shutil.copy(build.SOURCE, folder / "kernels.cpp"))


@pytest.fixture
def as_gpu(monkeypatch):
    """Registers the CPU as a platform with a library of kernels, or None."""

    def register(library):
        resampling.operator.register_kernel("cpu")(resampling.compute)
        activation.operator.register_kernel("cpu")(activation.compute)
        host = Host(library)
        monkeypatch.setitem(dispatch.PLATFORMS, "cpu", host)
        monkeypatch.setenv("OP_BACKEND", "cuda")
        return host

    return register


@pytest.fixture
def launched(as_gpu, host_kernels):
    """The kernels compute; counts how often, by name."""
    return as_gpu(host_kernels).launched


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resampling_kernel_equals_the_convolutions(launched, layout):
    for shape, taps, up, down, pad in some_resamplings(300):
        x = random_tensor(*shape).to(memory_format=layout)
        kernel = random_tensor(*taps, seed=1)
        expected = resampling.plain(x, kernel, up, down, pad)
        y = resampling.operator(x, kernel, up, down, pad)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12, msg=str((shape, taps, pad)))
        assert y.is_contiguous(memory_format=dispatch.layout(x))
    assert launched["upfirdn2d"] == 300


@needs_compiler
def test_resampling_kernel_takes_slices_and_empty_batches(launched):
    x, kernel = random_tensor(4, 6, 9, 20)[::2, 1:4, :, ::2], random_tensor(4, 4).T
    expected = resampling.plain(x, kernel, 2, 1, [2, 1, 2, 1])
    torch.testing.assert_close(upfirdn2d(x, kernel, up=2, pad=(2, 1)), expected, rtol=0, atol=1e-12)
    assert upfirdn2d(x[:0], kernel, up=2, pad=(2, 1)).shape == (0, 3, 18, 20)
    assert launched["upfirdn2d"] == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_sum_in_single_precision_and_round_once(launched, dtype):
    if dtype != torch.float32 and not os.path.exists(f"{HEADERS}/cuda_bf16.h"):
        pytest.skip("needs the CUDA headers")
    x, kernel = random_tensor(2, 3, 16, 16, dtype=dtype), random_tensor(12, 12, seed=1, dtype=dtype)
    eps = torch.finfo(dtype).eps
    exact = upfirdn2d(x.double(), kernel.double(), pad=(5, 6))
    error = (upfirdn2d(x, kernel, pad=(5, 6)).double() - exact).abs()
    summing = 144 * torch.finfo(torch.float32).eps * x.abs().max() * kernel.abs().max()
    assert (error <= eps / 2 * exact.abs() + summing).all()
    bias = random_tensor(3, seed=2, dtype=dtype)
    exact = fused_leaky_relu(x.double(), bias.double())
    error = (fused_leaky_relu(x, bias).double() - exact).abs()
    assert (error <= (eps / 2 + 4 * torch.finfo(torch.float32).eps) * exact.abs() + 1e-6).all()
    assert min(launched.values()) == 2


@needs_compiler
def test_activation_kernel_equals_the_formula(launched):
    shapes = [(5, 7), (3, 8), (2, 3, 10), (2, 4, 5), (2, 3, 4, 6), (2, 8, 3, 5), (1, 3, 2, 2, 4)]
    layouts = [torch.contiguous_format, torch.channels_last]
    dtypes = [torch.float64, torch.float32]
    for shape, layout, dtype, first in itertools.product(shapes, layouts, dtypes, (0, 1)):
        # A first element that is no multiple of 16 bytes away from an aligned address.
        x = random_tensor(first + torch.Size(shape).numel(), dtype=dtype)[first:].reshape(shape)
        x = x.to(memory_format=layout) if len(shape) == 4 else x
        bias, gate = random_tensor(shape[1], seed=1, dtype=dtype), random_tensor(*shape, seed=2)
        for arguments in ((bias, None), (None, gate.to(dtype)), (bias, gate.to(dtype))):
            expected = activation.plain(x, *arguments, 0.1, 1.5)
            y = activation.operator(x, *arguments, 0.1, 1.5)
            torch.testing.assert_close(y, expected, msg=str((shape, layout, dtype, first)))
            assert y.stride() == x.stride()
    assert launched["leaky_relu"] == 7 * 2 * 2 * 2 * 3


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "up, down, pad",
    [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 3, (-1, 3)), (3, 2, (0, -1))],
)
def test_operators_can_be_differentiated_twice(as_gpu, host_kernels, compiled, up, down, pad):
    launched = as_gpu(host_kernels if compiled else None).launched
    x = random_tensor(1, 2, 4, 5).requires_grad_()
    kernel = random_tensor(3, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    assert gradgradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    assert (launched["upfirdn2d"] > 0) == compiled


@needs_compiler
def test_the_activation_can_be_differentiated_twice(launched):
    x = random_tensor(2, 3, 4, 2).requires_grad_()
    bias = random_tensor(3, seed=1).requires_grad_()
    assert gradcheck(fused_leaky_relu, (x, bias)) and gradgradcheck(fused_leaky_relu, (x, bias))
    layer = FusedLeakyReLU(3).double()
    layer(x).square().sum().backward()
    expected = 2 * 2 * torch.where(x > 0, x, 0.04 * x).sum((0, 2, 3))
    torch.testing.assert_close(layer.bias.grad, expected)
    assert launched["leaky_relu"] > 4


@needs_compiler
@pytest.mark.parametrize("slope, scale", [(-0.5, 1.0), (0.2, -1.0)])
def test_slopes_and_gains_below_0_are_left_to_pytorch(launched, slope, scale):
    x, bias = random_tensor(2, 3, 4).requires_grad_(), torch.zeros(3, dtype=torch.float64)
    assert gradcheck(lambda x: fused_leaky_relu(x, bias, slope, scale), (x,))
    assert not launched["leaky_relu"]


@needs_compiler
def test_third_derivatives_equal_those_of_pytorch(launched, monkeypatch):
    def third(x, kernel):
        y = upfirdn2d(x, kernel, 2, 3, (2, 1)).pow(4).sum()
        for _ in range(3):
            grads = torch.autograd.grad(y, (x, kernel), create_graph=True)
            y = sum(g.pow(2).sum() for g in grads)
        return y

    tensors = [t.requires_grad_() for t in (random_tensor(1, 1, 3, 4), random_tensor(2, 3, seed=1))]
    found = third(*tensors)
    assert launched["upfirdn2d"] > 5
    monkeypatch.setenv("OP_BACKEND", "plain")
    torch.testing.assert_close(found, third(*tensors))


@needs_compiler
@pytest.mark.slow
def test_operators_pass_opcheck(launched):
    x = random_tensor(2, 3, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    kernel, bias = random_tensor(4, 3).requires_grad_(), random_tensor(3).requires_grad_()
    calls = [
        (resampling.operator, (x, kernel, 2, 3, [1, 2, 3, -1])),
        (resampling.operator, (x[:, ::2], kernel, 1, 2, [1, 2, 3, -1])),
        (activation.operator, (x, bias, None, 0.2, 1.5)),
        (activation.operator, (x, None, x.detach(), 0.2, 1.5)),
    ]
    for operator, arguments in calls:
        found = torch.library.opcheck(operator, arguments)
        assert found and set(found.values()) == {"SUCCESS"}


class Calls(TorchDispatchMode):
    """Notes the names of the operators of ours that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "score_sde":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_tensors_on_a_gpu_go_to_the_operators(monkeypatch):
    """With tensors that have a device and no numbers."""
    monkeypatch.setenv("OP_BACKEND", "cuda")
    with FakeTensorMode(), Calls() as calls:
        x = torch.empty(2, 3, 8, 6, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        y = upfirdn2d(x, torch.ones(4, 4, device="cuda"), up=2)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 13, 9), torch.bfloat16, "cuda")
        y = fused_leaky_relu(y, torch.zeros(3, device="cuda", dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 13, 9), torch.bfloat16, "cuda")
        assert y.is_contiguous(memory_format=torch.channels_last)
        upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2, 2))
    assert calls.names == ["upfirdn2d", "leaky_relu"]


def compiled_and_not(backend, dynamic, sizes):
    def network(x, kernel, bias):
        x = fused_leaky_relu(upfirdn2d(x, kernel, up=2, pad=(2, 1)).sin(), bias)
        return upfirdn2d(x, kernel, down=2, pad=(1, 1)).cos()

    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=dynamic)
    kernel, bias = random_tensor(4, 4), random_tensor(3)
    for size in sizes:
        results = []
        for function in (network, compiled):
            leaves = [t.clone().requires_grad_() for t in (random_tensor(2, 3, size, 7), bias)]
            y = function(leaves[0], kernel, leaves[1])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*results)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("compiler, dynamic", [("aot_eager", True), ("inductor", None)])
def test_networks_compile_with_the_operators_in_them(launched, compiler, dynamic):
    torch.compiler.reset()
    sizes = (6,) if compiler == "inductor" else (6, 8)  # it takes seconds for each
    compiled_and_not(compiler, dynamic, sizes)
    # Twice forward and twice backward, for each size, without and with the compiler.
    assert launched["upfirdn2d"] == len(sizes) * 2 * 4


@needs_compiler
def test_function_transforms_use_functions_of_pytorch(launched, monkeypatch):
    xs, kernels, bias = random_tensor(3, 2, 2, 5, 4), random_tensor(3, 4, 4), random_tensor(3, 2)

    def resampled(x, kernel):
        return upfirdn2d(x, kernel, 2, 1, (2, 1))

    def cubed(x, bias):
        return fused_leaky_relu(x, bias).pow(3).sum()

    def pullback(x, kernel):
        y, vjp = torch.func.vjp(resampled, x, kernel)
        return vjp(y)

    def dual():
        with forward_ad.dual_level():
            x, b = (forward_ad.make_dual(t, t.cos()) for t in (xs[0], bias[0]))
            return forward_ad.unpack_dual(fused_leaky_relu(resampled(x, kernels[0]), b))

    def everything():
        return [
            torch.vmap(resampled)(xs, kernels),
            torch.vmap(pullback)(xs, kernels),
            torch.func.jvp(lambda x: resampled(x, kernels[0]).cos(), (xs[0],), (xs[1],)),
            torch.func.hessian(lambda k: resampled(xs[0], k).pow(3).sum())(kernels[0]),
            torch.vmap(torch.func.grad(cubed))(xs, bias),
            [*dual()],
        ]

    found = everything()
    assert not any(launched.values())
    monkeypatch.setenv("OP_BACKEND", "plain")
    torch.testing.assert_close(found, everything())


@needs_compiler
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients_equal_single_ones(launched, create_graph):
    """A backward pass under `vmap` of a forward pass recorded without it."""
    leaves = [random_tensor(2, 2, 5, 4), random_tensor(4, 4, seed=1), random_tensor(2, seed=2)]
    for leaf in leaves:
        leaf.requires_grad_()
    y = fused_leaky_relu(upfirdn2d(leaves[0], leaves[1], 2, 1, (2, 1)), leaves[2])
    assert min(launched.values()) == 1
    grads = random_tensor(3, *y.shape, seed=3)
    options = {"retain_graph": True, "create_graph": create_graph}
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, **options)
    expected = [torch.autograd.grad(y, leaves, grad, **options) for grad in grads]
    for together, one_by_one in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(one_by_one))


def test_the_dtype_of_the_image_survives_autocast(as_gpu):
    as_gpu(None)
    x, kernel = random_tensor(1, 2, 6, 6, dtype=torch.float32), torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert upfirdn2d(x, kernel).dtype == torch.float32


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(2, device="meta")),
        (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)),
    ],
    ids=["two dtypes", "two devices", "integers"],
)
def test_kernels_take_one_floating_dtype_on_one_device(as_gpu, tensors):
    as_gpu(None)
    assert dispatch.has_kernel(torch.ones(2), torch.ones(2))
    assert not dispatch.has_kernel(*tensors)


def test_images_too_large_for_the_counters_are_left_to_pytorch():
    assert resampling.counts_fit(torch.empty(9, 3, 2**14, 2**14, device="meta"), 1, 1, [0] * 4)
    assert not resampling.counts_fit(torch.empty(1, 8, 2**14, 2**14, device="meta"), 1, 1, [0] * 4)
    assert not resampling.counts_fit(torch.empty(1, 3, 2**14, 2**14, device="meta"), 2, 1, [0] * 4)


@needs_compiler
def test_the_backend_is_chosen_by_the_environment(as_gpu, host_kernels, monkeypatch):
    host, x, kernel = as_gpu(host_kernels), torch.ones(1, 1, 4, 4), torch.ones(2, 2)
    upfirdn2d(x, kernel)
    assert host.launched["upfirdn2d"] == 1
    for setting in (lambda: monkeypatch.setenv("OP_BACKEND", "plain"),
                    lambda: monkeypatch.delenv("OP_BACKEND")):  # fmt: skip
        setting()
        upfirdn2d(x, kernel)
    assert host.launched["upfirdn2d"] == 1
    monkeypatch.setenv("OP_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"OP_BACKEND is 'gpu'.* plain, cuda or cpu"):
        upfirdn2d(x, kernel)


@needs_compiler
def test_failed_launches_are_errors(launched, monkeypatch):
    monkeypatch.setattr(dispatch, "DTYPES", (None,) * 7 + (torch.float32,))
    with pytest.raises(RuntimeError, match="upfirdn2d could not be launched"):
        dispatch.launch("upfirdn2d", torch.ones(1), *[None] * 3, *[1] * 12)


@needs_compiler
def test_a_compilation_that_was_killed_is_not_waited_for(tmp_path, monkeypatch):
    """PyTorch waited without end for the lock that such a process had left."""
    from torch.utils import cpp_extension, file_baton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "score_lib_short"
    folder.mkdir()
    (folder / "lock").touch()
    waiting = types.SimpleNamespace(time=time.time, sleep=lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(file_baton, "time", waiting)
    source = tmp_path / "short.cpp"
    names = "upfirdn2d", "leaky_relu", "probe"
    functions = (f'extern "C" const char* {name}() {{ return "told"; }}\n' for name in names)
    source.write_text("".join(functions))
    assert build.compiled(source).probe(0) == b"told"
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: pytest.fail("compiled again"))
    assert build.compiled(source).probe(0) == b"told"
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]


def test_without_kernels_pytorch_computes_and_one_line_is_logged(
    as_gpu, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "broken.cpp").write_text("out of order")
    host = as_gpu(None)
    host.kernels = lambda device: build.kernels(device, tmp_path / "broken.cpp")
    x, kernel = random_tensor(1, 2, 6, 6), random_tensor(4, 4, seed=1)
    for _ in range(2):
        found = upfirdn2d(x, kernel, up=2, pad=(2, 1))
        assert torch.equal(found, resampling.plain(x, kernel, 2, 1, [2, 1, 2, 1]))
        fused_leaky_relu(x, torch.zeros(2, dtype=torch.float64))
    (message,) = (r.getMessage() for r in caplog.records if "falling back" in r.getMessage())
    assert "\n" not in message


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90"])
def test_nvcc_compiles_the_kernels(architecture, tmp_path):
    from torch.utils import cpp_extension

    command = ["nvcc", "-c", build.SOURCE, "-o", tmp_path / "kernels.o", f"-arch={architecture}"]
    command += ["-std=c++17", *cpp_extension.COMMON_NVCC_FLAGS, *build.CUDA_FLAGS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
