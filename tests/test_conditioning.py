"""Conditions of networks: exact conditional scores through samplers, likelihood and losses."""

import pytest
import torch
from mixture import (
    MEANS,
    STD,
    MixtureOracle,
    guided_posterior,
    posterior,
    prior_quantiles,
)
from networks import fill_weights, tiny_config
from oracles import exact_pc
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import likelihood
import losses
import sampling
from models.adm import SuperResModel
from models.conditioning import ConditionLayers, Dropping, Given, Guided, Takes, takes_of
from models.precision import Compiled, InBfloat16
from models.utils import create_model, get_score_fn
from score_lib.options import complete
from sde_lib import VESDE, VPSDE, subVPSDE

NULL = {"classes": 3}


def process(name):
    return {"vesde": VESDE(0.01, 8.0), "vpsde": VPSDE(), "subvpsde": subVPSDE()}[name]


def guided(sde, c, w, **options):
    return Guided(MixtureOracle(sde), {"classes": c}, NULL, w, **options)


# --- Samples --------------------------------------------------------------------------------------

SOLVERS = {
    "ode": {"rtol": 1e-7, "atol": 1e-7},
    "heun": {"steps": 60},
    "dpmpp_2m": {"steps": 100},
}


def flow_samples(sde, model, method, z):
    options = {"eps": sde.sampling_eps, "continuous": True, "denoise": False, **SOLVERS[method]}
    if method == "ode":
        sampler = sampling.get_ode_sampler(sde, z.shape, lambda x: x, **options)
    else:
        solver = {"heun": sampling.Heun, "dpmpp_2m": sampling.DPMSolver2M}[method]
        sampler = sampling.get_solver_sampler(sde, z.shape, solver, lambda x: x, **options)
    return sampler(model, z)[0]


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("w", (1, 2, 4))
@pytest.mark.parametrize("name", ("vpsde", "vesde"))
def test_guided_flow_has_the_posterior_of_the_exact_flow(name, w, method):
    sde = process(name)
    z = prior_quantiles(sde, 200)
    samples = flow_samples(sde, guided(sde, 1, w), method, z)
    assert abs(posterior(samples, 1) - guided_posterior(sde, 1, w, stochastic=False)) < 4e-3


@pytest.mark.parametrize("w", [*(pytest.param(w, marks=pytest.mark.slow) for w in (1, 2)), 4])
def test_guided_sde_has_the_posterior_of_the_exact_density(w):
    """Predictor-corrector; 4,000 samples have a standard error of 0.005."""
    sde = process("vpsde")
    torch.manual_seed(0)
    sampler = exact_pc(sde, (4000, 1), sampling.EulerMaruyamaPredictor, steps=200)
    samples, _ = sampler(guided(sde, 1, w), noise=torch.randn_like)
    assert abs(posterior(samples, 1) - guided_posterior(sde, 1, w, stochastic=True)) < 0.015


@pytest.mark.parametrize("name", ("vpsde", "vesde", "subvpsde"))
def test_given_samples_are_of_the_class_of_each(name):
    """Along the flow, class by class: the moments of Gaussians, and their own posterior."""
    sde, count = process(name), 100
    z = prior_quantiles(sde, count).repeat(3, 1)
    classes = torch.arange(3).repeat_interleave(count)
    samples = flow_samples(sde, Given(MixtureOracle(sde), classes=classes), "ode", z).view(3, count)
    # The spread of the prior's quantiles, and that of p_T, which differs in VE.
    scale, std = sde.marginal_coeffs(torch.full((1,), sde.T, dtype=torch.float64))
    eps = sde.marginal_coeffs(torch.full((1,), sde.sampling_eps, dtype=torch.float64))
    at_end = ((eps[0] * STD) ** 2 + eps[1] ** 2).sqrt()
    ratio = at_end / ((scale * STD) ** 2 + std**2).sqrt()
    expected = eps[0] * MEANS - ratio * scale * MEANS
    torch.testing.assert_close(samples.mean(1), expected, rtol=0, atol=1e-4)
    spread = ratio * prior_quantiles(sde, count).std()
    torch.testing.assert_close(samples.std(1), spread.expand(3), rtol=1e-4, atol=0)


