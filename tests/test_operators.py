"""Linear measurements against dense linear algebra, and conjugate gradients against a solver."""

from __future__ import annotations

import math

import pytest
import scipy.ndimage
import torch
from ml_collections import ConfigDict
from torch.utils._python_dispatch import TorchDispatchMode

from controllable_generation import (
    GaussianBlur,
    GrayScale,
    LinearOperator,
    Mask,
    MatrixOperator,
    RandomProjection,
    Separable,
    SuperResolution,
    get_operator,
    measure,
    register_operator,
)
from score_lib.base.linalg import solve
from score_lib.inverse.configured import build_operator
from score_lib.inverse.operators import OPERATORS as REGISTERED
from score_lib.options import complete

SHAPES = ((3, 8, 6), (1, 8, 8), (2, 12), (16,))
RCOND = 1e-5


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def separable(shape):
    """Wider, taller and of less than full rank, and nothing along the first of several axes."""
    kinds = (
        lambda n: rand(n - 1, n, seed=n),
        lambda n: rand(n + 1, 2, seed=n) @ rand(2, n, seed=n + 1),
    )
    matrices = [kind(n) for kind, n in zip(kinds, shape[-2:], strict=False)]
    return Separable(shape, [None] * (len(shape) - len(matrices)) + matrices)


def matrix_operator(shape):
    """Of rank 5."""
    return MatrixOperator(shape, rand(7, 5) @ rand(5, math.prod(shape), seed=1))


MAKERS = {
    "separable": separable,
    "super_resolution": SuperResolution,
    "blur": lambda shape: GaussianBlur(shape, 0.7),
    "strong_blur": lambda shape: GaussianBlur(shape, 2.0),
    "gray": GrayScale,
    "box": Mask.box,
    "random_mask": lambda shape: Mask.random(shape, 0.4, 3),
    "half": Mask.half,
    "matrix": matrix_operator,
    "projection": RandomProjection,
}
CASES = pytest.mark.parametrize("shape", SHAPES, ids=str)
OPERATORS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def dense(operator):
    """The matrix of an operator, (M, n), column by column."""
    n = math.prod(operator.shape)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *operator.shape)
    return operator.apply(basis).reshape(n, -1).T


def some_pairs(operator, dtype=torch.float64):
    """x (5, *D) and y (5, *M)."""
    x = rand(5, *operator.shape, seed=5, dtype=dtype)
    return x, rand(5, *operator.measured_shape, seed=6, dtype=dtype)


def config_of(options):
    return complete(ConfigDict({"control": options}))


def inner(a, b):
    return (a * b).flatten(1).sum(1)


# --- Every operator against its matrix ----------------------------------------------------------


@CASES
@OPERATORS
def test_adjoint_is_the_transpose(make, shape):
    operator = make(shape)
    x, y = some_pairs(operator)
    image, back = operator.apply(x), operator.adjoint(y)
    assert image.shape == y.shape and back.shape == x.shape
    torch.testing.assert_close(inner(image, y), inner(x, back))
    torch.testing.assert_close(operator.gram(y), operator.apply(back), rtol=0, atol=0)


@CASES
@OPERATORS
def test_pseudo_inverse_of_the_dense_matrix(make, shape):
    operator = make(shape)
    _, y = some_pairs(operator)
    expected = y.flatten(1) @ torch.linalg.pinv(dense(operator), rtol=RCOND).T
    torch.testing.assert_close(operator.pinv(y).flatten(1), expected)


@CASES
@OPERATORS
def test_weights_along_the_singular_vectors_of_the_dense_matrix(make, shape):
    """With a weight that is large at 0, where it must not count, and differs between samples."""
    operator = make(shape)
    x, _ = some_pairs(operator)
    s = torch.linspace(1, 2, 5, dtype=torch.float64)
    _, d, Vh = torch.linalg.svd(dense(operator), full_matrices=False)
    d, Vh = d[d > RCOND * d[0]], Vh[d > RCOND * d[0]]

    def shared(d):
        return 1 / (0.01 + d)

    def per_sample(d):
        return torch.cos(s[:, None] * d)

    for weight in (shared, per_sample):
        expected = (x.flatten(1) @ Vh.T * weight(d[None])) @ Vh
        torch.testing.assert_close(operator.spectral(x, weight).flatten(1), expected)


