"""The CUDA kernels: their arithmetic and registration without a GPU, and all of them on one.

`kernels.cu` is also plain C++.  Compiled as such by a stand-in for nvcc, and with the CPU taken for
a GPU, everything but the launch itself runs here: build, choice, operators, derivatives.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from op import FusedLeakyReLU, build, dispatch, fused_leaky_relu, upfirdn2d

resampling = importlib.import_module("op.upfirdn2d")
activation = importlib.import_module("op.fused_act")
CPU = torch.device("cpu")

# PyTorch itself, when it compiles.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NINJA = shutil.which("ninja", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or NINJA is None, reason="needs g++ and ninja"
)

# Compiles as plain C++ whatever nvcc would compile; its last argument is the source.
HOST_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo stand-in; exit 0; }
echo compiled >> "$(dirname "$0")/log"
for source; do :; done
exec g++ -x c++ -std=c++17 -O1 -shared -fPIC -I/usr/local/cuda/include -o kernels.so "$source"
"""


def random_tensor(*shape: int, seed: int = 0, dtype=torch.float64, device=CPU) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def install(folder, script: str, monkeypatch) -> None:
    """Make a script the nvcc of this process, and forget what was built."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").write_text(script)
    (folder / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.delenv("OP_BACKEND", raising=False)
    forgotten = (build._kernels.cache_clear, build._say_once.cache_clear)
    forgotten += (dispatch._takes_kernel.clear,)
    for forget in forgotten:
        forget()
    yield
    for forget in forgotten:
        forget()


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(tmp_path_factory.mktemp("nvcc in $a folder"), HOST_COMPILER, monkeypatch)
        return build.load(build.compiled((9, 0)))


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Sends tensors on the CPU where those on a GPU go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_on_gpu", lambda x: x.device.type == "cpu")
    monkeypatch.setattr(dispatch, "_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_index_and_stream", lambda device: (0, None))
    library = torch.library.Library("score_sde", "IMPL")
    library.impl("upfirdn2d", resampling._fastest, "CPU")
    library.impl("leaky_relu", activation._fastest, "CPU")
    yield
    library._destroy()


@pytest.fixture
def kernels_on_cpu(cpu_as_gpu, host_kernels, monkeypatch):
    """The kernels compute; counts how often, by name."""
    counts = {"upfirdn2d": 0, "leaky_relu": 0}
    launch = dispatch.launch

    def counted(name, *arguments):
        counts[name] += 1
        launch(name, *arguments)

    monkeypatch.setattr(dispatch, "launch", counted)
    monkeypatch.setattr(build, "kernels", lambda device: host_kernels)
    monkeypatch.setenv("OP_BACKEND", "cuda")
    return counts


def some_resamplings(count: int) -> list[tuple]:
    """Shapes, filters, factors and paddings, some of them with a kernel of their own."""
    draw, found = random.Random(0), []
    while len(found) < count:
        shape = [draw.randint(1, 3), draw.randint(1, 4), *(draw.randint(3, 9) for _ in range(2))]
        taps = draw.choice([(4, 4), (4, 4), (draw.randint(1, 6), draw.randint(1, 6))])
        up, down = draw.choice([(1, 1), (2, 1), (1, 2), (draw.randint(1, 4), draw.randint(1, 4))])
        pad = [draw.randint(-2, 5) for _ in range(4)]
        sides = (pad[2] + pad[3], pad[0] + pad[1])
        if all(n * up + s >= k for n, s, k in zip(shape[2:], sides, taps, strict=True)):
            found.append((shape, taps, up, down, pad))
    return found


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resampling_kernel_computes_what_the_convolutions_do(kernels_on_cpu, layout):
    for shape, taps, up, down, pad in some_resamplings(300):
        x = random_tensor(*shape).to(memory_format=layout)
        kernel = random_tensor(*taps, seed=1)
        expected = resampling._plain(x, kernel, up, down, pad)
        y = resampling._operator(x, kernel, up, down, pad)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12, msg=str((shape, taps, pad)))
        assert y.stride() == resampling._result(x, kernel, up, down, pad).stride()
        assert dispatch.layout(x) == layout or x.is_contiguous()
    assert kernels_on_cpu["upfirdn2d"] == 300


@needs_compiler
def test_resampling_kernel_takes_slices_and_nothing(kernels_on_cpu):
    x, kernel = random_tensor(4, 6, 9, 20)[::2, 1:4, :, ::2], random_tensor(4, 4).T
    expected = resampling._plain(x, kernel, 2, 1, [2, 1, 2, 1])
    torch.testing.assert_close(upfirdn2d(x, kernel, up=2, pad=(2, 1)), expected, rtol=0, atol=1e-12)
    assert upfirdn2d(x[:0], kernel, up=2, pad=(2, 1)).shape == (0, 3, 18, 20)
    assert kernels_on_cpu["upfirdn2d"] == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_sum_in_single_precision_and_round_once(kernels_on_cpu, dtype):
    if dtype != torch.float32 and not os.path.exists("/usr/local/cuda/include/cuda_bf16.h"):
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
    assert min(kernels_on_cpu.values()) == 2


@needs_compiler
def test_activation_kernel_computes_what_the_formula_does(kernels_on_cpu):
    shapes = [(5, 7), (3, 8), (2, 3, 10), (2, 4, 5), (2, 3, 4, 6), (2, 8, 3, 5), (1, 3, 2, 2, 4)]
    layouts = [torch.contiguous_format, torch.channels_last]
    dtypes = [torch.float64, torch.float32]
    for shape, layout, dtype, first in itertools.product(shapes, layouts, dtypes, (0, 1)):
        # A first element that is no multiple of 16 bytes away from an aligned address.
        x = random_tensor(first + torch.Size(shape).numel(), dtype=dtype)[first:].reshape(shape)
        x = x.to(memory_format=layout) if len(shape) == 4 else x
        bias, gate = random_tensor(shape[1], seed=1, dtype=dtype), random_tensor(*shape, seed=2)
        for arguments in ((bias, None), (None, gate.to(dtype)), (bias, gate.to(dtype))):
            expected = activation._plain(x, *arguments, 0.1, 1.5)
            y = activation._operator(x, *arguments, 0.1, 1.5)
            torch.testing.assert_close(y, expected, msg=str((shape, layout, dtype, first)))
            assert y.stride() == x.stride()
    assert kernels_on_cpu["leaky_relu"] == 7 * 2 * 2 * 2 * 3


@needs_compiler
@pytest.mark.parametrize("backend", ["cuda", "auto"])
@pytest.mark.parametrize(
    "up, down, pad",
    [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (1, 1)), (2, 3, (-1, 3)), (3, 2, (0, -1))],
)
def test_operators_can_be_differentiated_twice(kernels_on_cpu, monkeypatch, backend, up, down, pad):
    """With the kernels, and where the operators run the plain functions."""
    monkeypatch.setenv("OP_BACKEND", backend)
    monkeypatch.setattr(dispatch, "_seconds", lambda work: 0 if "plain" in str(work) else 1)
    x = random_tensor(1, 2, 4, 5).requires_grad_()
    kernel = random_tensor(3, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    assert gradgradcheck(lambda x, k: upfirdn2d(x, k, up, down, pad), (x, kernel))
    assert (kernels_on_cpu["upfirdn2d"] > 0) == (backend == "cuda")


@needs_compiler
def test_the_activation_can_be_differentiated_twice(kernels_on_cpu):
    x = random_tensor(2, 3, 4, 2).requires_grad_()
    bias = random_tensor(3, seed=1).requires_grad_()
    assert gradcheck(fused_leaky_relu, (x, bias)) and gradgradcheck(fused_leaky_relu, (x, bias))
    layer = FusedLeakyReLU(3).double()
    layer(x).square().sum().backward()
    expected = 2 * 2 * torch.where(x > 0, x, 0.04 * x).sum((0, 2, 3))
    torch.testing.assert_close(layer.bias.grad, expected)
    assert kernels_on_cpu["leaky_relu"] > 4


@needs_compiler
@pytest.mark.parametrize("slope, scale", [(-0.5, 1.0), (0.2, -1.0)])
def test_the_sign_of_the_output_is_asked_only_where_it_tells(kernels_on_cpu, slope, scale):
    x, bias = random_tensor(2, 3, 4).requires_grad_(), torch.zeros(3, dtype=torch.float64)
    assert gradcheck(lambda x: fused_leaky_relu(x, bias, slope, scale), (x,))
    assert not kernels_on_cpu["leaky_relu"]


@needs_compiler
def test_third_derivatives(kernels_on_cpu, monkeypatch):
    def third(x, kernel):
        y = upfirdn2d(x, kernel, 2, 3, (2, 1)).pow(4).sum()
        for _ in range(3):
            grads = torch.autograd.grad(y, (x, kernel), create_graph=True)
            y = sum(g.pow(2).sum() for g in grads)
        return y

    tensors = [t.requires_grad_() for t in (random_tensor(1, 1, 3, 4), random_tensor(2, 3, seed=1))]
    found = third(*tensors)
    assert kernels_on_cpu["upfirdn2d"] > 5
    monkeypatch.setenv("OP_BACKEND", "plain")
    torch.testing.assert_close(found, third(*tensors))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_registration(kernels_on_cpu, layout):
    x = random_tensor(2, 3, 6, 5).to(memory_format=layout).requires_grad_()
    kernel, bias = random_tensor(4, 3).requires_grad_(), random_tensor(3).requires_grad_()
    torch.library.opcheck(resampling._operator, (x, kernel, 2, 3, [1, 2, 3, -1]))
    torch.library.opcheck(resampling._operator, (x[:, ::2], kernel, 1, 2, [1, 2, 3, -1]))
    torch.library.opcheck(activation._operator, (x, bias, None, 0.2, 1.5))
    torch.library.opcheck(activation._operator, (x, None, x.detach(), 0.2, 1.5))


class Calls(TorchDispatchMode):
    """Notes the names of the operators of ours that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "score_sde":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_tensors_on_a_gpu_go_to_the_operators():
    """With tensors that have a device and no numbers."""
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


