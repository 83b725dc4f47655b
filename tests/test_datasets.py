"""Data sets from a config: the digits, the scalers, and how each option arrives."""

import colorsys
import importlib.util
import os

import numpy as np
import pytest
import torch
from dataset_helpers import (
    assert_same,
    everything,
    make_config,
    numbered_source,
    run_python,
    take,
    together,
)

import datasets
from datasets import DataError, MemorySource, Source, register_dataset


@pytest.mark.parametrize("centered, low, high", [(True, -1.0, 1.0), (False, 0.0, 1.0)])
def test_scalers_map_to_the_range_of_the_network_and_back(centered, low, high):
    config = make_config("DIGITS", centered=centered)
    x = torch.linspace(0, 1, 11)
    scaled = datasets.get_data_scaler(config)(x)
    assert (scaled[0], scaled[-1]) == (low, high)
    torch.testing.assert_close(datasets.get_data_inverse_scaler(config)(scaled), x)


def digits_config(**data):
    return make_config("DIGITS", num_channels=1, **data)


@pytest.mark.slow
def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    original = load_digits()
    _, _, info = datasets.get_streams(digits_config())
    parts = [everything(source) for source in info.sources.values()]
    images = torch.cat([part[0] for part in parts]).flatten(1).numpy()
    labels = torch.cat([part[1] for part in parts]).numpy()
    expected = np.c_[original.data, original.target]
    rows = np.c_[images, labels]
    assert np.array_equal(expected[np.lexsort(expected.T)], rows[np.lexsort(rows.T)])
    held_out = {tuple(row) for row in rows[info.num_examples["train"] :]}
    for digit in range(10):
        sixths = expected[original.target == digit][5::6]
        assert held_out.issuperset(map(tuple, sixths.astype(int)))


