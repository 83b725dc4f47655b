"""Augmentation of training images, and what the network is told of it."""

import math

import pytest
import torch
from dataset_helpers import assert_same, make_config, numbered_source, take, together
from small_runs import small_config

import datasets
import run_lib
from datasets import ImageStream
from score_lib.data.augment import augment, changed, labels_of
from score_lib.runs.train import training_streams

QUARTER = math.pi / 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def changes(count=1, **columns):
    """Parameters of changes, 0 but for the named."""
    names = ["left", "top", "zoom", "angle", "stretch", "direction", "right", "down"]
    rows = torch.zeros(count, len(names))
    for name, value in columns.items():
        rows[:, names.index(name)] = value
    return rows


def disc(height, width, std=4.0, at=(0.0, 0.0)):
    """A Gaussian blob (1, 1, H, W) at (right, down) of the centre."""
    down, right = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    return torch.exp(-((right - at[0]) ** 2 + (down - at[1]) ** 2) / (2 * std**2))[None, None]


def test_nothing_changes_with_probability_0():
    images = torch.rand(50, 3, 5, 7)
    same, labels = augment(images, 0.0, generator())
    assert torch.equal(same, images) and torch.equal(labels, torch.zeros(50, 9))


def test_labels_are_0_exactly_where_nothing_was_changed():
    images = torch.rand(2000, 1, 4, 6)
    found, labels = augment(images, 0.12, generator())
    kept = (found == images).flatten(1).all(1)
    assert torch.equal(kept, (labels == 0).all(1)) and labels.shape == (2000, 9)
    assert found.min() >= 0 and found.max() <= 1
    # Mirrors are made in half of the cases; each of four other changes in all.
    expected = 0.94**2 * 0.88**4
    assert abs(kept.double().mean() - expected) < 4 * (expected / 2000) ** 0.5


