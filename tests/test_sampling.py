"""Samplers return the distribution whose score they are given."""

import inspect
import itertools
import math

import pytest
import torch
from ml_collections import ConfigDict
from oracles import MU, S0, GaussianOracle, golden_sde, inverse_scaler

import sampling
from models.utils import get_score_fn
from score_lib.base.tensors import SampleNoise
from score_lib.options import complete
from score_lib.samplers import pc
from score_lib.samplers.configured import follows_flow, get_sampling_fn, register_sampler
from score_lib.samplers.grids import visited_times
from sde_lib import VESDE, VPSDE, subVPSDE

SDES = {
    "ve": lambda N: VESDE(sigma_min=0.01, sigma_max=20, N=N),
    "vp": lambda N: VPSDE(N=N),
    "subvp": lambda N: subVPSDE(N=N),
}
ANCESTRAL = [("ve", "ancestral_sampling"), ("vp", "ancestral_sampling")]
PREDICTORS = [(n, p) for n in SDES for p in ("euler_maruyama", "reverse_diffusion")] + ANCESTRAL


def pc_sampler(sde, shape, predictor, corrector=None, **options):
    return sampling.get_pc_sampler(
        sde,
        shape,
        predictor and sampling.get_predictor(predictor),
        corrector and sampling.get_corrector(corrector),
        lambda x: x,
        options.pop("snr", 0.1),
        continuous=True,
        eps=sde.sampling_eps,
        **options,
    )


def exact_moments(sde, predictor, start, eps):
    """Mean and variance of a predictor's result, computed instead of sampled.

    With a Gaussian's score a step is x <- a x + b + c z: moments follow from those at the start.
    """
    score_fn = get_score_fn(sde, GaussianOracle(sde).double(), continuous=True)
    built = sampling.get_predictor(predictor)(sde, score_fn)
    built.noise = torch.ones_like
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, variance = start
    for t in torch.linspace(sde.T, eps, sde.N, dtype=torch.float64):
        x, x_mean = built.update_fn(ends, t.expand(2))
        b, a, c = x_mean[0], x_mean[1] - x_mean[0], (x - x_mean)[0]
        mean, of_mean, variance = a * mean + b, a**2 * variance, a**2 * variance + c**2
    return float(mean), float(of_mean)


def marginal(sde, t):
    """Mean and variance of x_t."""
    scale, std = sde.marginal_coeffs(torch.tensor([t], dtype=torch.float64))
    return scale * MU, (scale * S0) ** 2 + std**2


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("name", "predictor"), PREDICTORS)
def test_mean_and_deviation_within_monte_carlo_error(name, predictor):
    """Samples have the moments that the steps imply, and those are the data's."""
    sde, count = SDES[name](500), 50_000
    prior = torch.zeros(1), torch.full((1,), float(sde.prior_std) ** 2)
    mean, variance = exact_moments(sde, predictor, prior, sde.sampling_eps)
    std = math.sqrt(variance)
    torch.manual_seed(1)
    x, evaluations = pc_sampler(sde, (count, 1), predictor)(GaussianOracle(sde))
    assert evaluations == sde.N
    assert x.mean() == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert x.std() == pytest.approx(std, abs=4 * std / math.sqrt(2 * count))
    assert mean == pytest.approx(MU, abs=0.02) and std == pytest.approx(S0, abs=0.02)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("corrector", ("langevin", "langevin_per_sample", "ald"))
@pytest.mark.quick_cases(4)
def test_correctors_keep_the_distribution(name, corrector):
    sde, shape = SDES[name](300), (4_000, 8)
    if corrector == "langevin_per_sample":
        # The norm of one sample's score fluctuates by 1 / sqrt(D), and with it the step, which
        # biases the chain: in 8 dimensions by 18%.  Images have thousands.
        shape = (64, 500)
    torch.manual_seed(2)
    sampler = pc_sampler(sde, shape, "reverse_diffusion", corrector, snr=0.05)
    x, evaluations = sampler(GaussianOracle(sde))
    assert evaluations == 2 * sde.N
    assert x.mean() == pytest.approx(MU, abs=5 * S0 / math.sqrt(x.numel()) + 0.01)
    # The unadjusted chain is biased by the order of its step.
    assert x.std() == pytest.approx(S0, rel=0.03)


