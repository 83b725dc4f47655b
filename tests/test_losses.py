"""Losses, averages and optimisation steps."""

import math

import pytest
import torch
from ml_collections import ConfigDict
from oracles import MU, S0, GaussianOracle, golden_sde

import losses
from benchmarks import objectives
from models.conditioning import Dropping
from models.ema import ExponentialMovingAverage
from score_lib.base.tensors import SampleNoise
from sde_lib import VESDE, VPSDE, subVPSDE

SDES = (VESDE(N=100), VPSDE(N=100), subVPSDE(N=100))


class Zero(torch.nn.Module):
    def forward(self, x, labels):
        return torch.zeros_like(x)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_loss_of_the_zero_score_is_one(sde):
    """|s 0 + z|^2 averages to 1 a dimension, and half the dimension when summed."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 5)
    options = {"train": False, "likelihood_weighting": False}
    assert losses.get_sde_loss_fn(sde, **options)(Zero(), x) == pytest.approx(1, abs=0.02)
    summed = losses.get_sde_loss_fn(sde, reduce_mean=False, **options)
    assert summed(Zero(), x) == pytest.approx(2.5, abs=0.05)


def test_a_training_step_needs_an_optimizer():
    with pytest.raises(ValueError, match=r"needs optimize_fn: .*optimization_manager"):
        losses.get_step_fn(VPSDE(), train=True)


@pytest.mark.parametrize("objective", ("score", "classifier"))
@pytest.mark.parametrize("continuous", (True, False))
def test_no_sample_has_no_loss(objective, continuous):
    loss_fn = losses.get_loss_fn(VPSDE(), True, True, continuous, False, objective)
    with pytest.raises(ValueError, match=r"one sample or more, not \(0, 3\)"):
        loss_fn(Zero(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_exact_score_has_the_smallest_loss(sde):
    """E|s score + z|^2 = m^2 s0^2 / (m^2 s0^2 + s^2), averaged over t; any other score is worse."""
    torch.manual_seed(0)
    x = MU + S0 * torch.randn(200_000, 1)
    loss_fn = losses.get_sde_loss_fn(sde, train=False, likelihood_weighting=False)
    t = torch.linspace(1e-5, 1, 20_001, dtype=torch.float64)
    scale, std = sde.marginal_coeffs(t)
    signal = (scale * S0) ** 2
    expected = float((signal / (signal + std**2)).mean())
    assert loss_fn(GaussianOracle(sde), x) == pytest.approx(expected, rel=0.02)
    for wrong in (GaussianOracle(sde, mu=MU + 0.1), GaussianOracle(sde, s0=0.8 * S0)):
        torch.manual_seed(1)
        worse = loss_fn(wrong, x)
        torch.manual_seed(1)
        assert worse > loss_fn(GaussianOracle(sde), x)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_weightings_differ_by_their_weight(sde):
    """With one time for all, the two losses differ by the factor g^2 / s^2."""
    x, t, z = torch.randn(4, 3), torch.full((4,), 0.3), torch.randn(4, 3)
    plain, weighted = (
        losses.get_sde_loss_fn(sde, train=False, likelihood_weighting=w).per_sample(
            Zero(), x, losses.Draws(t, z)
        )
        for w in (False, True)
    )
    factor = (sde.diffusion(t) / sde.marginal_coeffs(t)[1]) ** 2
    torch.testing.assert_close(weighted, plain * factor)


@pytest.mark.parametrize("kind", ("continuous", "discrete"))
def test_draws_belong_to_the_sample(kind):
    """With noise of its own, a sample's loss does not depend on its batch."""
    sde = golden_sde("vpsde")
    loss_fn = losses.get_loss_fn(sde, False, True, kind == "continuous", False)
    x = torch.randn(6, 2, 3)

    def per_sample(rows):
        draws = loss_fn.draw(x[rows], SampleNoise(3, rows))
        return loss_fn.per_sample(Zero(), x[rows], draws)

    whole = per_sample(range(6))
    torch.testing.assert_close(whole, torch.cat([per_sample(range(2)), per_sample(range(2, 6))]))
    assert whole.unique().numel() == 6