def test_a_condition_is_for_each_sample_or_for_all():
    sde, x, t = process("vpsde"), torch.randn(4, 1).double(), torch.full((4,), 300.0).double()
    oracle = MixtureOracle(sde)
    each = Given(oracle, classes=torch.tensor([0, 1, 2, 1]))(x, t)
    for row, c in enumerate((0, 1, 2, 1)):
        assert torch.equal(Given(oracle, classes=c)(x, t)[row], each[row])
    with pytest.raises(ValueError, match="classes is for 3 samples, but the batch has 4"):
        Given(oracle, classes=torch.tensor([0, 1, 2]))(x, t)


# --- Guidance -------------------------------------------------------------------------------------


def test_guidance_is_one_doubled_batch():
    sde, x, t = process("vpsde"), torch.randn(5, 1).double(), torch.full((5,), 300.0).double()
    model = guided(sde, 2, 3.0)
    found = model(x, t)
    assert model.module.calls == [10]
    one, null = (Given(model.module, classes=c)(x, t) for c in (2, 3))
    torch.testing.assert_close(found, null + 3.0 * (one - null))


def test_a_scale_of_one_is_the_conditional_network_alone():
    sde, x, t = process("vpsde"), torch.randn(5, 1).double(), torch.full((5,), 300.0).double()
    model = guided(sde, 2, 1)
    assert torch.equal(model(x, t), Given(model.module, classes=2)(x, t))
    assert model.module.calls == [5, 5]


def test_guidance_is_on_within_its_interval_of_labels():
    sde, x = process("vpsde"), torch.randn(4, 1).double()
    t = torch.tensor([99.0, 100.0, 500.0, 500.1]).double()
    found = guided(sde, 2, 3.0, interval=(100.0, 500.0))(x, t)
    always, never = guided(sde, 2, 3.0)(x, t), guided(sde, 2, 1)(x, t)
    torch.testing.assert_close(found[1:3], always[1:3])
    torch.testing.assert_close(found[[0, 3]], never[[0, 3]])
    assert not torch.allclose(always, never)


def test_guidance_needs_a_network_that_knows_the_null():
    oracle = MixtureOracle(process("vpsde"))
    oracle.takes = Takes(classes=3)
    with pytest.raises(ValueError, match="condition_dropout above 0"):
        Guided(oracle, {"classes": 1}, NULL, 2.0)
    with pytest.raises(ValueError, match=r"null for each condition, classes, .* given none"):
        Guided(MixtureOracle(process("vpsde")), {"classes": 1}, {}, 2.0)


@pytest.mark.parametrize(
    ("scale", "interval", "said"),
    (
        (2.0, (500.0, 100.0), "the least and the largest label, not .500.0, 100.0."),
        (2.0, (100.0,), "the least and the largest label"),
        (torch.nan, None, "one finite number for all samples, not nan"),
        (torch.tensor([1.0, 2.0]), None, "one finite number for all samples"),
    ),
)
def test_scales_and_intervals_of_no_guidance_are_refused(scale, interval, said):
    with pytest.raises(ValueError, match=said):
        guided(process("vpsde"), 2, scale, interval=interval)


def test_the_null_is_for_each_sample_or_for_all():
    sde, x, t = process("vpsde"), torch.randn(5, 1).double(), torch.full((5,), 300.0).double()
    oracle, once = MixtureOracle(sde), guided(sde, 2, 3.0)(x, t)
    for null in (torch.tensor([3]), torch.full((5,), 3)):
        assert torch.equal(Guided(oracle, {"classes": 2}, {"classes": null}, 3.0)(x, t), once)
    with pytest.raises(ValueError, match=r"the null of classes is one number .* not .5, 1."):
        Guided(oracle, {"classes": 2}, {"classes": torch.full((5, 1), 3)}, 3.0)