@pytest.mark.parametrize("name", SDES)
def test_ode_sampler_maps_the_prior_to_the_data(name):
    """The flow of a Gaussian is affine: x_0 = mu + (x_T - m mu) s0 / sqrt(m^2 s0^2 + s^2)."""
    sde = SDES[name](1000)
    ends = torch.tensor([sde.T, sde.sampling_eps], dtype=torch.float64)
    scale, std = sde.marginal_coeffs(ends)
    total = torch.sqrt((scale * S0) ** 2 + std**2)
    z = sde.prior_sampling((64, 2, 3)).double()
    expected = scale[1] * MU + (z - scale[0] * MU) * total[1] / total[0]
    sampler = sampling.get_ode_sampler(sde, z.shape, lambda x: x, eps=sde.sampling_eps)
    x, evaluations = sampler(GaussianOracle(sde).double(), z=z)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    assert evaluations < 200


@pytest.mark.parametrize(("name", "predictor"), PREDICTORS)
@pytest.mark.quick_cases(3)
def test_weak_convergence_is_of_first_order(name, predictor):
    """Doubling the steps halves the errors of mean and variance."""
    errors = []
    for N in (200, 400, 800):
        sde = SDES[name](N)
        # Down to just above 0: at 0 itself rounding would decide which step comes last.
        mean, variance = exact_moments(sde, predictor, marginal(sde, 1), 1e-6)
        truth = marginal(sde, 0)
        errors.append((mean - float(truth[0]), variance - float(truth[1])))
    for one in zip(*errors, strict=True):
        if max(map(abs, one)) > 1e-9:  # the VE process keeps the mean exactly
            orders = [math.log2(abs(a / b)) for a, b in itertools.pairwise(one)]
            assert orders == pytest.approx([1, 1], abs=0.1), one


@pytest.mark.parametrize("name", SDES)
def test_probability_flow_predictors_draw_no_noise(name):
    sde = SDES[name](100)
    z = sde.prior_sampling((8, 2))
    for predictor in ("euler_maruyama", "reverse_diffusion"):
        sampler = pc_sampler(sde, z.shape, predictor, probability_flow=True, denoise=False)
        results = [sampler(GaussianOracle(sde), z=z)[0] for _ in range(2)]
        assert torch.equal(*results)


