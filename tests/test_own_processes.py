"""Processes of users that are written in other ways than ours: each equals the plain one."""

import dataclasses
import math

import foreign_sde
import pytest
import torch

import checks
import controllable_generation as control
import likelihood
import losses
import sampling
from models.utils import get_score_fn
from sde_lib import SDE, VPSDE, LinearSDE

SHAPE = (4, 2)
X = torch.linspace(-1, 1, 8).reshape(SHAPE)


class Ornstein(SDE):
    """dx = -x dt + sqrt(2) dw.

    Args:
        form: how the diffusion and the standard deviation are given.
    """

    T = 3.0

    def __init__(self, N=60, form=lambda g: g):
        super().__init__(N)
        self.form = form

    def sde(self, x, t):
        return -x, self.form(torch.full_like(t, math.sqrt(2)))

    def marginal_prob(self, x, t):
        mean = torch.exp(-t).reshape(-1, *[1] * (x.dim() - 1)) * x
        return mean, self.form(torch.sqrt(-torch.expm1(-2 * t)))

    def prior_sampling(self, shape):
        return torch.randn(shape)

    def prior_logp(self, z):
        return -(z**2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2


class Linear(LinearSDE):
    """dx = sqrt(2 t) dw, of which all but the standard deviation is constant."""

    prior_std = T = 8.0

    def __init__(self, N=60, form=lambda g: g):
        super().__init__(N)
        self.form = form

    def drift_rate(self, t):
        return self.form(torch.zeros_like(t))

    def diffusion(self, t):
        return torch.sqrt(2 * t)

    def marginal_coeffs(self, t):
        return self.form(torch.ones_like(t)), t


def number(g):
    """One number for all samples, where they agree; other coefficients stay (B,)."""
    return g[0].item() if len(g) and bool((g == g[0]).all()) else g


def sides(g):
    return g[:, None]


def shared(g):
    """One tensor for all samples, where they agree."""
    return g[:1] if len(g) and bool((g == g[0]).all()) else g


def model(x, labels):
    """Knows data N(0, I) of Ornstein."""
    t = labels / 999
    return torch.sqrt(-torch.expm1(-2 * t))[:, None] * x


def pc(predictor, corrector, **options):
    def compute(sde):
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, predictor, corrector, lambda x: x, 0.1, continuous=True, **options
        )
        return sampler(model)[0]

    return compute


def loss(**options):
    return lambda sde: losses.get_sde_loss_fn(sde, False, **options)(model, X)


def restored(method):
    def compute(sde):
        operator = control.Mask((2,), torch.tensor([1, 0]))
        restore = control.get_pc_restorer(
            sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True, eps=1e-2
        )
        return restore(model, operator, operator.apply(X), 0.1, method=method)

    return compute


USES = {
    "euler": pc(sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector),
    "chain": pc(sampling.ReverseDiffusionPredictor, sampling.AnnealedLangevinDynamics),
    "flow": pc(sampling.ReverseDiffusionPredictor, None, probability_flow=True),
    "grid": pc(sampling.ReverseDiffusionPredictor, None, steps=2000, grid="log_snr"),
    "ode": lambda sde: sampling.get_ode_sampler(sde, SHAPE, lambda x: x)(model)[0],
    "adaptive": lambda sde: sampling.get_adaptive_sampler(sde, SHAPE, lambda x: x)(model)[0],
    "heun": lambda sde: sampling.get_solver_sampler(
        sde, SHAPE, sampling.Heun, lambda x: x, 8, churn=2.0
    )(model)[0],
    "loss": loss(likelihood_weighting=False),
    "likelihood loss": loss(likelihood_weighting=True),
    "weighted loss": loss(likelihood_weighting=False, weighting="min_snr"),
    "v loss": loss(likelihood_weighting=False, parametrization="v"),
    "likelihood": lambda sde: likelihood.get_likelihood_fn(sde, lambda x: x)(model, X)[0],
    "in steps": lambda sde: likelihood.get_likelihood_fn(sde, lambda x: x, steps=20)(model, X)[0],
    "inpainted": restored("projection"),
    "guided": restored("pigdm"),
    "dps": restored("dps"),
    "edited": lambda sde: control.get_pc_editor(
        sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True, start_time=1
    )(model, X),
    "checked": lambda sde: [f.text for f in checks.process(sde, shape=(2,))],
    "checked samples": lambda sde: [
        f.text
        for f in checks.sampler(
            lambda sde, shape: sampling.get_solver_sampler(
                sde, shape, sampling.DDIM, lambda x: x, 10, continuous=True
            ),
            sde,
            (2,),
        )
    ],
}


