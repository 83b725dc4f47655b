"""Inverse problems, guidance and conditions for data of every rank: see `test_every_rank`."""

from __future__ import annotations

import math

import pytest
import torch
from ml_collections import ConfigDict
from operator_cases import dense
from oracles import GaussianDataOracle, exact_moments
from ranks import (
    EVERY_RANK,
    FEW,
    FEW_COVARIANCE,
    FEW_MEAN,
    ROOT,
    SDES,
    SHAPES,
    B,
    EntryNoise,
    batch,
    coeffs,
    configured,
    few_oracle,
    flow,
    grey,
    k,
    n,
    oracle,
)

import controllable_generation as control
import sampling
from models.conditioning import Given, Guided, Takes, taken_by
from score_lib.base.tensors import batch_mul
from score_lib.inverse.measurements import build_operator
from score_lib.inverse.operators import OPERATORS
from score_lib.inverse.restoration import RESTORATIONS
from score_lib.options import complete
from score_lib.runs.conditions import Conditions
from sde_lib import VESDE, VPSDE

# --- Inverse problems and guidance ----------------------------------------------------------------

OPTIONS = complete(ConfigDict({}))


def restored(method, operator, y, shape, **settings):
    """A few steps of predictor-corrector sampling with a measurement, denoised."""
    sde = VPSDE(beta_max=2.0, N=3)
    restore = control.get_pc_restorer(
        sde,
        sampling.ReverseDiffusionPredictor,
        sampling.AnnealedLangevinDynamics,
        lambda x: x,
        0.16,
        continuous=True,
        eps=1e-3,
    )
    found = restore(oracle(sde), operator, y, 0.1, method=method, noise=EntryNoise(), **settings)
    assert found.shape == (B, *shape)
    return found


def operator_of(name, shape):
    """An operator, and its matrix for flattened data."""
    if name == "matrix":
        return control.MatrixOperator(shape, ROOT[:5]), ROOT[:5]
    operator = build_operator(name, OPTIONS, shape)
    return operator, dense(operator)


NAMES = [*sorted(OPERATORS), "matrix"]


@pytest.mark.parametrize("name", NAMES)
def test_restored_data_of_any_rank_are_those_of_a_matrix(name):
    """Each operator of the rank against its matrix, for vectors: each method with each rank."""
    methods = [method for method in RESTORATIONS if method != "none"]
    for rank in (2, 3, 4, 5):
        operator, matrix = operator_of(name, SHAPES[rank])
        y = operator.apply(batch(SHAPES[rank], seed=3))
        method = methods[(NAMES.index(name) + rank) % len(methods)]
        x = restored(method, operator, y, SHAPES[rank]).flatten(1)
        flat = restored(method, control.MatrixOperator((n,), matrix), y.flatten(1), (n,))
        torch.testing.assert_close(x, flat, rtol=0, atol=1e-7)


@EVERY_RANK
def test_the_guided_ode_ends_at_the_posterior(rank, kind):
    """Mean and covariance of x_t at t = 0.05 given y = A x_0 + noise of deviation 0.1."""
    sde = VESDE(sigma_max=100) if kind == "ve" else SDES[kind](10)
    operator = control.RandomProjection(FEW[rank], 3)
    truth = EntryNoise()(torch.empty(1, *FEW[rank]))
    y, A = operator.apply(truth), dense(operator)

    def draw(count, noise):
        guided = control.get_restoration("tweedie")(
            operator, y.expand(count, -1), 0.1, iterations=3
        )
        options = {"eps": 0.05, "constraints": [guided], "rtol": 3e-4, "atol": 3e-4}
        sample = sampling.get_ode_sampler(sde, (count, *FEW[rank]), lambda x: x, **options)
        return sample(few_oracle(sde), noise=noise)[0]

    mean, covariance = exact_moments(draw, k)
    gain = FEW_COVARIANCE @ A.T @ torch.linalg.inv(A @ FEW_COVARIANCE @ A.T + 0.01 * torch.eye(3))
    (m,), (s,) = coeffs(sde, 0.05)
    expected = FEW_MEAN + gain @ (y[0] - A @ FEW_MEAN)
    torch.testing.assert_close(mean, m * expected, rtol=0, atol=0.01)
    expected = m**2 * (FEW_COVARIANCE - gain @ A @ FEW_COVARIANCE) + s**2 * torch.eye(k)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.002)


class Classes(torch.nn.Module):
    """Gaussian data of two classes, of one covariance and of means of their own."""

    takes = Takes(classes=2, droppable=True)

    def __init__(self, sde, means):
        super().__init__()
        self.networks = [few_oracle(sde, mean) for mean in means]

    def forward(self, x, labels, *, classes):
        values = torch.stack([network(x, labels) for network in self.networks])
        return values[classes, torch.arange(len(x))]