@CASES
@OPERATORS
def test_weights_see_only_singular_values_that_count(make, shape):
    operator, seen = make(shape), []

    def weight(d):
        seen.append(d)
        return torch.ones_like(d)

    operator.spectral(rand(2, *shape), weight)
    values = torch.linalg.svdvals(dense(operator))
    values = values[values > RCOND * values[0]]
    (d,) = seen
    assert d.dim() == 2 and len(d) == 1
    extremes = torch.stack([d.max(), d.min()])
    torch.testing.assert_close(extremes, torch.stack([values.max(), values.min()]))


@CASES
@OPERATORS
def test_projection_onto_the_row_space(make, shape):
    operator = make(shape)
    x, y = some_pairs(operator)
    z = x.flip(0)
    projected = operator.project(x)
    torch.testing.assert_close(operator.project(projected), projected)
    torch.testing.assert_close(inner(projected, z), inner(x, operator.project(z)))
    torch.testing.assert_close(operator.project(operator.pinv(y)), operator.pinv(y))
    # What is left over is mapped to zero, up to the singular values that count as zero.
    largest = torch.linalg.matrix_norm(dense(operator), ord=2)
    left_over = operator.apply(x - projected).flatten(1).norm(dim=1)
    assert (left_over <= (1e-12 + RCOND * largest) * x.flatten(1).norm(dim=1)).all()


@CASES
@OPERATORS
def test_single_precision(make, shape):
    """Results keep the dtype, and differ from those in float64 by rounding times condition."""
    operator = make(shape)
    x = rand(5, *shape, seed=5)
    y = operator.apply(x)
    d = torch.linalg.svdvals(dense(operator))
    d = d[d > RCOND * d[0]]
    methods = {"apply": x, "adjoint": y, "project": x, "pinv": y, "gram": y, "picture": y}
    for name, argument in methods.items():
        expected = getattr(operator, name)(argument)
        result = getattr(operator, name)(argument.float())
        assert result.dtype == torch.float32 and result.device == argument.device
        condition = d[0] / d[-1] if name == "pinv" else 1.0
        size = (
            argument.norm() / d[0] if name == "pinv" else argument.norm() * d[0].clamp(min=1) ** 2
        )
        assert (result - expected).norm() <= 3e-6 * condition * size, name


@CASES
@OPERATORS
def test_results_lie_in_order_in_memory(make, shape):
    """Noise like a result is drawn in the order of its memory: the same for every operator."""
    operator = make(shape)
    x, y = some_pairs(operator)
    for result in (operator.apply(x), operator.adjoint(y), operator.project(x), operator.pinv(y)):
        assert result.is_contiguous()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_flow(make):
    operator = make((2, 4, 4))
    x, y = some_pairs(operator)
    for fn, argument in ((operator.apply, x), (operator.adjoint, y), (operator.project, x)):
        assert torch.autograd.gradcheck(fn, argument.requires_grad_(), fast_mode=True)