def computed(name, sde):
    torch.manual_seed(0)
    return USES[name](sde)


def assert_as_computed(name, sde, expected):
    found, expected = computed(name, sde), computed(name, expected)
    if name.startswith("checked"):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", USES)
def test_coefficients_may_be_numbers_or_have_sides_of_length_1(name):
    """Of sides beside B, as images have them: broadcast against (B,), they gave a wrong loss."""
    for form in (number, sides, shared):
        assert_as_computed(name, Ornstein(form=form), Ornstein())


@pytest.mark.parametrize("name", USES)
def test_functions_of_time_may_be_numbers(name):
    assert_as_computed(name, Linear(form=number), Linear())


def test_bounds_take_functions_of_time_that_are_numbers():
    def bound(sde):
        torch.manual_seed(0)
        return likelihood.get_elbo_fn(sde, num_times=4)(model, X).total

    class Constant(Linear):
        def diffusion(self, t):
            return self.form(torch.ones_like(t))

        def marginal_coeffs(self, t):
            return self.form(torch.ones_like(t)), torch.sqrt(t)

    torch.testing.assert_close(bound(Constant(form=number)), bound(Constant()))


@pytest.mark.parametrize("batch", (1, 2, 4))
@pytest.mark.parametrize("name", ("sde", "marginal_prob"))
def test_a_coefficient_for_each_entry_is_refused(name, batch):
    """For a batch of one it was broadcast, and the loss was wrong."""

    class EachEntry(Ornstein):
        def method(self, x, t):
            mean, coefficient = getattr(Ornstein, name)(self, x, t)
            return mean, coefficient[:, None] * torch.ones_like(x)

    setattr(EachEntry, name, EachEntry.method)
    weighted = losses.get_sde_loss_fn(EachEntry(), False, likelihood_weighting=name == "sde")
    with pytest.raises(ValueError, match=rf"one number for each sample, \(B,\), .*\({batch}, 2\)"):
        weighted(model, X[:batch])


class OwnReverse(Ornstein):
    """Its reverse process has the published methods alone, and the number 0 for that of an ODE."""

    def reverse(self, score_fn, probability_flow=False):
        ours = super().reverse(score_fn, probability_flow)

        class Reverse:
            N, T = self.N, self.T

            def sde(_, x, t):
                drift, diffusion = ours.sde(x, t)
                return drift, 0.0 if probability_flow else diffusion

            def discretize(_, x, t):
                return ours.discretize(x, t)

        return Reverse()


@pytest.mark.parametrize("name", USES)
def test_a_reverse_process_needs_only_the_published_methods(name):
    """Longer steps of the reverse diffusion predictor are Euler-Maruyama's, as of `SDE`."""
    assert_as_computed(name, OwnReverse(), Ornstein())


class Sized(Ornstein):
    """Time runs faster for longer data, by the length of x or by that given to the class."""

    def __init__(self, length=None):
        super().__init__()
        self.length = length

    def marginal_prob(self, x, t):
        return super().marginal_prob(x, t * (self.length or x.shape[-1]) / 3)

    def sde(self, x, t):
        drift, diffusion = super().sde(x, t)
        speed = (self.length or x.shape[-1]) / 3
        return drift * speed, diffusion * math.sqrt(speed)


@pytest.mark.parametrize("name", [name for name in USES if "checked" not in name])
def test_noise_that_depends_on_the_size_of_data_is_refused(name):
    """Scores were those of data of one entry, and samples had nearly twice the spread."""
    with pytest.raises(ValueError, match=r"marginal_prob.*Sized.*for x of \(2,\).*as an argument"):
        computed(name, Sized())
    assert computed(name, Sized(2)).isfinite().all()


