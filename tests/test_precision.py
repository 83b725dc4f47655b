"""Lower precision, compilation and recomputed activations: accuracy, memory and wrappers."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from networks import build as build_network
from networks import fill_weights, tiny_config
from small_runs import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import in_full_precision
from models.precision import ChannelsLast, Compiled, InBfloat16, accelerated, matmul_precision
from models.utils import get_model_fn

PYRAMIDS = {"fir": True, "embedding_type": "fourier", "progressive": "residual"}
PYRAMIDS |= {"progressive_input": "residual", "scale_by_sigma": True}
SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip"}
WIDE = {"blocks_per_group": 1, "channel_multiplier": 2, "fourier_scale": 16}
CASES = {
    "ddpm": ("ddpm", {}),
    "ncsnpp, pyramids": ("ncsnpp", PYRAMIDS),
    "ncsnpp, skips": ("ncsnpp", SKIPS),
    "ncsn": ("ncsn", {"image_size": 16}),
    "ncsnv2_64": ("ncsnv2_64", {"image_size": 16, "scale_by_sigma": True}),
    "wideresnet": ("wideresnet_noise_conditional", {**WIDE, "nonlinearity": "swish"}),
}
every_network = pytest.mark.parametrize("case", CASES)


def build(case: str, **changes) -> nn.Module:
    name, options = CASES[case]
    config = tiny_config(name, **{"dropout": 0.0, **options, **changes})
    config.data.num_classes = 10
    return fill_weights(build_network(config))


def inputs(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    size = CASES[case][1].get("image_size", 8)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    by_sigma = case in ("ncsnpp, pyramids", "wideresnet")
    return x, torch.tensor([0.5, 3.0]) if by_sigma else torch.tensor([1, 6])


def output_and_gradients(model, x, labels) -> list[torch.Tensor]:
    """The output, and the gradients of a loss: of the images, and of all weights as one vector."""
    x = x.clone().requires_grad_()
    out = model(x, labels)
    weights = [p for p in model.parameters() if p.requires_grad]
    first, *others = torch.autograd.grad(out.square().mean(), [x, *weights])
    return [out.detach(), first, torch.cat([grad.flatten() for grad in others])]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def recorded(*layers: nn.Module):
    """The list of the layers' outputs, in the order of computation."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda *a: outputs.append(a[2])) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


# Precision.


@every_network
def test_bfloat16_is_off_by_the_rounding_of_bfloat16(case):
    """One rounding has an error of 2^-9 / sqrt(3) = 0.0011; 100 of them add up like noise."""
    model, given = build(case), inputs(case)
    expected = output_and_gradients(model, *given)
    actual = output_and_gradients(InBfloat16(model), *given)
    errors = [relative_error(*pair) for pair in zip(actual, expected, strict=True)]
    assert all(value.dtype == torch.float32 for value in actual)
    # If rounding changes the largest value of a maximum pool, the gradient goes to another pixel.
    bounds = (0.03, 0.6, 0.25) if case == "ncsnv2_64" else (0.02, 0.05, 0.05)
    assert errors[0] > 1e-4 and all(a < b for a, b in zip(errors, bounds, strict=True)), errors


def test_noise_levels_and_the_first_layer_are_exact_in_bfloat16():
    model, (x, labels) = build("ncsnpp, pyramids"), inputs("ncsnpp, pyramids")
    embedding, stem = model.plan.embedding, model.plan.stem
    layers = [model.all_modules[i] for i in (embedding.fourier, *embedding.dense, stem)]
    results = []
    for network in (model, InBfloat16(model)):
        with recorded(*layers) as outputs:
            network(x, labels)
            network(x, labels * (1 + 1e-4))
        results.append(outputs)
    for exact, other in zip(*results, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, exact, rtol=1e-5, atol=1e-5)
    # In bfloat16 the difference between these noise levels would be lost in rounding.
    changes = [outputs[6] - outputs[2] for outputs in results]
    assert relative_error(changes[1], changes[0]) < 1e-2


