"""Constraints: inpainting, colorization, classes, editing, and the one mechanism behind them."""

import math

import numpy as np
import pytest
import torch
from oracles import (
    MU,
    S0,
    SEEDS,
    GaussianOracle,
    ScoreOracle,
    assert_close_to_largest,
    golden_sde,
    goldens,
    inverse_scaler,
)
from torch import nn

import sampling
from controllable_generation import (
    ClassGuidance,
    StartFrom,
    get_pc_colorizer,
    get_pc_conditional_sampler,
    get_pc_editor,
    get_pc_inpainter,
)
from score_lib.base.tensors import SampleNoise, batch_mul
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE

SDES = {"ve": VESDE(sigma_max=20, N=200), "vp": VPSDE(N=200), "subvp": subVPSDE(N=200)}
CASES = (("vesde", "continuous"), ("vesde", "discrete"), ("vpsde", "continuous"))


def build(get, sde, corrector="langevin", scaler=lambda x: x, continuous=True, **options):
    return get(
        sde,
        sampling.ReverseDiffusionPredictor,
        sampling.get_corrector(corrector),
        scaler,
        0.16,
        continuous=continuous,
        **options,
    )


# --- Inpainting and colorization ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "grid"), CASES)
@pytest.mark.parametrize("task", ("inpaint", "colorize"))
def test_goldens(name, grid, task):
    g, sde, continuous = goldens(), golden_sde(name), grid == "continuous"
    get = {"inpaint": get_pc_inpainter, "colorize": get_pc_colorizer}[task]
    inputs = {"inpaint": ("data", "mask"), "colorize": ("gray",)}[task]
    sample = build(get, sde, scaler=inverse_scaler, continuous=continuous, denoise=False)
    torch.manual_seed(SEEDS["control"])
    out = sample(
        GaussianOracle(sde, continuous), *(g[f"{task}/{name}/{grid}/{key}"] for key in inputs)
    )
    assert_close_to_largest(out, g[f"{task}/{name}/{grid}/out"], 2e-5)


