"""Switches for speed: what they change, and what they leave alone."""

import json

import pytest
import torch
from processes import together
from small_runs import small_config

import losses
import run_lib
from models.precision import Compiled, InBfloat16
from score_lib.disk.checkpoints import read_checkpoint

CHANGES = {"model__dropout": 0.0, "training__snapshot_sampling": False}


def trained(folder, **changes):
    """Weights and averages, and the log, of a small run."""
    run_lib.train(small_config(**CHANGES, **changes), folder)
    return tensors_of(folder), [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def tensors_of(folder):
    checkpoint = read_checkpoint(folder / "checkpoints/checkpoint_2.pth")
    return [*checkpoint["model"].values(), *checkpoint["ema"]["shadow_params"]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


def apart(tensors, others):
    """Relative distance of two lists of tensors."""
    one, other = (torch.cat([t.flatten().double() for t in part]) for part in (tensors, others))
    return float((one - other).norm() / other.norm())


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
        {"training__precision": "tf32"},  # nothing changes where there are no tensor cores
        {"model__checkpoint_activations": True},
        {"sampling__precision": "bfloat16"},
    ),
    ids=str,
)
def test_these_change_no_bit_of_training(switch, plain, tmp_path):
    tensors, log = trained(tmp_path, **switch)
    assert all(torch.equal(*pair) for pair in zip(tensors, plain[0], strict=True))
    assert log == plain[1]


@pytest.fixture
def modes(monkeypatch):
    """The modes in which networks are compiled, which here means traced, forwards and backwards.

    What a backend makes of that is tested with the networks.
    """
    modes, compile = [], torch.compile

    def traced(function, mode):
        modes.append(mode)
        return compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    return modes


@pytest.mark.slow
def test_compiled_training_is_that_of_plain_training(plain, tmp_path, modes):
    tensors, _ = trained(tmp_path, training__compile="reduce-overhead")
    assert modes == ["reduce-overhead"] and apart(tensors, plain[0]) < 1e-5


def test_samplers_may_keep_what_a_cuda_graph_would_overwrite(monkeypatch):
    """Here a network that, as a graph does, gives every result in the same place."""
    place = torch.zeros(2, 1)
    monkeypatch.setattr(torch, "compile", lambda *_, mode: lambda _, x, t: place.copy_(x))
    network = Compiled(torch.nn.Identity(), {"mode": "reduce-overhead"})
    with torch.no_grad():
        first, second = (network(torch.full((2, 1), value), None) for value in (1.0, 2.0))
    assert first.tolist() == [[1.0], [1.0]] and second.tolist() == [[2.0], [2.0]]


@pytest.mark.slow
def test_all_switches_at_once_in_two_processes(plain, tmp_path, modes):
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
        run_lib.setup(small_config(**change)).sample(range(3), seed=0)
        for change in ({}, {"sampling__precision": "bfloat16"})
    )
    assert rounded.dtype == torch.float32 and 0 < apart([rounded], [plain]) < 0.02


@pytest.mark.slow
def test_evaluation_is_in_float32(tmp_path):
    """Losses do not depend on what training and sampling are computed in."""
    only_loss = {f"eval__enable_{task}": False for task in ("bpd", "sampling")}
    config = small_config(**CHANGES, **only_loss, eval__begin_ckpt=2, eval__end_ckpt=2)
    run_lib.train(config, tmp_path)
    plain = run_lib.evaluate(config, tmp_path)
    config.training.precision = config.sampling.precision = "bfloat16"
    assert run_lib.evaluate(config, tmp_path, "other") == plain


def test_the_wrappers_are_where_the_config_says():
    run = run_lib.setup(small_config(sampling__precision="bfloat16", sampling__compile="default"))
    assert isinstance(run.sampling_model, Compiled)
    assert isinstance(run.sampling_model.module, InBfloat16)
    assert run.sampling_model.module.module is run.state["model"]
    assert run_lib.setup(small_config()).sampling_model.__class__ is run.state["model"].__class__


def tf32():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_on_inside_training_and_sampling_only(tmp_path, monkeypatch):
    """Also PyTorch's own default, TF32 in convolutions, is put back."""
    before, seen = tf32(), []
    train_step, network = losses._TrainStep.__call__, run_lib.Run.sampling_model.func

    def looking_step(*arguments):
        seen.append(("step", *tf32()))
        return train_step(*arguments)

    def looking_network(run):
        run.state["model"].register_forward_hook(lambda *_: seen.append(("sample", *tf32())))
        return network(run)

    monkeypatch.setattr(losses._TrainStep, "__call__", looking_step)
    monkeypatch.setattr(run_lib.Run, "sampling_model", property(looking_network))
    once = {"training__n_iters": 1, "sampling__num_samples": 1, "training__eval_freq": 5}
    for training, sampling in (("tf32", "float32"), ("float32", "tf32")):
        seen.clear()
        precision = {"training__precision": training, "sampling__precision": sampling}
        run_lib.train(small_config(**once, **precision), tmp_path / training)
        on = {"tf32": (True, True), "float32": (False, False)}
        assert set(seen) == {("step", *on[training]), ("sample", *on[sampling])}
    assert tf32() == before