@dataclasses.dataclass(frozen=True)
class Frozen(Ornstein):
    """A process whose attributes cannot be set."""

    N: int = 60
    form: object = staticmethod(lambda g: g)


@pytest.mark.parametrize("name", USES)
def test_a_process_may_be_a_frozen_dataclass(name):
    assert_as_computed(name, Frozen(), Ornstein())


def test_a_frozen_process_takes_other_steps():
    assert Frozen().with_steps(90) == Frozen(N=90)


class ForImages(Ornstein):
    """Its own methods broadcast for data (B, C, H, W) alone."""

    def sde(self, x, t):
        return -torch.ones_like(t)[:, None, None, None] * x, super().sde(x, t)[1]

    def marginal_prob(self, x, t):
        return torch.exp(-t)[:, None, None, None] * x, super().marginal_prob(x, t)[1]


@pytest.mark.parametrize("name", [name for name in USES if "checked" not in name])
@pytest.mark.parametrize("kind", (ForImages, foreign_sde.VPSDE, foreign_sde.VESDE))
def test_a_process_for_images_is_refused_for_vectors(kind, name):
    """Samples of (4, 2) had the shape (4, 1, 4, 2), and losses were of all pairs."""
    sde = kind() if kind is ForImages else kind(0.1, 10.0, 60)
    with pytest.raises(
        ValueError, match=r"of .* gives \(\d, 1, \d, 2\) for x of \(\d, 2\).*batch_mul"
    ):
        computed(name, sde)
    score_fn = get_score_fn(sde, lambda x, labels: x, continuous=True)
    assert score_fn(torch.ones(4, 1, 1, 2), torch.full((4,), 0.5)).shape == (4, 1, 1, 2)


@pytest.mark.parametrize("batch", (1, 4))
@pytest.mark.parametrize("form", (torch.sum, torch.mean, sides, lambda log_p: 0.0))
def test_a_prior_has_one_density_for_each_sample(form, batch):
    """The sum over a batch was taken for the density of each of its samples."""

    class Prior(Ornstein):
        def prior_logp(self, z):
            return form(super().prior_logp(z))

    with pytest.raises(
        ValueError, match=r"prior_logp\(z\) of Prior.* gives .* one number for each"
    ):
        likelihood.get_likelihood_fn(Prior(), lambda x: x)(model, X[:batch])


# --- A mean that is no multiple of x_0 ------------------------------------------------------------


# Another one for each datum and entry, as where a process reverts to a given picture.
CENTRES = torch.linspace(1, 3, 8).reshape(SHAPE)


class Reverting(Ornstein):
    """The same around centres c, dx = (c - x) dt + sqrt(2) dw: all as there, but shifted."""

    def sde(self, x, t):
        return super().sde(x - CENTRES, t)

    def marginal_prob(self, x, t):
        mean, std = super().marginal_prob(x - CENTRES, t)
        return mean + CENTRES, std

    def prior_sampling(self, shape):
        return super().prior_sampling(shape) + CENTRES


def around_centres(x, labels):
    return model(x - CENTRES, labels)