def test_discrete_levels_are_uniform():
    sde = VPSDE(N=4)
    loss_fn = losses.get_ddpm_loss_fn(sde, train=False)
    for noise in (None, torch.randn_like):
        levels = loss_fn.draw(torch.zeros(40_000, 1), noise).level
        assert torch.bincount(levels, minlength=4) / 40_000 == pytest.approx([0.25] * 4, abs=0.02)


def test_uniform_numbers_stand_for_levels_from_first_to_last():
    ends = torch.tensor([0.0, 0.5, 1.0])
    assert losses.DiscreteLevels(VPSDE(N=10)).at(ends).tolist() == [0, 5, 9]
    times = losses.ContinuousLevels(VPSDE(), eps=0.1).at(ends)
    torch.testing.assert_close(times, torch.tensor([0.1, 0.55, 1.0]))


class MeanAndLevel(torch.nn.Module):
    """A classifier of two classes: the mean of its input, and its noise label."""

    def forward(self, x, noise_std):
        return torch.stack([x.mean(1), noise_std], dim=1)


@pytest.mark.parametrize(
    ("sde", "continuous"),
    (*((sde, True) for sde in SDES), *((sde, False) for sde in SDES[:2])),
    ids=repr,
)
def test_a_classifier_sees_noisy_data_and_the_noise_in_them(sde, continuous):
    """Its loss is the log-sum-exp of the logits of m x + s z and s, less that of the label."""
    x, z, labels = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    level = torch.full((6,), 0.3) if continuous else torch.full((6,), 30)
    scale, std = (sde.marginal_coeffs if continuous else sde.discrete_coeffs)(level)
    logits = torch.stack([scale * x.mean(1) + std * z.mean(1), std], dim=1)
    expected = logits.logsumexp(1) - logits[torch.arange(6), labels]
    loss_fn = losses.get_classifier_loss_fn(sde, train=False, continuous=continuous)
    found = loss_fn.per_sample(MeanAndLevel(), x, losses.Draws(level, z), labels)
    torch.testing.assert_close(found, expected)


def test_likelihood_weighting_needs_continuous_time():
    with pytest.raises(ValueError, match=r"training\.continuous"):
        losses.get_loss_fn(VPSDE(), True, True, False, True)


def optim_config(**changes):
    values = {"optimizer": "Adam", "lr": 0.1, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    return ConfigDict({"optim": {**values, "warmup": 4, "grad_clip": 1.0, **changes}})


def test_warm_up_is_linear():
    assert [losses.learning_rate(s, 0.1, 4) for s in (0, 1, 4, 9)] == [0, 0.025, 0.1, 0.1]
    assert losses.learning_rate(0, 0.1, 0) == 0.1
    falling = [losses.learning_rate(s, 0.1, 4, left=8 - s, cooldown=4) for s in (1, 4, 5, 7, 9)]
    assert falling == pytest.approx([0.025, 0.1, 0.075, 0.025, 0])


@pytest.mark.parametrize("grad_clip", (1.0, -1.0))
def test_gradient_is_clipped_to_its_norm(grad_clip):
    config = optim_config(grad_clip=grad_clip)
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = losses.get_optimizer(config, parameters)
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((1,), 2.0)
    norm = losses.optimization_manager(config)(optimizer, parameters, step=9)
    assert norm == pytest.approx(4.0)
    left = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
    assert left == pytest.approx(1.0 if grad_clip > 0 else 4.0, rel=1e-5)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="Adam"):
        losses.get_optimizer(optim_config(optimizer="SGD"), [])


def _training(model, accumulation, **options):
    """A training step by the VP process, and the state that it changes."""
    config = optim_config(warmup=0)
    state = {"model": model, "step": 0}
    state["ema"] = ExponentialMovingAverage(model.parameters(), 0.9)
    state["optimizer"] = losses.get_optimizer(config, model.parameters())
    manager = losses.optimization_manager(config)
    step = losses.get_step_fn(VPSDE(), True, manager, accumulation=accumulation, **options)
    return step, state


