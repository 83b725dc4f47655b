"""Every experiment, made small, trains a step and draws samples from the result."""

import re

import numpy as np
import pytest
import torch
from small_runs import dotted, logged
from test_configs import OWN

import run_lib
from configs.defaults import experiments, load
from score_lib.base.tensors import image_shape
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.options import flatten

# Making an experiment small changes sizes, never kinds: the data
# are a file of a few images, and the rest are numbers.
DATA = {"data.dataset": "IMAGES", "data.image_size": 32, "data.num_workers": 0}
DATA |= {"data.category": "", "data.tfrecords_path": ""}  # of other data sets
SIZES = {
    "model.nf": 8,
    "training.batch_size": 2,
    "training.n_iters": 1,
    "training.log_freq": 1,
    "training.eval_freq": 1,
    "training.snapshot_freq": 1,
    "optim.warmup": 0,  # during which the first step has a learning rate of 0
    "sampling.num_samples": 2,
}
AT_MOST = {"model.num_res_blocks": 1, "sampling.n_steps_each": 2}
# Chains of the processes with betas need more steps than beta_max = 20.
NUM_SCALES = {"vesde": 3, "vpsde": 21, "subvpsde": 21}
RESOLUTIONS = 4
NUMBERS = re.compile(r"[-+.,()\de\s]+")  # a number, or a tuple of them

PUBLISHED = [name for name in experiments() if name not in OWN]
# One of each network and process; the others are slow.
QUICK = {
    "subvp/cifar10_ddpmpp_continuous",
    "ve/cifar10_ncsnpp_continuous",
    "ve/ncsn/cifar10",
    "ve/ncsnv2/cifar10",
    "vp/ddpm/cifar10",
}


def small(name, path, **changes):
    """An experiment on images from a file, with everything small; changes have __ for the dot."""
    config = load(name)
    flat = flatten(config)
    at_most = {key: min(flat[key], most) for key, most in AT_MOST.items() if key in flat}
    own = {"data.path": str(path), **SIZES, **at_most, **dotted(changes)}
    config.update_from_flattened_dict(DATA | own)
    config.model.num_scales = NUM_SCALES[config.training.sde]
    if "ch_mult" in config.model:
        config.model.ch_mult = config.model.ch_mult[:RESOLUTIONS]
    return config


def distinct(names):
    """One name for all experiments which, when small, differ in numbers and evaluations only."""
    kinds = {}
    for name in names:
        options = flatten(small(name, "images.npy")).items()
        kind = {key: str(value) for key, value in options if not key.startswith("eval.")}
        kinds.setdefault(frozenset(i for i in kind.items() if not NUMBERS.fullmatch(i[1])), name)
    return list(kinds.values())


@pytest.fixture(scope="module")
def colour_images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data"), 32, 32, 3)


def save_images(folder, *shape):
    """A file of four images."""
    path = folder / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The samples that a run draws, before they become bytes."""
    samples, draw = [], run_lib.Run.draw

    def sample(*arguments, **options):
        samples.append(draw(*arguments, **options))
        return samples[-1]

    monkeypatch.setattr(run_lib.Run, "draw", sample)
    return samples


def check_run(config, folder, drawn):
    """Train, and check the results."""
    before = run_lib.setup(config).state["model"].state_dict()
    run_lib.train(config, folder)
    records = logged(folder)
    values = {key: value for record in records for key, value in record.items()}
    assert values.keys() == {"step", "training_loss", "grad_norm", "learning_rate", "eval_loss"}
    assert np.isfinite(list(values.values())).all() and values["grad_norm"] > 0
    checkpoint = read_checkpoint(folder / "checkpoints" / "checkpoint_1.pth")
    after = checkpoint["model"]
    assert checkpoint["step"] == 1 and list(after) == [f"module.{key}" for key in before]
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[f"module.{key}"], before[key]) for key in before)
    (samples,), shape = drawn, image_shape(config)
    assert samples.shape == (2, *shape) and samples.isfinite().all() and samples.std() > 0
    pixels = np.load(folder / "samples" / "iter_1" / "sample.np")
    assert pixels.shape == (2, *shape[1:], shape[0]) and pixels.dtype == np.uint8


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in distinct(sorted(PUBLISHED, key=lambda name: name not in QUICK))
    ],
)
def test_published_experiment_trains_and_samples(name, colour_images, tmp_path, drawn):
    check_run(small(name, colour_images), tmp_path, drawn)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_small_is_the_same_experiment(name):
    full, made_small = flatten(load(name)), flatten(small(name, "images.npy"))
    changed = {key for key, value in made_small.items() if value != full[key]}
    assert changed <= {*(*DATA, *SIZES, *AT_MOST, "data.path", "model.num_scales", "model.ch_mult")}


IMAGES = {
    "colour": ((32, 32, 3), {}),
    "gray": ((32, 32), {"data__num_channels": 1}),
    "not square": ((16, 24, 3), {"data__image_size": 16, "data__image_width": 24}),
    "gray, not square": (
        (48, 32, 1),
        {"data__image_size": 24, "data__image_width": 16, "data__num_channels": 1},
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_own_images(case, tmp_path, drawn):
    shape, options = IMAGES[case]
    config = small("vp/images", save_images(tmp_path, *shape), **options)
    check_run(config, tmp_path / "run", drawn)
