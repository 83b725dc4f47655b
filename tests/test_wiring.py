"""Each option, seed, scale and average arrives where it should.

A network that records its calls stands in for a real one; a draw from a config is compared with the
same draw by explicit arguments, and must differ from the draw without the option.
"""

import functools
import json

import numpy as np
import pytest
import torch
from mutations import MUTATIONS, ROOT
from recorder import Recorder
from small_runs import logged, small_config

import losses
import run_lib
import sampling
from losses import LikelihoodLevels, LogNormalLevels
from sampling import SampleNoise
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.parametrization import EDM
from sde_lib import VESDE, VPSDE, create_sde, subVPSDE


def recording(experiment="vp/digits", **changes):
    """A small config whose network is the recorder, with an empty record."""
    Recorder.calls.clear()
    return small_config(experiment, model__name="recorder", **changes)


def train(folder, experiment="vp/digits", **changes):
    """The training calls of a short run, and its last checkpoint."""
    config = recording(experiment, training__snapshot_sampling=False, **changes)
    run_lib.train(config, folder)
    return [call for call in Recorder.calls if call.training], read_checkpoint(
        folder / "checkpoints-meta" / "checkpoint.pth"
    )


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "low", "almost_no_noise"),
    (
        ("vp/digits", -1, {"model__beta_min": 1e-9, "model__beta_max": 1e-9}),
        ("ve/digits", 0, {"model__sigma_min": 1e-6, "model__sigma_max": 2e-6}),
    ),
)
def test_training_and_evaluation_see_images_in_the_range_of_the_network(
    experiment, low, almost_no_noise, tmp_path
):
    """[-1, 1] for centred data, otherwise [0, 1]; both ends occur in every batch of digits."""
    changes = {"sampling__corrector": "none", "sampling__predictor": "euler_maruyama"}
    train(tmp_path, experiment, training__eval_freq=1, **almost_no_noise, **changes)
    calls = [call for call in Recorder.calls if call.x.shape[0] > 1]
    assert {call.training for call in calls} == {True, False}
    for call in calls:
        assert low - 0.01 <= call.x.min() < low + 0.05
        assert 0.9 < call.x.max() <= 1.01


def test_every_training_step_draws_new_times_noise_and_examples(tmp_path):
    calls, _ = train(tmp_path)
    labels = torch.stack([call.labels for call in calls])
    assert labels.shape == (12, 16)
    assert len(labels.unique()) == labels.numel()
    assert len({float(call.x.sum()) for call in calls}) == 12


def test_seed_decides_what_training_sees(tmp_path):
    first, _ = train(tmp_path / "a", seed=1)
    same, _ = train(tmp_path / "b", seed=1)
    other, _ = train(tmp_path / "c", seed=2)
    assert torch.equal(first[3].x, same[3].x) and torch.equal(first[3].labels, same[3].labels)
    assert not torch.equal(first[3].labels, other[3].labels)


def test_times_cover_the_process(tmp_path):
    """Labels are 999 t with t uniform on [1e-5, 1]; noise has unit variance at t = 1."""
    calls, _ = train(tmp_path, training__batch_size=256)
    t = torch.cat([call.labels for call in calls]) / 999
    assert t.min() < 0.01 and t.max() > 0.99 and abs(t.mean() - 0.5) < 0.03
    late = torch.cat([call.x for call in calls])[t > 0.9]
    assert late.std() == pytest.approx(1, abs=0.05)


def test_training_has_gradients_and_evaluation_has_none(tmp_path):
    train(tmp_path, training__eval_freq=1)
    full = [call for call in Recorder.calls if call.x.shape[0] == 16]
    assert {(call.training, call.with_grad) for call in full} == {(True, True), (False, False)}


def test_evaluation_during_training_uses_the_average(tmp_path):
    _, checkpoint = train(tmp_path, training__eval_freq=1, optim__lr=0.1, optim__warmup=0)
    evaluations = [c for c in Recorder.calls if not c.training and c.x.shape[0] == 16]
    assert evaluations[-1].weight == float(checkpoint["ema"]["shadow_params"][0])
    assert evaluations[-1].weight != float(checkpoint["model"]["module.weight"])


