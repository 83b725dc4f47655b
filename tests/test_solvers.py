"""Solvers of few steps: orders of convergence, exact cases, and error against evaluations."""

import copy
import math

import pytest
import torch
from oracles import MU, S0, Cosine, GaussianOracle, exact_moments
from small_runs import small_config
from test_control import MEANS, SPREAD, MixtureOracle

import run_lib
import sampling
from controllable_generation import ClassGuidance
from likelihood import get_log_likelihood_fn
from score_lib.base.tensors import SampleNoise
from score_lib.samplers import adaptive, grids
from score_lib.sdes.coefficients import marginal_coeffs
from score_lib.sdes.snr import log_snr, time_at
from sde_lib import VESDE, VPSDE, LinearSDE, subVPSDE

SDES = {"ve": VESDE(sigma_max=20), "vp": VPSDE(), "subvp": subVPSDE()}
SOLVERS = {
    "ddim": sampling.DDIM,
    "dpmpp_2m": sampling.DPMSolver2M,
    "dpmpp_3m": sampling.DPMSolver3M,
    "dpmpp_sde": sampling.DPMSolverSDE,
    "heun": sampling.Heun,
}
ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3}
EPS = 1e-3


def draw(sde, solver, steps, z, network=None, **options):
    """Samples from given codes, in float64, and the evaluations."""
    options = {"denoise": False, "eps": EPS, **options}
    sample = sampling.get_solver_sampler(sde, z.shape, solver, lambda x: x, steps, **options)
    return sample(network or GaussianOracle(sde), z)


