"""Inpainting and colorization."""

import pytest
import torch
from oracles import (
    MU,
    S0,
    SEEDS,
    GaussianOracle,
    assert_close_to_largest,
    golden_sde,
    goldens,
    inverse_scaler,
)

import sampling
from controllable_generation import KnownGray, KnownPixels, get_pc_colorizer, get_pc_inpainter
from sde_lib import VESDE, VPSDE, subVPSDE
from utils import SampleNoise

SDES = {"ve": VESDE(sigma_max=20, N=200), "vp": VPSDE(N=200), "subvp": subVPSDE(N=200)}
CASES = (("vesde", "continuous"), ("vesde", "discrete"), ("vpsde", "continuous"))


def build(get, sde, corrector="langevin", scaler=lambda x: x, continuous=True, **options):
    return get(
        sde,
        sampling.ReverseDiffusionPredictor,
        sampling.get_corrector(corrector),
        scaler,
        0.16,
        continuous=continuous,
        **options,
    )


@pytest.mark.parametrize(("name", "grid"), CASES)
@pytest.mark.parametrize("task", ("inpaint", "colorize"))
def test_goldens(name, grid, task):
    g, sde, continuous = goldens(), golden_sde(name), grid == "continuous"
    get = {"inpaint": get_pc_inpainter, "colorize": get_pc_colorizer}[task]
    inputs = {"inpaint": ("data", "mask"), "colorize": ("gray",)}[task]
    sample = build(get, sde, scaler=inverse_scaler, continuous=continuous, denoise=False)
    torch.manual_seed(SEEDS["control"])
    out = sample(
        GaussianOracle(sde, continuous), *(g[f"{task}/{name}/{grid}/{key}"] for key in inputs)
    )
    assert_close_to_largest(out, g[f"{task}/{name}/{grid}/out"], 2e-5)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_known_pixels_stay_and_the_rest_follows_the_data(sde):
    """With independent pixels the open ones are distributed as the data."""
    torch.manual_seed(0)
    data = MU + S0 * torch.randn(2000, 2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    x = build(get_pc_inpainter, sde, eps=sde.sampling_eps)(GaussianOracle(sde), data, mask)
    known = mask.bool()
    scale, _ = sde.marginal_coeffs(torch.tensor([sde.sampling_eps]))
    torch.testing.assert_close(x[:, known], data[:, known] * scale)
    assert x[:, ~known].mean() == pytest.approx(MU, abs=0.03)
    assert x[:, ~known].std() == pytest.approx(S0, abs=0.05)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_denoising_removes_the_last_noise(sde):
    """The mean keeps the known part without noise; the sample has it with noise."""
    data, mask = torch.full((50, 4), 0.7), torch.tensor([1.0, 0.0, 0.0, 1.0])
    eps = 0.05
    scale, std = sde.marginal_coeffs(torch.tensor([eps]))
    results = []
    for denoise in (True, False):
        sample = build(get_pc_inpainter, sde, denoise=denoise, eps=eps)
        results.append(sample(GaussianOracle(sde), data, mask)[:, mask.bool()] - 0.7 * scale)
    assert results[0].abs().max() < 1e-6
    assert results[1].std() == pytest.approx(float(std), rel=0.3)


def test_nothing_leaks_from_under_the_mask():
    sde, data = SDES["vp"], torch.randn(3, 1, 4, 4)
    mask = (torch.arange(16).reshape(1, 1, 4, 4) % 3 == 0).float()
    other = torch.where(mask == 1, data, torch.full_like(data, torch.nan))
    results = []
    for values in (data, other):
        torch.manual_seed(0)
        results.append(build(get_pc_inpainter, sde)(GaussianOracle(sde), values, mask))
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("channels", (1, 2, 3, 5))
@pytest.mark.parametrize("size", ((), (4,), (4, 6)), ids=str)
def test_colorization_keeps_the_gray_image(channels, size):
    sde = SDES["vp"]
    gray = torch.randn(4, 1, *size).expand(4, channels, *size)
    x = build(get_pc_colorizer, sde, eps=1e-3)(GaussianOracle(sde), gray)
    scale, _ = sde.marginal_coeffs(torch.tensor([1e-3]))
    torch.testing.assert_close(x.mean(1), gray[:, 0] * scale)
    if channels > 1:
        assert x.std(dim=1).mean() > 0.1


def test_known_noise_has_unit_variance_in_its_subspace():
    z = torch.randn(100_000, 3)
    spread = KnownGray(torch.zeros(1, 3)).spread(z)
    assert spread.square().sum(1).mean() == pytest.approx(1, abs=0.02)


def test_a_result_is_a_function_of_seed_and_number():
    sde, data, mask = SDES["ve"], torch.randn(5, 2, 2), torch.eye(2)

    def run(rows):
        sample = build(get_pc_inpainter, sde, corrector="langevin_per_sample")
        return sample(GaussianOracle(sde), data[rows], mask, noise=SampleNoise(1, rows))

    parts = torch.cat([run(range(2)), run(range(2, 5))])
    torch.testing.assert_close(run(range(5)), parts, rtol=0, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"mask has shape \(3,\).*\(2, 4\)"):
        KnownPixels(torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="1 for what is known"):
        KnownPixels(torch.zeros(2, 4), torch.full((2, 4), 0.5))