def compiled_and_not(backend, dynamic):
    def network(x, kernel, bias):
        x = fused_leaky_relu(upfirdn2d(x, kernel, up=2, pad=(2, 1)).sin(), bias)
        return upfirdn2d(x, kernel, down=2, pad=(1, 1)).cos()

    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=dynamic)
    kernel, bias = random_tensor(4, 4), random_tensor(3)
    for size in (6, 8):
        results = []
        for function in (network, compiled):
            leaves = [t.clone().requires_grad_() for t in (random_tensor(2, 3, size, 7), bias)]
            y = function(leaves[0], kernel, leaves[1])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*results)


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_networks_compile_with_the_operators_in_them(kernels_on_cpu, dynamic):
    torch.compiler.reset()
    compiled_and_not("aot_eager", dynamic)
    # Twice forward and twice backward, for both sizes, without and with the compiler.
    assert kernels_on_cpu["upfirdn2d"] == 2 * 2 * 4


@needs_compiler
@pytest.mark.slow
def test_networks_compile_with_inductor(kernels_on_cpu):
    torch.compiler.reset()
    compiled_and_not("inductor", None)
    assert kernels_on_cpu["upfirdn2d"] == 2 * 2 * 4


@needs_compiler
def test_function_transforms_see_the_plain_functions(kernels_on_cpu, monkeypatch):
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
    assert not any(kernels_on_cpu.values())
    monkeypatch.setenv("OP_BACKEND", "plain")
    torch.testing.assert_close(found, everything())


