"""Networks of vectors, of point sets, and of signals with one or three sides."""

import functools
import math

import pytest
import torch
from networks import build, error, fill_weights, out_and_gradient, tiny_config
from small_runs import small_config
from test_docs import example
from torch import nn

import run_lib
from configs import data, parts
from likelihood import get_log_likelihood_fn
from losses import get_sde_loss_fn
from models.adaptive import Adaptive, Head, Stem
from models.adm import UNetModel
from models.precision import Compiled, InBfloat16
from models.set_transformer import Attention, InducedAttention
from models.utils import create_model, get_score_fn
from score_lib.base.tensors import batch_mul, data_shape, image_shape
from score_lib.likelihood import value_and_divergence
from score_lib.options import checked, complete
from sde_lib import VESDE, VPSDE

# Shape of the data, and options that differ from the tiny network's.
CASES = {
    "vector": ("mlp", (3,), {}),
    "features": ("mlp", (3,), {"input_fourier_scale": 0.5, "embedding_type": "fourier"}),
    "image": ("mlp", (), {"image_size": 4, "centered": True}),
    "points": ("set_transformer", (5, 2), {"num_heads": 2}),
    "induced": ("set_transformer", (5, 2), {"num_heads": 2, "inducing_points": 3}),
}
SETS = ("points", "induced")


def config_of(case, condition="", **options):
    name, shape, own = CASES[case]
    config = tiny_config(name, **{"num_res_blocks": 2, "dropout": 0.0, **own, **options})
    config = complete(config)
    config.data.shape, config.data.num_classes = shape, 5
    config.training.condition, config.training.condition_dropout = condition, 0.1 * bool(condition)
    return config


def network(case, condition="", **options):
    """A network in evaluation mode, with weights that are not 0."""
    return fill_weights(create_model(config_of(case, condition, **options), "cpu")).eval()


def inputs(case, batch=3):
    torch.manual_seed(0)
    return torch.randn(batch, *data_shape(config_of(case))), torch.linspace(3, 400, batch)


# --- The output ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_output_has_the_shape_of_the_data_and_starts_at_zero(case):
    x, labels = inputs(case)
    output = create_model(config_of(case), "cpu")(x, labels)
    assert output.shape == x.shape and not output.any()
    assert network(case)(x, labels).abs().min() > 0


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("count", (5, 8))
def test_permuted_points_give_a_permuted_output(case, count):
    model, labels = network(case), inputs(case)[1]
    x, order = torch.randn(3, count, 2), torch.randperm(count)
    output = model(x, labels)
    torch.testing.assert_close(model(x[:, order], labels), output[:, order], rtol=0, atol=1e-5)
    # The points of a set know of each other, and those of other sets are not seen.
    x[1, 0] += 1
    moved = (model(x, labels) - output).abs().amax(dim=2)
    assert moved[1].min() > 1e-4 and moved[[0, 2]].max() == 0


@pytest.mark.parametrize("case", CASES)
def test_noise_level_and_conditions_reach_their_sample_alone(case):
    model, (x, labels) = network(case, "classes,features"), inputs(case)
    given = {"classes": torch.arange(3), "features": torch.randn(3, 9)}
    base = model(x, labels, **given)
    for kind, value in {**given, "labels": labels}.items():
        changed = {**given, "labels": labels, kind: value.clone()}
        changed[kind][1] += 1
        other = model(x, **changed)
        torch.testing.assert_close(other[[0, 2]], base[[0, 2]])
        assert (other[1] - base[1]).abs().max() > 1e-3
    # The null is one class more.
    null = {"classes": torch.full((3,), 5), "features": torch.zeros(3, 9)}
    assert (model(x, labels, **null) - base).abs().max() > 1e-3


@pytest.mark.parametrize("case", ("vector", "points"))
def test_without_blocks_the_output_is_affine_in_the_data(case):
    """So the score of a Gaussian is within reach, far from the data, too."""
    model, (x, labels) = network(case, num_res_blocks=0), inputs(case)
    y = 100 * torch.randn_like(x)
    found, expected = model((x + y) / 2, labels), (model(x, labels) + model(y, labels)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- Its layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("others", (None, 4))
def test_attention_is_that_of_pytorch(others):
    ours = fill_weights(Attention(8, 2))
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    both = ours.query, ours.key_value
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in both]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in both]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    h = torch.randn(2, 5, 8)
    seen = h if others is None else torch.randn(2, others, 8)
    found = ours(h) if others is None else ours(h, seen)
    torch.testing.assert_close(found, theirs(h, seen, seen)[0])


