"""Operators against their definitions: lower resolution, blur, gray, masks, projections."""

import math

import pytest
import scipy.ndimage
import torch
from operator_cases import CASES, OPERATORS, RCOND, dense, rand, some_pairs

from controllable_generation import (
    GaussianBlur,
    GrayScale,
    Mask,
    RandomProjection,
    SuperResolution,
    get_restoration,
    measure,
)
from score_lib.inverse.operators import LinearOperator
from score_lib.inverse.rescaled import rescaled

# --- Lower resolution, blur, gray ---------------------------------------------------------------


@pytest.mark.parametrize("shape", ((3, 12, 6), (2, 12), (6,)), ids=str)
@pytest.mark.parametrize("factor", (1, 2, 3))
def test_super_resolution_of_blocks_is_exact(shape, factor):
    operator = SuperResolution(shape, factor)
    sides = tuple(n // factor for n in (shape[1:] or shape))
    assert operator.measured_shape == (*shape[:-1][:1], *sides)
    small = rand(4, *operator.measured_shape)
    large = small
    for axis in range(-len(sides), 0):
        large = torch.repeat_interleave(large, factor, dim=axis)
    torch.testing.assert_close(operator.apply(large), small, rtol=1e-14, atol=1e-14)
    assert torch.equal(operator.picture(small), large)


def test_super_resolution_takes_means_of_blocks():
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert SuperResolution((1, 2, 4)).apply(x).tolist() == [[[[2.5, 4.5]]]]


@pytest.mark.parametrize("std", (0.5, 1.0, 1.5, 3.0))
@CASES
def test_blur_is_that_of_scipy(shape, std):
    x = rand(2, *shape)
    widths = (0, *([std] * len(shape) if len(shape) == 1 else [0, *[std] * (len(shape) - 1)]))
    expected = scipy.ndimage.gaussian_filter(x.numpy(), widths, mode="reflect", truncate=4.0)
    result = GaussianBlur(shape, std).apply(x)
    torch.testing.assert_close(result, torch.from_numpy(expected))


def test_a_rescaled_blur_is_undone_without_more_rounding():
    """In float32 A^+ y had twenty times the size of the image."""
    blur, x = GaussianBlur((1, 16, 16), 2.0), rand(2, 1, 16, 16)
    y, scale = blur.apply(x).float(), torch.tensor(0.25)
    torch.testing.assert_close(rescaled(blur, scale).pinv(y), 4 * blur.pinv(y))
    mixed = rescaled(blur, torch.linspace(0.2, 0.3, 16))
    assert get_restoration("pigdm")(mixed, mixed.apply(x)).measurement.isfinite().all()
    with pytest.raises(NotImplementedError, match="units of their own"):
        mixed.pinv(y)


@pytest.mark.parametrize("std", (1.0, 2.5, 4.0))
def test_blur_spreads_a_point_by_its_standard_deviation(std):
    x = torch.zeros(1, 1, 65, 47, dtype=torch.float64)
    x[..., 32, 23] = 1
    y = GaussianBlur(x.shape[1:], std).apply(x)[0, 0]
    for axis, centre in ((0, 32), (1, 23)):
        profile, place = y.sum(1 - axis), torch.arange(y.shape[axis]) - centre
        assert (profile * place).sum() == pytest.approx(0, abs=1e-12)
        # Cutting it off at four standard deviations takes 0.1 % of the variance.
        assert (profile * place**2).sum() == pytest.approx(std**2, rel=2e-3)


@CASES
@pytest.mark.parametrize("std", (0.4, 2.0, 20.0))
def test_blur_keeps_constants_and_means(shape, std):
    operator, x = GaussianBlur(shape, std), rand(3, *shape)
    constant = torch.full_like(x, 0.3)
    torch.testing.assert_close(operator.apply(constant), constant)
    torch.testing.assert_close(operator.apply(x).flatten(1).mean(1), x.flatten(1).mean(1))
    assert operator.picture(x) is x


def test_inverting_a_blur_does_not_enlarge_rounding_beyond_the_cut():
    """By way of A^T y the error in single precision would be larger than the image."""
    operator, x = GaussianBlur((3, 32, 32), 1.2), rand(2, 3, 32, 32)
    restored = operator.pinv(operator.apply(x).float())
    error = (restored - operator.project(x)).norm() / x.norm()
    assert error < torch.finfo(torch.float32).eps / RCOND


@CASES
def test_gray_is_the_mean_over_channels(shape):
    operator, x = GrayScale(shape), rand(4, *shape)
    y = operator.apply(x)
    assert operator.measured_shape == (1, *shape[1:])
    torch.testing.assert_close(y, x.mean(1, keepdim=True))
    assert torch.equal(operator.picture(y), y.expand_as(x))


# --- Masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_shape", ((), (6,), (4, 6), (1, 4, 6), (3, 4, 6), (1, 1, 4, 1)))
@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.float32))
def test_masks_that_broadcast(mask_shape, dtype):
    mask = (rand(*mask_shape) > 0).to(dtype)
    operator, x = Mask((3, 4, 6), mask), rand(5, 3, 4, 6)
    assert torch.equal(operator.apply(x), x * mask)
    assert operator.measured_shape == operator.shape