@needs_compiler
@pytest.mark.parametrize("create_graph", [False, True])
def test_several_gradients_at_once(kernels_on_cpu, create_graph):
    """A backward pass under `vmap` of what a forward pass without it recorded."""
    leaves = [random_tensor(2, 2, 5, 4), random_tensor(4, 4, seed=1), random_tensor(2, seed=2)]
    for leaf in leaves:
        leaf.requires_grad_()
    y = fused_leaky_relu(upfirdn2d(leaves[0], leaves[1], 2, 1, (2, 1)), leaves[2])
    assert min(kernels_on_cpu.values()) == 1
    grads = random_tensor(3, *y.shape, seed=3)
    options = {"retain_graph": True, "create_graph": create_graph}
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, **options)
    expected = [torch.autograd.grad(y, leaves, grad, **options) for grad in grads]
    for together, one_by_one in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(one_by_one))


@needs_compiler
def test_the_dtype_of_the_image_survives_autocast(kernels_on_cpu, monkeypatch):
    x, kernel = random_tensor(1, 2, 6, 6, dtype=torch.float32), torch.ones(4, 4)
    monkeypatch.setattr(build, "kernels", lambda device: None)
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
def test_what_the_kernels_do_not_take(cpu_as_gpu, tensors):
    assert dispatch.has_kernel(torch.ones(2), torch.ones(2))
    assert not dispatch.has_kernel(*tensors)


