"""Right values in situations where samplers are known to give wrong ones without a word."""

import math

import pytest
import torch
from oracles import GaussianOracle, exact_pc

import controllable_generation
import likelihood
import losses
import sampling
from models.utils import get_model_fn
from score_lib.disk.pictures import to_uint8
from score_lib.samplers.accuracy import MOST_ERROR, _warn_once, final_std
from sde_lib import SDE, VESDE, VPSDE, subVPSDE

SDES = {"ve": VESDE, "vp": VPSDE, "subvp": subVPSDE}
FEW = (200, 100, 50, 25)


class BinaryOracle(torch.nn.Module):
    """The network that has learned entries of exactly -1 or 1: E[x_0 | x_t] = tanh(m x / s^2)."""

    def __init__(self, sde):
        super().__init__()
        self.sde, self.unused = sde, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, label):
        t = (
            self.sde.T * torch.log(label / 0.01) / math.log(5000)
            if is_ve(self.sde)
            else label / 999
        )
        m, s = self.sde.marginal_coeffs(t)
        denoised = torch.tanh(sampling.batch_mul(m / s**2, x))
        score = self.sde.score_of_denoised(x, t, denoised)
        return score if is_ve(self.sde) else -sampling.batch_mul(s, score)


def is_ve(sde):
    return sde.sampling_eps == VESDE.sampling_eps


# --- Few steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", FEW)
@pytest.mark.parametrize("predictor", ("reverse_diffusion", "euler_maruyama"))
@pytest.mark.parametrize("name", SDES)
def test_binary_data_stay_binary_in_few_steps_or_are_refused(name, predictor, steps):
    sde, predictor = SDES[name](N=1000), sampling.get_predictor(predictor)
    try:
        sampler = exact_pc(sde, (500, 4), predictor, steps=steps)
    except ValueError as refusal:
        assert name == "subvp" and steps <= 50
        assert "100 steps are enough" in str(refusal) and "dpmpp_2m" in str(refusal)
        return
    torch.manual_seed(0)
    x, evaluations = sampler(BinaryOracle(sde))
    error = (x.abs() - 1).square().mean().sqrt()
    assert evaluations == steps and error <= MOST_ERROR
    expected = final_std(sde, predictor, sampling.visited_times(sde, sde.sampling_eps, steps=steps))
    assert error == pytest.approx(expected, rel=0.15, abs=1e-3)


@pytest.mark.parametrize(
    ("sde", "settings", "error"),
    (
        (VESDE(0.2, 50, N=1000), {"steps": 500}, 0.2),
        (VPSDE(0.1, 4, N=1000), {"steps": 200, "eps": 0.1}, 0.11),
    ),
    ids=str,
)
def test_an_error_of_the_last_step_is_none_of_too_few(sde, settings, error, caplog):
    """Noise of sigma_min, or of a last time far from the data, stays in any number of steps."""
    _warn_once.cache_clear()
    exact_pc(sde, (2, 4), sampling.EulerMaruyamaPredictor, **settings)
    said = f"off by {error:.2g} in the network's range, however many steps"
    assert [said in text for text in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("sde", "settings", "error"),
    (
        (VPSDE(N=100), {}, 0.63),
        (VPSDE(N=200), {"grid": "uniform"}, 0.15),
        (subVPSDE(N=100), {}, 0.43),
        (VESDE(N=100), {"eps": 1e-5}, None),
        (VPSDE(N=1000), {}, None),
        (VPSDE(N=1000), {"steps": 100}, None),
        (VPSDE(N=100), {"grid": "log_snr"}, None),
        (VPSDE(N=100), {"continuous": False}, None),
    ),
    ids=str,
)
def test_a_published_chain_that_misses_the_data_is_told(sde, settings, error, caplog):
    _warn_once.cache_clear()
    settings = {"continuous": True, "snr": 0.16, **settings}
    sampler = sampling.get_pc_sampler(
        sde, (500, 4), sampling.EulerMaruyamaPredictor, None, lambda x: x, **settings
    )
    if error is None:
        assert not caplog.text
        return
    assert f"samples will be off by {error} in the network's range" in caplog.text
    x, _ = sampler(BinaryOracle(sde))
    assert (x.abs() - 1).square().mean().sqrt() == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("name", SDES)
def test_the_refusal_names_a_solver_that_does_it(name):
    sde = SDES[name](N=1000)
    eps = sde.sampling_eps
    sampler = sampling.get_solver_sampler(
        sde, (500, 4), sampling.DPMSolver2M, lambda x: x, 25, eps=eps
    )
    torch.manual_seed(0)
    x, _ = sampler(BinaryOracle(sde))
    assert (x.abs() - 1).square().mean().sqrt() < 1e-3


def test_a_process_built_with_few_steps_is_its_own_chain():
    sde = subVPSDE(N=50)
    _, evaluations = exact_pc(sde, (4, 4), sampling.EulerMaruyamaPredictor)(BinaryOracle(sde))
    assert evaluations == 50