def test_a_mask_for_each_sample():
    mask = (rand(5, 1, 4, 6) > 0).double()
    operator, x = Mask((3, 4, 6), mask), rand(5, 3, 4, 6)
    for result in (operator.apply(x), operator.adjoint(x), operator.pinv(x), operator.project(x)):
        assert torch.equal(result, x * mask)
    s = torch.linspace(1, 2, 5, dtype=torch.float64)
    weighted = operator.spectral(x, lambda d: s[:, None] * d)
    torch.testing.assert_close(weighted, x * mask * s.reshape(5, 1, 1, 1))
    with pytest.raises(ValueError, match=r"masks for 5 samples, but 4"):
        operator.apply(x[:4])


def test_nothing_leaks_from_under_a_mask():
    mask = torch.arange(12).reshape(3, 4) % 2
    operator = Mask((2, 3, 4), mask)
    x = torch.where(mask == 1, rand(5, 2, 3, 4), torch.nan).requires_grad_()
    results = (
        operator.apply(x),
        operator.adjoint(x),
        operator.pinv(x),
        operator.project(x),
        operator.gram(x),
        operator.observed(x),
        operator.spectral(x, lambda d: 2 * d),
        measure(operator, x, 0.1, noise=lambda y: x),
    )
    for result in results:
        assert result.isfinite().all() and (result[:, :, mask == 0] == 0).all()
    (gradient,) = torch.autograd.grad(operator.apply(x).square().sum(), x)
    assert gradient.isfinite().all()


def test_picture_of_a_mask_fills_what_is_open():
    mask = torch.tensor([1, 0, 1])
    y = torch.tensor([[0.1, torch.nan, 0.3]])
    assert torch.equal(Mask((3,), mask).picture(y, fill=0.5), torch.tensor([[0.1, 0.5, 0.3]]))


def known(operator):
    """1 where an operator that is a mask sees x, (*D)."""
    return operator.apply(torch.ones(1, *operator.shape))[0]


@CASES
@OPERATORS
def test_pictures_of_rescaled_data_are_in_their_units(make, shape):
    """Those of the operator, by the units; what is open has the given value in them."""
    operator, scale = make(shape), 0.5 + rand(*shape).abs()
    y = some_pairs(operator)[1]
    expected = operator.picture(y) / scale
    if isinstance(operator, Mask):
        expected = torch.where(operator.mask, expected, 0.5)
    torch.testing.assert_close(rescaled(operator, scale).picture(y, fill=0.5), expected)


def test_pictures_of_rescaled_data_need_no_singular_values():
    class Twice(LinearOperator):
        def apply(self, x):
            return 2 * x

        adjoint = apply

    y, scale = rand(5, 3), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(rescaled(Twice((3,)), scale).picture(y), 2 * y / scale)


def test_boxes():
    one = torch.zeros(3, 5, 6)
    one[:, 1:3, 4:5] = 1
    assert torch.equal(known(Mask.box((3, 5, 6), (1, 4, 2, 1))), 1 - one)
    centre = torch.zeros(1, 8, 6)
    centre[:, 2:6, 1:4] = 1
    assert torch.equal(known(Mask.box((1, 8, 6))), 1 - centre)
    assert known(Mask.box((2, 8))).tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    assert known(Mask.box((6,), (3, 2))).tolist() == [1, 1, 1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"in whole numbers; not \(0.5, 2\)"):
        Mask.box((6,), (0.5, 2))


def test_the_right_half_is_open():
    assert known(Mask.half((2, 1, 4))).tolist() == [[[1, 1, 0, 0]]] * 2
    assert known(Mask.half((5,))).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("shape", ((3, 10, 12), (2, 50), (40,)), ids=str)
def test_random_pixels_are_a_function_of_the_seed(shape):
    mask = known(Mask.random(shape, 0.3, 1))
    assert mask.mean() == pytest.approx(0.3, abs=1e-6)
    if len(shape) > 1:
        assert (mask == mask[:1]).all(), "channels differ"
    assert torch.equal(mask, known(Mask.random(shape, 0.3, 1)))
    assert not torch.equal(mask, known(Mask.random(shape, 0.3, 2)))
    assert (known(Mask.random(shape, 0.6, 1)) >= mask).all(), "a larger share keeps others"
    assert known(Mask.random(shape, 1e-9)).sum() == (shape[0] if len(shape) > 1 else 1)


# --- Projections --------------------------------------------------------------------------------


@CASES
def test_random_rows_are_orthonormal_and_a_function_of_the_seed(shape):
    n = math.prod(shape)
    rows = dense(RandomProjection(shape, n // 2, seed=4))
    torch.testing.assert_close(rows @ rows.T, torch.eye(n // 2, dtype=torch.float64))
    assert torch.equal(rows, dense(RandomProjection(shape, n // 2, seed=4)))
    assert (rows - dense(RandomProjection(shape, n // 2, seed=5))).abs().max() > 0.1
    torch.testing.assert_close(rows[:3], dense(RandomProjection(shape, 3, seed=4)))
    assert RandomProjection(shape).measured_shape == (n // 4,)


def test_random_rows_have_no_preferred_direction():
    """Each entry of a row has mean 0 and variance 1 / n."""
    rows = torch.stack([dense(RandomProjection((6,), 6, seed=k)) for k in range(600)])
    assert rows.mean(0).abs().max() < 4.5 * math.sqrt(1 / 6 / 600)
    torch.testing.assert_close(
        rows.square().mean(0), torch.full((6, 6), 1 / 6).double(), rtol=0.25, atol=0
    )
