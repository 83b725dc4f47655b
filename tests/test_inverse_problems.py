"""Linear inverse problems with a known posterior: Gaussian data of any covariance."""

import pytest
import torch
from ml_collections import ConfigDict
from oracles import GaussianDataOracle, exact_moments
from small_runs import small_config

import sampling
from controllable_generation import (
    DataConsistency,
    GaussianBlur,
    LinearOperator,
    Mask,
    MatrixOperator,
    RandomProjection,
    SuperResolution,
    get_pc_restorer,
    get_restoration,
)
from models.utils import get_score_fn
from score_lib.inverse.restoration import STANDARDIZED, build_restoration
from score_lib.options import complete
from sde_lib import VESDE, VPSDE, subVPSDE

D = 4
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.4])
# Neighbours have a correlation of 0.8.
_DISTANCE = (torch.arange(D)[:, None] - torch.arange(D)).abs().double()
COVARIANCE = 0.25 * 0.8**_DISTANCE
TRUTH = torch.tensor([[0.9, 0.2, -0.3, -0.5]])

SDES = {
    "ve": lambda N: VESDE(sigma_max=10, N=N),
    "vp": lambda N: VPSDE(N=N),
    "subvp": lambda N: subVPSDE(N=N),
}
OPERATORS = {
    "mask": Mask((D,), torch.tensor([1.0, 0.0, 0.0, 1.0])),
    "super_resolution": SuperResolution((D,), 2),
    "blur": GaussianBlur((D,), 1.0),
    "projection": RandomProjection((D,), 2, seed=0),
}
# Every operator with one process, and every process: operators know of none.
PAIRS = pytest.mark.parametrize(
    ("sde", "operator"),
    [
        pytest.param(SDES[sde], OPERATORS[operator], id=f"{sde}-{operator}")
        for sde, operator in [*(("vp", o) for o in OPERATORS), ("ve", "blur"), ("subvp", "mask")]
    ],
)
# The corrector whose steps are linear in the noise.
CORRECTOR = sampling.AnnealedLangevinDynamics


def posterior(operator, noise_std, covariance=COVARIANCE):
    """Closed-form mean and covariance of x given y = A x + noise."""
    A = operator.apply(torch.eye(D).double()).T
    A = A[A.abs().sum(1) > 0]
    y = A @ TRUTH[0].double()
    of_y = A @ covariance @ A.T + noise_std**2 * torch.eye(len(A)).double()
    gain = covariance @ A.T @ torch.linalg.inv(of_y)
    return MEAN + gain @ (y - A @ MEAN.double()), covariance - gain @ A @ covariance


def errors(draw_moments, operator, noise_std, covariance=COVARIANCE):
    """Errors of mean and covariance: the first relative to the change by the measurement."""
    mean, cov = draw_moments
    true_mean, true_cov = posterior(operator, noise_std, covariance)
    change = torch.linalg.norm(true_mean - MEAN)
    return (
        float(torch.linalg.norm(mean - true_mean) / change),
        float(torch.linalg.norm(cov - true_cov) / torch.linalg.norm(true_cov)),
    )


def pc_moments(sde, operator, method, noise_std, corrector=None, covariance=COVARIANCE, **settings):
    """Mean and covariance of predictor-corrector samples, without Monte-Carlo error."""
    y = operator.apply(TRUTH)
    restore = get_pc_restorer(
        sde,
        sampling.ReverseDiffusionPredictor,
        corrector,
        lambda x: x,
        0.3,
        2,
        continuous=True,
        eps=sde.sampling_eps,
    )
    network = GaussianDataOracle(sde, MEAN, covariance)

    def draw(count, noise):
        many = y.expand(count, *y.shape[1:])
        return restore(network, operator, many, noise_std, method=method, noise=noise, **settings)

    return exact_moments(draw, D)


@pytest.mark.quick_cases(1)
@PAIRS
def test_tweedie_guidance_samples_the_posterior(sde, operator):
    """The error is that of the steps, of first order in 1 / N."""
    mean, cov = zip(
        *(
            errors(pc_moments(sde(N), operator, "tweedie", 0.1, iterations=D), operator, 0.1)
            for N in (50, 100, 200)
        ),
        strict=True,
    )
    assert mean[-1] < 0.003 and cov[-1] < 0.04
    assert cov[-1] < 0.75 * cov[0]


