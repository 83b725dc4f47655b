"""`--mode check` and its functions: right things pass, and each wrong one is found."""

import json
import math
import re
import types

import foreign_sde
import numpy as np
import pytest
import torch
from dataset_helpers import random_images, save_image
from oracles import exact_pc
from small_runs import command, run_forked, small_config
from torch import Tensor

import checks
import evaluation
import run_lib
import sampling
from score_lib.checks import sampling as checks_of_samplers
from score_lib.checks.process import few_entries
from score_lib.options import complete
from score_lib.runs import trial
from score_lib.runs.check import (
    Data,
    _names,
    _process,
    _samplers,
    _start,
    cost_of,
    data_of,
)
from score_lib.samplers.steps import Corrector
from sde_lib import SDE, VESDE, VPSDE, batch_mul, subVPSDE


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Three repetitions of what is timed will do."""
    monkeypatch.setattr(trial, "PATIENCE", 0.0)


def states(findings):
    return {finding.subject: finding.state for finding in findings}


def pc(predictor, corrector=None, **options):
    return lambda sde, shape: exact_pc(sde, shape, predictor, corrector, **options)


# --- Right ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", (True, False))
@pytest.mark.parametrize("kind", (VESDE, VPSDE, subVPSDE))
def test_published_processes_are_ok(kind, continuous):
    if kind is subVPSDE and not continuous:
        pytest.skip("it has no discrete networks")
    findings = checks.process(kind(), continuous) + checks.log_likelihood(kind())
    assert checks.worst(findings) == "ok", findings


@pytest.mark.parametrize("shape", ((3,), (10_000,), (2, 5_000), (1, 64, 64, 64)), ids=str)
def test_large_data_of_any_rank_are_checked_by_few_entries(shape):
    """An exact trace of all entries would take hours, and more memory than there is."""
    run = types.SimpleNamespace(sde=VPSDE(), shape=shape, reading={}, objective="score")
    findings = _process(run)
    assert checks.worst(findings) == "ok", findings
    few = few_entries(shape)
    assert len(few) == len(shape) and (few == shape) == (math.prod(shape) <= 64)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", (VESDE, VPSDE, subVPSDE))
def test_published_samplers_are_ok(kind):
    predictor = sampling.ReverseDiffusionPredictor
    findings = checks.sampler(pc(predictor, sampling.LangevinCorrector), kind())
    for corrector in (sampling.LangevinCorrector, sampling.AnnealedLangevinDynamics):
        findings += checks.corrector(corrector, kind(), 0.16)
    assert checks.worst(findings) == "ok", findings


@pytest.mark.parametrize(("solver", "order"), (("DDIM", 1), ("Heun", 2), ("DPMSolver2M", 2)))
def test_orders_of_convergence_are_measured(solver, order):
    sde = VPSDE()

    def build(steps):
        kind, exact = getattr(sampling, solver), checks.told_by_time(sde)
        return sampling.get_solver_sampler(
            exact, (64, 1, 2, 2), kind, lambda x: x, steps, denoise=False
        )

    (finding,) = checks.order(build, sde, 20)
    assert finding.state == "ok" and float(finding.text.split()[1].rstrip(";")) == pytest.approx(
        order, abs=0.4
    )


@pytest.mark.parametrize(
    ("kind", "predictor"),
    (
        (VESDE, "reverse_diffusion"),
        (VPSDE, "euler_maruyama"),
        (VPSDE, "ancestral_sampling"),
        (subVPSDE, "euler_maruyama"),
        (subVPSDE, "reverse_diffusion"),
    ),
)
def test_steps_of_predictors_are_of_first_order(kind, predictor):
    (finding,) = checks.order_of_steps(sampling.get_predictor(predictor), kind(), 400)
    order = float(finding.text.split()[1].rstrip(";"))
    assert finding.state == "ok" and order == pytest.approx(1, abs=0.3), finding


def test_a_prior_that_is_not_quite_the_end_of_the_process_is_noted():
    """NCSN's largest noise level is 1: p_T of data of deviation 0.5 is wider than the prior."""
    found = states(checks.process(VESDE(0.01, 1.0, N=10)) + checks.log_likelihood(VESDE(0.01, 1.0)))
    assert found["prior"] == "note" and found["likelihood"] == "ok"


# --- Wrong ones -----------------------------------------------------------------------------------


class WrongSign(VPSDE):
    """The drift drives data away from 0, and the marginals do not."""

    def drift_rate(self, t):
        return -super().drift_rate(t)


class WrongDiffusion(VPSDE):
    """g is a tenth too large for s."""

    def diffusion(self, t):
        return 1.1 * super().diffusion(t)


