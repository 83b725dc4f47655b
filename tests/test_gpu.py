"""The library on a GPU, where there is one: it computes there what it computes on a CPU."""

from __future__ import annotations

import pytest
import torch
from networks import error, fill_weights, golden_networks, out_and_gradient
from oracles import GaussianOracle, apart
from small_runs import logged, small_config

import run_lib
from likelihood import get_likelihood_fn
from models.precision import accelerated, matmul_precision
from models.utils import get_model
from score_lib.disk.checkpoints import read_checkpoint
from sde_lib import VESDE, VPSDE, subVPSDE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GOLDENS = golden_networks()
# Relative distance of weights after the same short training; without any they are 0.008 apart.
NEAR = 2e-3
# Max pooling passes gradients on to the largest value, which rounding chooses.
SMOOTH = [case for case, golden in GOLDENS.items() if not golden.name.startswith("ncsnv2")]


def on_gpu(case):
    """A recorded case on the GPU: network, images, labels, weights of the outputs' sum."""
    golden = GOLDENS[case]
    model = fill_weights(get_model(golden.name)(golden.config)).eval().cuda()
    return model, golden.x.cuda(), golden.labels.cuda(), golden.cotangent.cuda()


@pytest.mark.parametrize("backend", ["plain", "cuda"])
@pytest.mark.parametrize("case", SMOOTH)
def test_recorded_networks(monkeypatch, case, backend):
    monkeypatch.setenv("OP_BACKEND", backend)
    with matmul_precision("float32"):
        *given, cotangent = on_gpu(case)
        out, grad = out_and_gradient(*given, cotangent=cotangent)
    assert error(out, GOLDENS[case].out) < 2e-5 and error(grad, GOLDENS[case].grad_x) < 2e-5


@pytest.mark.parametrize("precision, most", [("tf32", 2e-2), ("bfloat16", 1e-1)])
@pytest.mark.parametrize("case", SMOOTH)
def test_recorded_networks_in_lower_precision(case, precision, most):
    model, *given, _ = on_gpu(case)
    with matmul_precision(precision):
        out, _ = out_and_gradient(accelerated(model, precision), *given)
    assert 0 < error(out, GOLDENS[case].out) < most


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "cudagraphs"])
def test_compiled_networks(mode):
    """Trained and evaluated, several times, so that a CUDA graph is recorded and replayed."""
    case = next(case for case, golden in GOLDENS.items() if golden.name == "ncsnpp")
    model, x, labels, cotangent = on_gpu(case)
    compiled = accelerated(model, mode=mode)
    with matmul_precision("float32"):
        for _ in range(4):
            out, grad = out_and_gradient(compiled, x, labels, cotangent=cotangent)
            assert error(out, GOLDENS[case].out) < 5e-5
            assert error(grad, GOLDENS[case].grad_x) < 5e-5
        with torch.no_grad():
            outputs = [compiled(x * scale, labels) for scale in (1, 1, 1, 1, 0.5)]
            half = model(0.5 * x, labels)
    assert compiled.works
    assert max(error(out, GOLDENS[case].out) for out in outputs[:4]) < 5e-5
    assert error(outputs[4], half) < 5e-5


@pytest.mark.parametrize("sde", [VESDE(sigma_max=50.0), VPSDE(), subVPSDE()], ids=repr)
def test_likelihoods(sde):
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.2 * torch.randn(50, 2, 3, generator=generator)
    probe = torch.randn(x.shape, generator=generator).sign()
    found = []
    for device in ("cpu", "cuda"):
        like = get_likelihood_fn(sde, lambda y: y)
        oracle = GaussianOracle(sde, mu=0.3, s0=0.2).to(device)
        bpd, z, _ = like(oracle, x.to(device), noise=probe.to)
        found.append((bpd.cpu(), z.cpu()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def trained(folder, **changes):
    """Weights and averages, and the losses, of a small run."""
    run_lib.train(small_config(**changes), folder)
    checkpoint = read_checkpoint(folder / "checkpoints/checkpoint_2.pth")
    log = logged(folder)
    tensors = [*checkpoint["model"].values(), *checkpoint["ema"]["shadow_params"]]
    return tensors, [r["training_loss"] for r in log if "training_loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_training(tmp_path, precision):
    """From the same weights, with other noise: the losses are those of a CPU within its spread."""
    changes = {"training__n_iters": 60, "training__snapshot_freq": 30, "training__log_freq": 5}
    _, expected = trained(tmp_path / "cpu", device="cpu", **changes)
    found, losses = trained(
        tmp_path / "gpu", device="cuda", training__precision=precision, **changes
    )
    assert all(tensor.isfinite().all() for tensor in found if tensor.is_floating_point())
    assert sum(losses) / sum(expected) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp/digits", "vp/digits_conditional"])
def test_training_by_cuda_graphs(tmp_path, name):
    """The same kernels in the same order, up to the order of sums in gradients."""
    changes = {
        "name": name,
        "device": "cuda",
        "model__dropout": 0.0,
    }
    plain, losses = trained(tmp_path / "plain", **changes)
    replayed, others = trained(tmp_path / "replayed", training__compile="cudagraphs", **changes)
    assert others == pytest.approx(losses, rel=1e-3)
    assert apart(replayed, plain) < NEAR


@pytest.mark.parametrize("backend", ["plain", "cuda"])
@pytest.mark.parametrize("name", ["ve/digits", "vp/digits_conditional"])
def test_samples_by_cuda_graphs(monkeypatch, caplog, name, backend):
    monkeypatch.setenv("OP_BACKEND", backend)
    plain, replayed = (
        run_lib.setup(small_config(name, device="cuda", sampling__compile=mode)).draw(
            range(3), seed=0
        )
        for mode in ("", "cudagraphs")
    )
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
    assert "cannot be recorded" not in caplog.text


@pytest.mark.slow
def test_a_resumed_training_goes_on_as_an_undisturbed_one(tmp_path):
    """Up to the order of sums in gradients, which a GPU is free to choose."""
    whole, losses = trained(tmp_path / "whole", device="cuda")
    run_lib.train(small_config(device="cuda", training__n_iters=6), tmp_path / "parts")
    resumed, others = trained(tmp_path / "parts", device="cuda")
    assert others == pytest.approx(losses, rel=1e-3)
    assert apart(resumed, whole) < NEAR


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_samples_in_lower_precision(precision):
    plain, rounded = (
        run_lib.setup(small_config(device="cuda", **change)).draw(range(3), seed=0)
        for change in ({}, {"sampling__precision": precision})
    )
    assert plain.device.type == "cuda"
    assert float((plain - rounded).norm() / plain.norm()) < 0.02


def test_samples_do_not_depend_on_their_batch():
    run = run_lib.setup(small_config(device="cuda"))
    with matmul_precision("float32"):
        together = run.draw(range(6), seed=0)
        apart = torch.cat([run.draw(range(2), seed=0), run.draw(range(2, 6), seed=0)])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