@pytest.mark.parametrize("method", ("dps", "pigdm", "tweedie"))
def test_guidance_inside_inference_mode(method):
    """It differentiates all the same, and leaves an operator that can be differentiated."""
    sde, results = VPSDE(N=30), []
    steps = sampling.ReverseDiffusionPredictor, None, lambda x: x, 0.3
    restore = get_pc_restorer(sde, *steps, continuous=True)
    operator, network = RandomProjection((D,), 2, seed=0), GaussianDataOracle(sde, MEAN, COVARIANCE)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.manual_seed(0)
            y = operator.apply(TRUTH)
            results.append(restore(network, operator, y, 0.1, method=method))
    assert torch.equal(*results)
    x = TRUTH.clone().requires_grad_()
    (grad,) = torch.autograd.grad(operator.apply(x).sum(), x)
    torch.testing.assert_close(grad, operator.adjoint(torch.ones(1, 2)))


@pytest.mark.parametrize("sde", (SDES["vp"],), ids=("vp",))
@pytest.mark.slow
def test_tweedie_guidance_needs_no_noise_in_the_measurement(sde):
    operator = OPERATORS["mask"]
    mean, cov = errors(pc_moments(sde(400), operator, "tweedie", 0.0), operator, 0.0)
    assert mean < 0.002 and cov < 0.03


@PAIRS
def test_the_ode_is_guided_to_the_posterior(sde, operator):
    """Along the probability flow only the prior, which is not quite p_T, is left as an error."""
    sde, y = sde(100), operator.apply(TRUTH)
    if isinstance(sde, VESDE):
        sde = VESDE(sigma_max=100)  # of which the error of the prior's mean is a hundredth
    network = GaussianDataOracle(sde, MEAN, COVARIANCE)

    def draw(count, noise):
        many = y.expand(count, *y.shape[1:])
        constraint = get_restoration("tweedie")(operator, many, 0.1, iterations=D)
        sample = sampling.get_ode_sampler(
            sde, (count, D), lambda x: x, eps=sde.sampling_eps, constraints=[constraint]
        )
        return sample(network, noise=noise)[0]

    mean, cov = errors(exact_moments(draw, D), operator, 0.1)
    assert mean < 0.003 and cov < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sde", "noise_std"), [(SDES["vp"], 0.0), (SDES["ve"], 0.1), (SDES["subvp"], 0.1)]
)
def test_inpainting_approaches_the_conditional_distribution(sde, noise_std):
    """With corrector steps, whose number grows with N, at the rate at which they forget."""
    operator = OPERATORS["mask"]
    mean, cov = zip(
        *(
            errors(
                pc_moments(sde(N), operator, "projection", noise_std, CORRECTOR),
                operator,
                noise_std,
            )
            for N in (25, 100, 400)
        ),
        strict=True,
    )
    assert mean[0] > 1.2 * mean[1] > 1.2**2 * mean[2]
    assert cov[0] > 1.2 * cov[1] > 1.2**2 * cov[2]
    assert mean[2] < 0.04 and cov[2] < 0.18


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_projection_of_noisy_measurements_approaches_the_posterior(operator):
    _, cov = zip(
        *(
            errors(pc_moments(SDES["ve"](N), operator, "projection", 0.1, CORRECTOR), operator, 0.1)
            for N in (50, 200)
        ),
        strict=True,
    )
    assert cov[1] < 0.5 * cov[0] and cov[1] < 0.17


@pytest.mark.slow
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_inpainting_without_a_corrector_is_biased(sde):
    """However many steps there are: the mean by 12% of the measurement's effect, and the
    covariance by three fifths."""
    operator = OPERATORS["mask"]
    for N in (200, 400):
        mean, cov = errors(pc_moments(sde(N), operator, "projection", 0.0), operator, 0.0)
        assert 0.10 < mean < 0.13
        assert 0.55 < cov < 0.70