@pytest.mark.parametrize("shape", ((3,), (2, 5), (1, 4, 6), (2, 3, 4, 2)), ids=str)
@pytest.mark.parametrize("predictor", ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"))
@pytest.mark.parametrize("corrector", ("langevin", "langevin_per_sample", "ald", "none"))
def test_any_data_shape(shape, predictor, corrector):
    sde = golden_sde("vpsde")
    sampler = pc_sampler(VPSDE(N=30), (2, *shape), predictor, corrector)
    x, _ = sampler(GaussianOracle(sde))
    assert x.shape == (2, *shape) and x.isfinite().all()


@pytest.mark.parametrize("corrector", ("langevin_per_sample", "ald", "none"))
@pytest.mark.parametrize("name", SDES)
def test_a_sample_is_a_function_of_seed_and_number(name, corrector):
    """However the samples are shared out among batches, sample k is the same."""
    sde, oracle = SDES[name](20), GaussianOracle(SDES[name](20))

    def draw(indices):
        sampler = pc_sampler(sde, (len(indices), 2, 3), "reverse_diffusion", corrector)
        return sampler(oracle, noise=SampleNoise(5, indices))[0]

    whole = draw(range(7))
    parts = torch.cat([draw(range(3)), draw(range(3, 7))])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    assert not torch.equal(whole, draw(range(1, 8)))


@pytest.mark.parametrize("method", ("ode", "chain", "pc", "adaptive", "heun"))
def test_a_start_in_half_precision_is_one_in_float32(method):
    """1000 times in bfloat16 would be 200 different ones."""
    sde, z, continuous = VPSDE(N=100), torch.randn(4, 2).bfloat16(), method != "chain"
    steps = {"method": method, "predictor": "euler_maruyama", "corrector": "ald"}
    config = complete(ConfigDict({"sampling": steps, "training": {"continuous": continuous}}))
    sample = get_sampling_fn(config, sde, z.shape, lambda x: x, sde.sampling_eps)
    (found, count), (expected, expected_count) = (
        sample(GaussianOracle(sde, continuous), start, noise=SampleNoise(0, range(4)))
        for start in (z, z.float())
    )
    assert count == expected_count
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("per_sample", (False, True))
def test_no_sample_is_a_result_of_none(per_sample):
    sde = VPSDE()
    sample = sampling.get_ode_sampler(sde, (0, 2), lambda x: x, per_sample=per_sample)
    x, evaluations = sample(GaussianOracle(sde))
    assert x.shape == (0, 2) and evaluations == 0


def test_per_sample_ode_does_not_depend_on_the_batch():
    sde = SDES["vp"](1000)
    z = torch.cat([sde.prior_sampling((4, 3)), 30 * torch.ones(1, 3)])

    def run(z, per_sample):
        sampler = sampling.get_ode_sampler(sde, z.shape, lambda x: x, per_sample=per_sample)
        return sampler(GaussianOracle(sde), z=z)[0]

    alone = torch.cat([run(row[None], True) for row in z])
    torch.testing.assert_close(run(z, True), alone, rtol=0, atol=1e-6)
    assert (run(z, False) - alone).abs().max() > 1e-6


def test_inverse_scaler_and_latent_code_are_used():
    sde = SDES["vp"](10)
    z = torch.zeros(3, 2)
    sampler = sampling.get_pc_sampler(
        sde, z.shape, None, None, inverse_scaler, 0.1, continuous=True
    )
    x, evaluations = sampler(GaussianOracle(sde), z=z)
    assert torch.equal(x, torch.full_like(z, 0.5)) and evaluations == 0


class Halve(sampling.Predictor):
    """A user's predictor, with the abstract methods only."""

    def update_fn(self, x, t):
        self.score_fn(x, t)
        return x / 2, x / 2


def test_own_predictor_and_evaluations_really_made():
    x, evaluations = sampling.get_pc_sampler(
        VPSDE(N=3), (2, 4), Halve, None, lambda x: x, 0.1, continuous=True
    )(GaussianOracle(VPSDE(N=3)), z=torch.ones(2, 4))
    assert torch.equal(x, torch.full((2, 4), 0.125)) and evaluations == 3


@pytest.mark.parametrize("predictor", ("euler_maruyama", "reverse_diffusion"))
@pytest.mark.parametrize("steps", (0, 40))
def test_a_sampler_follows_the_number_of_steps_of_its_process(predictor, steps):
    """Published code sets `sde.N` also after it has made the sampler: the times were the old ones,
    and the steps as long as the new ones."""
    settings = (4, 2), sampling.get_predictor(predictor), None, lambda x: x, 0.1
    sde, expected = (VPSDE(beta_max=5, N=N) for N in (40, 20))
    results = []
    for process, given in ((sde, steps), (expected, 0)):
        sample = sampling.get_pc_sampler(process, *settings, continuous=True, steps=given)
        process.N = 20
        torch.manual_seed(0)
        results.append(sample(GaussianOracle(expected)))
    (x, evaluations), (same, _) = results
    assert torch.equal(x, same) and evaluations == 20


def test_a_sampler_makes_its_times_once(monkeypatch):
    """A grid of noise levels is found by bisection, which took longer than small networks."""
    made = []
    monkeypatch.setattr(
        pc, "visited_times", lambda *a, **k: made.append(a) or visited_times(*a, **k)
    )
    sample = pc_sampler(VPSDE(), (4, 2), "reverse_diffusion", steps=5, grid="edm")
    before = len(made)
    for _ in range(2):
        assert sample(GaussianOracle(VPSDE()))[1] == 5
    assert len(made) == before > 0


def test_shared_update_functions():
    sde, x, t = VPSDE(beta_max=5, N=10), torch.randn(4, 2), torch.full((4,), 0.5)
    oracle = GaussianOracle(sde)
    torch.manual_seed(0)
    predictor = sampling.ReverseDiffusionPredictor
    x_new, x_mean = sampling.shared_predictor_update_fn(x, t, sde, oracle, predictor, False, True)
    score_fn = get_score_fn(sde, oracle, continuous=True)
    torch.manual_seed(0)
    torch.testing.assert_close((x_new, x_mean), predictor(sde, score_fn).update_fn(x, t))
    unchanged, _ = sampling.shared_corrector_update_fn(x, t, sde, oracle, None, True, 0.1, 1)
    assert torch.equal(unchanged, x)


def test_shared_update_functions_evaluate_the_network_without_dropout():
    modes, network = [], torch.nn.Identity()
    network.forward = lambda x, labels: modes.append(network.training) or -x
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    for update, kind, options in (
        (sampling.shared_predictor_update_fn, sampling.ReverseDiffusionPredictor, (False, True)),
        (sampling.shared_corrector_update_fn, sampling.LangevinCorrector, (True, 0.1, 1)),
    ):
        update(x, t, VPSDE(), network.train(), kind, *options)
        assert modes.pop() is False and not modes


@pytest.mark.parametrize("get", (sampling.get_predictor, sampling.get_corrector))
def test_unknown_names_list_the_known_ones(get):
    with pytest.raises(ValueError, match="none"):
        get("langevine")


@pytest.mark.parametrize("register", (sampling.register_predictor, sampling.register_corrector))
def test_registries_take_the_published_arguments(register):
    assert list(inspect.signature(register).parameters)[:2] == ["cls", "name"]


@pytest.mark.parametrize("method", ("ode", "adaptive", "one's own"))
def test_a_grid_of_times_is_for_samplers_that_take_one(method):
    register_sampler(lambda *arguments, **options: None, name="one's own")
    options = {"method": method, "time_grid": "edm"}
    config = complete({"training": {"continuous": True}, "sampling": options})
    with pytest.raises(ValueError, match=r"time_grid = 'edm' should be '' with sampling\.method"):
        get_sampling_fn(config, VPSDE(), (1, 2), lambda x: x, 1e-3)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("ddim", "eta", 1.0),
        ("dpmpp_2m", "churn", 40.0),
        ("pc", "churn", 40.0),
        ("ode", "adaptive_rtol", 0.01),
        ("heun", "adaptive_atol", 0.01),
    ],
)
def test_options_of_another_method_are_refused(method, name, value):
    """Samples would be the same for any value of them."""
    config = complete({"training": {"continuous": True}, "sampling": {"method": method}})
    config.sampling[name] = value
    with pytest.raises(ValueError, match=rf"sampling\.{name} = {value} should be .*{method!r}, wh"):
        get_sampling_fn(config, VPSDE(), (1, 2), lambda x: x, 1e-3)


