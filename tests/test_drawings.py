"""Pictures of samples: the kind by the shape, the same bytes each time, whole files."""

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
from score_lib.disk import drawings
from score_lib.disk.pictures import make_grid, read_picture, save_grid


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


SHAPES = {
    (3, 1, 5, 8, 8): "volumes",
    (30, 1): "vectors",
    (30, 2): "vectors",
    (30, 9): "vectors",
    (1, 9): "vectors",
    (5, 20, 2): "points",
    (3, 20, 3): "points",
    (3, 2, 20): "series",
    (3, 3, 8, 8): "images",
    (3, 2, 8, 8): "images",
    (30,): "vectors",
    (3, 1, 2, 2, 2, 2): "vectors",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shape_chooses_the_picture(tmp_path, shape):
    path = tmp_path / "new" / "a.png"
    assert evaluation.save_samples_picture(path, normal(*shape)) == SHAPES[shape]
    first, seen = path.read_bytes(), pixels(path)
    assert seen.std() > 0
    evaluation.save_samples_picture(path, normal(*shape))
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    if len(shape) > 1 and shape[0] > 1:
        evaluation.save_samples_picture(path, normal(*shape, seed=1))
        assert not np.array_equal(pixels(path), seen)


def test_the_kind_can_be_chosen(tmp_path):
    path, x = tmp_path / "a.png", normal(4, 16)
    assert evaluation.save_samples_picture(path, x, kind="series") == "series"
    lines = pixels(path)
    assert evaluation.save_samples_picture(path, x) == "vectors"
    assert not np.array_equal(pixels(path), lines)
    assert evaluation.save_samples_picture(path, x[:, None], kind="series") == "series"
    np.testing.assert_array_equal(pixels(path), lines)


@pytest.mark.parametrize("channels, alike", [(1, 2), (5, 3)])
def test_sets_of_points_have_any_number_of_coordinates(tmp_path, channels, alike):
    x, other = normal(3, 20, channels), torch.zeros(3, 20, alike)
    shown = min(channels, alike)
    other[:, :, :shown] = x[:, :, :shown]
    for name, points in (("a", x), ("b", other)):
        path = tmp_path / f"{name}.png"
        assert evaluation.save_samples_picture(path, points, kind="points") == "points"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_slices_of_volumes_are_a_row_for_each_sample(tmp_path):
    x = torch.arange(2 * 16 * 32 * 32).reshape(2, 1, 16, 32, 32).double()
    evaluation.save_samples_picture(tmp_path / "a.png", x)
    places = [1, 3, 5, 7, 9, 11, 13, 15]  # eight of 16
    slices = (x[:, 0, places] / x.max()).flatten(0, 1)[:, None]
    expected = make_grid(slices, columns=8).movedim(0, -1)
    assert np.abs(pixels(tmp_path / "a.png") / 255 - expected.numpy()).max() < 1 / 255


def test_principal_axes_of_known_variance():
    axes = torch.linalg.qr(normal(6, 6).double())[0][:, :3].T
    sizes = torch.tensor([[5.0, 2.0, 1.0]]).double()
    # Coordinates whose covariance is exactly diagonal.
    scores = torch.linalg.qr(_centred(50, 3))[0]
    x = 7 + (scores * sizes) @ axes
    coordinates, shares = drawings.principal_coordinates(x)
    torch.testing.assert_close(shares, torch.tensor([25 / 30, 4 / 30]).double())
    for k in range(2):
        sign = axes[k][axes[k].abs().argmax()].sign()
        torch.testing.assert_close(coordinates[:, k], sign * scores[:, k] * sizes[0, k])


def _centred(*shape):
    x = normal(*shape, seed=1).double()
    return x - x.mean(dim=0)


@pytest.mark.slow
def test_constant_samples_can_be_drawn(tmp_path):
    for shape in ((4, 1), (4, 2), (4, 5), (4, 6, 3), (4, 2, 9), (4, 2, 8, 8), (2, 1, 4, 4, 4)):
        evaluation.save_samples_picture(tmp_path / "a.png", torch.ones(shape))
        assert np.isfinite(pixels(tmp_path / "a.png")).all()


def test_samples_that_cannot_be_drawn_are_refused(tmp_path):
    x, path = normal(4, 5), tmp_path / "a.png"
    for wrong, kind, message in (
        (x / 0, None, "samples with nan or inf cannot be drawn"),
        (x.to(torch.complex64), None, "samples should hold real numbers"),
        (x[:0], None, r"no samples to draw in the shape \(0, 5\)"),
        (x, "movies", "no kind of samples 'movies': choose from images, volumes"),
        (x, "points", r"samples of shape \(4, 5\) cannot be drawn as points"),
        (x, "images", r"cannot be drawn as images"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.save_samples_picture(path, wrong, kind)
    assert not list(tmp_path.iterdir())


def test_a_grid_shows_images_in_rows(tmp_path):
    grey = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1)
    grid = make_grid(grey.expand(3, 1, 32, 40), columns=2)
    assert grid.shape == (3, 2 * (32 + 2) + 2, 2 * (40 + 2) + 2)
    expected = torch.full_like(grid, 0.5)
    expected[:, 2:34, 2:42], expected[:, 2:34, 44:84], expected[:, 36:68, 2:42] = grey.flatten()
    assert torch.equal(grid, expected)
    assert save_grid(tmp_path / "grid.png", grey.expand(3, 3, 32, 40), columns=2)
    shown = read_picture(tmp_path / "grid.png")
    assert torch.equal((255 * shown).round(), (255 * expected).round())


def test_a_grid_of_one_image_is_the_image():
    image = torch.rand(1, 3, 40, 33)
    assert torch.equal(make_grid(image), image[0])