def test_images_too_large_for_the_counters_are_left_to_pytorch():
    assert resampling._counts_fit(torch.empty(9, 3, 2**14, 2**14, device="meta"), 1, 1, [0] * 4)
    assert not resampling._counts_fit(torch.empty(1, 8, 2**14, 2**14, device="meta"), 1, 1, [0] * 4)
    assert not resampling._counts_fit(torch.empty(1, 3, 2**14, 2**14, device="meta"), 2, 1, [0] * 4)


class Race:
    """Two ways to compute, of given times; notes which is asked how long it takes."""

    def __init__(self, monkeypatch, kernel: float, plain: float):
        self.measured = []
        self.times = {self.kernel: kernel, self.plain: plain}
        monkeypatch.setattr(dispatch, "_seconds", self.seconds)
        monkeypatch.setattr(build, "kernels", lambda device: object())

    def kernel(self):
        return "kernel"

    def plain(self):
        return "plain"

    def seconds(self, work):
        self.measured.append(work())
        return self.times[work]

    def run(self, kind="kind"):
        return dispatch.fastest(kind, torch.ones(1), self.kernel, self.plain)


def test_the_faster_way_is_found_once_and_kept(cpu_as_gpu, monkeypatch):
    race = Race(monkeypatch, kernel=1, plain=2)
    assert [race.run(), race.run(), race.run("other")] == ["kernel"] * 3
    assert race.measured == ["kernel", "plain"] * 2
    race = Race(monkeypatch, kernel=2, plain=1)
    assert [race.run("third"), race.run("kind")] == ["plain", "kernel"]


def test_nothing_is_tried_during_capture(cpu_as_gpu, monkeypatch):
    race = Race(monkeypatch, kernel=1, plain=2)
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    assert race.run() == "plain" and not race.measured
    monkeypatch.setattr(dispatch, "_capturing", lambda: False)
    assert race.run() == "kernel" and race.measured
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    assert race.run() == "kernel"


def test_what_the_user_asks_for_is_not_tried(cpu_as_gpu, monkeypatch):
    race = Race(monkeypatch, kernel=2, plain=1)
    for backend, expected in (("cuda", "kernel"), ("plain", "plain"), ("cuda", "kernel")):
        monkeypatch.setenv("OP_BACKEND", backend)
        assert race.run() == expected
        assert dispatch.has_kernel(torch.ones(1)) == (backend == "cuda")
    monkeypatch.delenv("OP_BACKEND")
    torch.use_deterministic_algorithms(True)
    try:
        assert race.run("other") == "kernel" and not race.measured
    finally:
        torch.use_deterministic_algorithms(False)
    assert race.run() == "plain"
    monkeypatch.setenv("OP_BACKEND", "gpu")
    with pytest.raises(ValueError, match="auto, plain or cuda, not 'gpu'"):
        upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2, 2))


def test_failed_launches_are_errors(cpu_as_gpu, host_kernels, monkeypatch):
    monkeypatch.setattr(build, "kernels", lambda device: host_kernels)
    monkeypatch.setattr(dispatch, "DTYPES", (None,) * 7 + (torch.float32,))
    with pytest.raises(RuntimeError, match=r"upfirdn2d could not be launched: (unk|comp)"):
        dispatch.launch("upfirdn2d", torch.ones(1), *[None] * 3, *[1] * 12)


# Building.


