"""Learned dequantization: exact densities, and bounds of a known probability."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianDataOracle, inverse_scaler

from likelihood import (
    LearnedDequantization,
    UniformDequantization,
    get_dequantization_loss_fn,
    get_elbo_fn,
)
from models.dequantizer import Dequantizer, Splines
from sde_lib import SDE, VPSDE

LEVELS = 4
SHAPES = ((), (1,), (3,), (1, 4), (2, 2, 3), (1, 2, 2, 2), (1, 2, 1, 2, 1))


def flow(shape, seed=0, scale=0.5, **sizes):
    """A small flow that is far from the identity, in float64."""
    torch.manual_seed(seed)
    made = Dequantizer(shape, **{"nf": 8, "num_layers": 3, "num_bins": 5, **sizes}).double()
    for coupling in made.couplings:
        torch.nn.init.normal_(coupling[-1].weight, std=scale)
        torch.nn.init.normal_(coupling[-1].bias, std=scale)
    return made.requires_grad_(False)


def scaler(x):
    return 2 * x - 1


# --- The flow -------------------------------------------------------------------------------------


def test_splines_are_monotone_with_exact_slopes_and_inverse():
    torch.manual_seed(0)
    raw = torch.randn(20, 1, 3 * 6 + 1, dtype=torch.float64).expand(-1, 101, -1)
    u = torch.linspace(0, 1, 101, dtype=torch.float64).repeat(20, 1).requires_grad_(True)
    splines = Splines.of(raw)
    value, log_slope = splines(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(log_slope.exp(), slope)
    torch.testing.assert_close(splines.inverse(value), u)
    torch.testing.assert_close(value[:, [0, -1]], u[:, [0, -1]])
    assert (value.diff(dim=1) > 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flow_is_inverted_and_its_density_is_exact(shape):
    """The Jacobian's determinant by automatic differentiation, whatever the rank of x."""
    made = flow(shape)
    x = torch.randint(LEVELS, (3, *shape)).double() / (LEVELS - 1)
    u = torch.rand(3, *shape, dtype=torch.float64)
    value, log_det = made(x, u)
    assert value.shape == x.shape and (value - u).abs().max() > 0.01
    torch.testing.assert_close(made.inverse(x, value), u)
    size = u[0].numel()
    for b in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, b=b: made(x[b : b + 1], v[None])[0][0], u[b]
        )
        expected = torch.linalg.slogdet(jacobian.reshape(size, size))[1]
        torch.testing.assert_close(log_det[b], expected)


def test_density_integrates_to_one_and_depends_on_the_data():
    grid = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    u = torch.cartesian_prod(grid, grid)
    learned = LearnedDequantization(LEVELS, flow((2,)))
    densities = []
    for x in ([0.0, 1.0], [1 / 3, 1 / 3]):
        data = torch.tensor([x], dtype=torch.float64).expand(len(u), -1)
        densities.append(learned.log_prob(data, u).exp())
        assert float(densities[-1].mean()) == pytest.approx(1, abs=3e-3)
    assert (densities[0] - densities[1]).abs().max() > 0.1


def test_noise_follows_its_density():
    """Shares of cells of one dimension, by drawing and by log_prob."""
    learned = LearnedDequantization(LEVELS, flow((1,)))
    x = torch.full((20_000, 1), 1 / 3, dtype=torch.float64)
    torch.manual_seed(0)
    images, log_q = learned(x)
    u = images * LEVELS - 1  # the level of 1/3 is 1 of 0 ... 3
    assert u.min() >= 0 and u.max() < 1
    torch.testing.assert_close(log_q, learned.log_prob(x, u), rtol=1e-6, atol=1e-6)
    grid = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    density = learned.log_prob(x[:1000], grid).exp().reshape(10, -1).mean(1)
    found = torch.histc(u, 10, 0, 1) / len(u) * 10
    torch.testing.assert_close(found, density, rtol=0, atol=0.12)
    assert density.max() / density.min() > 1.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_flow_is_uniform(shape):
    torch.manual_seed(0)
    learned = LearnedDequantization(LEVELS, Dequantizer(shape))
    x = torch.randint(LEVELS, (4, *shape)) / (LEVELS - 1)
    u = torch.rand(4, *shape)
    images, log_q = learned(x, lambda like: u)
    expected, zero = UniformDequantization(LEVELS)(x, lambda like: u)
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(log_q, zero, rtol=0, atol=1e-4)
    torch.testing.assert_close((expected * LEVELS).floor(), x * (LEVELS - 1))


def test_data_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="is for data of"):
        Dequantizer((2, 2))(torch.zeros(1, 3), torch.zeros(1, 3))