# --- Likelihood and other conditions --------------------------------------------------------------


def flow_log_density(sde, x, mean, std):
    """log p of x (B, *D) along the flow of data ~ N(mean, std^2 I): linear, from eps to T."""
    times = torch.tensor([1e-5, sde.T], dtype=torch.float64)
    m, s = sde.marginal_coeffs(times)
    spread = ((m * std) ** 2 + s**2).sqrt()
    z = m[1] * mean + spread[1] / spread[0] * (x - m[0] * mean)
    return sde.prior_logp(z) + x[0].numel() * torch.log(spread[1] / spread[0])


def exact_likelihood(sde):
    return likelihood.get_log_likelihood_fn(sde, hutchinson_type="exact", rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ("vpsde", "vesde", "subvpsde"))
def test_conditional_likelihood_is_that_of_the_class(name):
    sde = process(name)
    x, classes = torch.tensor([[-1.3], [0.2], [0.9]]).double(), torch.tensor([0, 1, 2])
    found = exact_likelihood(sde)(Given(MixtureOracle(sde), classes=classes), x).total
    expected = flow_log_density(sde, x, MEANS[:, None], STD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Enlarger(torch.nn.Module):
    """Exact for x ~ N(the image, repeated to twice its sides, plus the features; 0.3^2 I)."""

    def __init__(self, sde):
        super().__init__()
        self.sde = sde

    def forward(self, x, labels, *, image, features):
        scale, std = self.sde.marginal_coeffs(labels / 999)
        mean = image.repeat_interleave(2, 2).repeat_interleave(2, 3) + features[:, :, None, None]
        per = lambda a: a[:, None, None, None]  # noqa: E731
        return per(std / ((0.3 * scale) ** 2 + std**2)) * (x - per(scale) * mean)


def test_image_and_features_are_conditions_of_any_sampler_and_of_the_likelihood():
    sde = VPSDE()
    image, features = torch.rand(2, 1, 2, 2).double(), torch.tensor([[0.0], [0.7]]).double()
    model = Given(Enlarger(sde), image=image, features=features)
    mean = image.repeat_interleave(2, 2).repeat_interleave(2, 3) + features[:, :, None, None]
    z = torch.zeros(2, 1, 4, 4).double()
    samples = flow_samples(sde, model, "ode", z)
    torch.testing.assert_close(samples, mean, rtol=0, atol=2e-2)
    x = mean + 0.3 * torch.randn_like(mean)
    expected = flow_log_density(sde, x, mean, 0.3)
    torch.testing.assert_close(exact_likelihood(sde)(model, x).total, expected, rtol=0, atol=1e-4)


# --- Losses ---------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts the copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func._opname == "_to_copy" and made.device != args[0].device:
            self.count += 1
        return made


def test_dropping_copies_nothing_to_a_gpu():
    """Each step of training would wait there; with tensors that have a device and no numbers."""
    with FakeTensorMode(), Copies() as copies:
        given = {"classes": torch.zeros(3, dtype=torch.int64, device="cuda")}
        given["image"] = torch.zeros(3, 1, 8, 8, device="cuda")
        dropped = Dropping(0.5, {"classes": 10, "image": 0.5}).apply(
            given, torch.zeros(3, dtype=torch.bool, device="cuda")
        )
    assert copies.count == 0
    for kind, value in dropped.items():
        assert (value.device, value.dtype) == (given[kind].device, given[kind].dtype)


def test_a_dropped_condition_is_the_null_and_costs_no_other_draw():
    sde, batch = process("vpsde"), torch.zeros(4000, 1)
    classes = torch.arange(4000) % 3
    dropping = Dropping(0.2, NULL)
    loss_fn = losses.get_sde_loss_fn(sde, True, dropping=dropping)
    torch.manual_seed(0)
    draws = loss_fn.draw(batch)
    torch.manual_seed(0)
    plain = losses.get_sde_loss_fn(sde, True).draw(batch)
    assert torch.equal(draws.level, plain.level) and torch.equal(draws.z, plain.z)
    assert plain.dropped is None and abs(draws.dropped.float().mean() - 0.2) < 0.02
    seen = []

    def network(x, labels, classes):
        seen.append(classes)
        return x

    loss_fn.per_sample(network, batch, draws, condition={"classes": classes})
    assert torch.equal(seen[0], torch.where(draws.dropped, 3, classes))
    held_out = losses.get_sde_loss_fn(sde, False, dropping=dropping)
    assert held_out.draw(batch).dropped is None


def test_dropping_is_a_function_of_the_sample():
    loss_fn = losses.get_sde_loss_fn(VPSDE(), True, dropping=Dropping(0.5, NULL))
    whole = loss_fn.draw(torch.zeros(8, 1), sampling.SampleNoise(3, range(8)))
    part = loss_fn.draw(torch.zeros(4, 1), sampling.SampleNoise(3, range(4, 8)))
    assert torch.equal(whole.dropped[4:], part.dropped) and whole.dropped.unique().numel() == 2


def test_the_loss_of_the_exact_conditional_score_is_least():
    """E|s score + z|^2 is larger for the mixture's score, by what the class tells."""
    sde, oracle = process("vpsde"), MixtureOracle(process("vpsde"))
    torch.manual_seed(0)
    classes = torch.randint(3, (4000,))
    x = MEANS[classes][:, None] + STD * torch.randn(4000, 1).double()
    loss_fn = losses.get_sde_loss_fn(sde, False, likelihood_weighting=False)
    draws = loss_fn.draw(x)
    told, untold = (
        loss_fn.per_sample(oracle, x, draws, condition={"classes": c}).mean()
        for c in (classes, torch.full_like(classes, 3))
    )
    assert told < 0.97 * untold


# --- Networks -------------------------------------------------------------------------------------

NETWORKS = {
    "ddpm": tiny_config("ddpm"),
    "ncsnpp": tiny_config("ncsnpp", progressive_input="residual"),
    "adm": tiny_config("adm", nf=32),
}
UNETS = ("ddpm", "ncsnpp")


def conditional(name, kinds="classes,image,features", dropout=0.1):
    config = complete(NETWORKS[name])
    config.data.num_classes = 5
    config.training.condition, config.training.condition_dropout = kinds, dropout
    return fill_weights(create_model(config)).eval()


def condition(batch=2):
    torch.manual_seed(1)
    return {
        "classes": torch.arange(batch) % 5,
        "image": torch.rand(batch, 3, 4, 4),
        "features": torch.randn(batch, 9),
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_condition_changes_the_output_of_its_sample_alone(name):
    model, given = conditional(name), condition()
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0])
    base = model(x, labels, **given)
    for kind, value in given.items():
        changed = value.clone()
        changed[1] = changed[1] + 1
        other = model(x, labels, **{**given, kind: changed})
        torch.testing.assert_close(other[0], base[0])
        assert (other[1] - base[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", UNETS)
def test_an_unconditional_network_is_within_a_conditional_one(name):
    """Its weights load, and it is the function without classes, image and features."""
    config = NETWORKS[name]
    plain = fill_weights(create_model(config)).eval()
    model, given = conditional(name), condition()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("condition_layers.") for key in missing)
    assert list(model.state_dict())[: len(plain.state_dict())] == list(plain.state_dict())
    with torch.no_grad():
        for parameter in model.condition_layers.parameters():
            parameter.zero_()
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0])
    torch.testing.assert_close(model(x, labels, **given), plain(x, labels))