def test_ema_rate_and_the_state_arrive_in_the_checkpoint(tmp_path):
    _, checkpoint = train(tmp_path, model__ema_rate=0.5)
    assert checkpoint["ema"]["decay"] == 0.5 and checkpoint["ema"]["num_updates"] == 12
    assert checkpoint["step"] == 12 and checkpoint["position"] == 12 * 16
    assert json.loads(checkpoint["config"])["model"]["ema_rate"] == 0.5


def optimizer_of(**changes):
    run = run_lib.setup(recording(**changes))
    run.add_optimizer()
    return run.state["optimizer"].param_groups[0]


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    (
        ({"optim__lr": 0.3}, "lr", 0.3),
        ({"optim__beta1": 0.5}, "betas", (0.5, 0.999)),
        ({"optim__eps": 1e-3}, "eps", 1e-3),
        ({"optim__weight_decay": 0.2}, "weight_decay", 0.2),
        ({"optim__amsgrad": True}, "amsgrad", True),
    ),
)
def test_options_of_the_optimizer_arrive(changes, key, value):
    assert optimizer_of(**changes)[key] == value != optimizer_of()[key]


@pytest.mark.parametrize(
    ("warmup", "cooldown", "expected"), ((0, 0, 0.5), (10, 0, 0.2), (0, 4, 0.125))
)
def test_warmup_and_cooldown_arrive(warmup, cooldown, expected, tmp_path):
    """The rate of the update after four others, the last."""
    rates = {"optim__lr": 0.5, "optim__warmup": warmup, "optim__cooldown": cooldown}
    train(tmp_path, **rates, training__n_iters=5)
    records = logged(tmp_path)
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert rates[-1] == pytest.approx(expected)


def test_grad_clip_arrives(tmp_path):
    """A clipped gradient enters Adam's first moment smaller; a negative norm clips nothing."""
    moments = {}
    for clip in (-1.0, 1e-3):
        _, checkpoint = train(tmp_path / str(clip), optim__grad_clip=clip, training__n_iters=1)
        moments[clip] = checkpoint["optimizer"]["state"][0]["exp_avg"].abs()
    assert moments[1e-3] < 0.1 * moments[-1.0]


@pytest.mark.parametrize(
    ("experiment", "changes", "loss"),
    (
        ("vp/digits", {"training__reduce_mean": False}, {"reduce_mean": False}),
        ("vp/digits", {"training__likelihood_weighting": True}, {"likelihood_weighting": True}),
        ("subvp/digits", {"training__likelihood_weighting": True}, {"likelihood_weighting": True}),
        ("ve/digits", {"training__reduce_mean": True}, {"reduce_mean": True}),
    ),
)
def test_options_of_the_loss_arrive(experiment, changes, loss):
    usual = {
        "reduce_mean": not experiment.startswith("ve"),
        "continuous": True,
        "likelihood_weighting": False,
    }
    check_loss(recording(experiment, **changes), usual, loss)


def check_loss(config, usual, loss, count=8):
    """The configured loss is the published factory's with these keywords, which change it."""

    def value(loss_fn):
        torch.manual_seed(0)
        return loss_fn(run.state["model"], torch.rand(count, 1, 8, 8))

    run = run_lib.setup(config)
    expected = losses.get_sde_loss_fn(run.sde, False, **(usual | loss))
    without = losses.get_sde_loss_fn(run.sde, False, **usual)
    torch.testing.assert_close(value(run.loss_fn(False)), value(expected), rtol=0, atol=0)
    assert value(run.loss_fn(False)) != value(without)


