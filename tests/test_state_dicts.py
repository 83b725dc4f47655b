"""State dicts of wrapped networks load into networks, strictly or not."""

import pytest
import torch
from networks import build, fill_weights, tiny_config
from torch import nn

from models.ema import ExponentialMovingAverage

NETWORKS = {
    "ncsnpp": {"embedding_type": "fourier"},
    "ncsnv2_64": {},
    "adm": {"nf": 32},
    "mlp": {"embedding_type": "fourier", "input_fourier_scale": 1.0},
    "wideresnet_noise_conditional": {"blocks_per_group": 1, "channel_multiplier": 1},
}
WRAPPERS = {
    "plain": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
}


def network(name="ncsnpp"):
    config = tiny_config(name, **NETWORKS[name])
    config.data.num_classes = 3
    return build(config)


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_a_wrapped_network_load(name, wrapper, strict):
    ours, theirs = network(name), fill_weights(network(name))
    weights = WRAPPERS[wrapper](theirs).state_dict()
    fits = ours.load_state_dict(weights, strict=strict)
    assert not fits.missing_keys and not fits.unexpected_keys
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_random_features_come_from_the_file():
    """They are not trained, so the average does not bring them."""
    ours, theirs = network().eval(), fill_weights(network()).eval()
    average = ExponentialMovingAverage(theirs.parameters(), decay=0.9)
    ours.load_state_dict(nn.DataParallel(theirs).state_dict(), strict=False)
    average.copy_to(ours.parameters())
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    assert torch.equal(ours(x, labels), theirs(x, labels))


def test_wrappers_load_as_in_pytorch():
    ours, theirs = nn.DataParallel(network()), fill_weights(network())
    ours.load_state_dict(nn.DataParallel(theirs).state_dict())
    assert torch.equal(ours.module.all_modules[0].W, theirs.all_modules[0].W)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(theirs.state_dict())


def test_a_part_of_the_weights_loads_if_asked_for():
    ours, theirs = network(), fill_weights(network())
    weights = {"module.all_modules.0.W": theirs.all_modules[0].W}
    assert len(ours.load_state_dict(weights, strict=False).missing_keys) > 10
    assert torch.equal(ours.all_modules[0].W, theirs.all_modules[0].W)
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(weights)


def test_weights_that_fit_nowhere_are_told(caplog):
    ours = network()
    before = ours.all_modules[0].W.clone()
    ours.load_state_dict({"module.fc.weight": torch.zeros(3)}, strict=False)
    assert "nothing was loaded" in caplog.text and "module.fc.weight" in caplog.text
    assert torch.equal(ours.all_modules[0].W, before)
    # A prefix of some names is none of a wrapper.
    ours.load_state_dict({"module.sigmas": torch.zeros(10), "step": 3}, strict=False)
    assert caplog.text.count("nothing was loaded") == 2 and ours.sigmas.all()