def test_the_last_layer_is_exact_in_bfloat16():
    model, (x, labels) = build("ddpm"), inputs("ddpm")
    layer, head = model.all_modules, model.plan.head
    with recorded(layer[head.conv]) as outputs, torch.no_grad():
        seen = []
        layer[head.norm].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        InBfloat16(model)(x, labels)
        expected = layer[head.conv](model.act(layer[head.norm](seen[0])))
    torch.testing.assert_close(outputs[0], expected)


def test_the_last_layer_of_refinenets_is_exact_in_bfloat16():
    model, (x, labels) = build("ncsnv2_64"), inputs("ncsnv2_64")
    with recorded(model.refine4, model.end_conv) as outputs, torch.no_grad():
        InBfloat16(model)(x, labels)
        features, found = outputs
        expected = model.end_conv(model.act(model.normalizer(features.float())))
    torch.testing.assert_close(found, expected)


def test_sums_of_images_are_enlarged_exactly_in_bfloat16():
    """By a filter, a convolution that autocast would round."""
    model, seen = build("ncsnpp, skips", fir=True), []
    layer = model.enlarge
    hook = layer.register_forward_hook(lambda _, given, found: seen.append((given[0], found)))
    InBfloat16(model)(*inputs("ncsnpp, skips"))
    hook.remove()
    assert seen
    for image, found in seen:
        torch.testing.assert_close(found, layer(image))


def test_the_output_has_the_dtype_of_the_images_whatever_the_network_returns():
    class Layer(nn.Linear):
        def forward(self, x, labels):
            return super().forward(x)

    found = InBfloat16(Layer(2, 2))(torch.rand(3, 2), torch.ones(3))
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(("case", "stem"), [("ncsnv2_64", "begin_conv"), ("wideresnet", "stem")])
def test_the_first_layer_of_other_networks_is_exact_in_bfloat16(case, stem):
    model, (x, labels) = build(case), inputs(case)
    layer = getattr(model, stem)
    with recorded(layer) as outputs:
        InBfloat16(model)(x, labels)
    torch.testing.assert_close(outputs[0], layer(x if case == "wideresnet" else 2 * x - 1))


@pytest.mark.parametrize("name", ["InstanceNorm++", "VarianceNorm"])
def test_statistics_of_bfloat16_features_are_exact(name):
    """A mean of 1000 values, whose sum is more than bfloat16 can resolve."""
    model = build("ncsn", normalization=name)
    x = (torch.rand(2, 8, 32, 32) + torch.arange(8.0)[:, None, None] / 100 + 4).bfloat16()
    y = torch.tensor([1, 2])
    actual, expected = model.normalizer(x, y), model.normalizer(x.float(), y)
    assert relative_error(actual.float(), expected) < 3e-3


def test_float32_and_tf32_leave_the_network_as_it_is():
    model = build("ncsn")
    assert accelerated(model, "float32") is model and accelerated(model, "tf32") is model
    model, given = build("ddpm"), inputs("ddpm")
    before = model(*given)
    for precision in ("float32", "tf32"):
        wrapped = accelerated(model, precision)
        assert isinstance(wrapped, ChannelsLast) and wrapped.module is model
    with matmul_precision("tf32"):
        assert torch.equal(model(*given), before)
    assert accelerated(model.to("meta"), "float32") is model