@pytest.mark.parametrize(
    ("changes", "loss"),
    (
        ({"model__parametrization": "v"}, {"parametrization": "v"}),
        ({"model__sigma_data": 0.3}, {"parametrization": EDM(0.3)}),
        ({"training__noise_levels": "lognormal"}, {"noise_levels": "lognormal"}),
        (
            {"training__noise_levels": "lognormal", "training__lognormal_mean": -0.4},
            {"noise_levels": functools.partial(LogNormalLevels, mean=-0.4)},
        ),
        (
            {"training__noise_levels": "lognormal", "training__lognormal_std": 0.7},
            {"noise_levels": functools.partial(LogNormalLevels, std=0.7)},
        ),
        (
            {"training__noise_levels": "likelihood", "model__sigma_data": 0.3},
            {
                "noise_levels": functools.partial(LikelihoodLevels, sigma_data=0.3),
                "parametrization": EDM(0.3),
            },
        ),
        ({"training__weighting": "min_snr"}, {"weighting": "min_snr"}),
        ({"training__weighting": "output"}, {"weighting": "output"}),
    ),
)
def test_parametrization_levels_and_weighting_arrive(changes, loss):
    """Each of them changes the loss of EDM's network as the factory's keyword does."""
    usual = {"likelihood_weighting": False, "parametrization": "edm"}
    check_loss(recording(**edm(**changes)), usual, loss, count=64)


def edm(**changes):
    return {"model__parametrization": "edm", **changes}


def test_training_and_evaluation_with_edm_see_scaled_inputs_and_labels(tmp_path):
    """Labels are log(sigma) / 4 with log(sigma) ~ N(-1.2, 1.2^2); inputs have unit variance."""
    changes = edm(training__noise_levels="lognormal", training__weighting="output")
    train(tmp_path, training__eval_freq=1, **changes)
    calls = [call for call in Recorder.calls if len(call.x) > 1]
    assert {call.training for call in calls} == {True, False}
    for log_sigma, x in zip(
        (4 * torch.cat([call.labels for call in part]) for part in _by_mode(calls)),
        (torch.cat([call.x for call in part]) for part in _by_mode(calls)),
        strict=True,
    ):
        assert -1.6 < log_sigma.mean() < -0.8 and 0.9 < log_sigma.std() < 1.5
        noisy = x[log_sigma > 1].square().mean()  # nearly all noise
        assert 0.7 < noisy < 1.4
    # Of centred digits the mean square is about 0.7, of which EDM knows sigma_data^2 = 0.25.
    clean = x[log_sigma < -3].square().mean()
    assert 2 < clean < 4


def _by_mode(calls):
    return [[call for call in calls if call.training == mode] for mode in (True, False)]


def test_discrete_training_tells_the_network_whole_levels(tmp_path):
    changes = {"training__continuous": False, "model__num_scales": 40}
    calls, _ = train(tmp_path, sampling__predictor="ancestral_sampling", **changes)
    labels = torch.cat([call.labels for call in calls])
    assert labels.dtype == torch.int64 and labels.min() >= 0 and 30 < labels.max() < 40


def test_accumulation_splits_the_batch(tmp_path):
    whole, _ = train(tmp_path / "a", training__n_iters=1)
    parts, _ = train(tmp_path / "b", training__n_iters=1, training__grad_accumulation=4)
    assert [len(call.x) for call in parts] == [4] * 4
    torch.testing.assert_close(torch.cat([call.x for call in parts]), whole[0].x)


@pytest.mark.parametrize(
    ("experiment", "changes", "expected"),
    (
        ("vp/digits", {"model__beta_min": 0.2, "model__beta_max": 3.0}, VPSDE(0.2, 3.0, 7)),
        ("subvp/digits", {"model__beta_min": 0.2, "model__beta_max": 3.0}, subVPSDE(0.2, 3.0, 7)),
        ("ve/digits", {"model__sigma_min": 0.1, "model__sigma_max": 2.0}, VESDE(0.1, 2.0, 7)),
    ),
)
def test_options_of_the_process_arrive(experiment, changes, expected):
    sde = create_sde(recording(experiment, model__num_scales=7, **changes))
    assert type(sde) is type(expected) and repr(sde) == repr(expected)


# --- Sampling -------------------------------------------------------------------------------------


def draw_by_config(experiment="vp/digits", **changes):
    run = run_lib.setup(recording(experiment, model__num_scales=25, **changes))
    with torch.no_grad():
        run.state["ema"].shadow_params[0].fill_(0.3)
    Recorder.calls.clear()
    return run, run.draw(range(3), 5)