@pytest.mark.parametrize("operator", ("mask", "super_resolution", "projection"))
def test_pseudo_inverse_guidance_is_exact_for_independent_entries(operator):
    operator, covariance = OPERATORS[operator], 0.25 * torch.eye(D).double()
    found = pc_moments(SDES["vp"](200), operator, "pigdm", 0.1, covariance=covariance, data_std=0.5)
    mean, cov = errors(found, operator, 0.1, covariance)
    assert mean < 0.002 and cov < 0.02


@pytest.mark.slow
def test_pseudo_inverse_guidance_is_biased_for_correlated_entries():
    """With a correlation of 0.8 between neighbours, by 5% of the measurement's effect."""
    operator = OPERATORS["mask"]
    mean, _ = errors(pc_moments(SDES["vp"](200), operator, "pigdm", 0.1), operator, 0.1)
    assert 0.04 < mean < 0.06


def test_dps_follows_the_measurement_and_is_biased():
    """Its samples agree with the measurement, and their mean is off by a third of the posterior's
    standard deviation or more."""
    torch.manual_seed(0)
    operator, sde = OPERATORS["mask"], SDES["vp"](200)
    y = operator.apply(TRUTH).expand(2000, D)
    restore = get_pc_restorer(
        sde, sampling.ReverseDiffusionPredictor, None, lambda x: x, 0.3, continuous=True, eps=1e-3
    )
    network = GaussianDataOracle(sde, MEAN, COVARIANCE)
    x = restore(network, operator, y, 0.1, method="dps", strength=0.3)
    true_mean, true_cov = posterior(operator, 0.1)
    off = (x.double().mean(0) - true_mean).abs() / true_cov.diag().sqrt()
    known = TRUTH[0] != operator.apply(TRUTH)[0]
    assert (x - y)[:, ~known].square().mean().sqrt() < 0.25
    assert 0.3 < off[~known].max() < 1.0


class Path(sampling.Constraint):
    """Notes where steps start, (x, t, s), and end: the corrector's, then the predictor's."""

    def __init__(self):
        self.steps = []

    def wrap(self, sde, step, noise):
        def noted(x, t, s):
            moved = step(x, t, s)
            self.steps.append((x, t, s, moved[0]))
            return moved

        return noted