def test_a_small_image_is_enlarged_and_joined_to_the_input():
    """The first convolution sees the noisy image and the condition as channels of one input."""
    model, given = conditional("ncsnpp", "image"), condition()
    large = torch.nn.functional.interpolate(given["image"], (8, 8), mode="bilinear")
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0])
    found = model(x, labels, image=given["image"])
    torch.testing.assert_close(found, model(x, labels, image=large))
    stem, added = model.all_modules[model.plan.stem], model.condition_layers.image
    joint = torch.nn.functional.conv2d(
        torch.cat([2 * x - 1, 2 * large - 1], 1),
        torch.cat([stem.weight, added.weight], 1),
        stem.bias + added.bias,
        padding=1,
    )
    firsts = []
    block = model.all_modules[model.plan.encoder[0].blocks[0][0]]
    block.register_forward_pre_hook(lambda module, given: firsts.append(given[0]))
    model(x, labels, image=given["image"])
    torch.testing.assert_close(firsts[0], joint, rtol=1e-4, atol=1e-5)


def test_zero_features_and_the_null_image_have_a_meaning():
    model = conditional("ncsnpp")
    assert takes_of(InBfloat16(model)).null == {"classes": 5, "image": 0.5, "features": 0.0}
    x, labels, given = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0]), condition()
    nothing = {**given, "features": torch.zeros(2, 9)}
    assert model.condition_layers.features.bias is None
    with torch.no_grad():
        model.condition_layers.features.weight.mul_(10)
    assert not torch.allclose(model(x, labels, **given), model(x, labels, **nothing))
    grey = torch.full((2, 3, 4, 4), 0.5)
    with torch.no_grad():
        model.condition_layers.image.bias.zero_()
    before = model(x, labels, **{**given, "image": grey})
    with torch.no_grad():
        model.condition_layers.image.weight.zero_()
    torch.testing.assert_close(model(x, labels, **given), before)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({}, "takes the condition classes, but was given no condition"),
        ({"features": torch.zeros(2, 9)}, "takes the condition classes, .*condition features"),
        ({"classes": torch.zeros(2)}, r"classes should be \(2,\) of int64, .*float32"),
        ({"classes": torch.zeros(3, dtype=torch.int64)}, r"should be \(2,\) of int64"),
    ),
)
def test_other_conditions_are_refused(given, message):
    model = conditional("ddpm", "classes")
    with pytest.raises(ValueError, match=message):
        model(torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0]), **given)
    with pytest.raises(ValueError, match=r"image should be \(2, 3, h, w\), .* \(2, 1, 4, 4\)"):
        Takes(image=3).checked({"image": torch.rand(2, 1, 4, 4)}, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(("dropout", "null"), ((0.0, ""), (0.1, ", or 5 for the null")))
def test_unknown_classes_are_refused_before_they_are_looked_up(dropout, null):
    model = conditional("ddpm", "classes", dropout)
    assert model.condition_layers.classes.num_embeddings == 5 + (dropout > 0)
    with pytest.raises(ValueError, match=f"classes go from 0 to 4{null}, .* from 6 to 6"):
        Given(model, classes=6)
    with pytest.raises(ValueError, match="were given from -1 to 2"):
        Given(model, classes=torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"takes the condition classes, but was given .*image"):
        Given(InBfloat16(model), image=torch.zeros(1, 3, 4, 4))


def test_bfloat16_passes_the_condition_on():
    model, given = conditional("ncsnpp"), condition()
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0])
    expected, found = Given(model, **given)(x, labels), Given(InBfloat16(model), **given)(x, labels)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    moved = Given(InBfloat16(model), **{**given, "classes": given["classes"] + 1})(x, labels)
    assert (moved - found).abs().max() > 0.05