@needs_compiler
@pytest.mark.slow
def test_the_kernels_are_compiled_once(tmp_path, monkeypatch, cpu_as_gpu):
    install(tmp_path, HOST_COMPILER, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(build.compiled, [(9, 0)] * 3))
    assert build.compiled((8, 0)) not in names and len(names) == 1
    files = {file.name for file in (tmp_path / "cache/score_sde_op").iterdir()}
    assert len(files) == 2 and all(name.endswith(".so") for name in files)
    compilations = (tmp_path / "bin/log").read_text().count("compiled")
    monkeypatch.setenv("OP_BACKEND", "cuda")
    for _ in range(2):
        assert build.kernels(torch.device("cuda", 0)).probe(0) is None
    assert (tmp_path / "bin/log").read_text().count("compiled") == compilations


@needs_compiler
@pytest.mark.parametrize("what", ["source", "compiler"])
@pytest.mark.slow
def test_a_change_compiles_anew(tmp_path, monkeypatch, what):
    install(tmp_path, HOST_COMPILER, monkeypatch)
    before = build.compiled((9, 0))
    if what == "source":
        source = tmp_path / "the kernels: $1.cu"
        source.write_text(build._SOURCE.read_text() + "// changed\n")
        monkeypatch.setattr(build, "_SOURCE", source)
    else:
        (tmp_path / "bin/nvcc").write_text(HOST_COMPILER.replace("echo stand-in", "echo newer"))
    assert build.compiled((9, 0)) != before


