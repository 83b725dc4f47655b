"""Steps from a time to a time: other numbers of steps, other grids, a user's own classes."""

import functools
import itertools

import pytest
import torch
from oracles import MU, S0, GaussianOracle, exact_moments

import sampling
from sde_lib import VESDE, VPSDE, batch_mul, subVPSDE

SDES = {"ve": VESDE(), "vp": VPSDE(), "subvp": subVPSDE()}


class PointsOracle(torch.nn.Module):
    """The network that has learned data whose entries are exactly -1 or 1."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def forward(self, x, labels):
        is_ve = isinstance(self.sde, VESDE)
        t = torch.log(labels / 0.01) / torch.log(torch.tensor(5000.0)) if is_ve else labels / 999
        scale, std = self.sde.marginal_coeffs(t)
        denoised = torch.tanh(batch_mul(scale / std**2, x))
        score = batch_mul(std**-2, batch_mul(scale, denoised) - x)
        return score if is_ve else batch_mul(-std, score)


def draw(sde, predictor, network, corrector=None, shape=(1000, 4), **options):
    torch.manual_seed(0)
    options = {"continuous": True, "eps": sde.sampling_eps, **options}
    sampler = sampling.get_pc_sampler(
        sde, shape, predictor, corrector, lambda x: x, 0.16, **options
    )
    return sampler(network)


def distance_to_points(sde, steps, predictor, **options):
    x, evaluations = draw(sde, predictor, PointsOracle(sde), steps=steps, **options)
    assert evaluations == steps
    return float((x.abs() - 1).square().mean().sqrt())


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("grid", ("", "arctan"))
@pytest.mark.parametrize(
    "predictor", (sampling.ReverseDiffusionPredictor, sampling.AncestralSamplingPredictor)
)
def test_few_steps_end_at_the_data(name, grid, predictor):
    """A process of 1000 steps in 25: samples are the points of the data."""
    if (name, predictor) == ("subvp", sampling.AncestralSamplingPredictor):
        pytest.skip("sub-VP has no ancestral sampling")
    assert distance_to_points(SDES[name], 25, predictor, grid=grid) < 1e-3


def test_euler_maruyama_in_few_steps_falls_with_the_step():
    """Its error at the data is of order one."""
    found = [
        distance_to_points(SDES["vp"], steps, sampling.EulerMaruyamaPredictor)
        for steps in (25, 50, 100, 200)
    ]
    assert found[1] < 0.02
    assert all(1.6 < a / b < 2.6 for a, b in itertools.pairwise(found))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", SDES)
def test_few_exact_steps_keep_a_gaussian(name):
    """Also with corrector steps in between, and on another grid."""
    sde = SDES[name]
    for grid in ("", "edm"):
        for corrector in (None, sampling.LangevinCorrector):
            x, _ = draw(
                sde,
                sampling.ReverseDiffusionPredictor,
                GaussianOracle(sde),
                corrector,
                (4000, 8),
                steps=200,
                grid=grid,
            )
            assert x.mean() == pytest.approx(MU, abs=0.02)
            assert x.std() == pytest.approx(S0, rel=0.05)


@pytest.mark.parametrize("name", SDES)
def test_number_of_the_process_is_the_published_chain(name):
    """steps = N, or a process built with that N, is bit for bit the chain of the process."""
    sde = type(SDES[name])(N=30)
    for predictor in (sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor):
        chain, same = (
            draw(sde, predictor, GaussianOracle(sde), steps=steps)[0] for steps in (0, 30)
        )
        assert torch.equal(chain, same)


def test_n_set_on_a_process_is_another_chain():
    """Published code does `sde.N = 200`: the tables follow."""
    for name, sde in SDES.items():
        changed = type(sde)(N=1000)
        changed.N = 200
        for predictor in (sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor):
            x, evaluations = draw(changed, predictor, GaussianOracle(changed), shape=(4000, 4))
            assert evaluations == 200
            assert x.std() == pytest.approx(S0, rel=0.05), name


def test_callback_sees_every_step():
    sde, seen = VPSDE(N=10), []
    sampler = sampling.get_pc_sampler(
        sde, (3, 2), sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.16, continuous=True
    )
    x, _ = sampler(
        GaussianOracle(sde), callback=lambda i, t, x, x_mean: seen.append((i, t, x_mean))
    )
    numbers, times, means = zip(*seen, strict=True)
    assert numbers == tuple(range(10))
    assert [float(t[0]) for t in times] == torch.linspace(1, 1e-3, 10).tolist()
    assert torch.equal(means[-1], x)


class PublishedStyle(sampling.Predictor):
    """Knows only the steps of the process's own chain."""

    def update_fn(self, x, t):
        dt = -1.0 / self.rsde.N
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x + drift * dt
        return x_mean + diffusion[:, None] * (-dt) ** 0.5 * self.noise(x), x_mean