@pytest.mark.parametrize("name", ("ve", "vp"))
def test_steps_set_on_a_process_are_its_chain(name):
    """`sde.N = 100` after the process was made: samples of data of deviation 0.3 keep it.

    100 steps of the VE chain spread them by a twentieth.
    """
    sde = SDES[name](N=1000)
    sde.N = 100
    oracle = GaussianOracle(sde, mu=0.0, s0=0.3)
    torch.manual_seed(0)
    x, evaluations = exact_pc(sde, (4000, 4), sampling.ReverseDiffusionPredictor)(oracle)
    assert evaluations == 100 and x.std() == pytest.approx(0.3, rel=0.07)


# --- Correctors, denoising, adaptive steps --------------------------------------------------------


class Correlated:
    """The exact score of N(0, A A^T + s^2 I) at one time of a VE process, and draws."""

    def __init__(self, dimensions, std, correlated):
        self.sde, self.t = VESDE(N=1000), 0.5
        s = float(self.sde.sigma(torch.tensor(self.t)))
        root = torch.ones(dimensions, dimensions) if correlated else torch.zeros(1, 1)
        scale = math.sqrt(std**2 - s**2) if std > s else 0.0
        root = root * scale / dimensions if correlated else torch.eye(dimensions) * scale
        covariance = root @ root.T + s**2 * torch.eye(dimensions)
        self.precision = torch.linalg.inv(covariance)
        self.root, self.covariance = torch.linalg.cholesky(covariance), covariance

    def __call__(self, x, t):
        return -x @ self.precision

    def draw(self, count):
        return torch.randn(count, len(self.root)) @ self.root.T


@pytest.mark.parametrize("correlated", (False, True))
@pytest.mark.parametrize("dimensions", (1, 2, 8, 64))
def test_per_sample_langevin_keeps_the_distribution(dimensions, correlated):
    """200 steps from the distribution itself leave every variance within 4% (deviations 2%)."""
    torch.manual_seed(0)
    target = Correlated(dimensions, 1.0, correlated)
    corrector = sampling.get_corrector("langevin_per_sample")(target.sde, target, 0.16, 200)
    count = 100_000 // dimensions + 4_000
    x, _ = corrector.update_fn(target.draw(count), torch.full((count,), target.t))
    found = (x * x).mean() / target.covariance.diagonal().mean()
    assert found == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("name", SDES)
def test_denoised_ode_samples_do_not_depend_on_n(name):
    ends = []
    for N in (50, 1000):
        sde = SDES[name](N=N)
        z = sde.prior_from_normal(torch.randn(64, 3, generator=torch.Generator().manual_seed(1)))
        sampler = sampling.get_ode_sampler(
            sde, z.shape, lambda x: x, denoise=True, eps=sde.sampling_eps
        )
        ends.append(sampler(BinaryOracle(sde), z)[0])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert (ends[0].abs() - 1).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", (1, 2, 8))
def test_adaptive_steps_are_unbiased_in_few_dimensions(dimensions):
    """The published step control lets a step grow without limit: 0.61 instead of 0.5 in one."""
    sde, count = VPSDE(), 20_000
    torch.manual_seed(0)
    shape = (count, dimensions)
    sampler = sampling.get_adaptive_sampler(sde, shape, lambda x: x, eps=sde.sampling_eps)
    x, _ = sampler(GaussianOracle(sde, mu=0.0, s0=0.5))
    assert x.std() == pytest.approx(0.5, rel=0.02)


# --- Any dtype, any rank, the ends of time --------------------------------------------------------

SAMPLERS = {
    "pc": lambda sde, shape: exact_pc(sde, shape, sampling.ReverseDiffusionPredictor),
    "ode": lambda sde, shape: sampling.get_ode_sampler(sde, shape, lambda x: x),
    "adaptive": lambda sde, shape: sampling.get_adaptive_sampler(sde, shape, lambda x: x),
    "heun": lambda sde, shape: sampling.get_solver_sampler(
        sde, shape, sampling.Heun, lambda x: x, 10
    ),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((6,), (6, 1), (6, 1, 2, 3, 2)), ids=str)
@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_of_any_rank_have_the_dtype_of_the_network(method, shape, dtype):
    sde = VPSDE(N=30)
    x, _ = SAMPLERS[method](sde, shape)(BinaryOracle(sde).to(dtype))
    assert x.shape == shape and x.dtype == dtype and x.isfinite().all()


@pytest.mark.parametrize("name", SDES)
def test_a_default_dtype_of_half_precision_changes_no_value(name):
    """Tables, times and priors in bfloat16 would be those of other noise levels."""
    x = torch.linspace(-2, 2, 12, dtype=torch.float32).reshape(4, 3)

    def values():
        sde, network = SDES[name](N=50), lambda x, label: -x / (1 + label[:, None] ** 2)
        torch.manual_seed(0)
        sampler = exact_pc(
            sde, x.shape, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector
        )
        loss = losses.get_sde_loss_fn(sde, train=False)(network, x)
        noise = sampling.SampleNoise(0, range(4))
        return sampler(network)[0], sampler(network, noise=noise)[0], loss, noise(x)

    expected = values()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = values()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("data", (torch.float64, torch.float32))