def test_held_out_digits_are_a_fixed_sixth_of_each_class():
    _, _, info = datasets.get_streams(digits_config())
    _, _, other = datasets.get_streams(digits_config(seed=7))
    assert (info.name, info.shape, info.levels, info.num_classes) == ("DIGITS", (1, 8, 8), 17, 10)
    assert info.num_examples == {"train": 1501, "test": 296}
    assert info.class_to_idx == {str(digit): digit for digit in range(10)}
    train, test = (everything(source) for source in info.sources.values())
    counts = torch.bincount(train[1]), torch.bincount(test[1])
    assert torch.equal(counts[1], (counts[0] + counts[1]) // 6)
    assert torch.equal(test[0], other.sources["test"].images(range(296)))


def test_color_digits_are_the_digits_in_bright_colors():
    _, _, gray = datasets.get_streams(digits_config())
    _, _, color = datasets.get_streams(make_config("COLOR_DIGITS"))
    assert (color.shape, color.levels, color.num_classes) == ((3, 8, 8), 256, 10)
    for split, source in color.sources.items():
        (ink, expected_labels), (images, labels) = (
            info.sources[split].read(np.arange(len(source))) for info in (gray, color)
        )
        assert torch.equal(labels, expected_labels) and images.dtype == torch.uint8
        hues = ((5**0.5 - 1) / 2 * number % 1 for number in gray.sources[split].numbers)
        tints = torch.tensor([colorsys.hsv_to_rgb(hue, 0.85, 1) for hue in hues])
        expected = 255 / 16 * ink * tints[:, :, None, None]
        assert (images - expected).abs().max() < 0.501  # rounded to whole levels
        assert torch.equal(images.amax(1, keepdim=True), (255 / 16 * ink).round().byte())


def test_color_of_a_digit_is_independent_of_label_and_grey_value():
    _, _, info = datasets.get_streams(make_config("COLOR_DIGITS"))
    images, labels = info.sources["train"].read(np.arange(1501))
    tints = images.flatten(2).amax(2).double() / 255  # where there is most ink
    hues = torch.tensor([colorsys.rgb_to_hsv(*tint)[0] for tint in tints.tolist()])
    for label in range(10):
        sixths = torch.bincount((6 * hues[labels == label]).long(), minlength=6)
        assert sixths.min() > sixths.sum() / 12  # half of the value for equal parts
    by_grey = tints[tints.mean(1).argsort()]
    from_the_next = (by_grey[1:] - by_grey[:-1]).norm(dim=1)
    assert from_the_next.mean() > 0.9 * torch.pdist(tints).mean()


def test_training_streams():
    config = digits_config(batch_size=32, random_flip=True)
    config.eval.batch_size = 5
    train, test, _ = datasets.get_streams(config)
    batch, held_out = next(iter(train)), next(iter(test))
    for images, labels in (batch.values(), held_out.values()):
        assert images.shape == (32, 1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (32,) and labels.dtype == torch.int64
    assert train.random_flip and not test.random_flip
    assert len(take(test, 20)) == 20  # endless: 296 images have 9 such batches


def test_evaluation_streams():
    config = digits_config(random_flip=True)
    config.eval.batch_size = 100
    train, test, info = datasets.get_streams(config, evaluation=True)
    assert [len(batch["label"]) for batch in test] == [100, 100, 96]
    images = together(list(train))["image"]
    assert torch.equal((images * 16).to(torch.uint8), info.sources["train"].images(range(1501)))


def test_dequantization_and_shares():
    config = digits_config(batch_size=6)
    train, _, _ = datasets.get_streams(config, uniform_dequantization=True)
    parts = [datasets.get_streams(config, True, rank=r, world=2)[0] for r in range(2)]
    (whole,) = take(train, 1)
    assert (whole["image"] > 0).all() and (whole["image"] < 1).all()
    assert_same([together([next(iter(part)) for part in parts])], [whole])


def test_levels_option_is_used_and_checked():
    stream, _, info = datasets.get_streams(digits_config(levels=20))
    assert info.levels == 20
    assert next(iter(stream))["image"].max() <= 16 / 19
    for levels, message in [(10, "data.levels=10 allows 0 to 9"), (300, "data.levels=300")]:
        with pytest.raises(DataError, match=message):
            next(iter(datasets.get_streams(digits_config(levels=levels))[0]))


@register_dataset(name="MINE", options={"size": "data.my_size"})
def mine(shape, size):
    """Images whose shape is the configured one, and as many as the option says."""
    numbers = torch.arange(size, dtype=torch.uint8)
    return (MemorySource(numbers.reshape(-1, 1, 1, 1).expand(-1, *shape), numbers.long()),) * 2


def test_own_data_set_gets_the_shape_and_its_options():
    train, test, info = datasets.get_streams(make_config("MINE", my_size=12), evaluation=True)
    assert info.num_examples == {"train": 12, "test": 12} and info.shape == (3, 8, 8)
    assert (len(train), len(test)) == (3, 3)
    with pytest.raises(ValueError, match=r"'MINE' needs the option config.data.my_size"):
        datasets.get_streams(make_config("MINE"))


@pytest.mark.parametrize(
    "options, shape",
    [
        ({"image_size": 6}, (3, 6, 6)),
        ({"image_size": 6, "image_width": 9, "num_channels": 1}, (1, 6, 9)),
        ({"image_size": (5, 7), "num_channels": 4}, (4, 5, 7)),
    ],
)
def test_shape_options(options, shape):
    train, _, info = datasets.get_streams(make_config("MINE", my_size=4, **options))
    assert info.shape == shape and next(iter(train))["image"].shape == (4, *shape)


@pytest.mark.parametrize("dtype, said", [(torch.float32, False), (torch.uint8, True)])
def test_values_are_what_their_data_set_says(dtype, said):
    """Floats in the user's units would be scaled as grey levels, and come out black and white."""

    def values(shape):
        return (MemorySource(torch.zeros(9, *shape, dtype=dtype)),) * 2

    values.continuous = said
    register_dataset(values, name=f"VALUES_{said}")
    with pytest.raises(DataError, match=f"`continuous = {not said}`"):
        datasets.get_streams(make_config(f"VALUES_{said}", image_size=4))
    values.continuous = not said
    datasets.get_streams(make_config(f"VALUES_{said}", image_size=4))


@pytest.mark.parametrize("flip", [False, True])
def test_random_flip_option(flip):
    @register_dataset(name="NUMBERED")
    def numbered(shape):
        return numbered_source(100), numbered_source(100)

    config = make_config("NUMBERED", image_size=4, random_flip=flip, batch_size=100)
    for stream, flips in zip(datasets.get_streams(config)[:2], (flip, False), strict=True):
        (batch,) = take(stream, 1)
        stored = numbered_source(100).images(batch["label"].numpy()) / 255
        mirrored = (batch["image"] != stored).flatten(1).any(1)
        assert 20 < mirrored.sum() < 80 if flips else not mirrored.any()


class Processes(Source):
    """Images that are white if the process that made this object reads them, else black."""

    shape = (1, 1, 1)

    def __init__(self):
        self.maker = os.getpid()

    def __len__(self):
        return 8

    def read(self, numbers):
        white = 255 * (os.getpid() == self.maker)
        return torch.full((len(numbers), 1, 1, 1), white, dtype=torch.uint8), None


@pytest.mark.parametrize("workers", [0, 1])
def test_num_workers_option(workers):
    @register_dataset(name="PROCESSES")
    def processes(shape):
        return Processes(), Processes()

    config = make_config("PROCESSES", num_workers=workers)
    batch = next(iter(datasets.get_streams(config, evaluation=True)[0]))
    assert torch.equal(
        batch["image"], torch.full_like(batch["image"], 1.0 if workers == 0 else 0.0)
    )


def test_seed_option():
    config = make_config("MINE", my_size=30, batch_size=30)
    first, again = (take(datasets.get_streams(config)[0], 2) for _ in range(2))
    config.seed = 43
    (other, _), (held_out, _) = (take(stream, 2) for stream in datasets.get_streams(config)[:2])
    assert_same(first, again)
    assert not torch.equal(first[0]["label"], other["label"])
    assert not torch.equal(held_out["label"], other["label"])


def test_config_without_optional_options_is_completed():
    config = make_config("DIGITS", num_channels=1)
    del config.data.num_workers
    before = config.to_dict()
    train, _, info = datasets.get_streams(config)
    assert train.num_workers == 4 and info.levels == 17
    assert config.to_dict() == before


def test_mistakes_in_the_config(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown dataset 'DIGIT'.*did you mean 'DIGITS'"):
        datasets.get_streams(make_config("DIGIT"))
    for size, channels in ((28, 1), (8, 3)):
        config = make_config("DIGITS", image_size=size, num_channels=channels)
        with pytest.raises(DataError, match=r"set data.image_size=8 and data.num_channels=1"):
            datasets.get_streams(config)
    for size, channels in ((28, 3), (8, 1)):
        config = make_config("COLOR_DIGITS", image_size=size, num_channels=channels)
        with pytest.raises(DataError, match=r"^COLOR_DIGITS has RGB.*data.num_channels=3$"):
            datasets.get_streams(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        datasets.get_streams(digits_config())


@pytest.mark.slow
def test_digits_import_nothing_heavy():
    program = (
        "import sys; import datasets; before = set(sys.modules)\n"
        "from dataset_helpers import make_config\n"
        "next(iter(datasets.get_streams(make_config('DIGITS', num_channels=1))[0]))\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', 'torchvision', 'scipy'}\n"
        "print(heavy & set(sys.modules))"
    )
    run = run_python(program)
    assert run.stdout.strip() == "set()", run.stderr