def draw_by_hand(run, factory, *arguments, **options):
    """The samples of a factory's sampler from the same noise, with the averaged weights."""
    shape, noise = (3, 1, 8, 8), SampleNoise(5, range(3))
    keywords = {"continuous": True, "eps": run.sde.sampling_eps, "denoise": True, **options}
    sampler = factory(run.sde, shape, *arguments, **keywords)
    with run.state["ema"].applied(run.state["model"].parameters()):
        return sampler(run.state["model"], noise=noise)[0]


def pc(predictor, corrector=None, **options):
    """A predictor-corrector draw by hand."""

    def draw(run):
        arguments = {"snr": 0.16, "inverse_scaler": run.inverse_scaler, **options}
        return draw_by_hand(
            run, sampling.get_pc_sampler, predictor=predictor, corrector=corrector, **arguments
        )

    return draw


def few(factory, *arguments, **options):
    """A draw by hand of another sampler."""
    return lambda run: draw_by_hand(run, factory, *arguments, run.inverse_scaler, **options)


def chain(**changes):
    """A draw along the levels of a discrete network."""
    return {"sampling__method": "chain", "training__continuous": False, **changes}


EM, RD = sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor
LANGEVIN = {"sampling__corrector": "langevin"}
SAMPLING = {
    "predictor": ({"sampling__predictor": "reverse_diffusion"}, pc(RD)),
    "ancestral": (
        {"sampling__predictor": "ancestral_sampling"},
        pc(sampling.AncestralSamplingPredictor),
    ),
    "corrector": (LANGEVIN, pc(EM, sampling.LangevinCorrector)),
    "ald": ({"sampling__corrector": "ald"}, pc(EM, sampling.AnnealedLangevinDynamics)),
    "snr": (
        {**LANGEVIN, "sampling__snr": 0.3},
        pc(EM, sampling.LangevinCorrector, snr=0.3),
    ),
    "n_steps_each": (
        {**LANGEVIN, "sampling__n_steps_each": 3},
        pc(EM, sampling.LangevinCorrector, n_steps=3),
    ),
    "probability_flow": ({"sampling__probability_flow": True}, pc(EM, probability_flow=True)),
    "noise_removal": ({"sampling__noise_removal": False}, pc(EM, denoise=False)),
    "num_steps": ({"sampling__num_steps": 24}, pc(EM, steps=24)),
    "time_grid": ({"sampling__time_grid": "edm"}, pc(EM, grid="edm")),
    "parametrization": ({"model__parametrization": "v"}, pc(EM, parametrization="v")),
    "sigma_data": (edm(model__sigma_data=0.3), pc(EM, parametrization=EDM(0.3))),
    "ode with v": (
        {"sampling__method": "ode", "model__parametrization": "v"},
        few(sampling.get_ode_sampler, parametrization="v"),
    ),
    "heun with edm": (
        edm(sampling__method="heun"),
        few(sampling.get_solver_sampler, sampling.Heun, parametrization="edm"),
    ),
    "ode": ({"sampling__method": "ode"}, few(sampling.get_ode_sampler)),
    "ddim": (
        {"sampling__method": "ddim", "sampling__num_steps": 6},
        few(sampling.get_solver_sampler, sampling.DDIM, steps=6),
    ),
    "solver's grid": (
        {"sampling__method": "dpmpp_2m", "sampling__time_grid": "uniform"},
        few(sampling.get_solver_sampler, sampling.DPMSolver2M, steps=25, grid="uniform"),
    ),
    "churn": (
        {"sampling__method": "heun", "sampling__num_steps": 6, "sampling__churn": 2.0},
        few(sampling.get_solver_sampler, sampling.Heun, steps=6, churn=2.0),
    ),
    "ancestral chain": (
        chain(sampling__variance="large", sampling__respacing="6,7", sampling__noise_removal=False),
        few(
            sampling.get_chain_sampler,
            continuous=False,
            variance="large",
            respacing="6,7",
            denoise=False,
        ),
    ),
    "unclamped chain": (
        chain(sampling__clip=False, model__parametrization="v"),
        few(sampling.get_chain_sampler, continuous=False, clip=False, parametrization="v"),
    ),
    "ddim chain": (
        chain(sampling__variance="ddim", sampling__eta=0.7, sampling__clip_noise=False),
        few(
            sampling.get_chain_sampler,
            continuous=False,
            variance="ddim",
            eta=0.7,
            clip_noise=False,
        ),
    ),
    "tolerances": (
        {
            "sampling__method": "adaptive",
            "sampling__adaptive_rtol": 0.2,
            "sampling__adaptive_atol": 0.1,
        },
        few(sampling.get_adaptive_sampler, rtol=0.2, atol=0.1),
    ),
}


