"""DDPM and DDIM on integer steps: recorded runs of other libraries, closed forms, and wiring."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from networks import drawn_weights, tiny_config
from oracles import MU, S0, GaussianOracle, exact_moments, inverse_scaler
from recordings import load_tensors
from small_runs import small_config

import run_lib
import sampling
from controllable_generation import DataConsistency, Mask, StartFrom
from models.conditioning import Guided
from models.utils import get_model
from sampling import get_chain_sampler, get_chain_step_fn, kept_levels
from score_lib.base.affine import Clamp
from score_lib.sdes.chain import Chain
from sde_lib import VESDE, VPSDE, CosineVPSDE, subVPSDE


def goldens() -> dict[str, torch.Tensor]:
    return load_tensors("golden_chains.npz")


def process(schedule, N):
    return VPSDE(N=N) if schedule == "linear" else CosineVPSDE(N, continuous=False)


def off(value, expected):
    """The largest error relative to the largest value."""
    return float((value.double() - expected.double()).abs().max() / expected.abs().max())


# --- Respacing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "N", "respacing"),
    (
        ("linear", 1000, ""),
        ("linear", 250, ""),
        ("cosine", 1000, ""),
        ("cosine", 100, "10,5,5,2"),
        ("linear", 1000, "250"),
        ("linear", 1000, "ddim25"),
    ),
)
def test_respaced_chains_are_those_of_guided_diffusion(schedule, N, respacing):
    """The recorded betas are of float64, ours of the linear schedule are published in float32."""
    name = {"10,5,5,2": "_of_4"}.get(respacing, f"_{respacing}" * bool(respacing))
    golden = functools.partial("adm_schedule/{}_{}{}/{}".format, schedule, N, name)
    kept = kept_levels(N, respacing)
    chain = Chain(process(schedule, N), kept=kept)
    assert torch.equal(kept, goldens()[golden("timestep_map")])
    for found, name in (
        (chain.m**2, "alphas_cumprod"),
        (chain.log_step.exp(), "betas"),
        (chain.log_posterior, "posterior_log_variance_clipped"),
        (chain.weight, "posterior_mean_coef1"),
        (chain.weight_x, "posterior_mean_coef2"),
    ):
        torch.testing.assert_close(found, goldens()[golden(name)], rtol=5e-7, atol=0)


def test_strides_of_diffusers_and_what_is_refused():
    assert kept_levels(1000, "leading8").tolist() == list(range(0, 1000, 125))
    assert kept_levels(1000, "leading6").tolist() == [166 * i for i in range(6)]
    assert kept_levels(1000, "leading6+3").tolist() == [166 * i + 3 for i in range(6)]
    assert kept_levels(1000, "trailing8").tolist() == list(range(124, 1000, 125))
    assert kept_levels(10, "trailing3").tolist() == [2, 6, 9]
    assert kept_levels(10, 4).tolist() == [0, 3, 6, 9] and len(kept_levels(10, "0")) == 10
    for wrong, message in (
        ("11", "11 levels of 10"),
        ("3,3,9", "9 levels of 3"),
        ("leading11", "11 levels of 10"),
        ("ddim6", "'6' or 'leading6'"),
        ("fast", "should be one of"),
        ("trailing5+1", "should be one of"),
        ("leading5+2", "up to level 10, and the last of 10 is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            kept_levels(10, wrong)
    for one in ("1", "leading1", 1):
        with pytest.raises(ValueError, match=r"sampling.respacing = .*1.* keeps one level of 10"):
            get_chain_sampler(VPSDE(beta_max=5, N=10), (1, 2), lambda x: x, respacing=one)


# --- Recorded runs of Diffusers -------------------------------------------------------------------

# The layers of a small DDPM in our order, by their names there.
LAYERS = [
    *("time_embedding.linear_1", "time_embedding.linear_2", "conv_in"),
    *("down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0"),
    *("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    *("up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0.conv"),
    *("up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_norm_out", "conv_out"),
]
PARTS = {
    "resnets": {
        "GroupNorm_0": "norm1",
        "Conv_0": "conv1",
        "Dense_0": "time_emb_proj",
        "GroupNorm_1": "norm2",
        "Conv_1": "conv2",
        "NIN_0": "conv_shortcut",
    },
    "attentions": {
        "GroupNorm_0": "group_norm",
        "NIN_0": "to_q",
        "NIN_1": "to_k",
        "NIN_2": "to_v",
        "NIN_3": "to_out.0",
    },
}


@functools.cache
def recorded_network():
    """Our DDPM with the weights of the recorded one, which are drawn by the names there."""
    config = tiny_config("ddpm", nf=32, attn_resolutions=(), num_scales=1000, centered=True)
    model = get_model("ddpm")(config).eval()
    state = {"sigmas": model.sigmas}
    for name, value in model.state_dict().items():
        if name == "sigmas":
            continue
        _, k, *part, end = name.split(".")
        layer = LAYERS[int(k)]
        kind = layer.split(".")[-2] if "." in layer else ""
        theirs = ".".join([layer, *(PARTS[kind][p] for p in part if kind in PARTS)])
        shape, dense = tuple(value.shape), end == "W"
        if dense:
            shape = shape[::-1] + ((1, 1) if kind == "resnets" else ())
        leaf = {"W": "weight", "b": "bias"}.get(end, end)
        filled = drawn_weights(f"{theirs}.{leaf}", shape)
        state[name] = filled.flatten(1).T.contiguous() if dense else filled
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("case", "N", "tolerance", "options"),
    (
        ("ddpm_fixed_large", 20, 2e-5, {"variance": "large", "clip": False}),
        ("ddpm_fixed_small_clip_strided", 1000, 2e-5, {"respacing": "leading8"}),
        # x_0 = (x - s eps) / m has 1 / m = 33 times the rounding of eps, which is recorded, too.
        (
            "ddim_clip",
            1000,
            5e-5,
            {"variance": "ddim", "clip_noise": False, "respacing": "leading6"},
        ),
    ),
)
def test_runs_are_those_of_diffusers(case, N, tolerance, options):
    golden = {
        key.removeprefix(f"ddpm_run/{case}/"): value
        for key, value in goldens().items()
        if key.startswith(f"ddpm_run/{case}/")
    }
    sde = VPSDE(1e-4 * N, 0.02 * N, N)
    z, *noises = [*golden["noises"], torch.zeros(())]
    draws, path, told = iter(noises), [], []

    def model(x, labels):
        told.append(labels)
        return recorded_network()(x, labels)

    sample = get_chain_sampler(sde, z.shape, inverse_scaler, **options)
    x, evaluations = sample(
        model,
        z,
        noise=lambda like: next(draws).expand_as(like),
        callback=lambda i, t, x, x_mean: path.append(x),
    )
    path[-1] = 2 * x - 1
    assert evaluations == len(path) == len(golden["timesteps"])
    assert torch.equal(torch.stack(told)[:, 0], golden["timesteps"])
    assert told[0].dtype == torch.int64
    assert off(torch.stack(path), golden["x_after_step"]) < tolerance


# --- Recorded runs of guided-diffusion ------------------------------------------------------------

ADM = {
    "learned_range": ("linear", 1000, "", "learned", [0, 1, 400, 999]),
    "learned_range_respaced": ("cosine", 1000, "20", "learned", [0, 3, 19]),
    # Its network is told 1000 i / N.
    "fixed_large": ("linear", 100, "", "large", [0, 50, 99]),
}


def adm_network(N, variance, x, labels):
    label = (labels * (1000 / N if variance == "large" else 1)).reshape(-1, 1, 1, 1).to(x)
    eps = 0.3 * x + 0.0005 * label
    return torch.cat([eps, 0.5 * torch.sin(3 * x)], dim=1) if variance == "learned" else eps


def first_half(model):
    """Without the variances, which DDIM does not use."""
    return lambda x, labels: model(x, labels)[:, : x.shape[1]]


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("case", ADM)
def test_steps_are_those_of_guided_diffusion(case, clip):
    """Each sample of the batch at a level of its own; recorded without noise at level 0."""
    schedule, N, respacing, variance, numbers = ADM[case]
    x, i = goldens()[f"adm_diffusion/{case}/x"], torch.tensor(numbers)
    torch.manual_seed(31)
    z = torch.randn_like(x)

    def toward(score_fn):
        return lambda x, t: score_fn(x, t) - 1.5 * (x - 0.2)

    def step(variance, eta=0.0, guide=None):
        model = functools.partial(adm_network, N, ADM[case][3])
        if variance == "ddim":
            model = first_half(model)
        made = get_chain_step_fn(
            process(schedule, N), model, inverse_scaler if clip else None, respacing=respacing,
            variance=variance, eta=eta, guide=guide, shift_mean=True, noise=lambda x: z,
        )  # fmt: skip
        found, mean = made(x, i)
        return torch.where(i.reshape(-1, 1, 1, 1) > 0, found, mean)

    found = {
        f"p_sample/clip={clip}": step(variance),
        f"p_sample_classifier/clip={clip}": step(variance, guide=toward),
        f"ddim_classifier/clip={clip}/eta=0.0": step("ddim", guide=toward),
    }
    for eta in (0.0, 0.5, 1.0):
        found[f"ddim/clip={clip}/eta={eta}"] = step("ddim", eta)
    for name, value in found.items():
        # The recorded float32 figures of clamped DDIM are up to 4.5e-5 from those of float64.
        tolerance = 5e-5 if clip and "ddim" in name else 1e-6
        assert off(value, goldens()[f"adm_diffusion/{case}/{name}"]) < tolerance, name


@pytest.mark.parametrize(
    ("case", "method"),
    (
        ("learned_range", "p_sample"),
        ("learned_range_respaced", "p_sample"),
        ("learned_range_respaced", "ddim_sample"),
        ("fixed_large", "p_sample"),
        ("fixed_large", "ddim_sample"),
    ),
)
def test_loops_are_those_of_guided_diffusion(case, method):
    schedule, N, respacing, variance, _ = ADM[case]
    model = functools.partial(adm_network, N, variance)
    x = goldens()[f"adm_diffusion/{case}/x"]
    kind = variance if method == "p_sample" else "ddim"
    model = first_half(model) if kind == "ddim" else model
    sample = get_chain_sampler(
        process(schedule, N), x.shape, inverse_scaler, respacing=respacing, variance=kind
    )
    torch.manual_seed(31)
    found = 2 * sample(model, x)[0] - 1
    assert off(found, goldens()[f"adm_diffusion/{case}/{method}_loop"]) < 2e-5


# --- Closed forms ---------------------------------------------------------------------------------

CHAINS = {
    "vp": VPSDE(N=100),
    "cosine": CosineVPSDE(100, continuous=False),
    "ve": VESDE(sigma_min=0.02, sigma_max=20, N=100),
}


def recursion(m, s, prior_std, variance, eta, last_noise=False):
    """Mean and variance of samples of N(MU, S0^2) data by x_{i-1} = a x_i + b + sigma z."""
    mean, spread = 0.0, prior_std**2
    m, s = [1.0, *m.tolist()], [0.0, *s.tolist()]
    small = []
    for i in range(1, len(m)):
        step = s[i] ** 2 - (m[i] / m[i - 1] * s[i - 1]) ** 2
        small.append((s[i - 1] ** 2 * step / s[i] ** 2, step))
    for i in range(len(m) - 1, 0, -1):
        # E[x_0 | x] = share x + rest, and x = m x_0 + s eps.
        share = m[i] * S0**2 / ((m[i] * S0) ** 2 + s[i] ** 2)
        rest = MU * (1 - share * m[i])
        posterior, step = small[i - 1]
        if variance == "ddim":
            sigma2 = eta**2 * posterior
            along = math.sqrt(s[i - 1] ** 2 - sigma2) / s[i]
            a, b = along + (m[i - 1] - along * m[i]) * share, (m[i - 1] - along * m[i]) * rest
        else:
            sigma2 = step if variance == "large" else posterior or small[1][0]
            weight = m[i - 1] * step / s[i] ** 2
            along = m[i] / m[i - 1] * s[i - 1] ** 2 / s[i] ** 2
            a, b = along + weight * share, weight * rest
        noise = sigma2 if i > 1 or last_noise else 0.0
        mean, spread = a * mean + b, a**2 * spread + noise
    return mean, spread


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    ("variance", "eta", "respacing", "denoise"),
    (
        ("small", 0.0, "", True),
        ("large", 0.0, "20", False),
        ("small", 0.0, "4,9,10", False),
        ("ddim", 0.0, "20", True),
        ("ddim", 0.6, "trailing10", True),
    ),
)
def test_gaussian_samples_have_the_moments_of_the_recursion(
    name, variance, eta, respacing, denoise
):
    sde = CHAINS[name]
    options = {"variance": variance, "eta": eta, "respacing": respacing, "denoise": denoise}

    def draw(count, noise):
        shape, start = (count, 1), torch.empty(count, 1, dtype=torch.float64)
        sample = get_chain_sampler(sde, shape, lambda x: x, clip=False, **options)
        z = sde.prior_from_normal(noise(start))
        return sample(GaussianOracle(sde, continuous=False), z, noise=noise)[0]

    mean, covariance = exact_moments(draw, 1)
    chain = Chain(sde, kept=kept_levels(sde.N, respacing))
    expected = recursion(chain.m, chain.s, sde.prior_std, variance, eta, not denoise)
    assert float(mean) == pytest.approx(expected[0], rel=1e-5)
    assert float(covariance) == pytest.approx(expected[1], rel=1e-4)
    if len(chain) == sde.N:  # those of the data up to O(1 / N)
        assert float(mean) == pytest.approx(MU, rel=0.01)
        assert float(covariance) ** 0.5 == pytest.approx(S0, rel=7 / sde.N)


def test_clamping_keeps_the_precision_of_the_network():
    x = torch.randn(2, 3, 4)
    assert torch.equal(Clamp(lambda x: (x + 1) / 2)(x), x.clamp(-1, 1))
    assert Clamp(lambda x: (x + 1) / 2)(x.bfloat16()).dtype == torch.bfloat16


def test_every_dimension_is_clamped_to_its_own_range():
    """By the last step a network that predicts x_0 far outside has the ends of the data's range."""
    scale, shift = torch.tensor([[0.5], [-0.25]]), torch.tensor([[0.25], [1.0]])

    def inverse(x):
        return x * scale + shift

    def model(x, labels):  # x_0 is far above
        return torch.full_like(x, -1000)

    sample = get_chain_sampler(VPSDE(N=100), (3, 2, 4), inverse, variance="ddim")
    found = sample(model, torch.zeros(3, 2, 4))[0]
    expected = torch.tensor([1.0, 0.0])[:, None].expand(3, 2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    step = get_chain_step_fn(VPSDE(N=100), model, inverse, variance="ddim")
    x, _ = step(torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(inverse(x), expected, rtol=0, atol=1e-6)


def exact(sde, shape, mu=MU, s0=S0, **options):
    """Samples from fixed noise, in float64, of the network that has learned N(mu, s0^2)."""
    generator = torch.Generator().manual_seed(0)

    def noise(like):
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    z = sde.prior_from_normal(noise(torch.empty(shape, dtype=torch.float64)))
    options = {"clip": False, **options}
    sample = get_chain_sampler(sde, shape, lambda x: x, **options)
    return sample(GaussianOracle(sde, continuous=False, mu=mu, s0=s0), z, noise=noise)[0]


@pytest.mark.parametrize("name", CHAINS)
def test_ddim_with_all_its_noise_is_ancestral_sampling(name):
    sde, shape = CHAINS[name], (3, 2, 2)
    found = exact(sde, shape, variance="ddim", eta=1.0, respacing="50")
    torch.testing.assert_close(found, exact(sde, shape, respacing="50"), rtol=0, atol=1e-6)


class Toward(sampling.Constraint):
    """Adds the score of a measurement that turns N(MU, S0^2) into N(0.1, 0.2^2)."""

    def guide(self, sde, score_fn):
        def guided(x, t):
            m, s = sde.scale_and_std(t, 1)
            wanted, known = (
                (m * mean - x.T) / ((m * std) ** 2 + s**2) for mean, std in ((0.1, 0.2), (MU, S0))
            )
            return score_fn(x, t) + (wanted - known).T

        return guided


@pytest.mark.parametrize("variance", ("small", "ddim"))
def test_exact_guidance_gives_the_posterior(variance):
    """Sample by sample those of a network that has learned the posterior itself."""
    options = {"variance": variance, "respacing": "40"}
    found = exact(CHAINS["vp"], (5, 3), constraints=[Toward()], **options)
    expected = exact(CHAINS["vp"], (5, 3), mu=0.1, s0=0.2, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (found - exact(CHAINS["vp"], (5, 3), **options)).abs().max() > 0.1
    moved = exact(CHAINS["vp"], (5, 3), constraints=[Toward()], shift_mean=True, **options)
    assert ((moved - found).abs().max() > 1e-3) == (variance == "small")


def test_known_part_and_start_of_constraints():
    sde, shape, value = CHAINS["vp"], (4, 1, 2, 2), torch.full((4, 1, 2, 2), 0.7)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    keep = DataConsistency(Mask(shape[1:], mask), Mask(shape[1:], mask).apply(value))
    x = exact(sde, shape, constraints=[keep], respacing="30").float()
    m = sde.sqrt_alphas_cumprod[0]
    torch.testing.assert_close(x * mask, m * value * mask, rtol=0, atol=1e-6)
    assert (x - value)[:, 0, 0, 1].abs().min() > 1e-3
    with pytest.raises(ValueError, match=r"0\.816 of the data .* as by '5'"):  # at level 19 of 100
        exact(sde, shape, constraints=[keep], respacing="trailing5")
    # From the last of five levels at or below the time, number 25 of 0, 25, 50, 74, 99.
    labels = []
    sample = get_chain_sampler(
        sde, shape, lambda x: x, respacing="5", start_time=0.3, constraints=[StartFrom(value)],
        variance="ddim", clip=False,
    )  # fmt: skip

    def point(x, label):  # has learned data at 0.7
        labels.append(int(label[0]))
        m, s = (c.reshape(-1, 1, 1, 1) for c in sde.discrete_coeffs(label))
        return (x - m * 0.7) / s

    torch.testing.assert_close(sample(point)[0], value)
    assert labels == [25, 0]


def test_gradients_are_those_of_the_linear_map():
    """Also through learned variances."""
    sde, z = CHAINS["vp"], torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
    oracle = GaussianOracle(sde, continuous=False)

    def model(x, labels):
        return torch.cat([oracle(x, labels), torch.sin(x)], dim=1)

    def sample(z, **options):
        sampler = get_chain_sampler(
            sde, (1, 1), lambda x: x, variance="learned", respacing="10", clip=False, **options
        )
        return sampler(model, z, noise=torch.ones_like)[0]

    (gradient,) = torch.autograd.grad(sample(z, differentiable=True).sum(), z)
    with torch.no_grad():
        difference = (sample(z + 1e-5) - sample(z - 1e-5)) / 2e-5
    assert float(gradient) == pytest.approx(float(difference), rel=1e-4)


# --- Configs --------------------------------------------------------------------------------------

LEARNED = {
    "training__continuous": False,
    "model__learn_sigma": True,
    "model__nf": 32,
    "model__ch_mult": (1,),
    "model__attn_resolutions": (),
    "model__num_scales": 25,
    "sampling__method": "chain",
    "sampling__variance": "learned",
}


def filled_run(**changes):
    """A run whose network's output and variances are not 0."""
    run = run_lib.setup(small_config("vp/digits_adm", **LEARNED, **changes))
    run.state["ema"].shadow_params = [
        0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        for p in run.state["ema"].shadow_params
    ]
    return run


def test_learned_variances_arrive_by_config():
    """They change samples; sample k is a function of the seed and k; the mean is unguided's."""
    run = filled_run(sampling__respacing="leading5")
    images = run.draw(range(3), 5)
    assert torch.equal(run.draw(range(1, 3), 5), images[1:])
    with run.sampling_network() as network, torch.no_grad():
        x, labels = torch.randn(3, *run.shape), torch.tensor([0, 7, 24])
        expected = network(x, labels, variances=True)
        assert torch.equal(run.conditioned(network, {})(x, labels), expected)
        by_hand = get_chain_sampler(
            run.sde, images.shape, run.inverse_scaler, respacing="leading5", variance="learned"
        )(run.conditioned(network, {}), noise=sampling.SampleNoise(5, range(3)))[0]
    assert torch.equal(images, by_hand) and expected[:, 1].std() > 1e-3
    run.config.sampling.variance = "small"
    assert not torch.allclose(run.draw(range(3), 5), images, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    (
        {"shift_mean": True},
        {"clip": False, "respacing": "trailing7", "variance": "large"},
        {"variance": "ddim", "eta": 0.5, "clip_noise": False},
    ),
)
def test_every_option_arrives_and_changes_guided_samples(changes):
    named = {f"sampling__{key}": value for key, value in changes.items()}
    config = small_config(sampling__method="chain", training__continuous=False, **named)
    sde, shape = CHAINS["vp"], (5, 3)
    oracle = GaussianOracle(sde, continuous=False)

    def draw(build, *given, **options):
        noise = sampling.SampleNoise(3, range(5))
        return build(*given, constraints=[Toward()], **options)(oracle, noise=noise)[0]

    given = sde, shape, lambda x: (x + 0.2) / 0.4  # a range that clamps much
    found = draw(sampling.get_sampling_fn, config, *given, sde.sampling_eps)
    assert torch.equal(found, draw(get_chain_sampler, *given, **changes))
    for key, value in changes.items():  # back to the default of one of them
        rest = {name: changes[name] for name in changes if name != key}
        if (key, value) != ("variance", "ddim"):
            assert not torch.equal(found, draw(get_chain_sampler, *given, **rest)), key


def test_guidance_leaves_learned_variances_as_they_are():
    """The first half is null + w (class - null), the second that of the class."""

    def network(x, labels, *, classes):
        c = classes.to(x)[:, None].expand_as(x)
        return torch.cat([c, 10 * c], dim=1)

    model = Guided(network, {"classes": torch.tensor([2, 4])}, {"classes": 10}, 3.0)
    output = model(torch.zeros(2, 1), torch.zeros(2))
    assert output.tolist() == [[10 + 3 * (2 - 10), 20], [10 + 3 * (4 - 10), 40]]


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"training__continuous": True}, "'chain' needs training.continuous = False"),
        ({"sampling__num_steps": 5}, r"num_steps = 5 should be 0 .* sampling.respacing"),
        ({"sampling__time_grid": "edm"}, "time_grid = 'edm' should be ''"),
        ({"sampling__respacing": "every 5"}, "sampling.respacing = 'every 5' should be ''"),
        ({"sampling__respacing": "26"}, "26 levels of 25"),
        ({"sampling__respacing": "1"}, "two or more steps"),
        ({"sampling__eta": 1.5}, "sampling.eta = 1.5 should be"),
        (
            {"sampling__eta": 0.5},
            r"eta = 0.5 should be 0.0 .* but with sampling\.variance = 'ddim'",
        ),
        ({"sampling__variance": "medium"}, "'small', 'large', 'learned' or 'ddim'"),
        ({"model__learn_sigma": False}, "'learned' needs a network with model.learn_sigma"),
    ),
)
def test_mistakes_in_configs_are_refused(changes, message):
    config = small_config("vp/digits_adm", **LEARNED | changes)
    with pytest.raises(ValueError, match=message):
        run_lib.setup(config)


def test_mistakes_are_refused():
    make = functools.partial(get_chain_sampler, shape=(1, 2), inverse_scaler=inverse_scaler)
    with pytest.raises(NotImplementedError, match="subVPSDE has no discrete noise levels"):
        make(subVPSDE())
    for sde, options, message in (
        (VPSDE(), {"continuous": True}, "needs a network of discrete noise levels"),
        (VESDE(), {"respacing": "leading30"}, "leaves out the last level .* such as '30'"),
        (VPSDE(), {"start_time": -0.1}, "none of the visited levels"),
        (VPSDE(), {"variance": "huge"}, "unknown variance"),
        (VPSDE(), {"eta": 2}, "eta goes from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(sde, **options)
    with pytest.raises(ValueError, match="twice the channels"):
        make(VPSDE(), variance="learned")(lambda x, labels: x)
