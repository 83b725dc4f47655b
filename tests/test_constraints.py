"""Constraints: where sampling starts and stops, gradients, and users' own."""

import itertools

import pytest
import torch
from oracles import MU, S0, GaussianOracle
from test_control import SDES, build

import sampling
from controllable_generation import (
    DataConsistency,
    GrayScale,
    Mask,
    PseudoInverseGuidance,
    StartFrom,
    TweedieGuidance,
    get_pc_editor,
    get_pc_restorer,
)
from score_lib.base.tensors import batch_mul
from score_lib.inverse.restoration import PublishedGray
from sde_lib import SDE, VPSDE

# --- Start and stop in the middle -----------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("options", ({"denoise": False}, {}), ids=("raw", "default"))
@pytest.mark.quick_cases(4)
def test_a_run_in_two_parts_is_the_whole_one(sde, options):
    """Stopping at a time and starting there again visits the same times with the same noise."""

    def part(z, **times):
        sample = sampling.get_pc_sampler(
            sde,
            (8, 3),
            sampling.ReverseDiffusionPredictor,
            sampling.AnnealedLangevinDynamics,
            lambda x: x,
            0.16,
            continuous=True,
            **options,
            **times,
        )
        return sample(GaussianOracle(sde), z)

    z = sde.prior_sampling((8, 3))
    torch.manual_seed(0)
    whole, evaluations = part(z)
    torch.manual_seed(0)
    middle, before = part(z, stop_time=0.37)
    end, after = part(middle, start_time=0.37)
    assert torch.equal(whole, end) and evaluations == before + after and before > after > 0


@pytest.mark.parametrize("constraint", (DataConsistency, PublishedGray))
@pytest.mark.parametrize("noise_std", (0.0, 0.1))
def test_a_known_measurement_leaves_the_start_of_a_second_part(constraint, noise_std):
    """Only a draw from the prior knows nothing of the measurement yet."""
    operator, shape = GrayScale((3, 2, 2)), (2, 3, 2, 2)
    y = torch.full((2, 1, 2, 2), 0.7)

    def part(z, **times):
        sample = sampling.get_pc_sampler(
            SDES["vp"],
            shape,
            sampling.ReverseDiffusionPredictor,
            sampling.LangevinCorrector,
            lambda x: x,
            0.16,
            continuous=True,
            constraints=[constraint(operator, y, noise_std)],
            **times,
        )
        return sample(GaussianOracle(SDES["vp"]), z)[0]

    torch.manual_seed(0)
    whole = part(torch.ones(shape))
    torch.manual_seed(0)
    middle = part(torch.ones(shape), stop_time=0.1)
    torch.testing.assert_close(part(middle, start_time=0.1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "constraint", (DataConsistency, PublishedGray, PseudoInverseGuidance, TweedieGuidance)
)
def test_a_measurement_comes_to_the_device_of_the_samples(constraint):
    """Such as one of a CPU to a network on a GPU; the start of a second part computes nothing."""
    operator = GrayScale((3, 2, 2))
    made = constraint(operator, torch.full((2, 1, 2, 2), 0.7), 0.1)
    x, t = torch.zeros(2, 3, 2, 2, device="meta"), torch.tensor([0.5, 0.5])
    assert made.start(VPSDE(), x, t, torch.randn_like).device == x.device
    held = [value for value in vars(made).values() if isinstance(value, torch.Tensor)]
    assert held and all(value.device == x.device for value in held)


def test_visited_times_are_those_of_the_whole_run():
    sde = VPSDE(N=11)
    times = sampling.visited_times(sde, 0.0)
    torch.testing.assert_close(times, torch.cat([torch.linspace(1, 0, 11), torch.zeros(1)]))
    times = sampling.visited_times(sde, 0.0, 0.6, 0.2)
    torch.testing.assert_close(times, torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2]))
    assert sampling.visited_times(sde, 0.0, 0.59)[0] == sampling.visited_times(sde, 0.0, 0.5)[0]
    assert len(sampling.visited_times(sde, 0.0, 1.5)) == 12
    with pytest.raises(ValueError, match=r"none of the 11 times from 1 .* 0.2 and the stop at 0.6"):
        sampling.visited_times(sde, 0.0, 0.2, 0.6)


def test_rounding_skips_none_of_the_times():
    """A run may start at, or stop before, each of them, as a number of either precision."""
    sde = VPSDE(N=200)
    times = sampling.visited_times(sde, 1e-3)
    for k, time in enumerate(times[:-1].tolist()):
        assert torch.equal(sampling.visited_times(sde, 1e-3, time), times[k:])
    exact = torch.linspace(sde.T, 1e-3, sde.N, dtype=torch.float64)
    for k, time in enumerate(exact.tolist()):
        assert torch.equal(sampling.visited_times(sde, 1e-3, time), times[k:])


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_editing_forgets_as_much_as_it_should(sde):
    """Data outside the model's distribution keep the share that the posterior of x_0 given x_t
    leaves them: for N(0, S0^2) data, x_0 given x_t has mean S0^2 m / (m^2 S0^2 + s^2) x_t."""
    data = torch.full((4000, 1), 2.0)
    for start_time in (0.1, 0.5, 0.9):
        torch.manual_seed(0)
        edit = build(get_pc_editor, sde, corrector="none", start_time=start_time)
        x = edit(GaussianOracle(sde, mu=0.0), data)
        t = sampling.visited_times(sde, 1e-5, start_time)[:1]
        scale, std = sde.marginal_coeffs(t)
        kept = S0**2 * scale**2 / (scale**2 * S0**2 + std**2)
        assert x.mean() == pytest.approx(2 * float(kept), abs=0.04)