@functools.cache
def usual_draw():
    return draw_by_config()[1]


def test_a_draw_is_the_published_sampler():
    run, images = draw_by_config()
    torch.testing.assert_close(images, pc(EM)(run), rtol=0, atol=0)


@pytest.mark.parametrize("case", SAMPLING)
def test_options_of_sampling_arrive(case):
    changes, by_hand = SAMPLING[case]
    run, images = draw_by_config(**changes)
    torch.testing.assert_close(images, by_hand(run), rtol=0, atol=0)
    assert not torch.equal(images, usual_draw())


def test_draws_use_the_average_and_evaluation_mode():
    run, _ = draw_by_config()
    assert all(call.weight == pytest.approx(0.3) for call in Recorder.calls)
    assert not any(call.training or call.with_grad for call in Recorder.calls)
    assert float(run.state["model"].weight.detach()) == 0


def test_draws_are_in_the_precision_of_sampling():
    for precision, expected in (("float32", False), ("bfloat16", True)):
        draw_by_config(sampling__precision=precision)
        assert {call.autocast for call in Recorder.calls} == {expected}


def test_seed_and_number_decide_a_sample():
    run, images = draw_by_config()
    assert torch.equal(run.draw(range(1, 3), 5), images[1:])
    assert not torch.equal(run.draw(range(3), 6), images)
    assert torch.equal(run.draw(range(3)), run.draw(range(3), run.config.seed))


@pytest.mark.parametrize("mode", ("snapshot", "sample", "eval"))
def test_every_mode_draws_the_same_samples(mode, tmp_path):
    """Snapshots, `--mode sample` and evaluation give the bytes of `Run.draw`."""

    changes = {"sampling__num_samples": 4, "eval__num_samples": 4, "eval__begin_ckpt": 2}
    changes |= {"eval__end_ckpt": 2, "eval__enable_loss": False, "eval__enable_bpd": False}
    config = recording(model__ema_rate=0.9, optim__lr=0.05, optim__warmup=0, **changes)
    run_lib.train(config, tmp_path)
    run = run_lib.restored(config, tmp_path)
    expected = (run.draw(range(4)) * 17).floor().clamp(0, 16).mul(255 / 16).round().byte()
    if mode == "snapshot":
        found = np.load(tmp_path / "samples" / "iter_12" / "sample.np")
    elif mode == "sample":
        found = np.load(run_lib.sample(config, tmp_path) / "sample.np")
    else:
        run_lib.evaluate(config, tmp_path)
        with np.load(tmp_path / "eval" / "ckpt_2" / "samples_0.npz") as arrays:
            found = arrays["samples"]
    assert np.array_equal(found, expected.movedim(1, -1).numpy())


def test_latest_checkpoint_or_the_named_one_is_sampled(tmp_path):
    config = recording(training__snapshot_sampling=False)
    run_lib.train(config, tmp_path)
    assert run_lib.restored(config, tmp_path).state["step"] == 12
    config.eval.checkpoint = str(tmp_path / "checkpoints" / "checkpoint_1.pth")
    assert run_lib.restored(config, tmp_path).state["step"] == 6


def test_every_mutation_still_has_its_place():
    """Those of `mutations.py`, which are tried by hand."""
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation.name