def test_induced_attention_sees_tokens_by_the_learnt_points_alone():
    """One point finds one vector, which every token gets."""
    single = fill_weights(InducedAttention(8, 2, count=1, dropout=0.0))
    h = torch.randn(2, 5, 8)
    found = single(h)
    torch.testing.assert_close(found, found[:, :1].expand(-1, 5, -1))
    several = fill_weights(InducedAttention(8, 2, count=3, dropout=0.0))(h)
    assert (several - several[:, :1]).abs().amax(dim=2)[:, 1:].min() > 1e-3


def test_the_noise_level_scales_shifts_and_gates_a_branch():
    block, h, temb = Adaptive(nn.Tanh(), 4, 6), torch.randn(2, 5, 4), torch.randn(2, 6)
    assert torch.equal(block(h, temb), h)
    fill_weights(block)
    shift, scale, gate = block.of_level(nn.functional.silu(temb))[:, None].split(4, dim=-1)
    centred = h - h.mean(2, keepdim=True)
    normal = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(h, temb), h + gate * torch.tanh(normal * (1 + scale) + shift))


def test_the_noise_level_scales_and_shifts_the_input_of_the_last_layer():
    head, h, temb = Head(4, 3, 6), torch.randn(2, 5, 4), torch.randn(2, 6)
    assert not any(parameter.any() for parameter in head.parameters())
    fill_weights(head)
    shift, scale = head.of_level(nn.functional.silu(temb))[:, None].split(4, dim=-1)
    torch.testing.assert_close(head(h, temb), head.affine(h * (1 + scale) + shift))


def test_learnt_points_attend_and_are_attended_to():
    layer, h = fill_weights(InducedAttention(8, 2, count=3, dropout=0.0)), torch.randn(2, 5, 8)
    points, normalise = layer.points.expand(2, -1, -1), nn.LayerNorm(8)
    found = normalise(points + layer.gather(points, h))
    found = normalise(found + layer.mix(found))
    torch.testing.assert_close(layer(h), layer.spread(h, found))


def test_fourier_features_of_the_input():
    torch.manual_seed(0)
    stem = Stem(2, 4000, 0.7)
    assert stem.frequencies.std().item() == pytest.approx(0.7, rel=0.05)
    assert not dict(stem.named_parameters()).keys() & {"frequencies"}
    x, affine = torch.randn(3, 1, 2), stem.affine
    angles = 2 * math.pi * x @ stem.frequencies
    joint = torch.cat([x, angles.sin(), angles.cos()], dim=2)
    torch.testing.assert_close(stem(x), joint @ affine.weight.T + affine.bias)


def test_options_arrive():
    model = network("induced", nf=16, num_res_blocks=3, num_head_channels=4, dropout=0.3)
    attends = [layer for layer in model.modules() if isinstance(layer, InducedAttention)]
    assert len(attends) == 3 and {layer.points.shape for layer in attends} == {(1, 3, 16)}
    assert {layer.gather.heads for layer in attends} == {4}
    assert network("points").blocks[0].branch.heads == 2
    drops = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert len(drops) == 6 and set(drops) == {0.3}
    model = network("vector", num_res_blocks=3, dropout=0.2)
    assert [block.branch[2].p for block in model.blocks] == [0.2] * 3
    frequencies = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        frequencies.append(build(config_of("features", fourier_scale=scale)).embedding.fourier.W)
    torch.testing.assert_close(frequencies[1], 2 * frequencies[0])


@pytest.mark.parametrize("log", (True, False))
def test_fourier_features_of_the_noise_level(log):
    model, (x, labels) = network("features", fourier_log=log), inputs("features")
    labels = labels / 400
    levels = torch.log(labels) if log else labels
    angles = 2 * math.pi * levels[:, None] * model.embedding.fourier.W
    expected = model.embedding.layers(torch.cat([angles.sin(), angles.cos()], dim=1))
    torch.testing.assert_close(model.embedding(labels, x.dtype, {}), expected)


@pytest.mark.parametrize("case", ("features", "points"))
def test_output_is_scaled_by_sigma(case):
    """Labels are sigma with Fourier features, else they index the noise levels."""
    x, labels = inputs(case, 2)[0], torch.tensor([0.0, 9.0]) + (case == "features")
    sigma = labels if case == "features" else torch.tensor([50.0, 0.01])
    plain, scaled = (network(case, scale_by_sigma=scale)(x, labels) for scale in (False, True))
    torch.testing.assert_close(scaled, batch_mul(1 / sigma, plain))