def test_the_ode_can_start_from_data():
    """The flow maps N(m a, m^2 S0^2 + s^2) at t0 to its data: a single point to its quantile."""
    sde, data = SDES["vp"], torch.full((4000, 2), 1.0)
    sample = sampling.get_ode_sampler(
        sde, data.shape, lambda x: x, start_time=0.3, constraints=[StartFrom(data)]
    )
    x = sample(GaussianOracle(sde, mu=0.0))[0]
    scale, std = sde.marginal_coeffs(torch.tensor([0.3]))
    shrink = S0 / ((scale * S0) ** 2 + std**2).sqrt()
    assert x.mean() == pytest.approx(float(scale * shrink), abs=0.02)
    assert x.std() == pytest.approx(float(std * shrink), abs=0.02)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_gradients_go_through_the_sampler(sde):
    """For N(mu, S0^2) data every step is linear: the gradient is the same as a difference."""
    sample = sampling.get_pc_sampler(
        sde,
        (1, 1),
        sampling.ReverseDiffusionPredictor,
        sampling.AnnealedLangevinDynamics,
        lambda x: x,
        0.16,
        continuous=True,
        differentiable=True,
    )
    network = GaussianOracle(sde)
    z = torch.tensor([[0.4]], requires_grad=True)
    (slope,) = torch.autograd.grad(sample(network, z, noise=torch.zeros_like)[0], z)
    low, high = (
        sample(network, torch.tensor([[value]]), noise=torch.zeros_like)[0].detach()
        for value in (-10.0, 10.0)
    )
    torch.testing.assert_close(slope, (high - low) / 20, rtol=1e-3, atol=1e-7)


def test_gradients_reach_the_weights_and_the_flow():
    """d x / d z of the flow of N(mu, S0^2) data is the ratio of standard deviations."""
    sde = SDES["vp"]
    sample = sampling.get_ode_sampler(sde, (2, 3), lambda x: x, differentiable=True)
    network = GaussianOracle(sde)
    network.mu = torch.nn.Parameter(torch.tensor(MU))
    z = torch.randn(2, 3, requires_grad=True)
    x, _ = sample(_Shifted(network), z)
    slope, mean_slope = torch.autograd.grad(x.sum(), [z, network.mu])
    (scale, last), (first_scale, first) = (
        sde.marginal_coeffs(torch.tensor([t])) for t in (1e-3, 1.0)
    )
    ratio = ((scale * S0) ** 2 + last**2).sqrt() / ((first_scale * S0) ** 2 + first**2).sqrt()
    torch.testing.assert_close(slope, ratio.expand(2, 3), rtol=1e-3, atol=1e-5)
    expected = 6 * (scale - ratio * first_scale)
    torch.testing.assert_close(mean_slope, expected[0], rtol=1e-3, atol=1e-4)


class _Shifted(torch.nn.Module):
    """A Gaussian network whose mean is a parameter."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle

    def forward(self, x, labels):
        scale, std = self.oracle.sde.marginal_coeffs(labels / 999)
        variance = (scale * S0) ** 2 + std**2
        return batch_mul(std / variance, x - batch_mul(scale, self.oracle.mu.expand_as(x)))


def test_no_gradient_is_kept_by_default():
    sde, z = VPSDE(beta_max=2, N=3), torch.randn(2, 2, requires_grad=True)
    for sample in (
        sampling.get_pc_sampler(
            sde, (2, 2), sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1
        ),
        sampling.get_ode_sampler(sde, (2, 2), lambda x: x),
    ):
        assert not sample(GaussianOracle(sde), z)[0].requires_grad


# --- One mechanism --------------------------------------------------------------------------------


class PositivePart(sampling.Constraint):
    """A user's own: no entry of the mean is negative."""

    def wrap(self, sde, step, noise):
        def positive(x, t, s):
            x, x_mean = step(x, t, s)
            return x, x_mean.clamp(min=0)

        return positive