def test_parts_of_a_batch_make_the_same_step():
    """Accumulation changes memory, not the step, though 3 does not divide the batch of 8, and 20
    parts are more than it has samples."""
    results = []
    for accumulation in (1, 3, 20):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        step, state = _training(_IgnoresLabels(model), accumulation)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
        loss = [float(step(state, x)) for _ in range(3)]
        results.append((loss, [p.detach().clone() for p in model.parameters()]))
    for loss, parameters in results[1:]:
        assert results[0][0] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(results[0][1], parameters)


def test_labels_stay_with_their_parts_of_a_batch():
    """The loss of a classifier, and its gradient, do not depend on how the batch is split."""
    x, labels = torch.randn(8, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    results = []
    for accumulation in (1, 3):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        step, state = _training(_IgnoresLabels(model), accumulation, objective="classifier")
        results.append((step(state, x, labels), step.grad_norm, model.weight.detach()))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("accumulation", (1, 3))
def test_a_condition_may_be_given_once_for_all_parts_of_a_batch(accumulation):
    x, steps = torch.randn(8, 4), []
    for count in (8, 1):
        torch.manual_seed(0)
        model = _Conditional(3, 4)
        step, state = _training(model, accumulation, dropping=Dropping(0.5, {"classes": 2}))
        classes = torch.ones(count, dtype=torch.int64)
        steps.append((step(state, x, None, {"classes": classes}), model.weight.detach()))
    torch.testing.assert_close(*steps)


class _Conditional(torch.nn.Embedding):
    def forward(self, x, labels, *, classes):
        return x + super().forward(classes)


class _IgnoresLabels(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels):
        return self.inner(x)


def test_average_follows_the_formula():
    parameter = torch.nn.Parameter(torch.zeros(2))
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    ema = ExponentialMovingAverage([parameter, frozen], decay=0.5)
    expected = torch.zeros(2)
    for n in range(1, 30):
        parameter.data += 1
        ema.update([parameter, frozen])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema.shadow_params, [expected])
    assert not any(average.requires_grad for average in ema.shadow_params)
    with ema.applied([parameter, frozen]):
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), torch.full((2,), 29.0))


def test_average_of_half_precision_takes_small_steps():
    """From 1 to 2 in 3000 steps of a thousandth; bfloat16 would stay at 1."""
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    ema = ExponentialMovingAverage([parameter], decay=0.999, use_num_updates=False)
    parameter.data += 1
    for _ in range(3000):
        ema.update([parameter])
    expected = torch.full((2,), 2 - 0.999**3000)
    torch.testing.assert_close(ema.shadow_params, [expected], rtol=0, atol=1e-3)
    ema.copy_to([parameter])
    assert torch.equal(parameter.detach(), expected.bfloat16())


class Published:
    """A user's own average: the published methods, and nothing else."""

    def __init__(self, parameters):
        self.shadow_params = [p.detach() + 1 for p in parameters]

    def copy_to(self, parameters):
        for p, average in zip(parameters, self.shadow_params, strict=True):
            p.data.copy_(average)

    def store(self, parameters):
        self.collected_params = [p.clone() for p in parameters]

    def restore(self, parameters):
        for p, own in zip(parameters, self.collected_params, strict=True):
            p.data.copy_(own)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_average_may_have_another_precision_than_the_parameters(dtype):
    """As where a network is converted after its average was made."""
    network = torch.nn.Linear(2, 1, bias=False)
    ema = ExponentialMovingAverage(network.parameters(), decay=0.5)
    start = ema.shadow_params[0].clone()
    network.to(dtype)
    network.weight.data.fill_(0.1875)
    ema.update(network.parameters())  # by the decay 2 / 11
    torch.testing.assert_close(ema.shadow_params[0], start * 2 / 11 + 0.1875 * 9 / 11)


def test_evaluation_by_a_users_own_average():
    """It sees the average, and leaves the network as it was, also when it fails."""
    model = torch.nn.Linear(2, 2)
    own, seen = model.weight.detach().clone(), []
    state = {"model": _IgnoresLabels(model), "ema": Published(model.parameters())}
    model.register_forward_hook(lambda *_: seen.append(model.weight.detach().clone()))
    step = losses.get_step_fn(VPSDE(), train=False)
    assert step(state, torch.randn(3, 2)).isfinite()
    assert torch.equal(seen[0], own + 1) and torch.equal(model.weight, own)
    with pytest.raises(RuntimeError, match="shapes"):
        step(state, torch.randn(3, 5))
    assert torch.equal(model.weight, own)


