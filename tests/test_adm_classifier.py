"""The classifier of ADM by config, and which label each kind of classifier is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adm_helpers import POOLS, small
from control_runs import read, save
from networks import build, error, fill_weights, tiny_config
from small_runs import small_config

import run_lib
from controllable_generation import ClassGuidance, get_pc_conditional_sampler
from losses import get_classifier_loss_fn
from models.adm import EncoderUNetModel
from models.precision import InBfloat16
from sampling import EulerMaruyamaPredictor
from score_lib.losses.objectives import Draws
from score_lib.scores import classifier_label, get_classifier_grad_fn
from sde_lib import VESDE, VPSDE, CosineVPSDE

PROCESSES = (VPSDE(N=50), VESDE(N=50), CosineVPSDE(50), CosineVPSDE(50, continuous=False))


def classifier_config(classes=3, **options):
    config = tiny_config("adm_classifier", **{"nf": 32, "num_head_channels": 16, **options})
    config.data.num_classes = classes
    return config


class Told(torch.nn.Module):
    """A classifier of two classes that notes its labels."""

    def __init__(self, by_time):
        super().__init__()
        self.told_time_step, self.labels = by_time, []

    def forward(self, x, labels):
        self.labels.append(labels.clone())
        return x.flatten(1)[:, :2]


# --- By config ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_config_and_keywords_agree(pool):
    by_config = build(classifier_config(pool=pool, dropout=0.2, use_new_attention_order=True))
    by_keywords = EncoderUNetModel(
        8, 3, 32, 3, 1, (2,), 0.2, (1, 2), num_head_channels=16, use_scale_shift_norm=True,
        resblock_updown=True, use_new_attention_order=True, pool=pool,
    )  # fmt: skip
    assert repr(by_config).replace("ADMClassifier(", "EncoderUNetModel(", 1) == repr(by_keywords)
    by_keywords.load_state_dict(fill_weights(by_config).state_dict())
    x, t = torch.rand(2, 3, 8, 8), torch.tensor([3, 500])
    assert torch.equal(by_config.eval()(x, t), by_keywords.eval()(2 * x - 1, t))


@pytest.mark.parametrize("side", [(8, 16), (16, 8)])
def test_the_attention_pool_takes_images_of_any_configured_sides(side):
    """A position's embedding is its own, and the first position is the mean of the others."""
    config = classifier_config(image_size=side, pool="attention")
    model = fill_weights(build(config)).eval()
    pool, h = model.out[2], torch.randn(2, 64, side[0] // 2, side[1] // 2)
    tokens = h.flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + pool.positional_embedding
    query, key, value = pool.qkv_proj(tokens).unflatten(1, (3, 4, 16)).unbind(1)
    weights = torch.softmax(query[..., :1].mT @ key / 4, dim=-1)
    expected = pool.c_proj((value @ weights.mT).flatten(1, 2))[..., 0]
    torch.testing.assert_close(pool(h), expected, rtol=1e-4, atol=1e-5)
    assert model(torch.rand(2, 3, *side), torch.tensor([3, 500])).shape == (2, 3)
    with pytest.raises(ValueError, match="32 positions"):
        model(torch.rand(2, 3, 8, 8), torch.tensor([3, 500]))


def test_options_that_a_classifier_cannot_have_are_refused():
    with pytest.raises(ValueError, match="num_classes is 1, but a classifier needs at least two"):
        build(classifier_config(classes=1))
    with pytest.raises(ValueError, match="needs dims = 2 and num_head_channels"):
        build(classifier_config(num_head_channels=0))
    with pytest.raises(ValueError, match=r"scale_by_sigma = True.*'adm_classifier'"):
        build(classifier_config(scale_by_sigma=True))
    with pytest.raises(ValueError, match=r"num_channels = 3.*\(2, 1, 8, 8\)"):
        build(classifier_config())(torch.zeros(2, 1, 8, 8), torch.zeros(2))


# --- The label ------------------------------------------------------------------------------------


def test_each_kind_of_classifier_is_told_its_label():
    step, std = torch.tensor([7.0]), torch.tensor([0.3])
    wide = tiny_config("wideresnet_noise_conditional", blocks_per_group=1, channel_multiplier=1)
    wide.data.num_classes = 3
    for classifier, label in (
        (build(classifier_config()), step),
        (InBfloat16(small(EncoderUNetModel)), step),
        (torch.nn.DataParallel(small(EncoderUNetModel)), step),
        (build(wide), std),
        (lambda x, noise_std: x, std),
    ):
        assert classifier_label(classifier, step, std) is label


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("continuous", (True, False))
def test_training_tells_the_label_of_a_score_network(sde, continuous):
    loss_fn = get_classifier_loss_fn(sde, train=True, continuous=continuous)
    batch, labels = torch.randn(3, 2), torch.tensor([0, 1, 1])
    level = torch.tensor([0.1, 0.5, 0.9]) if continuous else torch.tensor([0, 20, 49])
    by_step, by_std = Told(True), Told(False)
    for classifier in (by_step, by_std):
        losses = loss_fn.per_sample(classifier, batch, Draws(level, torch.zeros(3, 2)), labels)
    mean, std = loss_fn.levels.marginal(batch, level)
    torch.testing.assert_close(losses, F.cross_entropy(mean, labels, reduction="none"))
    expected = sde.noise_label(level, True) if continuous else level
    assert torch.equal(by_step.labels[0], expected) and torch.equal(by_std.labels[0], std)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("continuous", (True, False))
def test_guidance_tells_the_label_of_training(sde, continuous):
    by_step, by_std = Told(True), Told(False)
    x, t, labels = torch.randn(2, 2), torch.tensor([0.4, 0.9]), torch.tensor([0, 1])
    for classifier in (by_step, by_std):
        guidance = ClassGuidance(classifier, labels, 3.0, continuous=continuous)
        guided = guidance.guide(sde, lambda x, t: torch.zeros_like(x))(x, t)
        # The gradient of log softmax.
        expected = 3 * (F.one_hot(labels, 2) - torch.softmax(x, dim=1))
        torch.testing.assert_close(guided, expected)
    assert torch.equal(by_step.labels[0], sde.noise_label(t, continuous))
    torch.testing.assert_close(by_std.labels[0], sde.marginal_coeffs(t)[1])


@pytest.mark.parametrize("classifier_continuous", (True, False))
def test_samplers_with_guidance_take_the_label_too(classifier_continuous):
    sde, classifier = VPSDE(N=5), Told(True)
    sampler = get_pc_conditional_sampler(
        sde, classifier, (2, 2), EulerMaruyamaPredictor, None, lambda x: x, 0.16, continuous=True,
        eps=1e-3, classifier_continuous=classifier_continuous,
    )  # fmt: skip
    sampler(lambda x, labels: x, torch.tensor([0, 1]))
    told = torch.stack(classifier.labels[1:])[:, 0]  # after the check of the classes
    times = torch.linspace(1, 1e-3, 5)
    torch.testing.assert_close(told, sde.noise_label(times, classifier_continuous))


def test_gradient_is_that_of_log_p():
    """Against differences, in float64."""
    sde, classifier = VPSDE(), small(EncoderUNetModel, pool="attention").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    t, labels = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([2, 0])
    grad = get_classifier_grad_fn(sde, classifier)(x, t, labels)

    def log_p(x):
        return torch.log_softmax(classifier(x, 999 * t), dim=1).gather(1, labels[:, None])[:, 0]

    direction, h = torch.randn_like(x), 1e-5
    with torch.no_grad():
        slope = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
    torch.testing.assert_close((grad * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-8)
    assert error(grad, get_classifier_grad_fn(sde, classifier)(x, 1.1 * t, labels)) > 1e-3


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_classifier_guides_samples(tmp_path):
    tiny = {"model__nf": 32, "training__n_iters": 2, "training__snapshot_freq": 2}
    tiny |= {"training__eval_freq": 2, "eval__accuracy_num_levels": 2}
    config = small_config("vp/digits_adm_classifier", **tiny)
    run_lib.train(config, tmp_path / "classifier")
    config.eval.update(checkpoint=str(tmp_path / "classifier/checkpoints/checkpoint_1.pth"))
    config.eval.update(accuracy_num_repeats=1, loss_num_repeats=1)
    (record,) = run_lib.evaluate(config, tmp_path / "classifier")
    assert 0 <= record["accuracy"] <= 1
    options = {"control__task": "class", "control__labels": (3, 5), "control__num_results": 2}
    found = {}
    for scale in (0.0, 5.0):
        score = small_config(
            "vp/digits_adm", model__nf=32, control__classifier=config.eval.checkpoint,
            eval__checkpoint=str(tmp_path / "score.pth"), control__guidance_scale=scale, **options,
        )  # fmt: skip
        save(run_lib.setup(score), tmp_path / "score.pth")
        found[scale], _, _ = read(run_lib.control(score, tmp_path))
    assert found[5.0]["result"].shape == (2, 2, 1, 8, 8)
    assert abs(found[5.0]["result"] - found[0.0]["result"]).max() > 1e-3
    # The same weights without a config, as published, averaged.
    contents = torch.load(config.eval.checkpoint, weights_only=True)
    names = [name for name in contents["model"] if not name.endswith("sigmas")]
    averaged = dict(zip(names, contents["ema"]["shadow_params"], strict=True))
    torch.save({k.removeprefix("module."): v for k, v in averaged.items()}, tmp_path / "bare.pt")
    score.control.update(classifier=str(tmp_path / "bare.pt"), name="again")
    with pytest.raises(ValueError, match=r"holds no config.*control.classifier_config"):
        run_lib.control(score, tmp_path)
    score.control.classifier_config = str(tmp_path / "classifier" / "config.json")
    again, _, _ = read(run_lib.control(score, tmp_path))
    assert np.array_equal(again["result"], found[5.0]["result"])