class Tilt(sampling.Constraint):
    """A user's own: adds a constant to the score of x_0, for which a Gaussian has an answer."""

    def guide(self, sde, score_fn):
        def tilted(x, t):
            scale, std = sde.marginal_prob(torch.ones_like(t), t)
            # E[exp(x_0) | x_t] is a Gaussian's again: tilting N(mu, S0^2) by exp(x) shifts mu.
            return score_fn(x, t) + batch_mul(
                scale * S0**2 / ((scale * S0) ** 2 + std**2), torch.ones_like(x)
            )

        return tilted


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_own_constraints_work_together(sde):
    torch.manual_seed(0)
    sample = sampling.get_pc_sampler(
        sde,
        (4000, 2),
        sampling.EulerMaruyamaPredictor,
        None,
        lambda x: x,
        0.16,
        continuous=True,
        eps=sde.sampling_eps,
        constraints=[Tilt(), PositivePart()],
    )
    x, evaluations = sample(GaussianOracle(sde))
    shifted = torch.distributions.Normal(MU + S0**2, S0)
    assert x.min() == 0 and evaluations == sde.N
    assert (x > 0).float().mean() == pytest.approx(
        1 - float(shifted.cdf(torch.tensor(0.0))), abs=0.02
    )
    assert x.median() == pytest.approx(MU + S0**2, abs=0.03)


class Recorder(sampling.Constraint):
    """Notes the order of calls."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def guide(self, sde, score_fn):
        def guided(x, t):
            self.calls.append(f"guide {self.name}")
            return score_fn(x, t)

        return guided

    def wrap(self, sde, step, noise):
        def wrapped(x, t, s):
            self.calls.append(f"wrap {self.name}")
            return step(x, t, s)

        return wrapped


def test_the_first_constraint_is_innermost():
    """Around the corrector, which is called first, and around the predictor."""
    calls, sde = [], VPSDE(N=1)
    constraints = [Recorder("first", calls), Recorder("second", calls)]
    sample = sampling.get_pc_sampler(
        sde,
        (1, 2),
        sampling.EulerMaruyamaPredictor,
        None,
        lambda x: x,
        0.1,
        continuous=True,
        constraints=constraints,
    )
    sample(GaussianOracle(sde))
    inwards = ["wrap second", "wrap first"]
    assert calls == [*inwards, *inwards, "guide second", "guide first"]


class Times(sampling.Constraint):
    """Notes the two times of each step."""

    def __init__(self):
        self.pairs = []

    def wrap(self, sde, step, noise):
        def wrapped(x, t, s):
            self.pairs.append((float(t[0]), float(s[0])))
            return step(x, t, s)

        return wrapped


@pytest.mark.parametrize("options", ({}, {"steps": 4}, {"steps": 4, "grid": "edm"}), ids=str)
def test_constraints_wrap_steps_between_neighbouring_times(options):
    """The corrector's and the predictor's, on any grid; the callback is told the first time."""
    sde, times, told = VPSDE(beta_max=5, N=7), Times(), []
    steps = (sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, lambda x: x, 0.16)
    keywords = {"continuous": True, "constraints": [times], **options}
    sample = sampling.get_pc_sampler(sde, (2, 2), *steps, **keywords)
    sample(GaussianOracle(sde), callback=lambda i, t, x, x_mean: told.append(float(t[0])))
    visited = sampling.visited_times(sde, 1e-3, **options).tolist()
    pairs = list(itertools.pairwise(visited))
    assert len(pairs) == options.get("steps", 7)
    assert times.pairs == [pair for pair in pairs for _ in range(2)]
    assert told == visited[:-1]


def test_the_ode_refuses_constraints_that_change_steps():
    with pytest.raises(ValueError, match=r"PositivePart.*'pc'"):
        sampling.get_ode_sampler(VPSDE(), (1, 2), lambda x: x, constraints=[PositivePart()])


class OldStyleSDE(SDE):
    """A user's own: only the abstract methods, and written for images alone."""

    def __init__(self):
        super().__init__(N=20)
        self.vp = VPSDE(N=20)

    def sde(self, x, t):
        return self.vp.drift_rate(t)[:, None, None, None] * x, self.vp.diffusion(t)

    def marginal_prob(self, x, t):
        scale, std = self.vp.marginal_coeffs(t)
        return scale[:, None, None, None] * x, std

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        return self.vp.prior_logp(z)


@pytest.mark.parametrize("method", ("projection", "pigdm", "tweedie"))
def test_a_process_that_knows_only_images_can_be_controlled(method):
    """With the same noise, the results are those of the process that it repeats."""
    results = []
    operator = Mask.half((1, 2, 4))
    for sde in (OldStyleSDE(), VPSDE(N=20)):
        torch.manual_seed(0)
        sample = get_pc_restorer(
            sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.16, continuous=True, eps=1e-3
        )
        y = operator.apply(torch.ones(3, 1, 2, 4))
        results.append(sample(GaussianOracle(VPSDE()), operator, y, 0.1, method=method))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_noisy_measurement_guides_by_its_score():
    """d/dx log N(y; x / m, sigma_y^2 + (s / m)^2) of the measured entry, where x has less noise."""
    sde, t, noise_std = VPSDE(), torch.tensor([0.2, 0.1]), 1.0
    m, s = (c[:, None] for c in sde.marginal_coeffs(t))
    x, y = torch.tensor([[0.5, -1.0], [0.2, 0.7]]), torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    mask = Mask((2,), torch.tensor([1.0, 0.0]))
    guided = DataConsistency(mask, y, noise_std).guide(sde, lambda x, t: torch.zeros_like(x))
    expected = (y - x / m) / (m * (noise_std**2 + (s / m) ** 2)) * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(guided(x, t), expected)