def test_layers_before_a_normalisation_may_be_frozen():
    """PyTorch's kernel of group normalisation crashes then, where channels come last."""
    gradients = []
    for fast in (False, True):
        model, given = build("ddpm"), inputs("ddpm")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("GroupNorm" in name)
        (accelerated(model) if fast else model)(*given).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 10
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < 1e-4, name


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_features_follow_the_order_of_the_input(name, channels, kind):
    """Nothing but rounding changes; without the wrapper nothing is in the other order."""
    model = fill_weights(build_network(tiny_config(name, num_channels=channels))).eval()
    x, labels = torch.rand(2, channels, 8, 8), torch.tensor([0.5, 3.0])
    orders = []
    for layer in model.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(lambda _, given, out: orders.append((given[0], out)))
    exact = output_and_gradients(model, x, labels)
    plain = output_and_gradients(InBfloat16(model), x, labels) if kind == "bfloat16" else exact
    assert all(a.is_contiguous() and b.is_contiguous() for a, b in orders)
    orders.clear()
    found = output_and_gradients(accelerated(model, kind), x, labels)
    last = torch.channels_last
    assert all(t.is_contiguous(memory_format=last) for pair in orders for t in pair)
    assert not any(t.is_contiguous() for pair in orders for t in pair)
    for value, other, right in zip(found, plain, exact, strict=True):
        assert relative_error(value, right) < 1.5 * relative_error(other, right) + 1e-5
    assert found[0].is_contiguous()


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match=r"'half'.*'bfloat16', 'float32', 'tf32'"):
        accelerated(nn.Identity(), "half")
    with pytest.raises(ValueError, match=r"'half'.*'bfloat16'"), matmul_precision("half"):
        pass


def test_a_network_is_wrapped_once_and_compiled_last():
    model = nn.Identity()
    fast = accelerated(model, "bfloat16", "default")
    assert isinstance(fast, Compiled) and fast.options == {"mode": "default"}
    assert isinstance(fast.module, InBfloat16) and fast.module.module is model
    for wrapped, wrap in ((fast, InBfloat16), (fast.module, InBfloat16), (fast, Compiled)):
        with pytest.raises(ValueError, match="already"):
            wrap(wrapped)


def test_global_switches_of_tf32_are_restored():
    def switches():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = switches()
    with contextlib.suppress(KeyError), matmul_precision("tf32"):
        assert switches() == (True, True)
        with matmul_precision("float32"):
            assert switches() == (False, False)
            # Metrics use the older names of the switches.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                pass
        assert switches() == (True, True)
        with matmul_precision("bfloat16"):
            assert switches() == (False, False)
        raise KeyError
    assert switches() == before


@pytest.mark.parametrize("wrap", [InBfloat16, Compiled])
def test_wrappers_share_weights_mode_and_checkpoints(wrap):
    model = build("ddpm")
    wrapped = wrap(model)
    assert list(wrapped.state_dict()) == list(model.state_dict())
    wrapped.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    assert all(a is b for a, b in zip(wrapped.parameters(), model.parameters(), strict=True))
    model.eval()
    assert not wrapped.training
    wrapped.train()
    assert model.training and all(layer.training for layer in model.modules())
    model.eval()
    with contextlib.suppress(ValueError):  # of the shape
        get_model_fn(wrapped, train=True)(torch.zeros(1), torch.zeros(1))
    assert model.training