def test_numbers_that_change_in_turn_are_those_of_a_chequerboard():
    """Checkpoints hold weights for it, but not the board itself."""
    assert Dequantizer((1, 4)).odd.tolist() == [[False, True] * 2]


# --- A known probability --------------------------------------------------------------------------

SDE_ = VPSDE()
MEAN = torch.tensor([0.1, -0.2])
COVARIANCE = torch.tensor([[0.09, 0.06], [0.06, 0.07]])


class Known:
    """A correlated Gaussian of two numbers with `LEVELS` grey levels, and its exact score."""

    def __init__(self, count=24):
        self.network = GaussianDataOracle(SDE_, MEAN, COVARIANCE)
        pairs = torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS))
        self.x = pairs.double() / (LEVELS - 1)
        grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        self.u = torch.cartesian_prod(grid, grid)
        self.log_p = self.log_density((pairs[:, None] + self.u) / LEVELS)  # (cells, points)
        self.mass = self.log_p.exp().mean(1)

    def log_density(self, images):
        """Of (k + u) / levels, where cells have the volume 1, in nats."""
        gaussian = torch.distributions.MultivariateNormal(MEAN.double(), COVARIANCE.double())
        return gaussian.log_prob(scaler(images)) + 2 * math.log(2 / LEVELS)

    def gap(self, dequantize):
        """Bits/dim of the bound over those of the exact probability, by integration over cells."""
        gaps = []
        for x, log_p, mass in zip(self.x, self.log_p, self.mass, strict=True):
            log_q = dequantize.log_prob(x.expand(len(self.u), -1), self.u)
            gaps.append((log_q.exp() * (log_q - log_p + mass.log())).mean())
        return float(self.mass @ torch.stack(gaps)) / (2 * math.log(2))

    def draw(self, count):
        return self.x[torch.multinomial(self.mass, count, replacement=True)].float()


@pytest.mark.slow
def test_training_tightens_the_bound_and_never_passes_the_exact_probability():
    known = Known()
    assert float(known.mass.sum()) == pytest.approx(1, abs=1e-2)
    torch.manual_seed(0)
    made = Dequantizer((2,), nf=16, num_layers=4, num_bins=5)
    learned = LearnedDequantization(LEVELS, made)
    loss_fn = get_dequantization_loss_fn(SDE_, learned, scaler, inverse_scaler)
    uniform = known.gap(UniformDequantization(LEVELS))
    assert uniform > 0.2
    optimizer, gaps = torch.optim.Adam(made.parameters(), lr=1e-2), []
    for step in range(100):
        optimizer.zero_grad()
        loss_fn(known.network, known.draw(256)).mean().backward()
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                gaps.append(known.gap(LearnedDequantization(LEVELS, made.double())))
            made.float()

    assert 0 < gaps[1] < gaps[0] < uniform and gaps[1] < 0.15 * uniform


@pytest.mark.parametrize("factor", (1.0, 0.8), ids=("exact", "wrong"))
def test_loss_is_the_bound_of_the_reverse_sde(factor):
    """Its mean is that of `get_elbo_fn` for data with the noise of time eps, plus log q."""
    known, eps, count = Known(), 1e-3, 4000
    torch.manual_seed(0)
    learned = LearnedDequantization(LEVELS, flow((2,)).float())

    def network(x, t):
        return factor * known.network(x, t)

    loss_fn = get_dequantization_loss_fn(SDE_, learned, scaler, inverse_scaler, eps=eps)
    # Times are strata of a batch, so that only batches are independent.
    found = torch.stack([loss_fn(network, known.draw(400)).mean() for _ in range(100)])
    images, log_q = learned(known.draw(count))
    m, s = SDE_.marginal_coeffs(torch.tensor([eps]))
    noised = m * scaler(images) + s * torch.randn(count, 2)
    bound = get_elbo_fn(SDE_, eps=eps, num_times=50)(network, noised).total
    # Bits/dim of cells of volume (2 / LEVELS)^2 in the network's range.
    expected = (log_q - bound) / (2 * math.log(2)) + math.log2(LEVELS / 2)
    error = math.hypot(float(found.std()) / 100**0.5, float(expected.std()) / count**0.5)
    assert abs(float(found.mean() - expected.mean())) < 4 * error < 0.25


def test_loss_needs_a_linear_drift():
    class Mine(SDE):
        sde = marginal_prob = prior_sampling = prior_logp = None

    with pytest.raises(ValueError, match="LinearSDE"):
        get_dequantization_loss_fn(Mine(), UniformDequantization(4), scaler, inverse_scaler)