class WrongPrior(VESDE):
    """Starts at half of sigma_max."""

    def prior_from_normal(self, z):
        return z * self.sigma_max / 2


class WrongDensity(VPSDE):
    """Half of the density's constant is missing."""

    def prior_logp(self, z: Tensor) -> Tensor:
        return super().prior_logp(z) + 0.25 * z[0].numel() * math.log(2 * math.pi)


class WrongChain(VPSDE):
    """Steps of the chain are made ten times."""

    def discretize(self, x, t):
        f, G = super().discretize(x, t)
        return 10 * f, math.sqrt(10) * G


class WrongLabel(VPSDE):
    """Networks are told one time for all."""

    def noise_label(self, t, continuous):
        return torch.ones_like(t)


class NoNoise(VPSDE):
    """Stops where there is no noise."""

    sampling_eps = 0.0


class TwoSchedules(VPSDE):
    """Its two forms of the marginals differ."""

    def marginal_coeffs(self, t):
        return super().marginal_coeffs(t)

    def marginal_prob(self, x, t):
        return super().marginal_prob(x, t / 2)


class WrongStep(VPSDE):
    """Steps between two times have twice their noise."""

    def transition(self, t, s):
        ratio, G = super().transition(t, s)
        return ratio, 2 * G


@pytest.mark.parametrize(
    ("kind", "subject"),
    (
        (TwoSchedules, "functions of time"),
        (WrongStep, "functions of time"),
        (WrongSign, "mean of x_t"),
        (WrongSign, "variance of x_t"),
        (WrongDiffusion, "variance of x_t"),
        (WrongPrior, "prior"),
        (WrongDensity, "density of the prior"),
        (WrongChain, "chain"),
        (WrongLabel, "convention"),
        (NoNoise, "times"),
    ),
)
def test_a_wrong_process_is_found(kind, subject):
    found = states(checks.process(kind()))
    assert found[subject] == "wrong", found


def test_a_wrong_likelihood_is_found():
    assert checks.worst(checks.log_likelihood(WrongDiffusion())) == "wrong"
    assert checks.worst(checks.log_likelihood(VPSDE(), rtol=0.1, atol=0.1)) != "ok"


class OwnNorms(Corrector):
    """Langevin steps whose size depends on the sample itself."""

    def update_fn(self, x, t):
        for _ in range(self.n_steps):
            score, z = self.score_fn(x, t), torch.randn_like(x)
            norms = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (z, score)]
            step = 2 * (self.snr * norms[0] / norms[1]) ** 2
            x = x + batch_mul(step, score) + batch_mul(torch.sqrt(2 * step), z)
        return x, x


def test_a_biased_corrector_is_found():
    assert checks.worst(checks.corrector(OwnNorms, VPSDE(), 0.16)) == "wrong"


class Hasty(sampling.ReverseDiffusionPredictor):
    """Steps of half the length."""

    def step(self, x, t, s):
        return super().step(x, t, (t + s) / 2)


@pytest.mark.parametrize(
    ("sde", "build"),
    (
        (VPSDE(), pc(Hasty, steps=200)),
        (subVPSDE(), pc(sampling.EulerMaruyamaPredictor, steps=25)),
        (VPSDE(N=12), pc(sampling.EulerMaruyamaPredictor)),
    ),
)
def test_a_wrong_sampler_is_found(sde, build):
    findings = checks.sampler(build, sde)
    assert checks.worst(findings) == "wrong", findings


# --- The mode -------------------------------------------------------------------------------------


def test_a_config_is_checked_and_the_findings_are_in_a_file(tmp_path):
    config = small_config(model__num_scales=1000, sampling__num_steps=100)
    found = run_lib.check(config, tmp_path)
    rows = json.loads((tmp_path / "check.json").read_text())
    assert [row["subject"] for row in rows] == [finding.subject for finding in found]
    assert "wrong" not in states(found).values(), found
    texts = {finding.subject: finding.text for finding in found}
    assert "vp/digits, but" in texts["config"] and "model.nf = 8 (not 16)" in texts["config"]
    assert "4 at 4x4" in texts["network"] or "attention" in texts["network"]
    assert "measured" in texts["training"] and "1501 images" in texts["data"]
    assert texts["start"] == "training starts from scratch"


