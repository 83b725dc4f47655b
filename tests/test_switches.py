"""Training, sampling and evaluation with lower precision, compilation, recomputed activations."""

import pytest
import torch
from oracles import apart
from processes import together
from small_runs import logged, small_config

import run_lib
from models.precision import Compiled
from score_lib.disk.checkpoints import read_checkpoint

CHANGES = {
    "model__ch_mult": (1,),
    "model__attn_resolutions": (),
    "model__dropout": 0.0,
    "training__snapshot_sampling": False,
}


def trained(folder, **changes):
    """Weights and averages, and the log, of a small run."""
    run_lib.train(small_config(**CHANGES, **changes), folder)
    return tensors_of(folder), logged(folder)


def tensors_of(folder):
    checkpoint = read_checkpoint(folder / "checkpoints/checkpoint_2.pth")
    return [*checkpoint["model"].values(), *checkpoint["ema"]["shadow_params"]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


def test_training_in_bfloat16_follows_float32(plain, tmp_path):
    """Master weights, averages and losses stay float32."""
    tensors, log = trained(tmp_path, training__precision="bfloat16")
    assert torch.bfloat16 not in {t.dtype for t in tensors}
    assert 1e-6 < apart(tensors, plain[0]) < 1e-2
    for record, expected in zip(log, plain[1], strict=True):
        for key in ("training_loss", "eval_loss"):
            if key in record:
                assert record[key] == pytest.approx(expected[key], rel=0.02)


@pytest.mark.parametrize(
    "switch",
    (
        {"training__precision": "tf32"},  # a no-op without tensor cores
        {"model__checkpoint_activations": True},
        {"sampling__precision": "bfloat16"},
    ),
    ids=str,
)
@pytest.mark.quick_cases(1)
def test_options_without_an_effect_on_the_numbers_of_training(switch, plain, tmp_path):
    tensors, log = trained(tmp_path, **switch)
    assert all(torch.equal(*pair) for pair in zip(tensors, plain[0], strict=True))
    assert log == plain[1]


@pytest.fixture
def modes(monkeypatch):
    """The list of modes of `torch.compile`, which here traces forwards and backwards only."""
    modes, compile = [], torch.compile

    def traced(function, mode):
        modes.append(mode)
        return compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    return modes


@pytest.mark.slow
def test_compiled_training_agrees_with_plain_training(plain, tmp_path, modes):
    tensors, _ = trained(tmp_path, training__compile="reduce-overhead")
    assert modes == ["reduce-overhead"] and apart(tensors, plain[0]) < 1e-5


def test_outputs_of_cuda_graphs_are_copied(monkeypatch):
    """With a network that, like a graph, writes all outputs to the same place."""
    place = torch.zeros(2, 1)
    monkeypatch.setattr(torch, "compile", lambda *_, mode: lambda _, x, *rest: place.copy_(x))
    network = Compiled(torch.nn.Identity(), mode="reduce-overhead")
    with torch.no_grad():
        first, second = (network(torch.full((2, 1), value), None) for value in (1.0, 2.0))
    assert first.tolist() == [[1.0], [1.0]] and second.tolist() == [[2.0], [2.0]]


@pytest.mark.slow
def test_all_options_at_once_in_two_processes(plain, tmp_path, modes):
    switches = {
        "training__precision": "bfloat16",
        "training__compile": "default",
        "training__grad_accumulation": 2,
        "model__checkpoint_activations": True,
    }
    assert together(2, run_lib.train, small_config(**CHANGES, **switches), tmp_path) == [None] * 2
    tensors = tensors_of(tmp_path)
    assert 1e-6 < apart(tensors, plain[0]) < 1e-2


def test_sampling_in_bfloat16_is_near_to_float32():
    plain, rounded = (
        run_lib.setup(small_config(**change)).draw(range(3), seed=0)
        for change in ({}, {"sampling__precision": "bfloat16"})
    )
    assert rounded.dtype == torch.float32 and 0 < apart([rounded], [plain]) < 0.02


@pytest.mark.slow
def test_evaluation_is_in_float32(tmp_path):
    """Losses do not depend on the precision of training and sampling."""
    only_loss = {f"eval__enable_{task}": False for task in ("bpd", "sampling")}
    config = small_config(**CHANGES, **only_loss, eval__begin_ckpt=2, eval__end_ckpt=2)
    run_lib.train(config, tmp_path)
    (plain,) = run_lib.evaluate(config, tmp_path)
    config.training.precision = config.sampling.precision = "bfloat16"
    (found,) = run_lib.evaluate(config, tmp_path, "other")
    assert found == {**plain, "trained_with": {"training.precision": "float32"}}