def test_stored_parameters_can_be_restored_again():
    """As published: stored once, for several evaluations."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = ExponentialMovingAverage([parameter], decay=0.5)
    parameter.data += 1
    ema.store([parameter])
    for _ in range(2):
        ema.copy_to([parameter])
        assert not parameter.any()
        ema.restore([parameter])
        assert parameter.eq(1).all()


def test_average_refuses_what_does_not_fit():
    ema = ExponentialMovingAverage([torch.nn.Parameter(torch.zeros(2))], decay=0.5)
    with pytest.raises(ValueError, match="0 trainable"):
        ema.update([])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        ema.load_state_dict({"decay": 0.5, "num_updates": 1, "shadow_params": [torch.zeros(3)]})
    with pytest.raises(RuntimeError, match="store"):
        ema.restore([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ExponentialMovingAverage([], decay=1.5)


def test_guard_names_the_first_bad_step():
    guard = losses.LossGuard()
    guard.watch(torch.tensor(1.0), 1)
    with pytest.raises(FloatingPointError, match="step 2"):
        guard.watch(torch.tensor(math.nan), 2)
    with pytest.raises(FloatingPointError, match="step 2"):
        guard.watch(torch.tensor(1.0), 3)


def test_guard_sees_weights_that_no_loss_has_seen():
    weights = [torch.ones(2, 3), torch.full((4,), 3e38)]  # finite, though their squares are not
    guard = losses.LossGuard()
    guard.check_weights(weights, 1)
    for bad in (math.nan, math.inf, -math.inf):
        weights[0][1, 2] = bad
        with pytest.raises(FloatingPointError, match="a weight is not finite at step 2"):
            losses.LossGuard().check_weights(weights, 2)


# --- Importance sampling of times -----------------------------------------------------------------


def likelihood_losses(sde, noise_levels):
    """Losses of samples at one point, weighted by g^2, of a network that is 10 % off everywhere."""
    loss_fn = losses.get_sde_loss_fn(
        sde, train=False, likelihood_weighting=True, noise_levels=noise_levels
    )
    torch.manual_seed(0)
    data = torch.zeros(40_000, 16)
    oracle = GaussianOracle(sde, mu=0.0, s0=0.0)
    draws = loss_fn.draw(data)
    return loss_fn.per_sample(lambda x, t: 1.1 * oracle(x, t), data, draws).double()


@pytest.mark.parametrize("process", objectives.PROCESSES)
def test_importance_sampling_takes_two_thirds_of_the_variance_on_a_mixture(process):
    """The mean of uniform times, with at most a third of their variance at fixed data."""
    case = objectives.mixture(objectives.PROCESSES[process], num_data=16)
    uniform, drawn = (
        objectives.sampled(case.losses[kind], case.network, case.data, draws=1024)
        for kind in ("", "likelihood")
    )
    error = ((uniform.var() + drawn.var()) / drawn.size) ** 0.5
    assert abs(uniform.mean() - drawn.mean()) < 4 * error
    assert drawn.var(1).mean() < uniform.var(1).mean() / 3


def test_no_time_of_importance_sampling_is_4_times_rarer_than_the_weight():
    """So the variance stays bounded for networks that are equally wrong at all times."""
    sde, t = VESDE(), torch.linspace(1e-3, 1, 1000)
    for sigma_data in (1e-4, 0.5, 1e4):  # of VE the weight is that of uniform times
        weight = losses.LikelihoodLevels(sde, sigma_data=sigma_data).weight(t)
        assert weight.max() < 4.001 and weight.min() > 0
    torch.testing.assert_close(weight, torch.ones_like(t), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", (VPSDE, subVPSDE))
def test_importance_sampling_of_a_network_that_is_equally_wrong_everywhere(kind):
    uniform, drawn = (likelihood_losses(kind(), levels) for levels in ("", "likelihood"))
    error = ((uniform.var() + drawn.var()) / len(drawn)).sqrt()
    assert (uniform.mean() - drawn.mean()).abs() < 4 * error
    assert drawn.var() < uniform.var() / 3
