"""The latent space of the flow: Gaussian data has codes in closed form, arcs and correlations are
geometry."""

import math

import numpy as np
import pytest
import torch
from oracles import MU, S0, GaussianOracle, assert_close_to_largest, inverse_scaler

from controllable_generation import (
    code_correlation,
    get_decoder,
    get_encoder,
    get_reconstructor,
    interpolate,
    temper,
)
from score_lib.base.tensors import batch_mul
from sde_lib import VESDE, VPSDE, subVPSDE

SDES = pytest.mark.parametrize("sde", (VESDE(), VPSDE(), subVPSDE()), ids=repr)
TIGHT = {"rtol": 1e-7, "atol": 1e-7}


def scaler(x):
    """From [0, 1] to [-1, 1]."""
    return 2 * x - 1


def draw_images(*shape, seed=0):
    """Independent numbers in [0, 1], float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_codes(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def oracle(sde, **data):
    return GaussianOracle(sde, **data).double()


def moments(sde, time, mu=MU, s0=S0):
    """Mean and standard deviation of p_t for data ~ N(mu, s0^2 I)."""
    scale, std = sde.marginal_coeffs(torch.tensor(time, dtype=torch.float64))
    return scale * mu, torch.sqrt((scale * s0) ** 2 + std**2)


def expected_codes(sde, images, eps=None, **data):
    """The flow of a Gaussian is affine: it keeps (x - mean) / std."""
    mean, std = moments(sde, sde.sampling_eps if eps is None else eps, **data)
    mean_T, std_T = moments(sde, sde.T, **data)
    return mean_T + (scaler(images) - mean) * std_T / std


@SDES
@pytest.mark.parametrize("shape", ((4, 3, 6, 5), (7, 5), (6,)), ids=str)
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.quick_cases(6)
def test_codes_of_gaussian_data_have_a_closed_form(sde, shape, per_sample):
    images, options = draw_images(*shape), {"per_sample": per_sample, **TIGHT}
    z, evaluations = get_encoder(sde, scaler, **options)(oracle(sde), images)
    expected = expected_codes(sde, images)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4 * sde.prior_std)
    decoded, _ = get_decoder(sde, inverse_scaler, **options)(oracle(sde), expected)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-4)
    assert 50 < evaluations < 500


@SDES
def test_images_can_be_taken_at_another_time(sde):
    images = draw_images(4, 3)
    z, _ = get_encoder(sde, scaler, eps=0.2, **TIGHT)(oracle(sde), images)
    expected = expected_codes(sde, images, eps=0.2)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4 * sde.prior_std)
    decoded, _ = get_decoder(sde, inverse_scaler, eps=0.2, **TIGHT)(oracle(sde), expected)
    torch.testing.assert_close(decoded, images, rtol=0, atol=1e-4)


@SDES
def test_decoding_inverts_encoding(sde):
    """At the usual tolerances of 1e-5."""
    images = draw_images(16, 3, 8, 6).float()
    model, counted = GaussianOracle(sde), []
    model.register_forward_hook(lambda *_: counted.append(1))
    result = get_reconstructor(sde, scaler, inverse_scaler)(model, images)
    assert result.evaluations == len(counted)
    assert result.images.dtype == result.z.dtype == torch.float32
    torch.testing.assert_close(result.images, images, rtol=0, atol=1e-3)
    error = (result.images - images).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(result.error, error)
    assert 0 < error.max() < 5e-4


@pytest.mark.parametrize("sde", (VESDE(0.01, 10, N=400), VPSDE(N=400)), ids=repr)
def test_networks_trained_on_a_grid_have_codes(sde):
    """Their score jumps from one noise level to the next, and stays near that of all times."""
    images = draw_images(3, 4)
    encode = get_encoder(sde, scaler, continuous=False, rtol=1e-4, atol=1e-4)
    z, _ = encode(GaussianOracle(sde, continuous=False).double(), images)
    assert_close_to_largest(z, expected_codes(sde, images), tolerance=0.01)


@pytest.mark.quick_cases(1)
@SDES
def test_gradients_pass_only_where_wanted(sde):
    """d images / d z = std_eps / (2 std_T), with the 1/2 of the inverse scaler."""
    z = sde.prior_std * draw_codes(3, 4)
    model = oracle(sde)
    ratio = moments(sde, sde.sampling_eps)[1] / moments(sde, sde.T)[1]

    decode = get_decoder(sde, inverse_scaler, differentiable=True, **TIGHT)
    jacobian = torch.autograd.functional.jacobian(lambda z: decode(model, z)[0], z)
    expected = ratio / 2 * torch.eye(z.numel(), dtype=z.dtype).reshape(*z.shape, *z.shape)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-4 * float(ratio))

    encode = get_encoder(sde, scaler, differentiable=True, **TIGHT)
    images = draw_images(3, 4).requires_grad_()
    gradient = torch.autograd.grad(encode(model, images)[0].sum(), images)[0]
    torch.testing.assert_close(gradient, 2 / ratio.expand(3, 4), rtol=1e-4, atol=0)

    assert not get_encoder(sde, scaler)(model, images)[0].requires_grad
    assert not get_decoder(sde, inverse_scaler)(model, z.requires_grad_())[0].requires_grad


def test_gradients_reach_the_network():
    """d x_0 / d mu = 1 - std_eps / std_T for VE, where the mean is mu at all times."""
    sde = VESDE()
    mu = torch.full((4,), MU, dtype=torch.float64, requires_grad=True)
    decode = get_decoder(sde, inverse_scaler, differentiable=True, **TIGHT)
    decoded, _ = decode(oracle(sde, mu=mu), sde.prior_std * draw_codes(1, 4))
    gradient = torch.autograd.grad(decoded.sum(), mu)[0]
    ratio = moments(sde, sde.sampling_eps)[1] / moments(sde, sde.T)[1]
    torch.testing.assert_close(gradient, (1 - ratio).expand(4) / 2, rtol=1e-4, atol=0)


@SDES
def test_interpolation_runs_from_one_image_to_the_other(sde):
    first, second = draw_images(2, 3, 4), draw_images(2, 3, 4, seed=1)
    options = {"per_sample": True}
    encode, decode = (
        get_encoder(sde, scaler, **options),
        get_decoder(sde, inverse_scaler, **options),
    )
    model = oracle(sde)
    codes = interpolate(encode(model, first)[0], encode(model, second)[0], [0.0, 0.5, 1.0])
    images = decode(model, codes.flatten(0, 1))[0].unflatten(0, (3, 2))
    reconstruct = get_reconstructor(sde, scaler, inverse_scaler, **options)
    for end, original in ((images[0], first), (images[2], second)):
        torch.testing.assert_close(end, reconstruct(model, original).images, rtol=0, atol=1e-12)
    assert (images[1] - images[0]).abs().max() > 0.05 < (images[1] - images[2]).abs().max()


@pytest.mark.parametrize("shape", ((3, 2, 5), (4, 7), (3,)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_ends_of_an_interpolation_are_exact(shape, dtype):
    first, second = draw_codes(*shape, dtype=dtype), 50 * draw_codes(*shape, seed=1, dtype=dtype)
    second[0] = -2 * first[0]
    second[1] = 0
    path = interpolate(first, second, [0, 0.3, 1])
    assert path.shape == (3, *shape) and path.dtype == dtype
    assert torch.equal(path[0], first) and torch.equal(path[2], second)


def test_interpolation_turns_at_a_constant_speed_about_the_origin():
    """Between codes of equal norm: each pair by its own angle, at that norm."""
    first, second = draw_codes(6, 2, 2), draw_codes(6, 2, 2, seed=1)
    first, second = (3 * batch_mul(1 / z.flatten(1).norm(dim=1), z) for z in (first, second))
    weights = torch.tensor([0.0, 0.1, 0.5, 0.75, 1.0], dtype=torch.float64)
    path = interpolate(first, second, weights).flatten(2)
    torch.testing.assert_close(path.norm(dim=2), torch.full_like(path[..., 0], 3))

    def angle(z):
        return torch.acos((first.flatten(1) * z).sum(1) / 9)

    angles = torch.stack([angle(z) for z in path[1:]])
    torch.testing.assert_close(angles, weights[1:, None] * angle(second.flatten(1)))
    assert angles[-1].std() > 0.1


def test_interpolation_keeps_to_where_codes_are():
    """The norm of a draw from N(0, I) is sqrt(D) to sqrt(1/2): it is at all weights."""
    first, second = draw_codes(8, 3, 32, 32, dtype=torch.float32), draw_codes(8, 3, 32, 32, seed=1)
    norms = interpolate(first, second.float(), torch.linspace(0, 1, 5)).flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(3072)), rtol=0.05, atol=0)
    straight = (first + second).flatten(1).norm(dim=1) / 2
    assert straight.max() < 0.75 * math.sqrt(3072)


def test_codes_without_an_arc_are_joined_by_a_line():
    """Parallel, opposite, one or both 0; beside a pair at a right angle, in one batch."""
    a = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    across = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    zero = torch.zeros_like(a)
    first = torch.stack([a, a, a, zero, zero, across]).requires_grad_()
    second = torch.stack([a, 3 * a, -a, a, zero, a]).requires_grad_()
    weights = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    path = interpolate(first, second, weights)
    line = 0.75 * first + 0.25 * second
    torch.testing.assert_close(path[1, :5], line[:5])
    assert (path[1, 5] - line[5]).abs().max() > 0.1
    gradients = torch.autograd.grad(path[1].sum(), (first, second, weights))
    torch.testing.assert_close(gradients[0][:5], torch.full_like(first[:5], 0.75))
    torch.testing.assert_close(gradients[1][:5], torch.full_like(first[:5], 0.25))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("angle", (1e-7, 1e-6, 1e-5, 2e-5, 1e-4))
def test_short_arcs_become_lines_smoothly(angle):
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    arc = torch.tensor([[math.cos(0.3 * angle), math.sin(0.3 * angle)]], dtype=torch.float64)
    path = interpolate(first, second, [0.3])[0]
    torch.testing.assert_close(path, arc, rtol=0, atol=1e-10)


def test_gradients_of_an_interpolation():
    first, second = (draw_codes(2, 3, seed=seed).requires_grad_() for seed in (0, 1))
    weights = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(interpolate, (first, second, weights))


@SDES
def test_temperature_scales_the_prior(sde):
    z = sde.prior_sampling((64, 3, 4))
    assert torch.equal(temper(z, 1), z) and not temper(z, 0).any()
    assert temper(z, 0.7).std() == pytest.approx(0.7 * sde.prior_std, rel=0.1)
    # The affine flow: 0.7 of the deviation from the data's mean is left.
    decode = get_decoder(sde, lambda x: x, **TIGHT)
    colder, warmer = (decode(oracle(sde), temper(z.double(), c))[0] for c in (0.7, 1.0))
    assert colder.std() / warmer.std() == pytest.approx(0.7, rel=1e-4)


def mixed(z, other, rho):
    """Codes that correlate with z by rho, where `other` is independent of z."""
    return rho * z + math.sqrt(1 - rho**2) * other


def test_correlation_finds_what_codes_share():
    first, noise = draw_codes(40, 3, 8, 8), draw_codes(40, 3, 8, 8, seed=1)
    result = code_correlation(first, mixed(first, noise, 0.6))
    assert result.same == pytest.approx(0.6, abs=4 * float(result.same_error))
    # A correlation's spread over D dimensions is (1 - rho^2) / sqrt(D).
    assert result.same_error == pytest.approx(0.64 / math.sqrt(40 * 192), rel=0.4)
    assert result.other == pytest.approx(0, abs=4 * float(result.other_error))
    # That of one network's code for another image goes with that of the same two exchanged.
    expected = math.sqrt((1 + 0.6**2) / (40 * 39 * 192))
    assert result.other_error == pytest.approx(expected, rel=0.4)
    assert result.distance == pytest.approx(math.sqrt(0.4**2 + 0.8**2), rel=0.02)


def test_correlation_is_that_of_numpy():
    first, second = draw_codes(4, 2, 3), draw_codes(4, 2, 3, seed=1)
    matrix = np.corrcoef(first.flatten(1).numpy(), second.flatten(1).numpy())[:4, 4:]
    result = code_correlation(first, second)
    assert result.same == pytest.approx(np.diag(matrix).mean())
    assert result.same_error == pytest.approx(np.diag(matrix).std(ddof=1) / 2)
    others = matrix[~np.eye(4, dtype=bool)].reshape(4, 3)
    assert result.other == pytest.approx(others.mean())
    distances = (first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
    assert result.distance == pytest.approx(float(distances.mean()))


def test_the_error_of_other_images_is_the_spread_over_images():
    """Of codes that share a picture, by networks that agree: it was half as large, since an image
    counts by both of its codes."""
    noise, share = draw_codes(60, 15, 4, 4), 1 + 0.5 * draw_codes(60, 15, 1, 1, seed=1)
    found = []
    for codes in noise + share * draw_codes(4, 4, seed=2):
        found.append(code_correlation(codes, 2 * codes))
    spread = torch.stack([one.other for one in found]).std()
    errors = torch.stack([one.other_error for one in found])
    assert errors.square().mean().sqrt() == pytest.approx(float(spread), rel=0.35)
    assert code_correlation(codes[:3], codes[:3]).other_error.isnan()


def test_scale_and_brightness_of_codes_do_not_correlate():
    first, noise = draw_codes(8, 3, 4), draw_codes(8, 3, 4, seed=1)
    second = mixed(first, noise, 0.6)
    brightness = draw_codes(8, seed=2)[:, None, None]
    expected = code_correlation(first, second)
    result = code_correlation(50 * first + 20, 3 * second + 5 * brightness)
    for name in ("same", "same_error", "other", "other_error"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


@SDES
def test_networks_that_know_the_data_agree_on_codes(sde):
    images = draw_images(16, 3, 8, 8)
    encode = get_encoder(sde, scaler)
    z = encode(oracle(sde), images)[0]
    again = code_correlation(z, encode(oracle(sde), images)[0])
    assert again.same == pytest.approx(1, abs=1e-12) and again.distance == 0
    nearby = encode(oracle(sde, mu=MU + 0.02, s0=S0 * 1.02), images)[0]
    result = code_correlation(z, nearby)
    assert result.same > 0.999
    assert result.other == pytest.approx(0, abs=0.02)
    expected = [expected_codes(sde, images, **data) for data in ({}, {"mu": 0.32, "s0": 0.51})]
    torch.testing.assert_close(
        result.distance, code_correlation(*expected).distance, rtol=0.05, atol=0
    )


def test_networks_that_know_other_data_agree_less():
    """Data whose means differ from pixel to pixel by as much as images do."""
    sde, images = VESDE(), draw_images(16, 3, 8, 8)
    mu = MU + 0.5 * draw_codes(3, 8, 8, seed=3)
    codes = [
        get_encoder(sde, scaler, **TIGHT)(model, images)[0]
        for model in (oracle(sde), oracle(sde, mu=mu))
    ]
    expected = code_correlation(expected_codes(sde, images), expected_codes(sde, images, mu=mu))
    result = code_correlation(*codes)
    torch.testing.assert_close(result.same, expected.same, rtol=0, atol=1e-4)
    assert 0.5 < result.same < 0.95


def test_mistakes_are_named():
    sde, z = subVPSDE(), torch.zeros(2, 3)
    for factory in (get_encoder, get_decoder):
        with pytest.raises(ValueError, match=r"from 0 to below T = 1, not at eps = 1.0; .* 0.001"):
            factory(sde, scaler, eps=1.0)
    with pytest.raises(ValueError, match=r"eps = -0\.1"):
        get_reconstructor(sde, scaler, inverse_scaler, eps=-0.1)
    with pytest.raises(ValueError, match=r"images to encode .* divide bytes by 255"):
        get_encoder(sde, scaler)(oracle(sde), torch.zeros(2, 3, dtype=torch.uint8))
    for pairs in (lambda a, b: interpolate(a, b, [0.5]), code_correlation):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
            pairs(z, torch.zeros(2, 4))
    for weights in ([-0.1], [0.5, 1.1], [math.nan], [], 0.5, [[0.5]]):
        with pytest.raises(ValueError, match=r"from 0 \(the first code\) to 1"):
            interpolate(z, z, weights)
    for temperature in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"not {temperature}"):
            temper(z, temperature)
    for shape in ((1, 3), (2,)):
        with pytest.raises(ValueError, match="at least two images of at least two dimensions"):
            code_correlation(torch.ones(shape), torch.ones(shape))
    with pytest.raises(ValueError, match="method 'DOP853', which runs on the host"):
        decode = get_decoder(sde, inverse_scaler, method="DOP853", differentiable=True)
        decode(oracle(sde), z.double().requires_grad_())