@pytest.mark.parametrize(
    ("option", "kind"),
    (
        ("sampling.predictor", "predictor"),
        ("sampling.corrector", "corrector"),
        ("control.task", "control task"),
        ("control.operator", "operator"),
        ("control.method", "restoration method"),
        ("eval.extractor", "feature extractor"),
    ),
)
def test_names_that_only_other_modes_look_up_are_found(option, kind):
    changes = {"sampling__method": "dpmpp_2m", option.replace(".", "__"): "digit"}
    (found,) = _names(complete(small_config(**changes)))
    assert found.state == "wrong" and f"{option}: unknown {kind} 'digit': known" in found.text
    assert not _names(complete(small_config(eval__extractor="mine:network")))


def test_a_config_with_a_parametrization_is_checked():
    found = _process(run_lib.setup(small_config("edm/digits", model__num_scales=1000)))
    assert "wrong" not in states(found).values(), found
    texts = {finding.subject: finding.text for finding in found}
    assert "the output of EDM(sigma_data=0.75)" in texts["convention"]


def test_a_classifier_is_not_said_to_predict_the_noise():
    found = states(_process(run_lib.setup(small_config("vp/digits_classifier"))))
    assert "convention" not in found and found["times"] == "ok"


def test_a_wrong_config_ends_with_code_1(tmp_path):
    options = {
        "sampling__predictor": "euler_maruyama",
        "sampling__num_steps": 25,
        "training__sde": "subvpsde",
        "model__num_scales": 1000,
    }
    arguments = command(workdir=tmp_path, mode="check", **options)[2:]
    code, output = run_forked(arguments)
    assert code == 1 and "too few" in output and "dpmpp_2m" in output, output
    assert json.loads((tmp_path / "check.json").read_text())[0]["state"] == "wrong"


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"data__image_size": 3}, "size is 3x3, which cannot be halved"),
        ({"model__norm_groups": 3}, "model.norm_groups = 3 should divide"),
        ({"model__fir": True, "model__fir_kernel": (1, -1)}, r"not sum to 0, unlike \[1, -1\]"),
        (
            {"training__condition": "features", "data__augment": 0.5, "model__num_features": 3},
            "model.num_features = 3 should be 9 with data.augment = 0.5",
        ),
    ),
)
def test_a_network_that_cannot_be_built_is_a_finding(changes, words, tmp_path):
    found = run_lib.check(small_config(**changes), tmp_path)
    assert [(one.subject, one.state) for one in found] == [("config", "wrong")]
    assert re.search(words, found[0].text)
    assert json.loads((tmp_path / "check.json").read_text()) == [found[0]._asdict()]


def test_a_process_of_ones_own_is_checked_by_its_abstract_methods():
    class Mine(SDE):
        """An Ornstein-Uhlenbeck process, written for images alone."""

        T = 5.0

        def sde(self, x, t):
            return -x, math.sqrt(2) * torch.ones_like(t)

        def marginal_prob(self, x, t):
            return torch.exp(-t)[:, None, None, None] * x, torch.sqrt(1 - torch.exp(-2 * t))

        def prior_sampling(self, shape):
            return torch.randn(*shape)

        def prior_logp(self, z):
            z = z.flatten(1)
            return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))

    findings = checks.process(Mine()) + checks.log_likelihood(Mine())
    assert "wrong" not in states(findings).values(), findings


class OfRank(SDE):
    """An Ornstein-Uhlenbeck process, written for data of one rank."""

    def __init__(self, rank):
        super().__init__(N=100)
        self.sides = (1,) * rank

    def sde(self, x, t):
        rate = torch.full_like(t, -5).reshape(-1, *self.sides)
        return rate * x, math.sqrt(10) * torch.ones_like(t)

    def marginal_prob(self, x, t):
        scale = torch.exp(-5 * t)
        return scale.reshape(-1, *self.sides) * x, torch.sqrt(1 - scale**2)

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        z = z.flatten(1)
        return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


@pytest.mark.parametrize("shape", ((3,), (2, 5_000), (1, 8, 8)), ids=str)
@pytest.mark.parametrize(
    ("method", "steps", "restored_by"), (("pc", 250, "tweedie"), ("ddim", 40, "dps"))
)
def test_processes_of_one_rank_are_checked_with_data_of_it(
    method, steps, restored_by, shape, monkeypatch
):
    """The sampler, its steps and order, the corrector, and restoration."""
    monkeypatch.setattr(checks_of_samplers, "COUNT", 256)
    config = small_config(
        sampling__method=method,
        sampling__predictor="euler_maruyama",
        sampling__corrector="langevin",
        sampling__snr=0.16,
        sampling__num_steps=steps,
        control__method=restored_by,
    )
    run = types.SimpleNamespace(
        sde=OfRank(len(shape)), shape=shape, config=config, objective="score", reading={}
    )
    found = states(_process(run) + _samplers(run))
    subjects = {"pc": ("order of steps", "corrector"), "ddim": ("order",)}[method]
    assert found.keys() >= {"sampler, Gaussian", "sampler, pixels", "restoration", *subjects}
    assert "wrong" not in found.values(), found