def guided_samples(sde, network, rank, **options):
    sample = configured(sde, (B, *FEW[rank]), {"method": "dpmpp_sde", "num_steps": 4}, **options)
    return sample(network, noise=EntryNoise())[0]


@EVERY_RANK
def test_guidance_without_a_classifier_moves_the_mean(rank, kind):
    """Scores of Gaussians of one covariance are linear in the means."""
    sde, null = SDES[kind](10), -FEW_MEAN
    means = torch.stack([FEW_MEAN, FEW_MEAN.flip(0), null])
    classes = torch.tensor([0, 1, 1, 0])
    network = Guided(Classes(sde, means), {"classes": classes}, {"classes": 2}, 2.5)
    found = guided_samples(sde, network, rank)
    for c in (0, 1):
        alone = few_oracle(sde, null + 2.5 * (means[c] - null))
        expected = guided_samples(sde, alone, rank)
        torch.testing.assert_close(found[classes == c], expected[classes == c], rtol=0, atol=1e-9)


@EVERY_RANK
def test_guidance_by_the_exact_classifier_gives_the_class(rank, kind):
    """Bayes: score of the mixture + grad log p(c | x_t) = score of the class."""
    sde, means = SDES[kind](10), torch.stack([FEW_MEAN, -FEW_MEAN])

    def log_p(x, m, s):
        covariance = m[:, None, None] ** 2 * FEW_COVARIANCE + (s**2)[:, None, None] * torch.eye(k)
        laws = [torch.distributions.MultivariateNormal(m[:, None] * c, covariance) for c in means]
        return torch.stack([law.log_prob(x.flatten(1)) for law in laws], dim=1)

    def logits(x, std):
        scale = {"ve": std**0, "subvp": (1 - std).sqrt()}.get(kind, (1 - std**2).sqrt())
        return log_p(x, scale, std)

    networks = [few_oracle(sde, mean) for mean in means]

    def mixture(x, labels):
        t = labels / 999
        if kind == "ve":
            t = (labels / sde.sigma_min).log() / math.log(sde.sigma_max / sde.sigma_min)
        weights = log_p(x, *sde.marginal_coeffs(t)).softmax(1)
        return sum(batch_mul(w, f(x, labels)) for w, f in zip(weights.T, networks, strict=True))

    classes = torch.tensor([0, 1, 1, 0])
    guided = control.ClassGuidance(logits, classes)
    found = guided_samples(sde, mixture, rank, constraints=[guided])
    for c in (0, 1):
        expected = guided_samples(sde, networks[c], rank)
        torch.testing.assert_close(found[classes == c], expected[classes == c], rtol=0, atol=1e-7)


class Shown(torch.nn.Module):
    """Gaussian data whose mean is the image that the network is shown."""

    def __init__(self, sde, channels):
        super().__init__()
        self.sde, self.takes = sde, Takes(image=channels)

    def forward(self, x, labels, *, image):
        self.takes.checked({"image": image}, x)
        return GaussianDataOracle(self.sde, image.flatten(1), FEW_COVARIANCE)(x, labels)


@EVERY_RANK
def test_a_measurement_is_a_condition(rank, kind):
    """Samples are those of the mean A x, or of A^+ A x where the channels are not those of x."""
    operator = ("gray", "projection", "half")[rank % 3]
    shape, sde = FEW[rank], SDES[kind](10)
    data = {"dataset": "IMAGES", "shape": shape, "centered": True}
    config = complete(ConfigDict({"data": data | {"uniform_dequantization": False}}))
    config.training.condition, config.training.condition_operator = "image", operator
    conditions = Conditions(config, shape, lambda x: 2 * x - 1, "cpu")
    x = grey(shape)
    image = conditions.of_data(x, None)["image"]
    A = dense(conditions.operator)
    expected = (2 * x - 1).flatten(1) @ A.T
    if operator != "half":
        expected = expected @ torch.linalg.pinv(A).T
    torch.testing.assert_close(image.flatten(1), expected, rtol=0, atol=1e-12)
    network = Given(Shown(sde, taken_by(config).image), image=image)
    z = sde.prior_std * batch(shape)
    options = {"rtol": 1e-6, "atol": 1e-6, "eps": 0.01}
    found, _ = sampling.get_ode_sampler(sde, z.shape, lambda x: x, **options)(network, z)
    moved = flow(sde, z.flatten(1), sde.T, 0.01, mean=expected)[0]
    torch.testing.assert_close(found.flatten(1), moved, rtol=0, atol=1e-4)