def no_compiler(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(build, "_USUAL_HOME", str(tmp_path))


def broken_compiler(tmp_path, monkeypatch):
    install(tmp_path, "#!/bin/sh\necho out of order\nexit 1\n", monkeypatch)


def unknown_chip(tmp_path, monkeypatch):
    script = HOST_COMPILER.replace("exec g++", "echo no such chip; exit 1 #")
    install(tmp_path, script, monkeypatch)


def no_ninja(tmp_path, monkeypatch):
    install(tmp_path, HOST_COMPILER, monkeypatch)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def no_cache(tmp_path, monkeypatch):
    install(tmp_path, HOST_COMPILER, monkeypatch)
    (tmp_path / "cache").write_text("a file")


def no_library(tmp_path, monkeypatch):
    script = HOST_COMPILER.replace("exec g++", "echo nonsense > kernels.so #")
    install(tmp_path, script, monkeypatch)


def old_driver(tmp_path, monkeypatch):
    script = HOST_COMPILER.replace("-O1", "-DPROBE_FAILS")
    install(tmp_path, script, monkeypatch)
    source = build._SOURCE.read_text().replace("return nullptr;\n#endif", 'return "old";\n#endif')
    (tmp_path / "kernels.cu").write_text(source)
    monkeypatch.setattr(build, "_SOURCE", tmp_path / "kernels.cu")


@needs_compiler
@pytest.mark.parametrize(
    "hindrance, reason",
    [
        (no_compiler, "nvcc is not installed"),
        (broken_compiler, "failed: out of order"),
        (unknown_chip, "no such chip"),
        (no_ninja, "ninja is not installed"),
        (no_cache, "cache"),
        (no_library, "kernels-.*so"),
        (old_driver, "old"),
    ],
)
def test_without_kernels_pytorch_computes_and_one_line_says_so(
    tmp_path, monkeypatch, cpu_as_gpu, caplog, hindrance, reason
):
    x, kernel = random_tensor(1, 2, 6, 6), random_tensor(4, 4, seed=1)
    expected = resampling._plain(x, kernel, 2, 1, [2, 1, 2, 1])
    hindrance(tmp_path, monkeypatch)
    gpu = torch.device("cuda", 0)
    kernels = build.kernels
    monkeypatch.setattr(build, "kernels", lambda device: kernels(gpu))
    for backend in ("auto", "cuda"):
        monkeypatch.setenv("OP_BACKEND", backend)
        for _ in range(2):
            assert torch.equal(upfirdn2d(x, kernel, up=2, pad=(2, 1)), expected)
        fused_leaky_relu(x, torch.zeros(2, dtype=torch.float64))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert re.search(reason, record.getMessage())


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_nvcc_compiles_the_kernels(tmp_path, monkeypatch, capability):
    try:
        build._nvcc(), build._ninja()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = build.load(build.compiled(capability))
    if not torch.cuda.is_available():
        assert b"CUDA" in library.probe(0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert build.kernels(torch.device("cuda", 0)) is None


# On a GPU.

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def on_gpu(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype, device="cuda")


@needs_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_on_a_gpu(monkeypatch, dtype, layout):
    monkeypatch.setenv("OP_BACKEND", "cuda")
    if build.kernels(torch.device("cuda", torch.cuda.current_device())) is None:
        pytest.skip("the kernels could not be compiled")
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for shape, taps, up, down, pad in [
        *some_resamplings(40),
        ((128, 64, 32, 32), (4, 4), 2, 1, [2, 1, 2, 1]),
        ((70_000, 5, 3, 3), (4, 4), 1, 2, [1, 1, 1, 1]),
        ((1, 3, 600, 500), (4, 4), 1, 1, [2, 1, 2, 1]),
    ]:
        x = on_gpu(*shape, dtype=dtype).to(memory_format=layout)
        kernel = on_gpu(*taps, seed=1, dtype=dtype)
        expected = resampling._plain(x.double(), kernel.double(), up, down, pad).to(dtype)
        y = resampling._launch(x, kernel, up, down, pad)
        torch.testing.assert_close(y, expected, **tolerance)
        bias = on_gpu(shape[1], seed=2, dtype=dtype)
        for gate in (None, x.roll(1)):
            gate = None if gate is None else gate.contiguous(memory_format=layout)
            expected = activation._plain(x, bias, gate, 0.2, 1.5)
            y = activation._launch(x, bias, gate, 0.2, 1.5)
            torch.testing.assert_close(y, expected, **tolerance)


@needs_gpu
def test_the_activation_kernel_on_a_gpu_takes_any_address(monkeypatch):
    """Elements are moved 16 bytes at a time only from addresses that allow it."""
    monkeypatch.setenv("OP_BACKEND", "cuda")
    shape, dtype = (2, 3, 4, 8), torch.float16
    x, gate = (on_gpu(193, seed=seed, dtype=dtype) for seed in (0, 1))
    for first, gate_first in itertools.product((0, 1), repeat=2):
        tensors = [x[first : first + 192], gate[gate_first : gate_first + 192]]
        tensors = [tensor.reshape(shape) for tensor in tensors]
        y = activation._operator(tensors[0], None, tensors[1], 0.2, 1.0)
        expected = activation._plain(tensors[0], None, tensors[1], 0.2, 1.0)
        torch.testing.assert_close(y, expected)


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "cuda", "plain"])
def test_derivatives_on_a_gpu(monkeypatch, backend):
    monkeypatch.setenv("OP_BACKEND", backend)
    x, kernel = on_gpu(1, 2, 4, 5).requires_grad_(), on_gpu(4, 4, seed=1).requires_grad_()
    bias = on_gpu(2, seed=2).requires_grad_()
    assert gradgradcheck(lambda x, k: upfirdn2d(x, k, 2, 1, (2, 1)), (x, kernel))
    assert gradgradcheck(fused_leaky_relu, (x, bias))
    _, found = torch.func.jvp(lambda x: upfirdn2d(x, kernel, 2).sin(), (x,), (x,))
    _, expected = torch.func.jvp(
        lambda x: upfirdn2d(x, kernel.cpu(), 2).sin(), (x.cpu(),), (x.cpu(),)
    )
    torch.testing.assert_close(found.cpu(), expected)


@needs_gpu
def test_networks_compile_and_are_captured_on_a_gpu():
    torch.compiler.reset()

    def network(x):
        x = fused_leaky_relu(upfirdn2d(x, kernel, up=2, pad=(2, 1)).sin(), bias)
        return upfirdn2d(x, kernel, down=2, pad=(1, 1)).cos()

    x, kernel, bias = (on_gpu(*s, dtype=torch.float32) for s in ((2, 3, 8, 8), (4, 4), (3,)))
    expected = network(x)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = network(x)
    x.copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(y, expected.flip(0), rtol=1e-4, atol=1e-5)


@needs_gpu
def test_the_choice_on_a_gpu_is_made_once():
    x, kernel = on_gpu(4, 3, 16, 16, dtype=torch.float32), torch.ones(4, 4, device="cuda")
    upfirdn2d(x, kernel)
    choices = dict(dispatch._takes_kernel)
    assert len(choices) == 1
    upfirdn2d(x, kernel)
    assert dispatch._takes_kernel == choices
