"""CUDA graphs without a GPU: which calls are replayed, and that nothing is overwritten."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

from models.graphs import Replayed
from models.precision import InBfloat16, accelerated


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.idle = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))

    def forward(self, x, labels, *, shift=0.0, gain=1.0):
        return gain * self.weight * x + labels[:, None] + shift


class Overwriting(torch.autograd.Function):
    """One place for all outputs, and the last input for the gradient, as a graph has them."""

    @staticmethod
    def forward(ctx, weight, recorder):
        ctx.recorder = recorder
        with torch.no_grad():
            return recorder.place.copy_(recorder.module(*recorder.places)).detach()

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.recorder.places[0]).sum(0), None


class Recorder:
    def __init__(self, module, places):
        self.module, self.places, self.replays = module, places, 0
        self.place = module(*places).detach()

    def __call__(self, *arguments):
        self.replays += 1
        for place, value in zip(self.places, arguments, strict=True):
            place.copy_(value)
        return Overwriting.apply(self.module.module.weight, self)


@pytest.fixture
def recorders(monkeypatch):
    found = []

    def record(module, places, allow_unused_input):
        assert allow_unused_input  # parameters of published networks are idle
        found.append(Recorder(module, places))
        return found[-1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(Replayed, "PLATFORM", "cpu")
    return found


def batch(size=2, value=1.0):
    return torch.full((size, 3), value), torch.zeros(size)


def test_outputs_are_kept_when_the_next_call_overwrites_them(recorders):
    network = Replayed(Network().eval())
    with torch.no_grad():
        outputs = [network(*batch(value=value)) for value in (1.0, 2.0, 3.0)]
    assert [float(output[0, 0]) for output in outputs] == [2.0, 4.0, 6.0]
    assert [recorder.replays for recorder in recorders] == [3]


def test_the_gpu_of_the_image_is_the_current_one_while_recording(recorders, monkeypatch):
    """A recording on another one is empty, and its replays change nothing."""
    current, record = ["another"], torch.cuda.make_graphed_callables

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    def recording(*arguments, **options):
        assert current == ["another", torch.device("cpu")]
        return record(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recording)
    with torch.no_grad():
        Replayed(Network().eval())(*batch())
    assert current == ["another"] and len(recorders) == 1


def test_every_shape_has_a_graph_up_to_a_number(recorders):
    network = Replayed(Network().eval())
    with torch.no_grad():
        for size in (1, 2, 3, 4, 5, 6, 1, 5):
            assert network(*batch(size)).shape == (size, 3)
    assert [recorder.replays for recorder in recorders] == [2, 1, 1, 1]


def test_conditions_arrive_by_their_names(recorders):
    network, (x, labels) = Replayed(Network().eval()), batch()
    given = {"gain": torch.full((2, 1), 5.0), "shift": torch.ones(2, 3)}
    with torch.no_grad():
        assert network(x, labels, **given)[0, 0] == 11
        assert network(x, labels, **dict(reversed(given.items())))[0, 0] == 11
        assert network(x, labels)[0, 0] == 2
    assert len(recorders) == 3


def test_gradients_of_training_are_those_of_its_batch(recorders):
    network = Replayed(Network().train())
    for value in (1.0, 3.0):
        network.module.weight.grad = None
        network(*batch(value=value)).sum().backward()
        assert network.module.weight.grad.tolist() == [2 * value] * 3
    assert [recorder.replays for recorder in recorders] == [2]


def test_a_call_before_the_backward_pass_leaves_the_first_one_its_features(recorders):
    network = Replayed(Network().train())
    losses = [network(*batch(value=value)).sum() for value in (1.0, 3.0)]
    for loss, value in zip(losses, (1.0, 3.0), strict=True):
        network.module.weight.grad = None
        loss.backward()
        assert network.module.weight.grad.tolist() == [2 * value] * 3
    assert [recorder.replays for recorder in recorders] == [1]
    network(*batch())  # whose output nobody wants
    gc.collect()
    network(*batch())
    assert [recorder.replays for recorder in recorders] == [3]


def test_other_derivatives_are_the_network_s_own(recorders):
    network, (x, labels) = Replayed(Network().eval()), batch()
    with torch.enable_grad():  # guidance of an evaluated network
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(leaf, labels).sum(), leaf)
        assert grad.tolist() == [[2.0] * 3] * 2
        assert network(x, labels).requires_grad
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda y: network(y, labels), (x,), (x,))
    assert tangent.tolist() == [[2.0] * 3] * 2
    network.train()
    (grad,) = torch.autograd.grad(network(leaf, labels).sum(), leaf)
    assert grad.tolist() == [[2.0] * 3] * 2 and not recorders


def test_a_failure_is_told_once_and_the_network_runs_without(recorders, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    network = Replayed(Network().eval())
    with torch.no_grad():
        outputs = [network(*batch(value=value)) for value in (1.0, 2.0)]
    assert [float(output[0, 0]) for output in outputs] == [2.0, 4.0] and not network.works
    assert [record.getMessage() for record in caplog.records] == [
        "the network's CUDA graph cannot be recorded, and it runs without "
        "(operation not permitted when stream is capturing)"
    ]


def test_copies_record_for_themselves(recorders):
    network = Replayed(Network().eval())
    with torch.no_grad():
        network(*batch())
        twin = copy.deepcopy(network)
        twin.module.weight.fill_(4.0)
        assert (network(*batch())[0, 0], twin(*batch())[0, 0]) == (2, 4)
    assert [recorder.replays for recorder in recorders] == [2, 1]


def test_it_comes_last_and_only_on_a_gpu(caplog):
    caplog.set_level("INFO")
    network = Network()
    fast = accelerated(network, "bfloat16", "cudagraphs")
    assert isinstance(fast, InBfloat16) and fast.module is network
    assert "no CUDA graphs" in caplog.text
    with pytest.raises(ValueError, match="Replayed last"):
        InBfloat16(Replayed(network))
    x, labels = batch()
    assert torch.equal(Replayed(network)(x, labels), network(x, labels))