def test_conditions_are_added_in_full_precision():
    layers = ConditionLayers(Takes(classes=5, image=3, features=9), temb_dim=8, nf=4)
    temb, h, given = torch.randn(2, 8), torch.randn(2, 4, 4, 4), condition()
    image = given.pop("image")
    of_class = layers.classes.weight[given["classes"]]
    expected = temb + of_class + given["features"] @ layers.features.weight.T
    joint = h + layers.image(image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layers.embed(temb, given), expected)
        torch.testing.assert_close(layers.join(h, image), joint)


@pytest.mark.slow
def test_compiled_networks_take_a_condition():
    sde, x = process("vpsde"), torch.randn(4, 1).double()
    labels = torch.full((4,), 300.0).double()
    compiled = Compiled(MixtureOracle(sde), backend="eager")
    found = Guided(compiled, {"classes": 1}, NULL, 2.0)(x, labels)
    torch.testing.assert_close(found, guided(sde, 1, 2.0)(x, labels))
    assert compiled.works


def test_mode_and_dtype_of_the_network_count():
    """A model that was made in training mode is evaluated without dropout, in any dtype."""
    model = conditional("ncsnpp", "classes").train()
    given = Given(model, classes=1)
    assert given.training
    fn = get_score_fn(VPSDE(), given, False, True)
    x, t = torch.rand(2, 3, 8, 8), torch.tensor([0.3, 0.5])
    assert torch.equal(fn(x, t), fn(x, t)) and not model.training
    model.train()
    assert torch.equal(fn(x, t), fn(x, t))
    assert fn(x.double(), t.double()).dtype == torch.float64