def test_full_precision_keeps_double_precision_and_devices_without_autocast():
    x = torch.rand(2, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_full_precision(lambda x: x, x).dtype == torch.float64
        assert in_full_precision(lambda x: x @ x.t(), x.bfloat16()).dtype == torch.float32
        assert in_full_precision(lambda x: x, torch.empty(2, device="meta")).is_meta


# Recomputed activations.


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors created in this mode: those still alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.alive[key] = size
                weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


SMALLEST = {"nf": 4, "ch_mult": (1,), "num_res_blocks": 0, "attn_resolutions": (), "dropout": 0.0}
DEEP = {"nf": 16, "num_res_blocks": 4, "dropout": 0.1, "image_size": 16, "attn_resolutions": (8,)}


def deep(name: str = "ncsnpp", **changes) -> nn.Module:
    return fill_weights(build_network(tiny_config(name, **DEEP, **changes)))


@pytest.mark.parametrize("options", [{}, {**PYRAMIDS, "resblock_type": "ddpm"}, SKIPS])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_recomputing_activations_changes_no_number(options, kind):
    x, labels, results = torch.rand(2, 3, 16, 16), torch.tensor([0.5, 3.0]), []
    for checkpoint_activations in (False, True):
        model = deep(**options, checkpoint_activations=checkpoint_activations)
        torch.manual_seed(0)
        results.append(output_and_gradients(accelerated(model, kind), x, labels))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.slow
def test_recomputing_activations_saves_memory():
    kept, most = [], []
    for checkpoint_activations in (False, True):
        model = deep(checkpoint_activations=checkpoint_activations)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with LiveBytes() as live:
            loss = model(torch.rand(8, 3, 16, 16), torch.tensor([1] * 8)).square().mean()
            gc.collect()
            kept.append(sum(live.alive.values()))
            loss.backward()
            most.append(live.most)
    assert kept[0] > 3.5 * kept[1], kept
    assert most[0] > 2.5 * most[1], most


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("name", ["ncsnpp", "adm", "adm_classifier"])
def test_only_training_recomputes_activations(name):
    """Transforms of `torch.func`, which cannot, take the gradient all the same."""
    config = tiny_config(name, nf=32, num_head_channels=16, dropout=0.0)
    config.model.checkpoint_activations, config.data.num_classes = True, 3
    model, x = fill_weights(build_network(config)), torch.rand(2, 3, 8, 8)
    labels, calls = torch.tensor([1, 2]), []
    middle = model.all_modules[model.plan.middle[0]] if name == "ncsnpp" else model.middle_block[0]
    middle.register_forward_pre_hook(lambda *_: calls.append(None))

    def count(train: bool, grad: bool) -> int:
        calls.clear()
        with torch.set_grad_enabled(grad):
            loss = model.train(train)(x, labels).sum()
        if grad:
            loss.backward()
        return len(calls)

    assert count(True, True) == 2
    assert count(False, True) == count(True, False) == count(False, False) == 1
    slope_of = torch.func.grad(lambda x: model(x, labels).sum())
    in_evaluation = slope_of(x)
    model.train()
    torch.testing.assert_close(slope_of(x), in_evaluation, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", (nn.Parameter, lambda w: w.clone()), ids=("weights", "tensors"))
def test_activations_are_recomputed_with_the_weights_of_their_time(kind):
    """`functional_call` takes its weights away before the backward pass: gradients were those of
    the network's own weights."""
    options = {**SMALLEST, "num_res_blocks": 1}
    model, other = (build("ddpm", **options, checkpoint_activations=c) for c in (True, False))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    own, (x, labels) = dict(other.named_parameters()), inputs("ddpm")
    given = {name: kind(p.detach()).requires_grad_() for name, p in own.items()}
    of_given = torch.func.functional_call(model.train(), given, (x, labels)).square().sum()
    expected = torch.autograd.grad(other.train()(x, labels).square().sum(), own.values())
    actual = torch.autograd.grad(of_given, given.values())
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


# Compilation.


@pytest.mark.slow
@pytest.mark.parametrize("case", ("ncsnpp, pyramids", "wideresnet"))
def test_networks_are_one_graph_forward_and_backward(case):
    model, given = build(case), inputs(case)
    torch._dynamo.reset()
    fast = Compiled(model, backend="aot_eager", fullgraph=True)
    expected, actual = output_and_gradients(model, *given), output_and_gradients(fast, *given)
    assert fast.works
    for value, wanted in zip(actual, expected, strict=True):
        assert relative_error(value, wanted) < 1e-5


@pytest.mark.slow
def test_a_compiled_network_recomputes_activations_in_bfloat16():
    options = {"nf": 8, "checkpoint_activations": True, "dropout": 0.0}
    model, (x, labels) = build("ddpm", **options), inputs("ddpm")
    torch._dynamo.reset()
    wrapped = InBfloat16(model)
    fast = Compiled(wrapped, backend="aot_eager", fullgraph=True)
    expected, actual = (output_and_gradients(m, x, labels) for m in (wrapped, fast))
    assert fast.works
    for value, wanted in zip(actual, expected, strict=True):
        assert relative_error(value, wanted) < 0.02


COMPILE = """
import sys
sys.path[:0] = [".", "tests"]
import torch
from networks import fill_weights
from models.precision import Compiled
from models.wideresnet import WideBlock

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = WideBlock(torch.nn.SiLU(), 4, 8, 1, stride=2, dropout=0.0)

    def forward(self, x, labels):
        return self.block(x, labels[:, None])

model = fill_weights(Network()).eval()
fast, x, labels = Compiled(model), torch.rand(2, 4, 8, 8), torch.tensor([0.5, 3.0])
results = []
for network in (model, fast):
    given = x.clone().requires_grad_()
    out = network(given, labels)
    weights = [p for p in model.parameters() if p.requires_grad]
    # Several backward passes through one forward pass, as in the likelihood.
    image_grad, = torch.autograd.grad(out.square().sum(), given, retain_graph=True)
    weight_grads = torch.autograd.grad(out.square().sum(), weights, retain_graph=True)
    again, = torch.autograd.grad(out.square().sum(), given)
    flat = torch.cat([grad.flatten() for grad in weight_grads])
    results.append([out.detach(), image_grad, again, flat])
for value, expected in zip(*results, strict=True):
    assert (value - expected).norm() <= 1e-5 * expected.norm()
print("works:", fast.works)
"""


def run_compiled(**environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_compiled_network_has_the_same_output_and_gradients():
    """In a process of its own, which a kernel that writes out of bounds would crash.

    One block is enough: its few channels and its stride are such a kernel's.
    """
    result = run_compiled()
    assert result.returncode == 0 and "works: True" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_network_runs_uncompiled_without_a_compiler(tmp_path):
    result = run_compiled(CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0 and "works: False" in result.stdout, result.stderr
    assert result.stderr.count("cannot be compiled here") == 1


def test_wrong_arguments_are_no_failure_of_the_compiler(caplog):
    def broken(graph, example_inputs):
        raise RuntimeError("no such compiler")

    torch._dynamo.reset()
    model, (x, labels) = build("ddpm", **SMALLEST).eval(), inputs("ddpm")
    fast = Compiled(model, backend=broken)
    with pytest.raises(ValueError, match=r"one label per image"):
        fast(x, labels[:1])
    assert fast.works and "cannot be compiled" not in caplog.text

    class Product(nn.Module):
        def forward(self, x, labels):
            return x @ labels

    product = Compiled(Product(), backend="eager")
    with pytest.raises(RuntimeError):  # during compilation
        product(torch.zeros(2, 3), torch.zeros(4, 1))
    assert product.works and "cannot be compiled" not in caplog.text
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(fast(x, labels), model(x, labels))
    messages = [r.getMessage() for r in caplog.records if "be compiled" in r.getMessage()]
    assert len(messages) == 1 and "no such compiler" in messages[0] and not fast.works


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.quick_cases(1)
def test_copies_of_a_compiled_network_are_independent(duplicate):
    torch._dynamo.reset()
    model, given = build("ddpm", **SMALLEST).eval(), inputs("ddpm")
    fast = Compiled(model, backend="eager")
    before, other = fast(*given), duplicate(fast)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(*given).any() and torch.equal(fast(*given), before)


def test_networks_that_are_miscompiled_are_not_compiled(caplog):
    assert isinstance(accelerated(build("ncsn"), "bfloat16", "default"), InBfloat16)
    assert "not compiled" in caplog.text


@pytest.mark.slow
def test_importing_loads_no_compiler():
    assert isinstance(Compiled(nn.Identity()), nn.Module)
    script = "import sys, models.precision; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