class OwnStep(sampling.Predictor):
    """Knows only steps from a time to a time."""

    def step(self, x, t, s):
        f, G = self.rsde.increment(x, t, s)
        return x - f + batch_mul(G, self.noise(x)), x - f


@pytest.mark.parametrize("predictor", (PublishedStyle, OwnStep))
@pytest.mark.parametrize("steps", (0, 200))
def test_own_predictor_of_either_kind(predictor, steps):
    sde = SDES["vp"]
    x, evaluations = draw(sde, predictor, GaussianOracle(sde), shape=(4000, 4), steps=steps)
    assert evaluations == (steps or 1000) and sde.N == 1000
    assert x.std() == pytest.approx(S0, rel=0.05)


class Published:
    """A predictor of the published code with its own base class: it has none of ours."""

    def __init__(self, sde, score_fn, probability_flow=False):
        self.rsde = sde.reverse(score_fn, probability_flow)

    def update_fn(self, x, t):
        f, G = self.rsde.discretize(x, t)
        return x - f + batch_mul(G, torch.randn_like(x)), x - f


@pytest.mark.parametrize("kind", ("predictor", "corrector"))
def test_a_name_instead_of_a_class_is_refused(kind):
    steps = {"predictor": None, "corrector": None, kind: "none"}
    with pytest.raises(ValueError, match=rf"is a name: give the class, get_{kind}\('none'\)"):
        sampling.get_pc_sampler(VPSDE(), (1, 2), *steps.values(), lambda x: x, 0.1)


@pytest.mark.parametrize("steps", (0, 200))
@pytest.mark.parametrize(
    "predictor",
    (
        Published,
        functools.partial(sampling.ReverseDiffusionPredictor),
        lambda *given: sampling.ReverseDiffusionPredictor(*given),
    ),
    ids=("without our base", "partial", "function"),
)
def test_whatever_makes_a_predictor_makes_its_steps(predictor, steps):
    """As the published samplers, which only call it."""
    sde, built_in = VPSDE(N=300), sampling.ReverseDiffusionPredictor
    chain = sde if isinstance(predictor, functools.partial) else VPSDE(N=steps or 300)
    options = {"steps": steps if chain is sde else 0, "shape": (100, 4)}
    expected, _ = draw(chain, built_in, GaussianOracle(sde), **options)
    found, evaluations = draw(
        sde, predictor, GaussianOracle(sde), steps=steps, shape=options["shape"]
    )
    assert torch.equal(found, expected) and evaluations == (steps or 300)


def test_other_grids_are_refused_for_a_predictor_that_is_no_class_of_ours():
    sde = VPSDE(N=30)
    with pytest.raises(ValueError, match=r"Published makes the steps .*own chain.*time_grid"):
        draw(sde, Published, GaussianOracle(sde), steps=50, grid="edm")
    x = torch.zeros(2, 4)
    step = sampling.shared_predictor_update_fn
    moved = step(x, torch.ones(2), sde, GaussianOracle(sde), Published, False, True)
    assert all(part.shape == x.shape for part in moved)


class XAlone(sampling.Predictor):
    """Forgets the mean, so that a batch of two was taken apart."""

    def update_fn(self, x, t):
        return x


class ForImages(Published):
    """Its noise broadcasts for data (B, C, H, W) alone, as in the published code."""

    def update_fn(self, x, t):
        f, G = self.rsde.discretize(x, t)
        return x - f + G[:, None, None, None] * torch.randn_like(x), x - f


class CorrectorForImages(sampling.Corrector):
    def update_fn(self, x, t):
        x_mean = x + t[:, None, None, None] * self.score_fn(x, t)
        return x_mean, x_mean


@pytest.mark.parametrize(
    ("predictor", "corrector", "made"),
    (
        (XAlone, None, r"not \(2, 3\):"),
        (ForImages, None, r"not \(2, 1, 2, 3\) and \(2, 3\):"),
        (None, CorrectorForImages, r"not \(2, 1, 2, 3\) and \(2, 1, 2, 3\):"),
    ),
)
def test_a_step_gives_x_and_its_mean_of_the_same_shape(predictor, corrector, made):
    sde = VPSDE(N=30)
    with pytest.raises(ValueError, match=rf"a step from x of \(2, 3\) .*{made}.*batch_mul"):
        draw(sde, predictor, GaussianOracle(sde), corrector, shape=(2, 3))


class Counted:
    """Steps that leave x as it is, and are counted."""

    calls = 0

    @classmethod
    def move(cls, x):
        cls.calls += 1
        return x, x


class OwnChain(Counted, sampling.EulerMaruyamaPredictor):
    def update_fn(self, x, t):
        return self.move(x)


class OwnPart(Counted, sampling.AncestralSamplingPredictor):
    def vpsde_update_fn(self, x, t):
        return self.move(x)