def test_adm_by_config_is_the_published_network():
    """Its classes are y, with a row more for the null, and its image is low_res."""
    model = conditional("adm", "classes,image")
    published = SuperResModel(
        8, 3, 32, 3, 1, (2,), channel_mult=(1, 2), num_classes=6, use_scale_shift_norm=True,
        resblock_updown=True,
    ).eval()  # fmt: skip
    published.load_state_dict(model.state_dict())
    x, t, given = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0]), condition()
    low, y = 2 * given["image"] - 1, given["classes"]
    expected = published(2 * x - 1, t, low_res=low, y=y)
    found = model(x, t, classes=y, image=given["image"])
    torch.testing.assert_close(found, expected)
    again = Given(published, classes=y, image=low)(2 * x - 1, t)
    torch.testing.assert_close(again, expected)
    with pytest.raises(ValueError, match="condition_dropout above 0"):
        Guided(published, {"classes": y, "image": low}, {"classes": 5, "image": 0.0}, 2.0)
    plain = conditional("adm", "")
    assert [*plain.state_dict()] == [k for k in model.state_dict() if k != "label_emb.weight"]
    embedding = conditional("adm", "features").feature_emb
    assert embedding.weight.shape == (128, 9) and embedding.bias is None


def test_features_of_adm_by_config_are_those_of_its_output():
    """They are of arguments as a config describes them, in [0, 1] and with steps of its own."""
    config = complete(NETWORKS["adm"])
    config.data.num_classes, config.model.rescale_timesteps = 5, True
    config.training.condition = "classes,image,features"
    model = fill_weights(create_model(config)).eval()
    x, t, given = torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0]), condition()
    features = model.get_feature_vectors(x, t, **given)
    assert torch.equal(model.out(features["up"][-1]), model(x, t, **given))
    with pytest.raises(ValueError, match="takes the condition classes and image and features"):
        model.get_feature_vectors(x, t, given["classes"])
    layer, embedded = model.feature_emb, []
    layer.register_forward_hook(lambda _, given, found: embedded.append(found))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, **given)
    of_features = given["features"] @ layer.weight.T
    torch.testing.assert_close(embedded[0], of_features)
    expected = model(x, t, **given)[:1]
    with torch.no_grad():
        model.time_embed[-1].bias += of_features[0]
    nothing = {**given, "features": torch.zeros(2, 9)}
    torch.testing.assert_close(model(x, t, **nothing)[:1], expected)


def test_a_network_without_the_keyword_is_refused():
    config = complete(tiny_config("ncsnv2_64"))
    config.training.condition, config.data.num_classes = "classes", 5
    with pytest.raises(ValueError, match="'ncsnv2_64' does not take classes: choose ncsnpp"):
        create_model(config)
    config.training.condition, config.model.learn_sigma = "", True
    with pytest.raises(ValueError, match="'ncsnv2_64' predicts no variances"):
        create_model(config)