@pytest.mark.parametrize(
    "options", ({}, {"steps": 50}, {"steps": 50, "grid": "log_snr"}, {"steps": 9}), ids=str
)
@pytest.mark.parametrize("sde", (SDES["ve"], SDES["vp"]), ids=("ve", "vp"))
def test_a_step_of_dps_is_as_long_as_its_strength(sde, options, monkeypatch):
    """Of data whose entries are independent, xhat_0 moves by c = m S^2 / (m^2 S^2 + s^2) with x."""
    monkeypatch.setattr("score_lib.samplers.pc.check_steps", lambda *given: None)
    sde, operator, strength, std = sde(30), OPERATORS["mask"], 0.3, 0.5
    network = GaussianDataOracle(sde, MEAN, std**2 * torch.eye(D))
    y = operator.apply(TRUTH).expand(5, D)
    path, dps = Path(), get_restoration("dps")(operator, y, strength=strength)
    sample = sampling.get_pc_sampler(
        sde, (5, D), sampling.ReverseDiffusionPredictor, None, lambda x: x, 0.0,
        continuous=True, eps=sde.sampling_eps, constraints=[dps, path], **options,
    )  # fmt: skip
    sample(network, noise=torch.zeros_like, z=torch.randn(5, D).mul(sde.prior_std))
    score_fn = get_score_fn(sde, network, continuous=True)
    free = sampling.ReverseDiffusionPredictor(sde, score_fn)
    assert len(path.steps) == 2 * options.get("steps", sde.N)
    for x, t, s, moved in path.steps[1::2]:
        _, alone = free.step(x, t, s) if options else free.update_fn(x, t)
        scale, noise = sde.marginal_coeffs(t)
        slope = scale * std**2 / ((scale * std) ** 2 + noise**2)
        found = torch.linalg.vector_norm(moved - alone, dim=1)
        torch.testing.assert_close(found, strength * slope, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("solver", ("dpmpp_sde", "ddim", "heun"))
@pytest.mark.parametrize("sde", (SDES["ve"], SDES["vp"]), ids=("ve", "vp"))
def test_dps_fits_the_measurement_in_any_number_of_steps(sde, solver):
    """By its strength alone; also Heun's at times between those of the grid."""
    sde, operator = sde(1000), OPERATORS["mask"]
    network = GaussianDataOracle(sde, MEAN, 0.25 * torch.eye(D))
    y = operator.apply(TRUTH).expand(400, D)
    residuals = []
    for steps in (20, 100):
        torch.manual_seed(0)
        config = small_config(sampling__method=solver)
        config.sampling.churn = steps / 10 if solver == "heun" else 0.0
        sample = sampling.get_sampling_fn(
            config, sde, (400, D), lambda x: x, sde.sampling_eps, steps=steps, continuous=True,
            constraints=[get_restoration("dps")(operator, y, strength=0.3)],
        )  # fmt: skip
        off = operator.apply(sample(network)[0]) - y
        residuals.append(off[:, [0, 3]].square().mean().sqrt().item())
    assert max(residuals) < 0.25
    assert residuals[0] == pytest.approx(residuals[1], rel=0.3)


@pytest.mark.slow
def test_a_noisy_measurement_stays_with_the_known_coordinates():
    """At t = eps, x is y up to noise where it was measured."""
    operator, sde = OPERATORS["super_resolution"], SDES["ve"](200)
    mean, cov = pc_moments(sde, operator, "projection", 0.1, CORRECTOR)
    true_mean, true_cov = posterior(operator, 0.1)
    of = operator.apply(torch.eye(D).double()).T
    torch.testing.assert_close(of @ mean, of @ true_mean, rtol=0, atol=0.02)
    torch.testing.assert_close((of @ cov @ of.T), of @ true_cov @ of.T, rtol=0.2, atol=1e-4)


@pytest.mark.parametrize("method", ("projection", "dps", "pigdm", "tweedie"))
def test_unmeasured_entries_never_leak(method):
    """A measurement may hold anything, even nan, where nothing was measured."""
    operator, sde = OPERATORS["mask"], SDES["vp"](30)
    y = operator.apply(TRUTH).expand(3, D)
    results = []
    for unknown in (0.0, 7.0, torch.nan):
        torch.manual_seed(0)
        restore = get_pc_restorer(
            sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.3, continuous=True
        )
        given = torch.where(operator.mask, y, unknown)
        network = GaussianDataOracle(sde, MEAN, COVARIANCE)
        results.append(restore(network, operator, given, 0.05, method=method))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Differences(LinearOperator):
    """A user's own: differences of neighbours, without singular values."""

    def __init__(self):
        super().__init__((D,), (D - 1,))

    def apply(self, x):
        return x.diff(dim=1)

    def adjoint(self, y):
        zero = torch.zeros_like(y[:, :1])
        return torch.cat([zero, y], dim=1) - torch.cat([y, zero], dim=1)


def test_own_operators_are_enough_for_guidance():
    operator = Differences()
    found = pc_moments(SDES["vp"](200), operator, "tweedie", 0.1)
    mean, cov = errors(found, operator, 0.1)
    assert mean < 0.003 and cov < 0.04
    assert operator.picture(operator.apply(TRUTH)).shape == TRUTH.shape
    with pytest.raises(NotImplementedError, match="Differences does not know its singular values"):
        DataConsistency(operator, operator.apply(TRUTH))


@pytest.mark.parametrize("method", ("pigdm", "tweedie"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_rows_that_repeat_others_change_nothing(method, dtype):
    """A A^T is singular then, and its null space holds only rounding, of which some is amplified
    without an end in more iterations than are needed."""
    rows = torch.tensor([[1.0, -0.3, 0.7, 0.2], [0.4, 1.1, -0.6, 0.9]], dtype=torch.float64)
    mixed = torch.tensor([[0.3, 1.2], [1.7, -0.4], [0.6, 0.6], [-0.1, 2.3]], dtype=torch.float64)
    sde, found = SDES["vp"](100), []
    network = GaussianDataOracle(sde, MEAN.to(dtype), COVARIANCE)
    generator = torch.Generator().manual_seed(0)
    x, t = TRUTH.to(dtype).expand(64, D), torch.full((64,), 1e-3, dtype=dtype)
    noisy = x + 0.01 * torch.randn(x.shape, generator=generator, dtype=dtype)
    for matrix in (rows, torch.cat([rows, mixed @ rows])):
        operator = MatrixOperator((D,), matrix)
        guidance = get_restoration(method)(operator, operator.apply(x), iterations=40)
        guided = guidance.guide(sde, get_score_fn(sde, network, continuous=True))
        found.append(guided(noisy, t).detach())
    torch.testing.assert_close(*found, rtol=0.01, atol=0.01 * float(found[0].abs().max()))


@pytest.mark.parametrize("method", ("pigdm", "tweedie"))
@pytest.mark.parametrize("noise_std", (0.0, 1e-3))
def test_rows_that_contradict_each_other_count_with_their_mean(method, noise_std):
    """Without noise there is no such x_0; guidance grew without an end, to a thousandfold."""
    sde = SDES["vp"](100)
    network = GaussianDataOracle(sde, MEAN, COVARIANCE)
    row = torch.tensor([[0.4, 0.1, -0.3, 0.2]])
    y = TRUTH @ row.mT
    off = torch.tensor([[0.3, -0.2, -0.1]])
    guided = [
        get_restoration(method)(MatrixOperator((D,), row.expand(count, D)), given, std)
        .guide(sde, get_score_fn(sde, network, continuous=True))(TRUTH, torch.tensor([0.01]))
        .detach()
        for count, given, std in ((3, y + off, noise_std), (1, y, noise_std / 3**0.5))
    ]
    torch.testing.assert_close(*guided, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_measurement_that_data_explain_stays_bit_for_bit(dtype):
    """Rounding in orthonormal rows is not taken for a direction to solve."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for kind in (GaussianBlur, SuperResolution, RandomProjection):
        operator = kind(images.shape[1:])
        y = operator.apply(images)
        guidance = get_restoration("tweedie")(operator, y)
        assert torch.equal(guidance.measurement, y)


@pytest.mark.parametrize("method", ("pigdm", "tweedie", "projection"))
def test_noise_that_is_not_stated_is_found_where_it_would_be_amplified(method):
    """Samples were ten thousand times as large as the data."""
    operator = GaussianBlur((8,), 3.0)
    data = torch.linspace(-1, 1, 16).reshape(2, 8).sin()
    y = operator.apply(data)
    get_restoration(method)(operator, y)
    noisy = y + 0.1 * torch.tensor([1.0, -1.0]).repeat(4)
    get_restoration(method)(operator, noisy, 0.1)
    with pytest.raises(ValueError, match=r"times as large .* state .* noise_std, above 0"):
        get_restoration(method)(operator, noisy)


@pytest.mark.parametrize("noise_std", (1e-4, 1e-2))
def test_a_row_measured_four_times_has_half_the_noise(noise_std):
    """Little noise is no rounding, in float32 either."""
    sde, row, found = SDES["vp"](100), torch.tensor([[0.4, 0.1, -0.3, 0.2]]), []
    score_fn = get_score_fn(sde, GaussianDataOracle(sde, MEAN, COVARIANCE), continuous=True)
    y = TRUTH @ row.mT + noise_std * torch.tensor([[0.3, -1.0, 1.6, 0.5]])
    x, t = TRUTH + 0.01 * torch.tensor([[1.0, -0.4, 0.3, 0.9]]), torch.tensor([1e-3])
    for count, mean, std in ((4, y, noise_std), (1, y.mean(1, keepdim=True), noise_std / 2)):
        operator = MatrixOperator((D,), row.expand(count, D))
        guidance = get_restoration("tweedie")(operator, mean, std, iterations=12)
        found.append(guidance.guide(sde, score_fn)(x, t).detach())
    torch.testing.assert_close(*found, rtol=0.01, atol=0.01 * float(found[0].abs().max()))


@pytest.mark.slow
def test_guidance_can_be_differentiated():
    """By the measurement: the posterior's mean moves by the gain of y."""
    operator, sde = OPERATORS["super_resolution"], SDES["vp"](60)
    network = GaussianDataOracle(sde, MEAN, COVARIANCE)

    def restored(y, **options):
        restore = get_pc_restorer(
            sde,
            sampling.ReverseDiffusionPredictor,
            None,
            lambda x: x,
            0.3,
            continuous=True,
            eps=1e-3,
            **options,
        )
        return restore(network, operator, y, 0.1, noise=torch.zeros_like)[0]

    y = operator.apply(TRUTH)
    slope = torch.autograd.functional.jacobian(lambda y: restored(y, differentiable=True), y)[:, 0]
    differences = [restored(y + step) - restored(y - step) for step in 0.5 * torch.eye(2)[:, None]]
    torch.testing.assert_close(slope, torch.stack(differences, dim=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("method", ("dps", "pigdm", "tweedie"))
def test_the_guided_estimate_is_clipped_to_the_range_of_data(method, sde):
    """E[x_0 | x_t, y] that the score stands for: bounds cut it off, and change nothing else."""
    sde, operator = sde(20), OPERATORS["mask"]
    score_fn = get_score_fn(sde, GaussianDataOracle(sde, MEAN, COVARIANCE), continuous=True)
    y, x = operator.apply(TRUTH).expand(5, D), torch.linspace(-1, 1, 5 * D).reshape(5, D)
    t = torch.linspace(0.2, 0.8, 5)

    def estimate(**options):
        constraint = get_restoration(method)(operator, y, 0.1, **options)
        return sde.denoised(x, t, constraint.guide(sde, score_fn)(x, t))

    free = estimate()
    assert free.min() < -0.1 and free.max() > 0.2
    torch.testing.assert_close(
        estimate(bounds=(-0.1, 0.2)), free.clamp(-0.1, 0.2), rtol=0, atol=1e-5
    )


def test_settings_come_from_the_config():
    """Data have a standard deviation in units of their range, here of a width of 3."""
    config = complete(ConfigDict({"control": {"strength": 0.7, "data_std": 0.2, "iterations": 3}}))
    operator, bounds = OPERATORS["mask"], (-2.0, 1.0)
    built = {
        name: build_restoration(name, config, operator, TRUTH, 0.1, bounds=bounds)
        for name in ("projection", "dps", "pigdm", "tweedie")
    }
    assert all(constraint.noise_std == 0.1 for constraint in built.values())
    assert {built[name].bounds for name in ("dps", "pigdm", "tweedie")} == {bounds}
    assert built["dps"].strength == 0.7
    assert built["pigdm"].data_std == pytest.approx(0.6) and built["pigdm"].iterations == 3
    assert built["tweedie"].iterations == 3


@pytest.mark.parametrize("data_std", [0.0, 0.2])
def test_deviations_of_standardized_data_are_in_the_networks_range(data_std):
    """1 by default, with bounds or without, and not a share of the width of the bounds."""
    config = complete(ConfigDict({"control": {"data_std": data_std}}))
    for bounds in (None, STANDARDIZED):
        built = build_restoration("pigdm", config, OPERATORS["mask"], TRUTH, 0.1, bounds=bounds)
        assert (built.data_std, built.bounds) == (data_std or 1.0, bounds)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    (
        ("tweedie", {"iterations": 0}, "set iterations to 1 or more, not 0"),
        ("pigdm", {"iterations": 0}, "set iterations to 1 or more, not 0"),
        ("pigdm", {"data_std": 0.0}, r"a number above 0, not data_std = 0\.0"),
        ("pigdm", {"data_std": torch.nan}, "a number above 0, not data_std = nan"),
    ),
)
def test_settings_by_which_a_measurement_counts_for_nothing_are_refused(method, settings, said):
    operator = OPERATORS["mask"]
    with pytest.raises(ValueError, match=said):
        get_restoration(method)(operator, operator.apply(TRUTH), 0.1, **settings)


def test_mistakes_are_named():
    operator = OPERATORS["super_resolution"]
    with pytest.raises(ValueError, match=r"measurement has shape \(1, 3\).*\(B, 2\)"):
        get_restoration("tweedie")(operator, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="noise of a measurement is 0 or more, not -1"):
        get_restoration("projection")(operator, torch.zeros(1, 2), -1.0)
    with pytest.raises(ValueError, match=r"the operator is an object .* not 'blur'"):
        get_restoration("pigdm")("blur", torch.zeros(1, 2))
    with pytest.raises(ValueError, match="known are dps, none, pigdm, projection, tweedie"):
        get_restoration("ddrm")