class OwnStepOfABuiltIn(Counted, sampling.ReverseDiffusionPredictor):
    def step(self, x, t, s):
        return self.move(x)


class OwnStepOfAnOwnChain(OwnChain):
    def step(self, x, t, s):
        return self.move(x)


CHAIN_ONLY = (OwnChain, OwnPart)


@pytest.mark.parametrize("grid", ("", "log_snr"))
@pytest.mark.parametrize("steps", (0, 15))
@pytest.mark.parametrize("predictor", (*CHAIN_ONLY, OwnStepOfABuiltIn, OwnStepOfAnOwnChain))
def test_the_nearest_method_of_a_built_in_predictors_subclass_counts(predictor, steps, grid):
    """On the chain and off it; other grids are refused where it makes steps of a chain alone."""
    sde, options = VPSDE(N=30), {"steps": steps, "grid": grid, "shape": (2, 3)}
    predictor.calls = 0
    if grid and predictor in CHAIN_ONLY:
        with pytest.raises(ValueError, match=rf"{predictor.__name__}.*own chain.*time_grid"):
            draw(sde, predictor, GaussianOracle(sde), **options)
        return
    draw(sde, predictor, GaussianOracle(sde), **options)
    assert predictor.calls == (steps or 30)


@pytest.mark.parametrize(
    "kind", (sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor)
)
def test_a_subclass_that_overrides_nothing_changes_no_bit(kind):
    sde, sub = VPSDE(N=30), type("Sub", (kind,), {})
    for options in ({}, {"steps": 60}, {"steps": 60, "grid": "log_snr"}):
        found, expected = (draw(sde, p, GaussianOracle(sde), **options)[0] for p in (sub, kind))
        assert torch.equal(found, expected)


def test_grids_are_for_predictors_with_steps_of_any_length():
    sde = SDES["vp"]
    with pytest.raises(ValueError, match=r"PublishedStyle.*time_grid"):
        draw(sde, PublishedStyle, GaussianOracle(sde), steps=50, grid="edm")
    with pytest.raises(ValueError, match=r"discrete.*continuous"):
        draw(sde, OwnStep, GaussianOracle(sde, continuous=False), steps=50, continuous=False)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    (
        (None, None, [1, 0.75, 0.5, 0.25, 0]),
        (0.75, 0.25, [0.75, 0.5, 0.25]),
        (0.6, None, [0.5, 0.25, 0]),
    ),
)
def test_visited_times(start, stop, expected):
    times = sampling.visited_times(VPSDE(), 0.25, start, stop, steps=4)
    torch.testing.assert_close(times, torch.tensor(expected))


@pytest.mark.parametrize("grid", ("", "uniform", "log_snr", "edm", "arctan"))
def test_a_single_step_leads_from_the_noise_to_the_data(grid):
    """Of data at a point the ancestral step finds it at once, on any grid."""
    assert sampling.visited_times(VPSDE(), 1e-3, steps=1, grid=grid).tolist() == [1, 0]

    def at_a_half(x, labels):
        scale, std = SDES["vp"].marginal_coeffs(labels / 999)
        return batch_mul(1 / std, x - batch_mul(scale, torch.full_like(x, 0.5)))

    x, _ = draw(SDES["vp"], sampling.AncestralSamplingPredictor, at_a_half, steps=1, grid=grid)
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("process", "predictor", "errors"),
    (
        (VPSDE, sampling.EulerMaruyamaPredictor, (0.001, 0.15, 0.63, 2.7)),
        (VPSDE, sampling.ReverseDiffusionPredictor, (0.001, 0.11, 0.48, 2.1)),
        (VPSDE, sampling.AncestralSamplingPredictor, (0.001, 0.11, 0.48, 2.1)),
        (subVPSDE, sampling.EulerMaruyamaPredictor, (0, 0.042, 0.43, 4.2)),
        (subVPSDE, sampling.ReverseDiffusionPredictor, (0, 0.042, 0.43, 4.2)),
    ),
)
def test_the_published_chain_of_few_steps_is_off_as_documented(process, predictor, errors):
    """On data at the point 0; as many steps of another grid find it."""

    def spread(sde, **options):
        def at_0(x, labels):
            return batch_mul(1 / sde.marginal_coeffs(labels / 999)[1], x)

        def samples(count, noise):
            given = {"continuous": True, "eps": 1e-3, **options}
            shape, z = (count, 1), noise(torch.empty(count, 1))
            made = sampling.get_pc_sampler(sde, shape, predictor, None, torch.clone, 0, **given)
            return made(at_0, z, noise=noise)[0]

        return float(exact_moments(samples, 1)[1].sqrt())

    for N, error in zip((1000, 200, 100, 50), errors, strict=True):
        assert spread(process(N=N)) == pytest.approx(error, rel=0.05, abs=6e-4)
    assert spread(process(N=100), steps=100, grid="log_snr") < 0.05