def test_published_signatures():
    """All published arguments by position, in the published order, and by keyword."""
    sde, data = VPSDE(N=30), torch.randn(3, 3, 4)
    names = ("predictor", "corrector", "inverse_scaler", "snr", "n_steps", "probability_flow")
    names += ("continuous", "denoise", "eps")
    steps = (sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector, inverse_scaler, 0.1, 2)
    settings = (*steps, True, True, False, 0.01)
    named = dict(zip(names, settings, strict=True))
    labels, by_size = torch.tensor([0, 1, 0]), (lambda x, noise_std: x[:, :2, 0])
    for get, first, given in (
        (get_pc_inpainter, (sde,), (data, torch.eye(3, 4))),
        (get_pc_colorizer, (sde,), (data[:, :1].expand(-1, 3, -1),)),
        (get_pc_conditional_sampler, (sde, by_size, (3, 3, 4)), (labels,)),
    ):
        results = []
        for sample in (get(*first, *settings), get(*first, **named)):
            torch.manual_seed(0)
            results.append(sample(GaussianOracle(sde), *given))
        assert torch.equal(*results) and results[0].shape == (3, 3, 4)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_classes_guide_inside_inference_mode(sde):
    def classifier(x, noise_std):
        return torch.stack([x.sum(1), -x.sum(1)], dim=1) / (1 + noise_std[:, None])

    sample = build(
        lambda sde, *a, **k: get_pc_conditional_sampler(sde, classifier, (3, 2), *a, **k), sde
    )
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            labels = torch.tensor([0, 1, 0])
            results.append(sample(GaussianOracle(sde), labels))
    assert torch.equal(*results)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_known_pixels_stay_and_the_rest_follows_the_data(sde):
    """With independent pixels the open ones are distributed as the data."""
    torch.manual_seed(0)
    data = MU + S0 * torch.randn(2000, 2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    x = build(get_pc_inpainter, sde, eps=sde.sampling_eps)(GaussianOracle(sde), data, mask)
    known = mask.bool()
    scale, _ = sde.marginal_coeffs(torch.tensor([sde.sampling_eps]))
    torch.testing.assert_close(x[:, known], data[:, known] * scale)
    assert x[:, ~known].mean() == pytest.approx(MU, abs=0.03)
    assert x[:, ~known].std() == pytest.approx(S0, abs=0.05)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_denoising_removes_the_last_noise(sde):
    """The mean keeps the known part without noise; the sample has it with noise."""
    data, mask = torch.full((50, 4), 0.7), torch.tensor([1.0, 0.0, 0.0, 1.0])
    eps = 0.05
    scale, std = sde.marginal_coeffs(torch.tensor([eps]))
    results = []
    for denoise in (True, False):
        sample = build(get_pc_inpainter, sde, denoise=denoise, eps=eps)
        results.append(sample(GaussianOracle(sde), data, mask)[:, mask.bool()] - 0.7 * scale)
    assert results[0].abs().max() < 1e-6
    assert results[1].std() == pytest.approx(float(std), rel=0.3)


@pytest.mark.parametrize("channels", (1, 2, 3, 5))
@pytest.mark.parametrize("size", ((), (4,), (4, 6)), ids=str)
@pytest.mark.quick_cases(8)
def test_colorization_keeps_the_gray_image(channels, size):
    sde = SDES["vp"]
    gray = torch.randn(4, 1, *size).expand(4, channels, *size)
    x = build(get_pc_colorizer, sde, eps=1e-3)(GaussianOracle(sde), gray)
    scale, _ = sde.marginal_coeffs(torch.tensor([1e-3]))
    torch.testing.assert_close(x.mean(1), gray[:, 0] * scale)
    if channels > 1:
        assert x.std(dim=1).mean() > 0.1


def test_the_noise_of_a_gray_image_has_the_right_variance():
    """Where neither predictor nor corrector acts, gray values of x_t are m y + s / sqrt(C) z."""
    sde, part = SDES["vp"], {"start_time": 0.3, "stop_time": 0.29}
    sample = get_pc_colorizer(sde, None, None, lambda x: x, 0.16, denoise=False, eps=0.01, **part)
    x = sample(GaussianOracle(sde), torch.full((50_000, 3), 0.5))
    scale, std = sde.marginal_coeffs(sampling.visited_times(sde, 0.01, **part)[-1:])
    assert x.mean() == pytest.approx(0.5 * float(scale), abs=0.01)
    assert x.mean(1).std() == pytest.approx(float(std) / math.sqrt(3), rel=0.02)
    assert (x.mean(1) - x[:, 0]).abs().max() > 0.1  # the rest is left alone


def test_masks_may_differ_between_samples():
    sde, data = SDES["vp"], torch.randn(2, 4)
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    x = build(get_pc_inpainter, sde, eps=1e-3)(GaussianOracle(sde), data, mask)
    scale, _ = sde.marginal_coeffs(torch.tensor([1e-3]))
    torch.testing.assert_close(x[mask.bool()], data[mask.bool()] * scale)


def test_a_result_is_a_function_of_seed_and_number():
    sde, data, mask = SDES["ve"], torch.randn(5, 2, 2), torch.eye(2)

    def run(rows):
        sample = build(get_pc_inpainter, sde, corrector="langevin_per_sample")
        return sample(GaussianOracle(sde), data[rows], mask, noise=SampleNoise(1, rows))

    parts = torch.cat([run(range(2)), run(range(2, 5))])
    torch.testing.assert_close(run(range(5)), parts, rtol=0, atol=1e-5)


def test_where_editing_starts_is_a_function_of_seed_and_number():
    sde, data = SDES["vp"], torch.randn(5, 2)
    edit = build(get_pc_editor, sde, corrector="none", start_time=0.5)

    def run(rows):
        return edit(GaussianOracle(sde), data[rows], noise=SampleNoise(1, rows))

    parts = torch.cat([run(range(2)), run(range(2, 5))])
    torch.testing.assert_close(run(range(5)), parts, rtol=0, atol=1e-5)


# --- Classes --------------------------------------------------------------------------------------

MEANS, SPREAD = torch.tensor([[-0.6, 0.2], [0.5, 0.4], [0.1, -0.7]]), 0.2


class MixtureOracle(ScoreOracle):
    """The networks that know a mixture of three Gaussians exactly: score, and classifier."""

    def logits(self, x, scale, std):
        """log p(x_t, class) up to a constant, (B, 3), and the variance of each class, (B,)."""
        distance = (x[:, None] - scale[:, None, None] * MEANS).square().sum(2)
        return -distance / (2 * self.variance(scale, std))[:, None]

    def variance(self, scale, std):
        return (scale * SPREAD) ** 2 + std**2

    def classify(self, x, noise_std):
        if isinstance(self.sde, VESDE):
            return self.logits(x, torch.ones_like(noise_std), noise_std)
        # s^2 = 1 - m^2 for VP, and s = 1 - m^2 for sub-VP.
        square = noise_std if isinstance(self.sde, subVPSDE) else noise_std**2
        return self.logits(x, (1 - square).clamp(min=0).sqrt(), noise_std)

    def score(self, x, scale, std):
        share = torch.softmax(self.logits(x, scale, std), dim=1)
        return -batch_mul(1 / self.variance(scale, std), x - batch_mul(scale, share @ MEANS))


def check_classes(x, labels):
    """Each class is N(its mean, SPREAD^2 I)."""
    for label, mean in enumerate(MEANS):
        torch.testing.assert_close(x[labels == label].mean(0), mean, rtol=0, atol=0.03)
        covariance = torch.cov(x[labels == label].T) / SPREAD**2
        torch.testing.assert_close(covariance, torch.eye(2), rtol=0, atol=0.2)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_samples_are_of_their_class(sde):
    torch.manual_seed(0)
    network, labels = MixtureOracle(sde), torch.arange(1500) % 3
    sample = get_pc_conditional_sampler(
        sde,
        network.classify,
        (len(labels), 2),
        sampling.EulerMaruyamaPredictor,
        None,
        lambda x: x,
        0.16,
        continuous=True,
        eps=sde.sampling_eps,
    )
    check_classes(sample(network, labels), labels)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.quick_cases(1)
def test_the_ode_can_be_guided_by_classes(sde):
    torch.manual_seed(0)
    network, labels = MixtureOracle(sde), torch.arange(1500) % 3
    sample = sampling.get_ode_sampler(
        sde,
        (len(labels), 2),
        lambda x: x,
        eps=sde.sampling_eps,
        constraints=[ClassGuidance(network.classify, labels)],
    )
    check_classes(sample(network)[0], labels)


def test_the_guidance_scale_multiplies_the_gradient():
    """At 0 the classes do not matter; at 2 samples are further from the other classes."""
    sde, labels = SDES["vp"], torch.zeros(1500, dtype=torch.int64)
    network, results = MixtureOracle(sde), {}
    for scale in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        sample = sampling.get_pc_sampler(
            sde,
            (1500, 2),
            sampling.EulerMaruyamaPredictor,
            None,
            lambda x: x,
            0.16,
            continuous=True,
            constraints=[ClassGuidance(network.classify, labels, scale)],
        )
        results[scale] = sample(network)[0].mean(0)
    torch.testing.assert_close(results[0.0], MEANS.mean(0), rtol=0, atol=0.06)
    away = MEANS[0] - MEANS.mean(0)
    assert (results[2.0] - results[1.0]) @ away > 0.02


@pytest.mark.parametrize("until", (None, 0.995))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_guidance_begins_at_the_first_time(dtype, until):
    """Also where T is no number of float32, as grids of times are."""
    sde = CosineVPSDE(N=20)
    labels, first = torch.zeros(1, dtype=torch.int64), sampling.visited_times(sde, 1e-3)[:1]
    guidance = ClassGuidance(lambda x, std: torch.cat([3 * x, 0 * x], 1), labels, until=until)
    guided = guidance.guide(sde, lambda x, t: torch.zeros_like(x))
    gradient = guided(torch.zeros(1, 1, dtype=dtype), first.to(dtype))
    torch.testing.assert_close(gradient, torch.tensor([[1.5]], dtype=dtype))


@pytest.mark.parametrize("until", (math.nan, 0.0, -1.0))
def test_guidance_that_would_never_begin_is_refused(until):
    with pytest.raises(ValueError, match=f"until is a time above 0, or None for T, not {until}"):
        ClassGuidance(lambda x, std: x, torch.zeros(1, dtype=torch.int64), until=until)


class NormalizedClassifier(nn.Module):
    """Logits of three classes, by statistics of a batch in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x, labels):
        return self.linear(self.norm(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_guidance_asks_the_classifier_in_evaluation_mode_and_its_own_dtype(dtype):
    """From its first call on: as it comes, in training mode, it would learn from samples."""
    results = []
    for mode in (False, True):
        classifier = NormalizedClassifier().to(dtype).train(mode)
        guidance = ClassGuidance(classifier, torch.tensor([0, 1, 2, 0]))
        sample = sampling.get_solver_sampler(
            SDES["vp"], (4, 2), sampling.DDIM, lambda x: x, 3, constraints=[guidance]
        )
        results.append(sample(lambda x, labels: x, noise=SampleNoise(0, range(4)))[0])
        assert classifier.norm.num_batches_tracked == 0
        assert torch.equal(classifier.norm.running_mean, torch.zeros(2, dtype=dtype))
    assert torch.equal(*results) and results[0].dtype == torch.float32


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_named():
    sde = VPSDE(N=30)
    inpaint = build(get_pc_inpainter, sde)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\).*\(2, 4\)"):
        inpaint(GaussianOracle(sde), torch.zeros(5, 2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="only 1"):
        inpaint(GaussianOracle(sde), torch.zeros(2, 4), torch.full((2, 4), 0.5))
    with pytest.raises(
        ValueError, match=r"the data should hold floating.* not torch.uint8: divide"
    ):
        inpaint(GaussianOracle(sde), torch.zeros(2, 4, dtype=torch.uint8), torch.ones(4))
    with pytest.raises(ValueError, match="not finite numbers"):
        inpaint(GaussianOracle(sde), torch.full((2, 4), torch.inf), torch.ones(4))
    colorize = build(get_pc_colorizer, sde)
    for images in (torch.randn(2, 3, 4), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"gray images are .* with equal channels"):
            colorize(GaussianOracle(sde), images)
    with pytest.raises(ValueError, match=r"data to start from should hold .* not torch.int64"):
        StartFrom(torch.zeros(3, 4, dtype=torch.int64))
    edit = sampling.get_pc_sampler(
        sde, (3, 4), None, None, lambda x: x, 0.1, constraints=[StartFrom(torch.zeros(3, 5))]
    )
    with pytest.raises(ValueError, match=r"data of shape \(3, 5\).*\(3, 4\)"):
        edit(GaussianOracle(sde))


@pytest.mark.parametrize(
    ("labels", "said"),
    (
        (torch.tensor([0.0, 1.0, 2.0]), "labels are whole numbers.*float32"),
        (torch.tensor([[0], [1], [2]]), r"labels are whole numbers.*\(3, 1\)"),
        (1, r"labels are whole numbers.*shape \(\)"),
        (torch.tensor([0, 1]), "2 labels were given for 3 samples"),
        (torch.tensor([0, 1, 3]), "label 3.*3 classes, 0 to 2"),
        (torch.tensor([0, -1, 2]), "label -1.*3 classes, 0 to 2"),
    ),
)
def test_wrong_labels_are_named(labels, said):
    sde = VPSDE(N=30)
    network = MixtureOracle(sde)
    sample = get_pc_conditional_sampler(
        sde, network.classify, (3, 2), None, None, lambda x: x, 0.16, continuous=True
    )
    with pytest.raises(ValueError, match=said):
        sample(network, labels)


def test_labels_and_masks_may_be_lists_and_arrays():
    sde, results = VPSDE(N=30), []
    network, kept = MixtureOracle(sde), torch.tensor([1.0, 0.0])
    settings = (None, None, lambda x: x, 0.16)
    draw = get_pc_conditional_sampler(sde, network.classify, (3, 2), *settings, continuous=True)
    inpaint = get_pc_inpainter(sde, *settings, continuous=True)
    for labels, mask in (
        (torch.tensor([0, 1, 2]), kept),
        ([0, 1, 2], kept.tolist()),
        (np.arange(3), kept.numpy()),
    ):
        torch.manual_seed(0)
        results.append((draw(network, labels), inpaint(network, torch.ones(3, 2), mask)))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
