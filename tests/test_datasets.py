"""Streams: order, flips, dequantisation, resuming, sharing; the digits; scalers."""

import colorsys
import importlib.util
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from dataset_helpers import make_config, numbered_source

from score_lib import data as datasets
from score_lib.data import DataError, ImageStream, MemorySource, Source, register_dataset
from score_lib.data.sources import Remembered, Subset

ROOT = pathlib.Path(__file__).resolve().parent.parent


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert torch.equal(batch["label"], other["label"])


def together(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label")}


# Order.


def test_training_order_is_one_permutation_after_the_other():
    """50 examples in batches of 7: batches straddle the epochs, and nothing is dropped."""
    order = together(take(ImageStream(numbered_source(50), 7, seed=1), 50))["label"]
    epochs = order.reshape(7, 50)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = take(ImageStream(numbered_source(5), 12), 1)
    assert sorted(batch["label"][:10].tolist()) == sorted(2 * list(range(5)))


def test_order_depends_on_the_seed_alone():
    source = numbered_source(50)
    first, again, other = (take(ImageStream(source, 8, seed=s), 10) for s in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first[0]["label"], other[0]["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_continues_exactly(workers):
    """Across the border of epochs at 20, with every random draw that a stream makes."""
    options = {"seed": 3, "random_flip": True, "dequantize": True}
    whole = ImageStream(numbered_source(20), 6, **options)
    batches = take(whole, 9)
    assert whole.position == 54
    for done in (0, 1, 3, 4, 7):
        resumed = ImageStream(numbered_source(20), 6, num_workers=workers, **options)
        resumed.seek(6 * done)
        assert_same(take(resumed, 9 - done), batches[done:])
        assert resumed.position == 54


def test_a_second_iteration_goes_on_where_the_first_was_left():
    stream = ImageStream(numbered_source(20), 6)
    batches = take(stream, 2) + take(stream, 3)
    assert_same(batches, take(ImageStream(numbered_source(20), 6), 5))


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(ImageStream(numbered_source(9), 4, random_flip=True, dequantize=True), 3)
    list(ImageStream(numbered_source(9), 4, evaluation=True, dequantize=True))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_is_one_ordered_pass_and_drops_nothing():
    source = numbered_source(10)
    stream = ImageStream(source, 4, evaluation=True)
    assert len(stream) == 3
    for _ in range(2):
        batches = list(stream)
        assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
        assert together(batches)["label"].tolist() == list(range(10))
    raw = (together(batches)["image"] * 255).round().to(torch.uint8)
    assert torch.equal(raw, source.images(range(10)))


def test_an_abandoned_evaluation_starts_again_and_seek_skips():
    stream = ImageStream(numbered_source(10), 4, evaluation=True)
    take(stream, 1)
    assert len(list(stream)) == 3
    stream.seek(8)
    assert [batch["label"].tolist() for batch in stream] == [[8, 9]]
    assert len(list(stream)) == 3


# Several processes.


@pytest.mark.parametrize("batch_size", [7, 9])
def test_shares_of_three_processes_make_the_batches_of_one(batch_size):
    options = {"seed": 5, "random_flip": True, "dequantize": True}
    whole = take(ImageStream(numbered_source(20), batch_size, **options), 6)
    ranks = [
        take(ImageStream(numbered_source(20), batch_size, rank=r, world=3, **options), 6)
        for r in range(3)
    ]
    assert_same([together(parts) for parts in zip(*ranks, strict=True)], whole)


@pytest.mark.parametrize("size, batch_size", [(20, 7), (7, 3), (2, 5), (10, 2)])
def test_shares_cover_an_evaluation_exactly_once(size, batch_size):
    options = {"evaluation": True, "dequantize": True}
    whole = together(list(ImageStream(numbered_source(size), batch_size, **options)))
    parts = [
        list(ImageStream(numbered_source(size), batch_size, rank=r, world=3, **options))
        for r in range(3)
    ]
    shared = together([batch for part in parts for batch in part])
    order = shared["label"].argsort()
    assert shared["label"][order].tolist() == list(range(size))
    assert torch.equal(shared["image"][order], whole["image"])


# Flips, dequantisation, floats.


def test_flips_mirror_left_to_right_with_probability_one_half():
    source = numbered_source(400)
    batch = together(take(ImageStream(source, 100, random_flip=True), 20))
    raw = source.images(batch["label"].numpy()).float() / 255
    kept = (batch["image"] == raw).flatten(1).all(1)
    mirrored = (batch["image"] == raw.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("evaluation", [False, True])
def test_dequantisation_spreads_each_level_over_its_cell(levels, evaluation):
    source = numbered_source(300, levels=levels)
    stream = ImageStream(source, 100, dequantize=True, evaluation=evaluation)
    batch = together(take(stream, 3))
    x, raw = batch["image"], source.images(batch["label"].numpy())
    assert x.dtype == torch.float32
    assert (x >= 0).all() and (x < 1).all()
    assert torch.equal((x * levels).floor().to(torch.uint8), raw)
    u = x.double() * levels - raw
    assert abs(u.mean() - 0.5) < 4 * 12**-0.5 / u.numel() ** 0.5
    assert abs(u.var() - 1 / 12) < 0.005


def test_noise_next_to_one_does_not_reach_the_next_level(monkeypatch):
    largest = 1 - 2**-24
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, largest))
    images = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    for levels in (17, 256):
        stream = ImageStream(MemorySource(images[:levels], levels=levels), levels, dequantize=True)
        x = take(stream, 1)[0]["image"].flatten().sort().values
        assert x.max() < 1
        assert torch.equal((x * levels).floor(), torch.arange(float(levels)))


def test_evaluation_noise_belongs_to_the_example():
    options = {"evaluation": True, "dequantize": True}
    small, large, other = (
        together(list(ImageStream(numbered_source(10), size, seed=seed, **options)))["image"]
        for size, seed in ((3, 0), (10, 0), (10, 1))
    )
    assert torch.equal(small, large)
    assert not torch.equal(large, other)
    # Equal images get unequal noise.
    constant = MemorySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    first, second = together(list(ImageStream(constant, 2, **options)))["image"]
    assert not torch.equal(first, second)


def test_setting_the_seed_gives_fresh_evaluation_noise():
    stream = ImageStream(numbered_source(4), 4, evaluation=True, dequantize=True)
    first = next(iter(stream))["image"]
    stream.seed = 1
    assert not torch.equal(first, next(iter(stream))["image"])


def test_floats_divide_by_the_last_level():
    images = torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    (batch,) = ImageStream(MemorySource(images, levels=17), 3, evaluation=True)
    assert batch["image"].flatten().tolist() == [0, 0.25, 1]
    assert batch["label"].tolist() == [0, 0, 0]


def test_statistics_see_bytes():
    source = numbered_source(10)
    stream = ImageStream(source, 4, evaluation=True, as_uint8=True)
    assert torch.equal(together(list(stream))["image"], source.images(range(10)))
    images = torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    stream = ImageStream(MemorySource(images, levels=17), 3, evaluation=True, as_uint8=True)
    (batch,) = stream
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].flatten().tolist() == [0, 64, 255]


def test_batches_arrive_on_the_device():
    stream = ImageStream(numbered_source(8), 4, random_flip=True, dequantize=True).to("meta")
    for batch in (
        next(iter(stream)),
        next(iter(ImageStream(numbered_source(8), 4, device="meta"))),
    ):
        assert batch["image"].device.type == batch["label"].device.type == "meta"
        assert batch["image"].shape == (4, 3, 4, 4) and batch["image"].dtype == torch.float32


# Sources and errors.


def test_remembered_images_are_read_once():
    asked = []

    class Counting(Source):
        shape = (3, 4, 4)

        def __len__(self):
            return 6

        def read(self, numbers):
            asked.extend(numbers.tolist())
            return numbered_source(6).read(numbers)

    source = Remembered(Counting())
    expected = numbered_source(6).read(np.array([4, 1, 5]))
    for _ in range(2):
        images, labels = source.read(np.array([4, 1, 5]))
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    assert sorted(asked) == [1, 4, 5]


class Failing(Source):
    shape = (1, 2, 2)

    def __len__(self):
        return 8

    def read(self, numbers):
        raise DataError("image 3 is broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_stays_one_sentence(workers):
    with pytest.raises(DataError, match=r"^image 3 is broken$"):
        next(iter(ImageStream(Failing(), 4, num_workers=workers)))


def test_what_a_source_gives_is_checked():
    class Wrong(Failing):
        def read(self, numbers):
            return torch.zeros(len(numbers), 2, 2), None

    with pytest.raises(DataError, match=r"Wrong gave torch.float32 \(4, 2, 2\) for 4 uint8"):
        next(iter(ImageStream(Wrong(), 4)))


def test_options_out_of_range():
    source = numbered_source(8)
    for options, message in [
        ({"rank": 2, "world": 2}, "rank 2 is not one of 2"),
        ({"batch_size": 0}, "a batch of 0 cannot"),
        ({"batch_size": 2, "world": 3}, "a batch of 2 cannot be shared by 3"),
        ({"as_uint8": True, "random_flip": True}, "as_uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageStream(source, **{"batch_size": 4, **options})
    with pytest.raises(DataError, match="no examples"):
        ImageStream(Subset(source, np.arange(0)), 4)
    with pytest.raises(ValueError, match="no position 9 in 8"):
        ImageStream(source, 4, evaluation=True).seek(9)
    with pytest.raises(TypeError, match="endless"):
        len(ImageStream(source, 4))


# From a config.


@pytest.mark.parametrize("centered, low, high", [(True, -1.0, 1.0), (False, 0.0, 1.0)])
def test_scalers_map_to_the_range_of_the_network_and_back(centered, low, high):
    config = make_config("DIGITS", centered=centered)
    x = torch.linspace(0, 1, 11)
    scaled = datasets.get_data_scaler(config)(x)
    assert (scaled[0], scaled[-1]) == (low, high)
    torch.testing.assert_close(datasets.get_data_inverse_scaler(config)(scaled), x)


def digits_config(**data):
    return make_config("DIGITS", num_channels=1, **data)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    original = load_digits()
    _, _, info = datasets.get_dataset(digits_config())
    parts = [source.read(np.arange(len(source))) for source in info.sources.values()]
    images = torch.cat([part[0] for part in parts]).flatten(1).numpy()
    labels = torch.cat([part[1] for part in parts]).numpy()
    expected = np.c_[original.data, original.target]
    rows = np.c_[images, labels]
    assert np.array_equal(expected[np.lexsort(expected.T)], rows[np.lexsort(rows.T)])
    held_out = {tuple(row) for row in rows[info.num_examples["train"] :]}
    for digit in range(10):
        sixths = expected[original.target == digit][5::6]
        assert held_out.issuperset(map(tuple, sixths.astype(int)))


def test_the_held_out_digits_are_a_fixed_sixth_of_each_class():
    _, _, info = datasets.get_dataset(digits_config())
    _, _, other = datasets.get_dataset(digits_config(seed=7))
    assert (info.name, info.shape, info.levels, info.num_classes) == ("DIGITS", (1, 8, 8), 17, 10)
    assert info.num_examples == {"train": 1501, "test": 296}
    train, test = (s.read(np.arange(len(s))) for s in info.sources.values())
    counts = torch.bincount(train[1]), torch.bincount(test[1])
    assert torch.equal(counts[1], (counts[0] + counts[1]) // 6)
    assert torch.equal(test[0], other.sources["test"].images(range(296)))


def test_color_digits_are_the_digits_in_their_order_each_in_a_bright_color():
    _, _, gray = datasets.get_dataset(digits_config())
    _, _, color = datasets.get_dataset(make_config("COLOR_DIGITS"))
    assert (color.shape, color.levels, color.num_classes) == ((3, 8, 8), 256, 10)
    for split, source in color.sources.items():
        (ink, expected_labels), (images, labels) = (
            info.sources[split].read(np.arange(len(source))) for info in (gray, color)
        )
        assert torch.equal(labels, expected_labels) and images.dtype == torch.uint8
        hues = ((5**0.5 - 1) / 2 * number % 1 for number in gray.sources[split]._numbers)
        tints = torch.tensor([colorsys.hsv_to_rgb(hue, 0.85, 1) for hue in hues])
        expected = 255 / 16 * ink * tints[:, :, None, None]
        assert (images - expected).abs().max() < 0.501  # rounded to whole levels
        assert torch.equal(images.amax(1, keepdim=True), (255 / 16 * ink).round().byte())


def test_neither_label_nor_grey_value_says_the_color_of_a_digit():
    _, _, info = datasets.get_dataset(make_config("COLOR_DIGITS"))
    images, labels = info.sources["train"].read(np.arange(1501))
    tints = images.flatten(2).amax(2).double() / 255  # where there is most ink
    hues = torch.tensor([colorsys.rgb_to_hsv(*tint)[0] for tint in tints.tolist()])
    for label in range(10):
        sixths = torch.bincount((6 * hues[labels == label]).long(), minlength=6)
        assert sixths.min() > sixths.sum() / 12  # half of what it would be for equal parts
    by_grey = tints[tints.mean(1).argsort()]
    from_the_next = (by_grey[1:] - by_grey[:-1]).norm(dim=1)
    assert from_the_next.mean() > 0.9 * torch.pdist(tints).mean()


def test_get_dataset_for_training():
    config = digits_config(batch_size=32, random_flip=True)
    config.eval.batch_size = 5
    train, test, _ = datasets.get_dataset(config)
    batch, held_out = next(iter(train)), next(iter(test))
    for images, labels in (batch.values(), held_out.values()):
        assert images.shape == (32, 1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (32,) and labels.dtype == torch.int64
    assert train.random_flip and not test.random_flip
    assert len(take(test, 20)) == 20  # endless: 296 images have 9 such batches


def test_get_dataset_for_evaluation():
    config = digits_config(random_flip=True)
    config.eval.batch_size = 100
    train, test, info = datasets.get_dataset(config, evaluation=True)
    assert [len(batch["label"]) for batch in test] == [100, 100, 96]
    images = together(list(train))["image"]
    assert torch.equal((images * 16).to(torch.uint8), info.sources["train"].images(range(1501)))


def test_get_dataset_dequantises_and_shares():
    config = digits_config(batch_size=6)
    train, _, _ = datasets.get_dataset(config, uniform_dequantization=True)
    parts = [datasets.get_dataset(config, True, rank=r, world=2)[0] for r in range(2)]
    (whole,) = take(train, 1)
    assert (whole["image"] > 0).all() and (whole["image"] < 1).all()
    assert_same([together([next(iter(part)) for part in parts])], [whole])


def test_levels_can_be_set_and_are_checked():
    stream, _, info = datasets.get_dataset(digits_config(levels=20))
    assert info.levels == 20
    assert next(iter(stream))["image"].max() <= 16 / 19
    for levels, message in [(10, "data.levels=10 allows 0 to 9"), (300, "data.levels=300")]:
        with pytest.raises(DataError, match=message):
            next(iter(datasets.get_dataset(digits_config(levels=levels))[0]))


def test_a_users_own_source():
    @register_dataset(name="MINE")
    def mine(config):
        return numbered_source(12), numbered_source(4)

    train, test, info = datasets.get_dataset(make_config("MINE", image_size=4), evaluation=True)
    assert info.num_examples == {"train": 12, "test": 4}
    assert (len(train), len(test)) == (3, 1)


def test_mistakes_in_the_config(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown dataset 'DIGIT'.*did you mean 'DIGITS'"):
        datasets.get_dataset(make_config("DIGIT"))
    for size, channels in ((28, 1), (8, 3)):
        config = make_config("DIGITS", image_size=size, num_channels=channels)
        with pytest.raises(DataError, match=r"set data.image_size=8 and data.num_channels=1"):
            datasets.get_dataset(config)
    for size, channels in ((28, 3), (8, 1)):
        config = make_config("COLOR_DIGITS", image_size=size, num_channels=channels)
        with pytest.raises(DataError, match=r"^COLOR_DIGITS are RGB.*data.num_channels=3$"):
            datasets.get_dataset(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        datasets.get_dataset(digits_config())


def test_digits_import_nothing_heavy():
    program = (
        "import sys; import datasets; before = set(sys.modules)\n"
        "from dataset_helpers import make_config\n"
        "next(iter(datasets.get_dataset(make_config('DIGITS', num_channels=1))[0]))\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', 'torchvision', 'scipy'}\n"
        "print(heavy & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "set()", run.stderr
