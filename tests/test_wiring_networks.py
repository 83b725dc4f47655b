"""Options of networks, precision and compilation arrive where they act."""

from __future__ import annotations

import contextlib

import pytest
import torch
from networks import build, fill_weights, images, tiny_config
from small_runs import small_config
from torch import nn

import run_lib
from models.precision import Compiled, InBfloat16
from models.unet import UNet
from models.utils import create_model, get_model_fn

REFINE_NETS = ["ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256"]


@contextlib.contextmanager
def recorded(run, read):
    """The list of read(network, output of a layer in the middle), over all forward passes."""
    network, seen = run.state["model"], []
    layer = network.all_modules[network.plan.middle[0]].Conv_0
    with layer.register_forward_hook(lambda _, given, output: seen.append(read(network, output))):
        yield seen


def train_and_evaluate(run):
    """One training step, and one evaluation."""
    run.add_optimizer()
    batch = torch.rand(2, *run.shape)
    for step in run.step_fns():
        step(run.state, batch)


# Networks.


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddpm", {}),
        ("ncsnpp", {"resblock_type": "ddpm"}),
        ("ncsnpp", {"resblock_type": "biggan"}),
        ("adm", {"nf": 32}),
    ],
)
def test_dropout_acts_in_training_only(name, options):
    config = tiny_config(name, dropout=0.37, **options)
    model, x, labels = fill_weights(build(config)), images(config), torch.tensor([1, 2])
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.37}
    assert not torch.equal(model(x, labels), model(x, labels))
    model.eval()
    assert torch.equal(model(x, labels), model(x, labels))


class Joined(nn.Module):
    """A user's own network around another one."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, labels):
        return self.network(x)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_acts_in_training_only_wherever_its_mode_was_set(train):
    """A network around one that was put into evaluation mode before trained without dropout."""
    model = Joined(nn.Sequential(nn.Dropout(0.5))).train(train)
    model.network.train(not train)
    dropped = get_model_fn(model, train)(torch.ones(1000), torch.ones(1000)) == 0
    assert bool(dropped.any()) is train
    assert all(layer.training is train for layer in model.modules())


def test_layers_that_a_network_keeps_frozen_are_frozen_from_the_first_step():
    """By a `train` of its own, which was not called while all layers were in training mode."""

    class Tuned(Joined):
        def train(self, mode=True):
            super().train(mode)
            self.network[0].eval()
            return self

    model = Tuned(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)))
    for train in (True, False, True):
        get_model_fn(model, train)(torch.ones(1000, 2), torch.ones(1000))
        assert (model.network[0].training, model.network[1].training) == (False, train)
    assert torch.equal(model.network[0].running_mean, torch.zeros(2))


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp"])
def test_only_conditional_networks_depend_on_the_noise_level(name):
    for conditional in (True, False):
        model = fill_weights(build(tiny_config(name, conditional=conditional))).eval()
        x = torch.rand(2, 3, 8, 8)
        outputs = [model(x, torch.full((2,), label)) for label in (1, 7)]
        assert torch.equal(*outputs) is not conditional


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", *REFINE_NETS])
def test_output_is_scaled_by_sigma(name):
    plain, scaled = (
        fill_weights(build(tiny_config(name, nf=4, image_size=16, scale_by_sigma=scale))).eval()
        for scale in (False, True)
    )
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 9])
    expected = plain(x, labels) / torch.tensor([50.0, 0.01])[:, None, None, None]
    torch.testing.assert_close(scaled(x, labels), expected)


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", *REFINE_NETS, "adm"])
def test_images_that_are_not_centred_are_centred_first(name):
    options = {"nf": 32 if name == "adm" else 4, "image_size": 16}
    raw, centred = (
        fill_weights(build(tiny_config(name, **options, centered=centered))).eval()
        for centered in (False, True)
    )
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    torch.testing.assert_close(raw(x, labels), centred(2 * x - 1, labels))


# Runs.


@pytest.mark.parametrize("checkpoint_activations, passes", [(False, 1), (True, 2)])
def test_training_recomputes_activations(checkpoint_activations, passes):
    run = run_lib.setup(small_config(model__checkpoint_activations=checkpoint_activations))
    with recorded(run, lambda network, _: network.training) as seen:
        train_and_evaluate(run)
    assert seen == [True] * passes + [False]


@pytest.mark.parametrize(
    "precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_training_precision(precision, dtype):
    """Evaluation stays float32."""
    run = run_lib.setup(small_config(training__precision=precision))
    with recorded(run, lambda network, output: (network.training, output.dtype)) as seen:
        train_and_evaluate(run)
    assert seen == [(True, dtype), (False, torch.float32)]


@pytest.mark.parametrize(
    "precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_sampling_precision(precision, dtype):
    run = run_lib.setup(small_config(sampling__precision=precision))
    with recorded(run, lambda network, output: output.dtype) as seen:
        assert run.draw(range(1)).dtype == torch.float32
    assert set(seen) == {dtype}


@pytest.mark.parametrize("section", ["training", "sampling"])
def test_compilation(section, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: modes.append(mode) or function)
    run = run_lib.setup(small_config(**{f"{section}__compile": "reduce-overhead"}))
    train_and_evaluate(run)
    assert modes == ["reduce-overhead"] * (section == "training")
    run.draw(range(1))
    assert modes == ["reduce-overhead"]


def test_the_sampling_network_is_compiled_last():
    run = run_lib.setup(small_config(sampling__precision="bfloat16", sampling__compile="default"))
    with run.sampling_network() as model:
        assert isinstance(model, Compiled) and isinstance(model.module, InBfloat16)
        assert model.module.module is run.state["model"]


def tf32():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("training, sampling", [("tf32", "float32"), ("float32", "tf32")])
def test_tf32_is_on_inside_training_and_sampling_only(training, sampling, tmp_path):
    """PyTorch's own default, TF32 in convolutions only, is restored."""
    before, seen = tf32(), set()

    def look(module, given, output):
        if isinstance(module, UNet):
            seen.add(("training" if module.training else "sampling", *tf32()))

    once = {"training__n_iters": 1, "sampling__num_samples": 1, "training__eval_freq": 5}
    precision = {"training__precision": training, "sampling__precision": sampling}
    with nn.modules.module.register_module_forward_hook(look):
        run_lib.train(small_config(**once, **precision), tmp_path)
    on = {"tf32": (True, True), "float32": (False, False)}
    assert seen == {("training", *on[training]), ("sampling", *on[sampling])}
    assert tf32() == before


@pytest.mark.parametrize("name", ("ncsnpp", "ddpm", "ncsn", "ncsnv2_64"))
def test_an_option_that_a_network_lacks_is_named(name):
    """Experiments of one's own may be written without the parts of `configs`."""
    refused = []
    for option in [key for key in tiny_config(name).model if key != "name"]:
        config = tiny_config(name)
        del config.model[option]
        try:
            create_model(config, "cpu")
        except ValueError as error:
            assert f"the network {name!r} needs config.model.{option}, which is miss" in str(error)
            refused.append(option)
    assert {"nf", "nonlinearity"} <= set(refused) and "dropout" not in refused