class Operations(TorchDispatchMode):
    """Names of the tensor operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# What makes the host wait for the device.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


@OPERATORS
def test_what_is_held_is_computed_and_moved_once(make):
    operator = make((2, 8, 6))
    x, y = some_pairs(operator, torch.float32)

    def use():
        for result in (operator.apply(x), operator.adjoint(y), operator.pinv(y)):
            assert result.dtype == torch.float32
        operator.spectral(x, lambda d: 1 / d)

    use()
    with Operations() as operations:
        use()
    assert operations.names
    assert not {"_to_copy", "_linalg_svd", "linalg_qr", "eye"} & set(operations.names)
    assert not WAITS & set(operations.names)


@OPERATORS
def test_results_are_on_the_device_of_the_argument(make):
    """On the device "meta", which refuses tensors from elsewhere and has no numbers to wait for."""
    operator = make((2, 8, 6))
    x, y = (tensor.to("meta") for tensor in some_pairs(operator))
    s = torch.ones(5, device="meta", dtype=x.dtype)
    for result in (
        operator.adjoint(y),
        operator.pinv(y),
        operator.picture(y, fill=0.5),
        operator.spectral(x, lambda d: s[:, None] / d),
        operator.adjoint(solve(lambda u: u + operator.gram(u), y, 2)),
    ):
        assert (result.device.type, result.shape) == ("meta", x.shape)
    assert measure(operator, x, 0.1).device.type == "meta"


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


def test_boxes():
    one = torch.zeros(3, 5, 6)
    one[:, 1:3, 4:5] = 1
    assert torch.equal(known(Mask.box((3, 5, 6), (1, 4, 2, 1))), 1 - one)
    centre = torch.zeros(1, 8, 6)
    centre[:, 2:6, 1:4] = 1
    assert torch.equal(known(Mask.box((1, 8, 6))), 1 - centre)
    assert known(Mask.box((2, 8))).tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    assert known(Mask.box((6,), (3, 2))).tolist() == [1, 1, 1, 0, 0, 1]


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


# --- Measurements -------------------------------------------------------------------------------


def test_measurements_are_the_image_plus_noise():
    operator, x = SuperResolution((1, 4, 4)), rand(3, 1, 4, 4)
    noise = rand(3, 1, 2, 2, seed=9)
    y = measure(operator, x, 0.5, noise=lambda like: noise.to(like))
    torch.testing.assert_close(y, operator.apply(x) + 0.5 * noise)
    torch.manual_seed(0)
    drawn = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    torch.manual_seed(0)
    torch.testing.assert_close(measure(operator, x, 2.0), operator.apply(x) + 2 * drawn)


def test_measurements_without_noise_draw_none():
    operator, x = SuperResolution((4,)), rand(3, 4)
    before = torch.get_rng_state()
    assert torch.equal(measure(operator, x), operator.apply(x))
    assert torch.equal(before, torch.get_rng_state())


# --- By name, and users' own --------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERED)
@CASES
def test_every_name_builds_from_defaults(name, shape):
    operator = build_operator(name, config_of({}), shape)
    x, _ = some_pairs(operator)
    assert operator.pinv(operator.apply(x)).shape == x.shape


OPTIONS = {
    "super_resolution": ({"factor": 3}, lambda shape: SuperResolution(shape, 3), {"factor": 2}),
    "blur": ({"blur_std": 2.0}, lambda shape: GaussianBlur(shape, 2.0), {"blur_std": 1.0}),
    "gray": ({}, GrayScale, {}),
    "box": ({"box": (0, 1, 2, 3)}, lambda s: Mask.box(s, (0, 1, 2, 3)), {"box": ()}),
    "random_mask": (
        {"keep": 0.5, "operator_seed": 3},
        lambda shape: Mask.random(shape, 0.5, 3),
        {"keep": 0.25, "operator_seed": 0},
    ),
    "half": ({}, Mask.half, {}),
    "projection": (
        {"num_measurements": 7, "operator_seed": 3},
        lambda shape: RandomProjection(shape, 7, 3),
        {"num_measurements": 0, "operator_seed": 0},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options, expected, defaults = OPTIONS[name]
    shape = (2, 6, 6)

    def build(options):
        return dense(build_operator(name, config_of(options), shape))

    assert torch.equal(build(options), dense(expected(shape)))
    assert torch.equal(build(defaults), build({}))


def test_options_cover_every_name():
    assert set(OPTIONS) == set(REGISTERED)


class Doubled(LinearOperator):
    """A user's operator with no more than it must have."""

    def apply(self, x):
        return 2 * self.check_x(x)

    def adjoint(self, y):
        return 2 * self.check_y(y)


def test_own_operator_with_two_methods():
    operator, x = Doubled((2, 3)), rand(4, 2, 3)
    assert torch.equal(operator.gram(x), 4 * x)
    assert torch.equal(measure(operator, x, 1.0, noise=torch.ones_like), 2 * x + 1)
    for method in (
        operator.pinv,
        operator.project,
        lambda x: operator.spectral(x, torch.ones_like),
    ):
        with pytest.raises(NotImplementedError, match=r"^Doubled does not know its singular value"):
            method(x)