def test_a_process_of_the_published_code_is_checked():
    """It has no hooks; ours stand in, by the published conventions."""
    for kind, settings in (("VESDE", (0.01, 5.0, 200)), ("VPSDE", (0.1, 20.0, 1000))):
        sde = getattr(foreign_sde, kind)(*settings)
        findings = [*checks.process(sde), *checks.log_likelihood(sde)]
        findings += checks.sampler(pc(sampling.ReverseDiffusionPredictor), sde)
        assert "wrong" not in states(findings).values(), findings


def images_of(folder, names):
    images = random_images(len(names), 8, 8, 3)
    for name, image in zip(names, images, strict=True):
        save_image(folder / name, "image.png", image)
    return folder


def own_images(path, **changes):
    options = {
        "data__dataset": "IMAGES",
        "data__path": str(path),
        "data__num_channels": 3,
        "data__levels": 0,
        "model__num_scales": 1000,
        "sampling__num_steps": 100,
        "eval__extractor": "tiny",
    }
    return small_config(**{**options, **changes})


def test_folders_of_a_split_and_classes_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    names = [f"{part}/{k}/{n}" for part in ("Train", "valid") for k in ("10", "2") for n in "abc"]
    folder = images_of(tmp_path / "data", names)
    found, again = (data_of(run_lib.setup(own_images(folder))).findings for _ in range(2))
    assert again == found
    texts = " ".join(finding.text for finding in found)
    assert "held out: valid/ (6 images)" in texts and "2 = 0, 10 = 1" in texts, texts


@pytest.mark.slow
def test_statistics_of_other_images_are_found(tmp_path):
    @evaluation.register_extractor(name="tiny")
    class Tiny(evaluation.Extractor):
        """Mean colours."""

        name, resize, digest = "tiny", "none", "0"

        def __init__(self, weights, device):
            pass

        def features(self, images):
            return images.float().mean((1, 2)), None

    names = [f"{k}" for k in range(20)]
    folder = images_of(tmp_path / "data", names)
    config = own_images(folder)
    run_lib.fid_stats(config, tmp_path / "run")
    assert states(run_lib.check(config, tmp_path / "run"))["statistics"] == "ok"
    for name in names:
        save_image(folder / name, "image.png", np.zeros((8, 8, 3), np.uint8))
    found = run_lib.check(config, tmp_path / "run")
    assert states(found)["statistics"] == "wrong", found


def test_what_training_begins_with_is_told_and_stays(tmp_path):
    def start(workdir, **changes):
        return _start(run_lib.setup(small_config(**changes)), Data([]), workdir)

    few, folder = {"training__n_iters": 3, "training__snapshot_sampling": False}, tmp_path / "run"
    [new] = start(folder)
    assert new.state == start("")[0].state == "ok" and "from scratch" in new.text
    run_lib.train(small_config(**few), folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    [resumed] = start(folder, **few)
    assert resumed.state == "ok" and resumed.text.endswith("after step 3 of 3")
    *_, changed = start(folder, **few, optim__lr=1e-4)
    assert changed.state == "note" and "optim.lr = 0.0001 instead of 0.00" in changed.text, changed
    [other] = start(folder, **few, model__nf=16)
    assert other.state == "wrong" and "model.nf = 16 instead of 8" in other.text
    weights = str(folder / "checkpoints-meta" / "checkpoint.pth")
    for workdir in ("", tmp_path / "new"):
        [begun] = start(workdir, model__weights=weights)
        assert begun.state == "ok", begun
        assert f"from the weights in {weights}" in begun.text
        [missing] = start(workdir, model__weights="nowhere.pth")
        assert missing.state == "wrong" and "no weights at model.weights" in missing.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_steps_that_were_tried_out_are_none_of_the_run(tmp_path):
    run = run_lib.setup(small_config("vp/vectors", training__snapshot_sampling=False))
    trial.try_out(run, cost_of(run), None)
    [found] = _start(run, Data([]), tmp_path / "new")
    assert (found.state, found.text) == ("ok", "training starts from scratch")


def test_classes_that_a_resumed_network_has_not_learned_are_found(tmp_path):
    config = small_config("vp/digits_classifier", training__n_iters=3)
    run_lib.train(config, tmp_path)
    [found] = _start(run_lib.setup(config), Data([], class_to_idx={"cat": 0}), tmp_path)
    assert found.state == "wrong" and "cat" in found.text