EXACT = {
    "mirror": ({"left": 1}, [1, 0, 0, 0, 0, 0, 0, 0, 0], lambda x: x.flip(-1)),
    "upside down": ({"top": 1}, [0, 1, 0, 0, 0, 0, 0, 0, 0], lambda x: x.flip(-2)),
    "quarter": ({"angle": QUARTER}, [0, 0, 0, -1, 1, 0, 0, 0, 0], lambda x: x.rot90(1, (-2, -1))),
    "half": ({"angle": math.pi}, [0, 0, 0, -2, 0, 0, 0, 0, 0], lambda x: x.rot90(2, (-2, -1))),
    "mirror, then quarter": (
        {"left": 1, "angle": QUARTER},
        [1, 0, 0, -1, 1, 0, 0, 0, 0],
        lambda x: x.flip(-1).rot90(1, (-2, -1)),
    ),
    "a pixel to the right": (
        {"right": 1.0},
        [0, 0, 0, 0, 0, 0, 0, 1, 0],
        lambda x: torch.cat([x[..., :1], x[..., :-1]], -1),
    ),
    "two pixels up": (
        {"down": -2.0},
        [0, 0, 0, 0, 0, 0, 0, 0, -2],
        lambda x: torch.cat([x[..., 2:, :], x[..., -2:, :].flip(-2)], -2),
    ),
    "quarter, then a pixel down": (
        {"angle": QUARTER, "down": 1.0},
        [0, 0, 0, -1, 1, 0, 0, 0, 1],
        lambda x: torch.cat([y := x.rot90(1, (-2, -1)), y], -2)[..., 7:15, :],
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_changes_that_keep_pixels_are_exact(case):
    """Of 8 px, of which an eighth is a pixel; beyond its edges an image is reflected."""
    columns, label, expected = EXACT[case]
    images = torch.rand(4, 2, 8, 8, generator=generator())
    rows, wanted = changes(4, **columns), expected(images)
    if case == "quarter, then a pixel down":
        wanted = torch.cat([wanted[..., 1:2, :], wanted[..., 1:, :]], -2)
    tolerance = {"rtol": 0, "atol": 0 if set(columns) <= {"left", "top"} else 5e-6}
    torch.testing.assert_close(changed(images, rows), wanted, **tolerance)
    torch.testing.assert_close(labels_of(rows), torch.tensor(4 * [label]).float())


def moments(image):
    """Mean (2,) and covariance (2, 2) of (right, down) under an image as a density, in pixels."""
    height, width = image.shape
    density = image.double() / image.double().sum()
    right = (torch.arange(width) - (width - 1) / 2).expand(height, width)
    down = (torch.arange(height) - (height - 1) / 2)[:, None].expand(height, width)
    places = torch.stack([right, down]).flatten(1).double()
    mean = places @ density.flatten()
    apart = places - mean[:, None]
    return mean, apart * density.flatten() @ apart.T


def test_zoom_and_stretch_are_powers_of_two():
    """A round blob, in an image that is not square.

    Interpolation changes a variance by up to a fifth of a squared pixel.
    """
    close = {"rtol": 0, "atol": 0.2}
    image, variance = disc(72, 96), 16.0
    mean, covariance = moments(changed(image, changes(zoom=3.0))[0, 0])
    torch.testing.assert_close(mean, torch.zeros(2).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, variance * 2**1.2 * torch.eye(2).double(), **close)
    rows = changes(stretch=2.0, direction=math.pi / 3)
    _, covariance = moments(changed(image, rows)[0, 0])
    along = torch.tensor([math.cos(math.pi / 3), -math.sin(math.pi / 3)]).double()  # up, not down
    across = torch.tensor([math.sin(math.pi / 3), math.cos(math.pi / 3)]).double()
    expected = torch.outer(along, along) * 2**0.8 + torch.outer(across, across) * 2**-0.8
    torch.testing.assert_close(covariance, variance * expected, **close)
    label = [0, 0, 0, 0, 0, 2 * along[0], -2 * along[1], 0, 0]
    torch.testing.assert_close(labels_of(rows)[0], torch.tensor(label).float())


def test_order_of_changes():
    """Enlarged, turned, stretched, and only then shifted, in parts of the sides."""
    image = disc(64, 96, std=2.0, at=(6.0, 0.0))
    rows = changes(zoom=5.0, angle=QUARTER, stretch=5.0, direction=0.0, right=-1.0, down=0.5)
    mean, _ = moments(changed(image, rows)[0, 0])
    # 6 to the right; doubled; turned: up; shrunk to half along it.
    expected = torch.tensor([-96 / 8, -6 + 0.5 * 64 / 8]).double()
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-2)


def test_draws_follow_the_published_distributions():
    _, labels = augment(torch.rand(20_000, 1, 2, 2), 1.0, generator())
    left, top, zoom, cos, sin, along, across, right, down = labels.double().T
    for flip in (left, top):
        assert set(flip.tolist()) == {0, 1} and abs(flip.mean() - 0.5) < 0.015
    for normal in (zoom, right, down):
        assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    torch.testing.assert_close((cos + 1) ** 2 + sin**2, torch.ones(20_000).double())
    assert abs(cos.mean() + 1) < 0.02 and abs(sin.mean()) < 0.02
    # a cos b and a sin b: their squares have the sum a^2.
    assert abs((along**2 + across**2).mean() - 1) < 0.04 and abs((along * across).mean()) < 0.02
    assert abs((zoom * right).mean()) < 0.03 and abs((left * top).mean() - 0.25) < 0.02


def test_changes_of_several_parameters_are_made_whole_and_others_apart():
    _, labels = augment(torch.rand(4000, 1, 2, 2), 0.5, generator())
    turned, stretched, shifted = (labels[:, k : k + 2] != 0 for k in (3, 5, 7))
    for made in (turned, stretched, shifted):
        assert torch.equal(made[:, 0], made[:, 1])
    changes = [labels[:, :1] != 0, labels[:, 1:2] != 0, labels[:, 2:3] != 0]
    made = torch.cat([*changes, turned[:, :1], stretched[:, :1], shifted[:, :1]], 1).double()
    assert made.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06


def test_mirroring_alone():
    """Without probability of the others, half of the images are mirrored, and the network told."""
    images = torch.rand(1000, 1, 3, 4)
    found, labels = augment(images, 0.0, generator(), mirror=True)
    flipped = labels[:, 0].bool()
    assert abs(flipped.double().mean() - 0.5) < 0.06 and not labels[:, 1:].any()
    assert torch.equal(found[flipped], images[flipped].flip(-1))
    assert torch.equal(found[~flipped], images[~flipped])


def test_a_part_of_a_batch_is_changed_as_in_the_whole():
    images = torch.rand(20, 3, 6, 6)
    whole = augment(images, 0.5, generator(3))
    part = augment(images[5:12], 0.5, generator(3), batch=20, first=5)
    for ours, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(ours, theirs[5:12], rtol=0, atol=1e-6)
    other = augment(images, 0.5, generator(4))
    assert not torch.equal(whole[1], other[1])


@pytest.mark.parametrize("p", (-0.1, 1.1))
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=r"data\.augment"):
        augment(torch.rand(2, 1, 4, 4), p, generator())