def test_ancestral_sampling_has_no_flow():
    with pytest.raises(ValueError, match="probability_flow"):
        sampling.AncestralSamplingPredictor(VPSDE(), None, probability_flow=True)


@pytest.mark.parametrize(
    "options",
    [
        *({"method": m} for m in ("ode", "ddim", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde")),
        {"method": "heun", "churn": 5.0},
        {"method": "adaptive"},
        *(
            {"method": "pc", "predictor": p, "corrector": c, "probability_flow": flow}
            for p, c, flow in (
                ("euler_maruyama", "none", False),
                ("euler_maruyama", "none", True),
                ("reverse_diffusion", "none", True),
                ("reverse_diffusion", "langevin", True),
            )
        ),
        *({"method": "chain", "variance": "ddim", "eta": eta, "clip": False} for eta in (0.0, 0.5)),
        {"method": "chain", "variance": "small", "clip": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_samplers_that_follow_the_flow_draw_noise_at_its_start_only(options):
    sde, z = VPSDE(N=40), 0.9 * torch.ones(2, 3)
    training = {"continuous": options["method"] != "chain"}
    config = complete(ConfigDict({"training": training, "sampling": {"num_steps": 60, **options}}))
    sample = get_sampling_fn(config, sde, z.shape, lambda x: x, 1e-3)
    one, other = (sample(GaussianOracle(sde), z, noise=SampleNoise(k, range(2)))[0] for k in (0, 1))
    assert torch.equal(one, other) == follows_flow(config)