@pytest.mark.parametrize("weights", (torch.float64, torch.float32))
def test_networks_are_called_in_their_own_dtype(weights, data):
    """A layer that, like most, refuses other dtypes than its own; labels pass through it, too."""
    layer = torch.nn.Linear(3, 3).to(weights)
    x = torch.randn(5, 3, dtype=data)
    bpd, _, _ = likelihood.get_likelihood_fn(VPSDE(), lambda x: x)(lambda_net(layer), x)
    assert bpd.isfinite().all()
    loss = losses.get_sde_loss_fn(VPSDE(), train=False)(lambda_net(layer), x)
    assert loss.dtype == data


@pytest.mark.parametrize("labels", (None, 3, (torch.zeros(5), torch.ones(5))), ids=str)
def test_labels_of_a_network_of_ones_own_may_be_any_objects(labels):
    network = lambda_net(torch.nn.Linear(3, 3))
    network.given = []
    network.forward = lambda x, labels: network.given.append(labels) or network.layer(x)
    for dtype in (torch.float32, torch.float64):
        assert get_model_fn(network)(torch.randn(5, 3, dtype=dtype), labels).dtype == dtype
    assert all(given is labels for given in network.given)


def lambda_net(layer):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, labels):
            return self.layer(x) * self.layer(labels[:, None].expand_as(x) / 999)

    return Net()


def test_scalars_have_likelihoods_and_losses():
    """(B,) is (B, 1) without its last axis."""
    sde, x = VPSDE(), torch.randn(7, generator=torch.Generator().manual_seed(0)) * 0.5
    oracle = GaussianOracle(sde, mu=0.0, s0=0.5)
    values = [
        likelihood.get_likelihood_fn(sde, lambda x: x, "exact")(oracle, data)[0]
        for data in (x, x[:, None])
    ]
    torch.testing.assert_close(*values)
    assert losses.get_sde_loss_fn(sde, train=False)(oracle, x).isfinite()


@pytest.mark.parametrize("eps", (-1e-3, 2.0, float("nan")))
@pytest.mark.parametrize("name", SDES)
def test_times_outside_the_process_are_refused(name, eps):
    sde = SDES[name](N=10)
    oracle, x = GaussianOracle(sde), torch.ones(2, 3)
    calls = [
        lambda: sampling.get_pc_sampler(sde, x.shape, None, None, lambda x: x, 0.1, eps=eps),
        lambda: sampling.get_ode_sampler(sde, x.shape, lambda x: x, eps=eps),
        lambda: sampling.get_adaptive_sampler(sde, x.shape, lambda x: x, eps=eps),
        lambda: sampling.get_solver_sampler(sde, x.shape, sampling.DDIM, lambda x: x, 5, eps=eps),
        lambda: likelihood.get_likelihood_fn(sde, lambda x: x, eps=eps)(oracle, x),
        lambda: losses.get_sde_loss_fn(sde, train=True, eps=eps),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="time"):
            call()


@pytest.mark.parametrize("name", ("vp", "subvp"))
def test_time_zero_is_refused_where_there_is_no_noise(name):
    sde = SDES[name](N=10)
    for method in (sampling.get_ode_sampler, sampling.get_adaptive_sampler):
        with pytest.raises(ValueError, match=r"no noise at eps = 0.*stop at 0.001"):
            method(sde, (2, 3), lambda x: x, eps=0.0)
    assert exact_pc(VESDE(N=10), (2, 3), None)  # the VE process has noise at 0


@pytest.mark.parametrize(
    "settings", ({"snr": -0.1}, {"snr": float("nan")}, {"n_steps": -1}, {"steps": -3})
)
def test_settings_of_a_sampler_out_of_range_are_refused(settings):
    given = {"snr": 0.1, "continuous": True, **settings}
    with pytest.raises(ValueError, match="at least 0"):
        sampling.get_pc_sampler(VPSDE(), (2, 3), None, None, lambda x: x, **given)


def test_a_users_process_of_one_shape_is_checked_in_that_shape():
    """`[:, None, None, None]` in `marginal_prob` is in use everywhere."""

    class Mine(SDE):
        def sde(self, x, t):
            return -x / 2, torch.ones_like(t)

        def marginal_prob(self, x, t):
            return torch.exp(-t / 2)[:, None, None, None] * x, torch.sqrt(1 - torch.exp(-t))

        def prior_sampling(self, shape):
            return torch.randn(*shape)

        def prior_logp(self, z):
            return z.flatten(1).sum(1)

    sampler = exact_pc(Mine(N=20), (2, 1, 2, 2), sampling.EulerMaruyamaPredictor, steps=10)
    assert sampler(lambda x, labels: x * 0)[1] == 10


def test_samples_that_are_not_finite_become_no_pictures():
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 of 3 samples.*not finite"):
        to_uint8(images)
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 127, 255]  # scalars, (B,)


def test_codes_are_never_denoised():
    with pytest.raises(TypeError, match="denoise"):
        controllable_generation.get_encoder(VPSDE(), lambda x: x, denoise=True)