# --- Streams --------------------------------------------------------------------------------------

OPTIONS = {"seed": 5, "random_flip": True, "augment": 0.3, "dequantize": True}


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stream_resumes_with_any_number_of_workers(workers):
    batches = take(ImageStream(numbered_source(20), 6, **OPTIONS), 4)
    resumed = ImageStream(numbered_source(20), 6, num_workers=workers, **OPTIONS)
    resumed.seek(12)
    assert_same(take(resumed, 2), batches[2:])
    assert batches[0].keys() == {"image", "label", "features"}
    assert batches[0]["features"].shape == (6, 9)
    assert any(batch["features"].any() for batch in batches)


def test_shares_of_ranks_concatenate_to_the_whole():
    whole = take(ImageStream(numbered_source(20), 9, **OPTIONS), 4)
    ranks = [
        take(ImageStream(numbered_source(20), 9, rank=r, world=3, **OPTIONS), 4) for r in range(3)
    ]
    assert_same([together(parts) for parts in zip(*ranks, strict=True)], whole)


def test_augmentation_leaves_the_other_draws_alone():
    """Images without a change are as in a stream without augmentation."""
    plain = take(ImageStream(numbered_source(300), 100, seed=5, dequantize=True), 3)
    options = {**OPTIONS, "random_flip": False}
    batches = take(ImageStream(numbered_source(300), 100, **options), 3)
    for batch, other in zip(batches, plain, strict=True):
        kept = (batch["features"] == 0).all(1)
        assert 10 < kept.sum() < 60 and torch.equal(batch["label"], other["label"])
        assert torch.equal(batch["image"][kept], other["image"][kept])
        assert not torch.equal(batch["image"], other["image"])


@pytest.mark.parametrize("p", (0.0, 0.25))
def test_the_option_changes_the_images_of_training_alone(p):
    """Other batches tell of no change, so that a network is told the same in evaluation."""

    @datasets.register_dataset(name="AUGMENTED")
    def numbered(shape):
        return numbered_source(200), numbered_source(100)

    config = make_config("AUGMENTED", image_size=4, random_flip=True, batch_size=200, augment=p)
    train, test, _ = datasets.get_streams(config)
    batch = next(iter(train))
    others = [test, *datasets.get_streams(config, evaluation=True)[:2]]
    for other in [batch, *(next(iter(stream)) for stream in others)]:
        assert ("features" in other) == (p > 0)
        assert other is batch or not p or not other["features"].any()
    if p:  # flips of all images, told; other changes of some
        features = batch["features"]
        assert abs(features[:, 0].mean() - 0.5) < 0.15
        assert abs(features[:, 2].bool().double().mean() - p) < 0.12
    _, stored, _ = datasets.get_streams(config, evaluation=True, as_uint8=True)
    images = numbered_source(100).images(range(100))
    assert torch.equal(next(iter(stored))["image"], images) and len(next(iter(stored))) == 2
    published, _, _ = datasets.get_dataset(config)
    assert ("features" in next(iter(published))) == (p > 0)


def test_the_unconditional_score_is_of_unchanged_images_too():
    """Without its features, a changed image would count as one of the data."""
    config = small_config(
        "edm/digits", data__augment=0.5, data__num_classes=10, training__batch_size=256,
        training__condition="classes,features", training__condition_dropout=0.4,
    )  # fmt: skip
    run, told = run_lib.setup(config), []
    batch = next(iter(training_streams(run)[0]))
    run.state["model"].register_forward_pre_hook(
        lambda _, __, condition: told.append(condition), with_kwargs=True
    )
    torch.manual_seed(0)
    with torch.no_grad():
        run.loss_fn(train=True)(run.state["model"], *run.arguments(batch))
    assert torch.equal(told[0]["features"], batch["features"]) and batch["features"].any()
    assert 60 < int((told[0]["classes"] == 10).sum()) < 150


def test_no_list_becomes_a_tensor_in_a_change(monkeypatch):
    """On a GPU each step of training would wait there for the list to be copied."""

    def refuse(*_, **__):
        raise AssertionError

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, refuse)
    x = torch.rand(2, 1, 8, 6)
    assert (changed(x, torch.zeros(2, 8)) - x).abs().max() < 1e-5