@pytest.mark.parametrize("case", ("vector", "induced"))
def test_recomputing_activations_changes_no_number(case):
    x, labels = inputs(case)
    found = []
    for again in (False, True):
        calls = []
        model = network(case, checkpoint_activations=again).train()
        model.blocks[0].branch.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        model(x, labels).square().sum().backward()
        assert len(calls) == 1 + again
        found.append(
            [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        )
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- Precision, compilation, derivatives --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_keeps_the_first_and_the_last_layer(case):
    model, (x, labels) = network(case), inputs(case)
    expected, seen = model(x, labels), {}
    for name in ("embedding", "stem", "head", "blocks.0", "blocks.0.branch"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda *given, name=name: seen.update({name: given[-1].dtype}))
    found = InBfloat16(model)(x, labels)
    assert found.dtype == torch.float32 and seen.pop("blocks.0.branch") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert 0 < error(found, expected) < 0.05
    half = model.double()(x.double(), labels.double())
    assert half.dtype == torch.float64 and error(half, expected.double()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case, wrap", (("features", lambda model: model), ("induced", InBfloat16)))
def test_the_network_is_one_graph_forward_and_backward(case, wrap):
    model, (x, labels) = wrap(network(case, "classes")), inputs(case)
    torch._dynamo.reset()
    fast = Compiled(model, backend="aot_eager", fullgraph=True)
    given, classes = (x, labels), torch.arange(3)
    told = [functools.partial(function, classes=classes) for function in (model, fast)]
    found = [out_and_gradient(function, *given) for function in told]
    assert fast.works and all(error(*pair) < 1e-5 for pair in zip(*found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_an_exact_divergence(case):
    """The trace of the Jacobian, and its derivative along v by differences."""
    model, (x, labels) = network(case).double(), inputs(case, 1)
    x, labels = x.double(), labels.double()
    v = torch.randn_like(x)

    def divergence(x):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: model(x, labels), x, create_graph=True
        )
        return jacobian.reshape(x.numel(), -1).trace()

    unit = torch.eye(x.numel()).double().reshape(-1, *x.shape)
    _, parts_of_it = value_and_divergence(model, x, labels, unit)
    torch.testing.assert_close(parts_of_it.sum(), divergence(x))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(divergence(x), x)
    with torch.no_grad():
        change = (divergence(x + 1e-5 * v) - divergence(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close((slope * v).sum(), change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SETS)
def test_likelihoods_do_not_depend_on_the_order_of_points(case):
    model, x = network(case, nf=4).double(), inputs(case, 2)[0][:, :3].double()
    with torch.no_grad():  # a smooth field
        model.head.affine.weight.mul_(0.02)
    fn = get_log_likelihood_fn(VPSDE(), hutchinson_type="exact", rtol=1e-2, atol=1e-2, eps=0.05)
    first, second = (fn(model, points).total for points in (x, x.flip(1)))
    torch.testing.assert_close(first, second)
    assert first.isfinite().all() and (first[0] - first[1]).abs() > 0.01


def test_a_parametrized_score():
    """At the start, that of data ~ N(0, sigma_data^2)."""
    config = config_of("features", fourier_log=False)
    fn = get_score_fn(VESDE(), create_model(config, "cpu"), continuous=True, parametrization="edm")
    x, t = torch.randn(3, 3), torch.tensor([0.1, 0.5, 0.9])
    sigma = VESDE().marginal_prob(x, t)[1]
    torch.testing.assert_close(fn(x, t), batch_mul(-1 / (sigma**2 + 0.25), x))
    config = data.digits_defaults()
    parts.edm(config)
    parts.solver_sampling(config, method="heun", num_steps=18)
    parts.mlp(config, embedding_type="fourier", fourier_log=False)
    assert checked(config)[1] == []
    config.model.fourier_log = True
    with pytest.raises(ValueError, match="fourier_log = True takes the logarithm"):
        checked(config)


# --- Learning ------------------------------------------------------------------------------------

MEANS, STDS = (
    torch.tensor([[0.7, 0.35], [-0.6, -0.15], [0.2, -0.8]]),
    torch.tensor([0.1, 0.2, 0.15]),
)


def draw(count):
    """Points of a mixture of three Gaussians in the plane."""
    which = torch.randint(3, (count,))
    return MEANS[which] + batch_mul(STDS[which], torch.randn(count, 2))


class Exact(nn.Module):
    """The noise that the exact score of Gaussians with given weights, means and stds predicts."""

    def __init__(self, means, stds):
        super().__init__()
        self.means, self.stds = means, stds

    def forward(self, x, labels):
        scale, std = VPSDE().marginal_coeffs(labels / 999)
        variance = (scale[:, None] * self.stds) ** 2 + std[:, None] ** 2
        offsets = x[:, None] - scale[:, None, None] * self.means
        logits = -0.5 * offsets.square().sum(2) / variance - variance.log()
        weights = torch.softmax(logits, dim=1) / variance
        return batch_mul(std, (weights[..., None] * offsets).sum(1))


def losses_of(data, *models):
    """The mean loss of each model on the same noise."""
    loss_fn = get_sde_loss_fn(VPSDE(), False, likelihood_weighting=False)
    torch.manual_seed(1)
    draws = loss_fn.draw(data)
    with torch.no_grad():
        return [loss_fn.per_sample(model, data, draws).mean().item() for model in models]


@pytest.mark.slow
def test_a_mixture_in_the_plane_is_learnt():
    """The loss is that of the exact score, up to a part of what the best Gaussian's has more."""
    torch.manual_seed(0)
    model = example("docs/experiments.md", "parts.mlp(config")["train"](draw, 300)
    x = draw(20000)
    gaussian = Exact(x.mean(0, keepdim=True), x.std()[None])
    learnt, exact, other = losses_of(x, model, Exact(MEANS, STDS), gaussian)
    assert exact < learnt < exact + 0.25 * (other - exact)


def draw_sets(count):
    """Sets of six numbers around a common centre."""
    return torch.randn(count, 1, 1) + 0.2 * torch.randn(count, 6, 1)


def exact_of_sets(x, labels):
    """The noise that the exact score of `draw_sets` predicts."""
    scale, std = (a[:, None, None] for a in VPSDE().marginal_coeffs(labels / 999))
    mean, within = x.mean(1, keepdim=True), (0.2 * scale) ** 2 + std**2
    return std * (mean / (6 * scale**2 + within) + (x - mean) / within)


def exact_of_numbers(x, labels):
    """The same without knowledge of the others in the set."""
    scale, std = VPSDE().marginal_coeffs(labels / 999)
    return batch_mul(std / (scale**2 * 1.04 + std**2), x)


@pytest.mark.slow
@pytest.mark.parametrize("count", (0, 4))
def test_points_are_learnt_together(count):
    names = example("docs/experiments.md", "parts.mlp(config")
    config = names["config"]
    parts.set_transformer(config, nf=16, num_res_blocks=1, num_heads=2, inducing_points=count)
    config.data.shape = (6, 1)
    torch.manual_seed(0)
    model = names["train"](draw_sets, 300, batch_size=128, lr=4e-3)
    learnt, exact, alone = losses_of(draw_sets(4000), model, exact_of_sets, exact_of_numbers)
    assert exact < learnt < exact + 0.25 * (alone - exact)


def test_the_example_measures_densities():
    """At the start the score is 0: x_T = m x_0 with x_T ~ N(0, I)."""
    names = example("docs/experiments.md", "parts.mlp(config")
    network, x = create_model(names["config"], "cpu"), torch.randn(3, 2)
    scale, _ = VPSDE().marginal_coeffs(torch.ones(1).double())
    expected = -0.5 * (scale * x).square().sum(1) - math.log(2 * math.pi) + 2 * scale.log()
    found = names["log_density"](network, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_run_of_digits_trains_and_samples():
    run = run_lib.setup(small_config(model__name="mlp", model__num_res_blocks=1))
    run.add_optimizer()
    train_step, evaluate = run.step_fns()
    batch = torch.rand(4, *run.shape)
    for _ in range(2):  # the learning rate starts at 0
        assert train_step(run.state, batch).isfinite()
    assert run.state["model"].head.affine.bias.any() and evaluate(run.state, batch).isfinite()
    assert run.draw(range(2)).shape == (2, 1, 8, 8)


# --- Signals of ADM ------------------------------------------------------------------------------

SIGNALS = {1: (3, 16), 3: (3, 5, 8, 4)}


def signal_config(dims, **options):
    config = complete(tiny_config("adm", **{"nf": 32, "attn_resolutions": (8,), **options}))
    config.data.shape = SIGNALS[dims]
    return config


@pytest.mark.parametrize("dims, rate", ((1, 2), (3, 1)))
def test_series_and_videos_by_config_are_those_by_keywords(dims, rate):
    """Attention at length, or height, 8; values are taken as they are, centred or not."""
    by_keywords = UNetModel(
        8, 3, 32, 3, 1, (rate,), 0.1, (1, 2), dims=dims, use_scale_shift_norm=True,
        resblock_updown=True,
    ).eval()  # fmt: skip
    x, labels = torch.randn(2, *SIGNALS[dims]), torch.tensor([3.0, 500.0])
    for centered in (False, True):
        config = signal_config(dims)
        config.data.centered = centered
        model = create_model(config, "cpu").eval()
        assert not model(x, labels).any()
        by_keywords.load_state_dict(fill_weights(model).state_dict())
        assert torch.equal(model(x, labels), by_keywords(x, labels))


def test_series_are_told_classes_and_features():
    config = signal_config(1)
    config.training.condition, config.data.num_classes = "classes,features", 5
    model = fill_weights(create_model(config, "cpu")).eval()
    x, labels = torch.randn(2, 3, 16), torch.tensor([3.0, 500.0])
    given = {"classes": torch.arange(2), "features": torch.randn(2, 9)}
    base = model(x, labels, **given)
    for kind, value in given.items():
        assert (model(x, labels, **{**given, kind: value + 1}) - base).abs().amin(0).max() > 1e-4


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape, condition, message",
    (
        ("mlp", (3,), "image", "'image' has an image, .*'mlp' cannot be told: choose classes"),
        ("set_transformer", (5, 2), "classes,image", "'classes,image' has an image"),
        ("adm", (3, 16), "image", r"only networks of images .*data.shape is \(3, 16\)"),
        ("set_transformer", (3,), "", r"shape is \(3,\): set data.shape = \(N, C\)"),
        ("set_transformer", (), "", r"shape is \(3, 8, 8\): set data.shape = \(N, C\)"),
        ("adm", (7,), "", r"data.shape = \(7,\) should be \(C, L\).*choose mlp"),
        ("adm", (3, 15), "", "size is 15, which cannot be halved 1 times.*data.shape"),
        ("ncsnpp", (3,), "", r"images are needed, .*data.shape is \(3,\).*mlp"),
    ),
)
def test_other_data_and_conditions_are_refused(name, shape, condition, message):
    config = complete(tiny_config(name, nf=32))
    config.data.shape, config.data.num_classes = shape, 5
    config.training.condition = condition
    with pytest.raises(ValueError, match=message):
        create_model(config, "cpu")


def test_other_options_and_calls_are_refused():
    for options in ({"conditional": False}, {"nonlinearity": "elu"}):
        with pytest.raises(ValueError, match="the only value for the network 'mlp'"):
            network("vector", **options)
    with pytest.raises(ValueError, match="num_heads = 3"):
        network("points", num_heads=3)
    with pytest.raises(ValueError, match="embedding_type is 'sines'"):
        network("vector", embedding_type="sines")
    vector, points, labels = network("vector"), network("points", "classes"), torch.ones(2)
    with pytest.raises(ValueError, match=r"takes \(B, 3\), .*shape \(2, 1, 3\)"):
        vector(torch.zeros(2, 1, 3), labels)
    with pytest.raises(ValueError, match=r"one label per datum, \(2,\).*\(3,\)"):
        vector(torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"points \(B, N, 2\).*shape \(2, 5, 3\)"):
        points(torch.zeros(2, 5, 3), labels)
    with pytest.raises(ValueError, match="takes the condition classes, but was given no condition"):
        points(torch.zeros(2, 5, 2), labels)
    with pytest.raises(ValueError, match=r"signals \(B, 3, W\).*\(2, 3, 16, 16\)"):
        create_model(signal_config(1), "cpu")(torch.zeros(2, 3, 16, 16), labels)


def test_the_shape_of_the_data():
    config = complete({"data": {"image_size": (4, 6), "num_channels": 1}})
    assert data_shape(config) == image_shape(config) == (1, 4, 6)
    config.data.shape = (2, 8, 9)
    assert data_shape(config) == image_shape(config) == (2, 8, 9)
    config.data.shape = (7,)
    assert data_shape(config) == (7,)
    with pytest.raises(ValueError, match="images are needed"):
        image_shape(config)