def flow_of_gaussian(sde, z):
    """Where the probability flow of N(MU, S0^2 I) data takes codes."""
    scale, std = marginal_coeffs(sde, torch.tensor([sde.T, EPS], dtype=torch.float64))
    spread = ((scale * S0) ** 2 + std**2).sqrt()
    return scale[1] * MU + (z - scale[0] * MU) * spread[1] / spread[0]


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(sde, name):
    z = sde.prior_std * torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    exact = flow_of_gaussian(sde, z)
    errors = [
        float((draw(sde, SOLVERS[name], steps, z, grid="edm")[0] - exact).abs().max())
        for steps in (40, 80)
    ]
    order = math.log2(errors[0] / errors[1])
    assert ORDERS[name] - 0.1 < order < ORDERS[name] + 0.25


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("name", SOLVERS)
def test_any_step_is_exact_for_a_single_point(sde, name):
    """Data that are one point have a constant D: the flow is a line in (m, s), and noise exact."""
    point = GaussianOracle(sde, mu=0.7, s0=0.0)

    def samples(count, noise):
        sample = sampling.get_solver_sampler(
            sde, (count, 2), SOLVERS[name], lambda x: x, 3, denoise=False, eps=0.1
        )
        return sample(point, noise=noise)[0]

    mean, covariance = exact_moments(samples, 2)
    (m, s) = (c[0] for c in marginal_coeffs(sde, torch.tensor([0.1], dtype=torch.float64)))
    (m_T,) = marginal_coeffs(sde, torch.tensor([sde.T], dtype=torch.float64))[0]
    # At T the prior's mean is 0, where p_T's is m_T times the point.
    torch.testing.assert_close(mean, (0.7 * m).expand(2), rtol=0, atol=float(m_T) * 0.8 * float(s))
    torch.testing.assert_close(covariance, s**2 * torch.eye(2).double(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize(("name", "settings"), (("dpmpp_sde", {}), ("heun", {"churn": 20.0})))
def test_random_solvers_keep_the_distribution(sde, name, settings):
    """Mean and variance of Gaussian data, without Monte-Carlo error; it falls with the steps."""
    errors = []
    for steps in (25, 100):

        def samples(count, noise, steps=steps):
            sample = sampling.get_solver_sampler(
                sde,
                (count, 1),
                SOLVERS[name],
                lambda x: x,
                steps,
                eps=EPS,
                denoise=False,
                **settings,
            )
            return sample(GaussianOracle(sde), noise=noise)[0]

        mean, covariance = exact_moments(samples, 1)
        errors.append(abs(float(covariance) / S0**2 - 1))
        assert float(mean) == pytest.approx(MU, abs=0.02)
    assert errors[1] < 0.02 and errors[1] < errors[0] / 2


def distance_to_mixture(x):
    """Wasserstein distance between sorted samples (N,) and the mixture of `mixture_1d`."""
    share = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    cdf = torch.special.ndtr((grid[:, None] - MEANS[:, 0].double()) / SPREAD).mean(1)
    quantiles = grid[torch.searchsorted(cdf, share).clamp(max=len(grid) - 1)]
    return float((x.double().sort().values - quantiles).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("sde", (SDES["ve"],), ids=("ve",))
def test_few_evaluations_are_as_good_as_a_thousand_steps(sde):
    """On a Gaussian mixture with the exact score: 40 of DPM-Solver++ or of Heun's method.

    In one dimension, where the flow keeps order: quantiles of the prior become quantiles of the
    samples, without Monte-Carlo error.
    """
    torch.manual_seed(0)
    network, count = Mixture1d(sde), 20_000
    predictor_corrector = sampling.get_pc_sampler(
        sde,
        (count, 1),
        sampling.ReverseDiffusionPredictor,
        sampling.LangevinCorrector,
        lambda x: x,
        0.16,
        continuous=True,
        eps=sde.sampling_eps,
    )
    reference = distance_to_mixture(predictor_corrector(network)[0][:, 0])
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    z = sde.prior_std * torch.special.ndtri(share)[:, None]
    cases = {"dpmpp_2m": (39, "log_snr"), "dpmpp_3m": (39, "log_snr"), "heun": (19, "arctan")}
    for name, (steps, grid) in cases.items():
        x, evaluations = draw(sde, SOLVERS[name], steps, z, network, denoise=True, grid=grid)
        assert evaluations <= 40
        assert distance_to_mixture(x[:, 0]) <= reference, name


class Mixture1d(MixtureOracle):
    """The first coordinate of the mixture alone."""

    def logits(self, x, scale, std):
        distance = (x - scale[:, None] * MEANS[:, 0]).square()
        return -distance / (2 * self.variance(scale, std))[:, None]

    def score(self, x, scale, std):
        share = torch.softmax(self.logits(x, scale, std), dim=1)
        mean = scale[:, None] * (share @ MEANS[:, :1].to(share))
        return (mean - x) / self.variance(scale, std)[:, None]


def test_grids():
    sde = SDES["vp"]
    for kind in ("uniform", "log_snr", "edm", "arctan"):
        times = sampling.time_grid(sde, 10, EPS, kind)
        assert times[0] == 1 and times[-1] == EPS and (times.diff() < 0).all()
    lambdas = log_snr(sde, sampling.time_grid(sde, 10, EPS, "log_snr"))
    torch.testing.assert_close(lambdas.diff(), lambdas.diff()[:1].expand(10), rtol=1e-6, atol=0)
    sigma = torch.exp(-log_snr(sde, sampling.time_grid(sde, 10, EPS, "edm"))) ** (1 / 7)
    torch.testing.assert_close(sigma.diff(), sigma.diff()[:1].expand(10), rtol=1e-6, atol=0)
    t = torch.tensor([0.003, 0.4, 0.97], dtype=torch.float64)
    for each in SDES.values():
        found = time_at(each, log_snr(each, t))
        torch.testing.assert_close(found, t, rtol=1e-7, atol=0)
    lambdas = log_snr(sde, sampling.time_grid(sde, 10, EPS, "arctan"))
    angles = torch.exp(-0.75 * lambdas).atan()
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(10), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_those_made(name):
    z = torch.randn(2, 3)
    a_step = 2 if name == "heun" else 1
    assert draw(SDES["vp"], SOLVERS[name], 7, z)[1] == 7 * a_step
    assert draw(SDES["vp"], SOLVERS[name], 7, z, denoise=True)[1] == 7 * a_step + 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_a_function_of_seed_and_number(name):
    sde = SDES["vp"]

    def samples(rows):
        sample = sampling.get_solver_sampler(sde, (len(rows), 3), SOLVERS[name], lambda x: x, 5)
        return sample(GaussianOracle(sde), noise=SampleNoise(0, rows))[0]

    parts = torch.cat([samples(range(2)), samples(range(2, 5))])
    torch.testing.assert_close(samples(range(5)), parts, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_adaptive_steps_keep_the_distribution(sde):
    """Also with rejected steps: redrawn noise would make the standard deviation 17% too large."""
    torch.manual_seed(0)
    found = {}
    for rtol in (0.2, 0.02):
        sample = sampling.get_adaptive_sampler(
            sde, (4000, 4), lambda x: x, rtol=rtol, atol=rtol / 6, eps=EPS
        )
        x, evaluations = sample(GaussianOracle(sde))
        found[rtol] = evaluations
        assert x.mean() == pytest.approx(MU, abs=0.02)
        assert x.std() == pytest.approx(S0, rel=0.03)
    assert 2 * found[0.2] < found[0.02] < 3000


def test_rejected_increments_are_kept():
    """The increments of shorter steps add up to the rejected one."""
    torch.manual_seed(0)
    x, h = torch.zeros(20_000, 1), torch.full((20_000,), 0.4)
    path = adaptive.BrownianPath(x, h)
    no, yes = torch.zeros(len(x), dtype=torch.bool), torch.ones(len(x), dtype=torch.bool)
    whole = path.increment(h, torch.randn_like(x))
    path.settle(no)
    first = path.increment(h / 4, torch.randn_like(x))
    path.settle(yes)
    rest = path.increment(0.75 * h, torch.randn_like(x))
    path.settle(yes)
    torch.testing.assert_close(first + rest, whole)
    assert whole.var() == pytest.approx(0.4, rel=0.04)
    assert first.var() == pytest.approx(0.1, rel=0.04)
    assert torch.corrcoef(torch.cat([first, rest], dim=1).T)[0, 1].abs() < 0.03
    beyond = path.increment(h, torch.randn_like(x))
    assert beyond.var() == pytest.approx(0.4, rel=0.04)
    assert torch.corrcoef(torch.cat([whole, beyond], dim=1).T)[0, 1].abs() < 0.03


@pytest.mark.parametrize(
    ("name", "settings"), [*((n, {}) for n in SOLVERS), ("heun", {"churn": 2})]
)
def test_no_sample_is_a_result_of_none(name, settings):
    sde = SDES["vp"]
    shape = (0, 2)
    sample = sampling.get_solver_sampler(sde, shape, SOLVERS[name], lambda x: x, 5, **settings)
    assert sample(GaussianOracle(sde))[0].shape == shape


def test_adaptive_steps_do_not_depend_on_the_batch():
    sde = SDES["vp"]

    def samples(rows):
        sample = sampling.get_adaptive_sampler(sde, (len(rows), 3), lambda x: x)
        return sample(GaussianOracle(sde), noise=SampleNoise(0, rows))[0]

    parts = torch.cat([samples(range(2)), samples(range(2, 5))])
    torch.testing.assert_close(samples(range(5)), parts, rtol=0, atol=1e-5)


class Broken(torch.nn.Module):
    """An exact score whose last sample is not finite after some calls; fails if called for ever."""

    def __init__(self, sde, value):
        super().__init__()
        self.oracle, self.value, self.calls = GaussianOracle(sde), value, 0

    def forward(self, x, labels):
        self.calls += 1
        assert self.calls < 500, "sampling goes on"
        output = self.oracle(x, labels)
        last = torch.arange(len(x))[:, None] == len(x) - 1
        return torch.where(last & (self.calls > 5), self.value, output)


@pytest.mark.parametrize("make", (sampling.get_adaptive_sampler, sampling.get_ode_sampler))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("size", (1, 4))
def test_a_score_that_is_not_finite_ends_sampling(make, value, size):
    torch.manual_seed(0)
    sample = make(SDES["vp"], (size, 2), lambda x: x)
    with pytest.raises(FloatingPointError, match=r"beyond t = .*is the score finite there"):
        sample(Broken(SDES["vp"], value))


@pytest.mark.parametrize("first_step", (0.0, 1e-12))
def test_steps_below_rounding_end_sampling(first_step):
    sample = sampling.get_adaptive_sampler(SDES["vp"], (2, 2), lambda x: x, first_step=first_step)
    with pytest.raises(FloatingPointError, match="beyond t = 1: the step has become smaller"):
        sample(Broken(SDES["vp"], torch.nan))


def test_stochastic_heun_corrects_euler_maruyama():
    """By nothing where drift and diffusion are constant; by half the change of a drift -x."""
    x, t, h = torch.randn(3, 2), torch.full((3,), 0.5), torch.full((3,), 0.1)
    z = torch.randn_like(x)
    euler, improved = adaptive.stochastic_heun(lambda x, t: (0 * x + 2, 0 * t + 3), x, t, h, z)
    torch.testing.assert_close(euler, x - 0.2 + 3 * z)
    torch.testing.assert_close(improved, euler)
    euler, improved = adaptive.stochastic_heun(lambda x, t: (-x, 0 * t), x, t, h, z)
    torch.testing.assert_close(euler, 1.1 * x)
    torch.testing.assert_close(improved, x * (1 + 0.1 + 0.005))


def test_solvers_can_be_guided():
    torch.manual_seed(0)
    sde, labels = SDES["vp"], torch.arange(900) % 3
    network = MixtureOracle(sde)
    sample = sampling.get_solver_sampler(
        sde,
        (900, 2),
        sampling.DPMSolver2M,
        lambda x: x,
        30,
        constraints=[ClassGuidance(network.classify, labels)],
    )
    x, _ = sample(network)
    for label, mean in enumerate(MEANS):
        torch.testing.assert_close(x[labels == label].mean(0), mean, rtol=0, atol=0.04)


@pytest.mark.parametrize("method", [*SOLVERS, "adaptive"])
@pytest.mark.parametrize("experiment", ("ve/digits", "vp/digits", "subvp/digits"))
@pytest.mark.quick_cases(9)
def test_every_solver_is_a_sampling_method(method, experiment):
    config = small_config(experiment, sampling__method=method, sampling__num_steps=3)
    config.sampling.churn = 1.0 if method == "heun" else 0.0
    images = run_lib.setup(config).draw(range(2))
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_discrete_models_can_be_sampled_in_few_steps():
    """The labels stay those of the thousand levels that the network was trained with."""
    sde, seen = VPSDE(N=1000), []

    def network(x, labels):
        seen.append(labels)
        return torch.zeros_like(x)

    config = small_config(
        training__continuous=False, model__num_scales=1000, sampling__method="ddim"
    )
    config.sampling.num_steps = 4
    run = run_lib.setup(config)
    sampler = sampling.get_sampling_fn(
        run.config, run.sde, (1, *run.shape), lambda x: x, run.sde.sampling_eps
    )
    sampler(network)
    times = sampling.time_grid(sde, 4, sde.sampling_eps, "log_snr")
    torch.testing.assert_close(torch.cat(seen)[:5].double(), 999 * times, rtol=1e-4, atol=1e-4)


class ToNothing(LinearSDE):
    """m(t) = 1 - t, up to T = 1."""

    def drift_rate(self, t):
        return -1 / (1 - t)

    def diffusion(self, t):
        return torch.sqrt(2 * t / (1 - t))

    def marginal_coeffs(self, t):
        return 1 - t, t


class CosineToNothing(Cosine):
    """m(1) = 0 up to rounding."""

    T = 1.0


@pytest.mark.parametrize("sde", (ToNothing(), CosineToNothing()))
def test_a_start_without_the_data_is_refused(sde):
    """Samples were as large as 4e13, or no numbers."""
    for name in ("Heun", "DDIM", "DPMSolver2M"):
        settings = sde, (2, 3), getattr(sampling, name), lambda x: x, 10
        with pytest.raises(ValueError, match=r"nothing of the data .* time 1 of .* T = 0\.995"):
            sampling.get_solver_sampler(*settings)
        sampling.get_solver_sampler(*settings, start_time=0.99)
    with pytest.raises(ValueError, match=r"nothing of the data"):
        get_log_likelihood_fn(sde, steps=9)(lambda x, label: x, torch.ones(1, 2))


def test_own_grids_are_checked(monkeypatch):
    monkeypatch.setattr(grids, "_GRIDS", copy.deepcopy(grids._GRIDS))
    sde = VPSDE()
    sampling.register_grid("mine")(lambda sde, first, eps, steps: torch.tensor([1.0, 0.3, 0.1]))
    sampling.register_grid("rising")(lambda *_: torch.tensor([1.0, 0.2, 0.5, 0.1]))
    assert sampling.time_grid(sde, 2, 0.2, "mine").tolist() == [1.0, 0.30000001192092896, 0.2]
    visited = sampling.visited_times(sde, 0.2, steps=3, grid="Mine").tolist()
    assert visited == pytest.approx([1.0, 0.3, 0.2, 0.0])
    for kind in ("mine", "rising"):
        with pytest.raises(ValueError, match=rf"grid '{kind}' .* fall from 1 to 0\.2, \(4,\)"):
            sampling.time_grid(sde, 3, 0.2, kind)


def test_mistakes_are_named():
    sde = SDES["vp"]
    with pytest.raises(ValueError, match=r"'linear'.*arctan, edm"):
        sampling.time_grid(sde, 5, EPS, "linear")
    with pytest.raises(ValueError, match="0 steps"):
        sampling.time_grid(sde, 0, EPS, "edm")
    with pytest.raises(ValueError, match="time 2"):
        sampling.time_grid(sde, 5, EPS, "edm", 2.0)
    config = small_config(sampling__method="dpm")
    with pytest.raises(ValueError, match=r"'dpm'.*adaptive, chain, ddim"):
        run_lib.setup(config)