def test_own_operator_with_singular_values():
    class Known(Doubled):
        def spectral(self, x, weight):
            return weight(x.new_full((1, 1), 2.0)).reshape(-1, 1, 1) * x

    operator, x = Known((2, 3)), rand(4, 2, 3)
    torch.testing.assert_close(operator.pinv(operator.apply(x)), x)
    torch.testing.assert_close(operator.project(x), x)


# --- Mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "name": (lambda: get_operator("blurr"), r"known are blur, box, gray.*did you mean 'blur'"),
    "factor": (lambda: SuperResolution((3, 8, 6), 4), r"factor 4 .*\(8, 6\)"),
    "no factor": (lambda: SuperResolution((3, 8, 6), 0), "factor 0"),
    "std": (lambda: GaussianBlur((3, 8), 0.0), "above 0 pixels, not 0.0"),
    "std nan": (lambda: GaussianBlur((3, 8), math.nan), "above 0 pixels, not nan"),
    "mask shape": (lambda: Mask((4,), torch.ones(3)), r"mask has shape \(3,\).*\(4,\)"),
    "mask too large": (lambda: Mask((1, 4), torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
    "mask dims": (lambda: Mask((4,), torch.ones(1, 2, 4)), r"mask has shape \(1, 2, 4\)"),
    "mask values": (lambda: Mask((4,), torch.full((4,), 0.5)), "only 1"),
    "mask nan": (lambda: Mask((4,), torch.full((4,), math.nan)), "only 1"),
    "box outside": (lambda: Mask.box((3, 8, 6), (4, 0, 5, 2)), r"\(8, 6\).*not \(4, 0, 5, 2\)"),
    "box empty": (lambda: Mask.box((3, 8, 6), (4, 0, 0, 2)), "top and left"),
    "box before": (lambda: Mask.box((3, 8, 6), (-1, 0, 2, 2)), "top and left"),
    "box entries": (lambda: Mask.box((3, 8, 6), (1, 2, 3)), r"not \(1, 2, 3\)"),
    "keep": (lambda: Mask.random((3, 8, 6), 1.5), "cannot be 1.5"),
    "keep none": (lambda: Mask.random((3, 8, 6), 0.0), "cannot be 0.0"),
    "measurements": (lambda: RandomProjection((2, 3), 7), "1 to 6 measurements, not 7"),
    "memory": (lambda: RandomProjection((3, 1024, 1024)), "do not fit into memory: 341 would"),
    "matrix": (lambda: MatrixOperator((2, 3), torch.ones(2, 5)), r"\(6,\).*\(2, 5\)"),
    "matrices": (lambda: Separable((2, 3), [None]), r"\(2, 3\).*each axis"),
    "axis": (lambda: Separable((2, 3), [None, torch.ones(3, 2)]), r"\[None, \(3, 2\)\]"),
    "noise": (lambda: measure(GrayScale((3,)), torch.ones(1, 3), -1.0), "0 or more, not -1.0"),
    "weights": (
        lambda: SuperResolution((4,)).spectral(torch.ones(3, 4), lambda d: torch.ones(3)),
        r"\(1, 2\) or \(3, 2\), not \(3,\).*s\[:, None\]",
    ),
    "taken name": (lambda: register_operator(name="blur")(Doubled), "already registered"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake):
    action, message = mistake
    with pytest.raises(ValueError, match=message):
        action()


@OPERATORS
def test_other_shapes_are_refused(make):
    operator = make((2, 8, 6))
    expected = r"\(B, 2, 8, 6\), not \(3, 2, 8, 7\)"
    for method in (operator.apply, operator.project):
        with pytest.raises(ValueError, match=f"takes x of shape {expected}"):
            method(torch.ones(3, 2, 8, 7))
    wrong = torch.ones(3, *operator.measured_shape, 2)
    for method in (operator.adjoint, operator.pinv, operator.picture):
        with pytest.raises(ValueError, match=r"takes y of shape \(B, "):
            method(wrong)


# --- Conjugate gradients ------------------------------------------------------------------------


def systems(batch=4, n=6, dtype=torch.float64):
    """Symmetric positive definite matrices (B, n, n), one a sample, and what applies them."""
    root = rand(batch, n, n, dtype=dtype)
    S = root @ root.mT + torch.eye(n, dtype=dtype)
    return S, lambda u: torch.einsum("bij,bj->bi", S, u.flatten(1)).reshape(u.shape)


@pytest.mark.parametrize("shape", ((6,), (2, 3), (1, 6, 1)), ids=str)
@pytest.mark.parametrize("iterations", (6, 9, 100))
def test_conjugate_gradients_solve_in_as_many_steps_as_dimensions(shape, iterations):
    S, apply = systems()
    b = rand(4, *shape, seed=2)
    u = solve(apply, b, iterations)
    assert u.shape == b.shape
    expected = torch.linalg.solve(S, b.flatten(1))
    torch.testing.assert_close(u.flatten(1), expected, rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_take_a_step_for_each_distinct_eigenvalue():
    d = torch.tensor([1.0, 1.0, 7.0, 7.0, 7.0], dtype=torch.float64)
    b = rand(3, 5)
    torch.testing.assert_close(solve(lambda u: d * u, b, 2), b / d)
    assert (solve(lambda u: d * u, b, 1) - b / d).abs().max() > 0.01


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_solved_sample_stays_while_others_go_on(dtype):
    """Among them one whose right side is zero, and one that a single step solves."""
    S, _ = systems(dtype=dtype)
    S[1] = 3 * torch.eye(6, dtype=dtype)
    b = rand(4, 6, seed=2, dtype=dtype)
    b[0] = 0
    u = solve(lambda u: torch.einsum("bij,bj->bi", S, u), b, 200)
    assert (u[0] == 0).all()
    assert torch.equal(u[1], solve(lambda u: 3 * u, b[1:2], 1)[0])
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    expected = torch.linalg.solve(S.double(), b.double()).to(dtype)
    torch.testing.assert_close(u, expected, rtol=tolerance, atol=tolerance)


def test_tolerance_is_relative_to_each_right_side():
    S, apply = systems()
    b = rand(4, 6, seed=2) * torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)[:, None]
    u = solve(apply, b, 50, tolerance=0.1)
    residual = (b - apply(u)).norm(dim=1) / b.norm(dim=1)
    assert (residual <= 0.1).all() and (residual > 1e-6).all()
    for k in range(4):
        alone = solve(lambda u, k=k: u @ S[k], b[k : k + 1], 50, tolerance=0.1)
        torch.testing.assert_close(u[k : k + 1], alone)


def test_conjugate_gradients_never_wait_for_the_device():
    calls = []

    def apply(u):
        calls.append(u.shape)
        return 2 * u

    b = rand(3, 4)
    with Operations() as operations:
        solve(apply, b, 7)
    assert len(calls) == 7
    assert not WAITS & set(operations.names)


def test_gradients_of_a_solution():
    """Among them those of a sample that was solved from the start: nothing is divided by zero."""
    S, apply = systems()
    b, c = rand(4, 6, seed=2), rand(4, 6, seed=3)
    b[0] = 0
    b.requires_grad_()
    (gradient,) = torch.autograd.grad((c * solve(apply, b, 20)).sum(), b)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[1:], torch.linalg.solve(S, c)[1:], rtol=1e-6, atol=1e-6)


@OPERATORS
def test_conjugate_gradients_on_the_system_of_a_noisy_measurement(make):
    """(sigma_y^2 I + A A^T) u = r."""
    operator = make((2, 8, 6))
    _, r = some_pairs(operator)
    matrix = dense(operator)
    S = 0.3**2 * torch.eye(len(matrix), dtype=torch.float64) + matrix @ matrix.T
    u = solve(lambda u: 0.3**2 * u + operator.gram(u), r, 3 * len(matrix))
    expected = torch.linalg.solve(S, r.flatten(1), left=False)
    torch.testing.assert_close(u.flatten(1), expected, rtol=1e-6, atol=1e-6)