def test_known_parts_have_the_mean_of_the_process():
    results = []
    for sde, network, data in ((Ornstein(), model, X), (Reverting(), around_centres, X + CENTRES)):
        torch.manual_seed(0)
        inpaint = control.get_pc_inpainter(
            sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True, eps=0.5
        )
        results.append(inpaint(network, data, torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(results[0] + CENTRES, results[1])


def test_denoising_takes_a_step_of_the_chain_where_the_formula_is_another():
    sde = Reverting()
    raw, denoised = (
        sampling.get_ode_sampler(sde, SHAPE, lambda x: x, denoise, eps=0.5)(around_centres, X)[0]
        for denoise in (False, True)
    )
    # f = (c - x) T / N, G^2 = 2 T / N and the score is c - x.
    torch.testing.assert_close(denoised, raw + (CENTRES - raw) * sde.T / sde.N)


@pytest.mark.parametrize("method", ("dps", "pigdm", "projection", "solver"))
def test_methods_that_need_a_multiple_refuse_another_mean(method):
    with pytest.raises(ValueError, match=r"marginal_prob.* (not m\(t\) x|the shape of x)"):
        if method == "solver":
            sampling.get_solver_sampler(Reverting(), SHAPE, sampling.DDIM, lambda x: x, 5)(
                around_centres
            )
        else:
            restored(method)(Reverting())


def test_a_linear_process_that_adds_a_picture_is_told_where_it_belongs():
    class Shifted(Linear):
        def marginal_prob(self, x, t):
            return x + CENTRES[:1], t

    with pytest.raises(ValueError, match=r"adds a picture .* subclasses sde_lib\.SDE"):
        pc(sampling.EulerMaruyamaPredictor, None)(Shifted())


class LearnedSchedule(VPSDE):
    """beta(t) of a network, as published processes are overridden: it takes float32 alone."""

    def __init__(self, N):
        super().__init__(N=N)
        self.network = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.network.weight, self.beta_1 - self.beta_0)
        torch.nn.init.constant_(self.network.bias, self.beta_0)

    def sde(self, x, t):
        beta = self.network(t[:, None])[:, 0]
        return -0.5 * beta[:, None, None, None] * x, torch.sqrt(beta)

    def marginal_prob(self, x, t):
        integral = t * self.network(t[:, None] / 2)[:, 0]
        return torch.exp(-0.5 * integral)[:, None, None, None] * x, (-torch.expm1(-integral)).sqrt()


@pytest.mark.parametrize("options", ({}, {"steps": 150}, {"grid": "log_snr"}), ids=str)
def test_a_schedule_that_takes_float32_alone_is_asked_in_float32(options):
    """Here it has learned the linear one, whose samples are known."""
    drawn = []
    for sde in (LearnedSchedule(200), VPSDE(N=200)):
        torch.manual_seed(0)
        sampler = sampling.get_pc_sampler(
            sde, (2, 1, 4, 4), sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.16,
            continuous=True, device="cpu", **options,
        )  # fmt: skip
        drawn.append(sampler(lambda x, labels: 0.1 * x)[0])
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)
    likelihood.get_elbo_fn(LearnedSchedule(200), num_times=2)(lambda x, labels: 0.1 * x, drawn[0])
    found = checks.process(LearnedSchedule(200))
    assert [one[:2] for one in found] == [one[:2] for one in checks.process(VPSDE(N=200))]


@pytest.mark.parametrize("name", ("marginal_prob", "sde"))
@pytest.mark.parametrize("owner", ("object", "class"))
def test_a_method_that_is_set_afterwards_is_not_half_of_a_process(owner, name):
    """Scores and samplers ask for coefficients of time, which did not follow it."""
    kind = type("Kind", (VPSDE,), {})
    sde, published = kind(), getattr(VPSDE, name)

    def doubled(x, t):
        mapped, coefficient = published(VPSDE(), x, t)
        return mapped, 2 * coefficient

    setattr(*((sde, name, doubled) if owner == "object" else (kind, name, staticmethod(doubled))))
    with pytest.raises(ValueError, match=rf"{name}\(x, t\) of Kind.* in a subclass"):
        get_score_fn(sde, lambda x, labels: x, continuous=True)(X, torch.full((4,), 0.3))


def test_a_bound_of_the_deviation_that_is_set_afterwards_is_refused():
    """It acts at the smallest times alone, where losses followed it and scores did not."""
    sde, published = VPSDE(), VPSDE().marginal_prob

    def bounded(x, t):
        mean, std = published(x, t)
        return mean, std.clamp(min=0.01)

    sde.marginal_prob = bounded
    with pytest.raises(ValueError, match=r"marginal_prob\(x, t\) of VPSDE.* in a subclass"):
        get_score_fn(sde, lambda x, labels: x, continuous=True)(X, torch.full((4,), 0.3))


def test_names_of_coefficients_are_free_in_a_process_that_is_not_linear():
    """There they may mean something else, such as the speed at which x reverts to a mean."""

    class Reverting(Ornstein):
        def drift_rate(self, t):
            return torch.full_like(t, 0.5)

        def diffusion(self, t):
            return torch.ones_like(t)

    score = get_score_fn(Reverting(), lambda x, labels: x, continuous=True)
    assert score(X, torch.full((4,), 0.3)).shape == X.shape
