"""Linear measurements: every operator against its dense matrix, names, options and mistakes."""

import math

import pytest
import torch
from ml_collections import ConfigDict
from operator_cases import (
    CASES,
    MAKERS,
    OPERATORS,
    RCOND,
    WAITS,
    Operations,
    dense,
    rand,
    some_pairs,
)

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
from score_lib.inverse.measurements import build_operator
from score_lib.inverse.operators import OPERATORS as REGISTERED
from score_lib.inverse.restoration import solve
from score_lib.options import complete


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
    # The rest is mapped to zero, up to the singular values that count as zero.
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


@OPERATORS
def test_constants_are_computed_and_moved_once(make):
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


@pytest.mark.parametrize("name", list(REGISTERED))
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
    """Other tests register more."""
    ours = {name for name in REGISTERED if get_operator(name).__module__.startswith("score_lib.")}
    assert set(OPTIONS) == ours


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


def test_own_operator_with_small_singular_values():
    """Rounding is that of A^+, which grows like 1 / d, not that of A^T and then d^-2."""
    d = torch.logspace(0, -2.5, 8)
    left, right = (torch.linalg.qr(rand(8, 8))[0].float() for _ in range(2))

    class Weak(LinearOperator):
        def apply(self, x):
            return (x @ right * d) @ left.T

        def adjoint(self, y):
            return (y @ left * d) @ right.T

        def spectral(self, x, weight):
            return (x @ right * weight(d[None])) @ right.T

    y = rand(4, 8).float()
    expected = (y.double() @ left.double() / d.double()) @ right.double().T
    off = (Weak((8,)).pinv(y) - expected).norm() / expected.norm()
    assert off < 20 * torch.finfo(torch.float32).eps


# --- Mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "name": (lambda: get_operator("blurr"), r"known are blur, box, .*gray.*did you mean 'blur'"),
    "factor": (lambda: SuperResolution((3, 8, 6), 4), r"factor 4 .*\(8, 6\)"),
    "no factor": (lambda: SuperResolution((3, 8, 6), 0), "factor 0"),
    "std": (lambda: GaussianBlur((3, 8), 0.0), "above 0 pixels, not 0.0"),
    "std huge": (lambda: GaussianBlur((3, 8), 1e30), "10 times the longest side, 8 pixels"),
    "std nan": (lambda: GaussianBlur((3, 8), math.nan), "above 0 pixels, not nan"),
    "mask shape": (lambda: Mask((4,), torch.ones(3)), r"mask has shape \(3,\).*\(4,\)"),
    "mask too large": (lambda: Mask((1, 4), torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
    "mask dims": (lambda: Mask((4,), torch.ones(1, 2, 4)), r"mask has shape \(1, 2, 4\)"),
    "mask values": (
        lambda: Mask((4,), torch.tensor([1, 0, 0.25, 0.5])),
        r"only 1 \(known\) and 0 \(open\), not 0\.25: .* mask > 0\.5",
    ),
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
